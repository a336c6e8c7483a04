"""Compare cells of a sweep: paired tests, confidence intervals and power; Bradley-Terry strengths of blind ratings.

The unit is the clip, because captions of one clip resemble each other: repeats of a clip are averaged first, and every
comparison is of the same clips under two cells.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from capkit.sweep.diagnostics import require_columns

OUTCOMES = ("first", "second", "tie")
PRIOR_COMPARISONS = 0.5  # with an opponent of average strength, see bradley_terry

_BATCH_ELEMENTS = 5_000_000  # resampled differences in memory at a time: 40 MB


def compare(
    table: pd.DataFrame,
    measure: str,
    cell: str,
    clip: str,
    baseline: Hashable,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Compare a measure in every cell with the same clips' measure in the baseline cell.

    Several captions of a clip in a cell count as their average. A clip that lacks the measure in one of the two cells
    is dropped from the pair. Look at `num_dropped`: if clips are dropped because hard ones fail, the rest is biased.

    Args:
        table: a row per caption.
        measure: column of numbers or booleans (their mean is a share); may have missing values.
        cell: column that identifies the cell, such as the prompt.
        clip: column that identifies the clip: "clip" of a sweep's table. Of many windows of few videos rather "video",
            because windows of one video resemble each other.
        baseline: the value in column `cell` that the others are compared with.
        num_resamples: of the bootstrap, and of the permutation test where there are too many sign patterns for all.
        confidence: of the intervals.

    Returns:
        A row for each other cell, in the order in which they appear:
        cell,
        num_clips: clips measured in both cells,
        num_dropped: other clips, with rows in at least one of the two,
        baseline_mean, mean, difference: over the pairs; the difference is cell minus baseline,
        low, high: percentile bootstrap interval of the difference over clips, widened for few clips as in Hesterberg,
            "What Teachers Should Know About the Bootstrap" (2015). Below about eight clips still too narrow.
        p_value: sign-flip permutation test, two-sided, exact for few clips. With five clips or fewer it cannot fall
            below 0.05, however large the difference.
        p_holm: corrected for the number of cells in the table (Holm), not for the number of measures compared.
        minimum_detectable_difference: see `detectable_difference`, with these clips and their standard deviation.
        With fewer than two pairs the interval, the tests and the detectable difference are NaN.

    Raises:
        ValueError: a column is missing or not numeric, there is no such baseline, or no other cell.
    """
    require_columns(table, [measure, cell, clip])
    _require_values(table, [cell, clip])
    column = table[measure]
    if column.dtype == object:  # such as booleans with None
        column = column.convert_dtypes()
    if not pd.api.types.is_numeric_dtype(column) and column.notna().any():
        raise ValueError(f"column {measure!r} holds {column.dtype} values; comparing needs numbers or booleans")
    values = column.to_numpy(float, na_value=math.nan)
    if np.isinf(values).any():
        raise ValueError(f"column {measure!r} has infinite values, which have no mean")
    cells = list(table[cell].unique())
    if baseline not in cells:
        raise ValueError(f"no cell {baseline!r} in column {cell!r}; there are {', '.join(map(repr, cells))}")
    if len(cells) < 2:
        raise ValueError(f"column {cell!r} has only the cell {baseline!r}; there is nothing to compare it with")

    frame = pd.DataFrame({"clip": list(table[clip]), "cell": list(table[cell]), "value": values})
    means = {name: rows.groupby("clip")["value"].mean() for name, rows in frame.groupby("cell")}
    results = pd.DataFrame(
        {"cell": name} | _compare_pairs(means[baseline], means[name], num_resamples, seed, confidence)
        for name in cells
        if name != baseline
    )
    results.insert(results.columns.get_loc("p_value") + 1, "p_holm", holm(results["p_value"]))
    return results


def holm(p_values: Sequence[float] | pd.Series) -> np.ndarray:
    """Holm's correction of p values for multiple comparisons. NaN stays NaN and does not count as a comparison."""
    values = np.asarray(p_values, float)
    corrected = np.full(len(values), math.nan)
    order = np.argsort(values)[: np.isfinite(values).sum()]  # NaN comes last
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


