"""How well one number orders captions as another one does, with bootstrap intervals over clips.

Arrays are (N, K): a clip a row, a cell of a sweep a column; NaN where there is none. Results are [value, low, high].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Estimate = list[float | None]
LEAST_DIFFERENCE = 0.01  # of truths of two cells that count as different


def resample(num_clips: int, num_samples: int = 400, seed: int = 0) -> Array:
    """How often each clip is in each bootstrap sample (num_samples + 1, num_clips); the first is of each clip once."""
    drawn = np.random.default_rng(seed).multinomial(num_clips, np.full(num_clips, 1 / num_clips), num_samples)
    return np.concatenate([np.ones((1, num_clips)), drawn])


def correlate_cells(measure: Array, truth: Array, samples: Array) -> Estimate:
    """Spearman's rank correlation of the cells' means."""
    ranks = [stats.rankdata(_cell_means(values, samples), axis=1) for values in (measure, truth)]
    first, second = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return _estimate((first * second).sum(axis=1) / np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1)))


def order_cells(measure: Array, truth: Array, samples: Array, pairs: Sequence[tuple[int, int]]) -> tuple[Estimate, int]:
    """Share of these pairs of cells whose means the measure orders rightly, and of how many: those whose truths differ.

    Equal measures count as half.
    """
    measured, true = (_cell_means(values, samples) for values in (measure, truth))
    first, second = np.array(pairs, int).reshape(-1, 2).T
    differs = np.abs(true[0, first] - true[0, second]) >= LEAST_DIFFERENCE
    first, second = first[differs], second[differs]
    if not len(first):
        return [None] * 3, 0
    signs = np.sign(measured[:, first] - measured[:, second]) * np.sign(true[:, first] - true[:, second])
    return _estimate((signs.mean(axis=1) + 1) / 2), len(first)


def order_within_clips(measure: Array, truth: Array, samples: Array) -> tuple[Estimate, int]:
    """Share of pairs of captions of one clip, of different truth, that the measure orders rightly; how many pairs."""
    first, second = np.triu_indices(measure.shape[1], 1)
    signs = np.sign(measure[:, first] - measure[:, second]) * np.sign(truth[:, first] - truth[:, second])
    counts = (np.isfinite(signs) & (truth[:, first] != truth[:, second])).sum(axis=1)
    agreeing = (np.nansum(signs, axis=1) + counts) / 2
    return _estimate(samples @ agreeing / np.maximum(samples @ counts, 1)), int(counts.sum())


def share(right: Array, clips: npt.NDArray[np.int64], samples: Array) -> Estimate:
    """The mean of numbers from 0 to 1, of which each belongs to a clip.

    Args:
        right, clips: the numbers; the number of the clip of each.
        samples: from `resample`.
    """
    sums, counts = (np.bincount(clips, values, samples.shape[1]) for values in (right, np.ones(len(right))))
    return _estimate(samples @ sums / np.maximum(samples @ counts, 1))


def auc(scores: Array, is_wrong: npt.NDArray[np.bool_], clips: npt.NDArray[np.int64], samples: Array) -> Estimate:
    """Chance that a wrong statement has a lower score than a right one (the area under the ROC curve); ties are half.

    Args:
        scores, is_wrong, clips: of each statement; the number of its clip.
        samples: from `resample`.
    """
    if is_wrong.all() or not is_wrong.any():
        return [None] * 3
    _, places = np.unique(scores, return_inverse=True)
    areas = []
    for sample in samples:
        wrong, right = (np.bincount(places, sample[clips] * which, places.max() + 1) for which in (is_wrong, ~is_wrong))
        above = right[::-1].cumsum()[::-1] - right / 2
        areas.append((wrong * above).sum() / max(wrong.sum() * right.sum(), 1))
    return _estimate(np.array(areas))


def beyond_length(measure: Array, length: Array) -> Array:
    """By how much a measure exceeds that of captions of the clip as long: the residual of one line for all clips."""
    y, x = (values - np.nanmean(values, axis=1, keepdims=True) for values in (measure, length))
    return y - x * np.nansum(x * y) / np.nansum(x * x)


def _cell_means(values: Array, samples: Array) -> Array:
    """(samples, K)"""
    is_known = np.isfinite(values)
    return samples @ np.where(is_known, values, 0) / np.maximum(samples @ is_known, 1)


def _estimate(values: Array) -> Estimate:
    """The first value, and where 95 % of the others lie; None where it is not defined."""
    if not np.isfinite(values[0]):
        return [None] * 3
    return [round(float(number), 4) for number in (values[0], *np.nanquantile(values[1:], (0.025, 0.975)))]