def detectable_difference(sd: float, num_clips: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that one paired comparison of this many clips detects with probability `power`.

    (t(1 - alpha / 2) + t(power)) * sd / sqrt(num_clips) with num_clips - 1 degrees of freedom: within 2% of the exact
    noncentral t for at least five clips and a power of at least 0.8.

    Args:
        sd: standard deviation of the clips' differences, in the measure's unit.
        num_clips: pairs.
        alpha: two-sided level of the test.

    Returns:
        The difference, in the measure's unit; NaN with fewer than two clips.

    Raises:
        ValueError: a negative sd, or power or alpha not between 0 and 1.
    """
    if sd < 0 or not 0 < power < 1 or not 0 < alpha < 1:
        raise ValueError(f"needs sd >= 0, 0 < power < 1, 0 < alpha < 1; got {sd=}, {power=}, {alpha=}")
    if num_clips < 2:
        return math.nan
    quantiles = stats.t.ppf([1 - alpha / 2, power], num_clips - 1)
    return float(quantiles.sum() * sd / math.sqrt(num_clips))


def bradley_terry(
    ratings: pd.DataFrame, num_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> pd.DataFrame:
    """Bradley-Terry strengths of variants from blind pairwise ratings: a is preferred to b with odds exp(a - b).

    A tie is half a win for each. As a weak prior every variant also has half a tie with an opponent of average
    strength, so that variants that never lost, or are not connected to the others, get a finite strength.

    Args:
        ratings: a row per comparison: `first` and `second`, the variants shown; `outcome`, one of "first", "second" and
            "tie"; `clip`.
        num_resamples: of the clips, for the intervals.
        confidence: of the intervals.

    Returns:
        A row per variant, strongest first:
        variant,
        strength: log-odds; the variants' mean is 0,
        low, high: percentile bootstrap over clips; NaN with fewer than two clips. They are of one strength: two
            variants can differ significantly even if their intervals overlap.
        num_comparisons: ratings of the variant.

    Raises:
        ValueError: a column is missing or has missing values, an outcome is unknown, or a variant meets itself.
    """
    columns = ["first", "second", "outcome", "clip"]
    require_columns(ratings, columns)
    _require_values(ratings, columns)
    if unknown := set(ratings["outcome"]) - set(OUTCOMES):
        raise ValueError(f"unknown outcome {min(unknown, key=str)!r}; there are {', '.join(OUTCOMES)}")
    if (ratings["first"].to_numpy(object) == ratings["second"].to_numpy(object)).any():
        raise ValueError("a variant is compared with itself")

    sides, variants = pd.factorize(pd.concat([ratings["first"], ratings["second"]], ignore_index=True))
    first, second = sides[: len(ratings)], sides[len(ratings) :]
    clips, clip_names = pd.factorize(ratings["clip"])
    score = ratings["outcome"].map({"first": 1.0, "second": 0.0, "tie": 0.5}).to_numpy(float)
    wins = np.zeros((len(clip_names), len(variants), len(variants)))  # (clips, winner, loser)
    np.add.at(wins, (clips, first, second), score)
    np.add.at(wins, (clips, second, first), 1 - score)

    low = high = np.full(len(variants), math.nan)
    if len(clip_names) > 1:
        shares = np.full(len(clip_names), 1 / len(clip_names))
        draws = np.random.default_rng(seed).multinomial(len(clip_names), shares, num_resamples)
        resampled = _strengths(np.tensordot(draws, wins, axes=1))
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    results = pd.DataFrame(
        {
            "variant": variants,
            "strength": _strengths(wins.sum(axis=0)),
            "low": low,
            "high": high,
            "num_comparisons": np.bincount(sides, minlength=len(variants)),
        }
    )
    return results.sort_values("strength", ascending=False, kind="stable", ignore_index=True)


def _require_values(table: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if table[name].isna().any():
            raise ValueError(f"column {name!r} has missing values; give each row its {name} or leave it out")


def _compare_pairs(
    baseline: pd.Series, other: pd.Series, num_resamples: int, seed: int, confidence: float
) -> dict[str, float]:
    """A row of `compare`, without `cell` and `p_holm`, from each clip's mean in either cell."""
    clips = pd.concat([baseline, other], axis=1)
    before, after = clips.dropna().to_numpy().T
    # Rounding errors count as 0: the test would find the same sign in every clip.
    differences = np.where(np.isclose(after, before, rtol=1e-12, atol=0), 0, after - before)
    num_clips = len(differences)
    low = high = p_value = sd = math.nan
    if num_clips > 1:
        sd = float(differences.std(ddof=1))
        tail = stats.norm.cdf(math.sqrt(num_clips / (num_clips - 1)) * stats.t.ppf((1 - confidence) / 2, num_clips - 1))
        resampling: dict[str, Any] = {"n_resamples": num_resamples, "batch": max(_BATCH_ELEMENTS // num_clips, 1)}
        interval = {"confidence_level": 1 - 2 * tail, "method": "percentile", "rng": np.random.default_rng(seed)}
        low, high = stats.bootstrap((differences,), np.mean, **resampling, **interval).confidence_interval
        flips = {"permutation_type": "samples", "vectorized": True, "rng": np.random.default_rng(seed)}
        p_value = stats.permutation_test((differences,), np.mean, **resampling, **flips).pvalue
    return {
        "num_clips": num_clips,
        "num_dropped": len(clips) - num_clips,
        "baseline_mean": before.mean() if num_clips else math.nan,
        "mean": after.mean() if num_clips else math.nan,
        "difference": float(differences.mean()) if num_clips else math.nan,
        "low": float(low),
        "high": float(high),
        "p_value": float(p_value),
        "minimum_detectable_difference": detectable_difference(sd, num_clips),
    }


def _strengths(wins: np.ndarray) -> np.ndarray:
    """Posterior mode of the strengths, centred, (..., K), from wins (..., K, K), winner first; by Newton's method."""
    strengths = np.zeros(wins.shape[:-1])
    if not wins.size:
        return strengths
    games = wins + np.swapaxes(wins, -1, -2)
    for _ in range(200):
        chances = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
        prior = 1 / (1 + np.exp(-strengths))
        gradient = (wins - games * chances).sum(axis=-1) + PRIOR_COMPARISONS * (0.5 - prior)
        weights = games * chances * (1 - chances)
        curvature = -weights
        own = np.arange(wins.shape[-1])
        curvature[..., own, own] += weights.sum(axis=-1) + PRIOR_COMPARISONS * prior * (1 - prior)
        steps = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # A full step can overshoot where one side has won nearly everything.
        steps /= np.maximum(np.abs(steps).max(axis=-1, keepdims=True), 1)
        strengths = strengths + steps
        if np.abs(steps).max() < 1e-9:
            break
    return strengths - strengths.mean(axis=-1, keepdims=True)
