"""Is a difference between cells of a sweep real, and how large must one be to be seen? Paired by clip; blind ratings.

The unit is the clip: captions of one clip are alike, so that many captions of few clips say little. Repeats of a clip
are averaged first, and every comparison is of the same clips under two cells.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

OUTCOMES = ("first", "second", "tie")
PRIOR_COMPARISONS = 0.5  # half a tie with an opponent of average strength, see bradley_terry

_BATCH_ELEMENTS = 5_000_000  # of resampled differences held at a time: 40 MB


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

    Several captions of a clip in a cell count as their average, over those that have the measure. A clip that lacks it
    in one of the two cells is dropped from that pair; where dropping goes with failing, say on hard clips, what is left
    is no fair sample: look at `num_dropped`.

    Args:
        table: a row per caption.
        measure: column of numbers, or of true and false (their mean is a share); may have missing values.
        cell: column that tells the cells apart, such as the prompt.
        clip: column that tells the clips apart.
        baseline: the value in column `cell` that the others are compared with.
        num_resamples: of the bootstrap, and of the test where there are too many sign patterns to go through them all.
        confidence: of the intervals.

    Returns:
        A row for each other cell, in the order in which they appear:
        cell,
        num_clips: pairs, clips measured in both cells,
        num_dropped: clips that have rows in at least one of the two, but not the measure in both,
        baseline_mean, mean, difference: over the pairs; the difference is the cell less the baseline,
        low, high: bootstrap interval of the difference over clips: percentiles, widened for few clips as in Hesterberg,
            "What Teachers Should Know About the Bootstrap" (2015). Below about eight clips still too narrow.
        p_value: sign-flip permutation test, two-sided, exact where there are few clips. Of five clips or fewer it can
            not fall below 0.05, however large the difference.
        p_holm: corrected for the number of cells in the table (Holm), not for other measures that are looked at.
        minimum_detectable_difference: see `detectable_difference`, with these clips and the spread they show.
        With fewer than two pairs the interval, the tests and the detectable difference are NaN.

    Raises:
        ValueError: a column is missing or unfit, there is no such baseline, or no other cell.
    """
    for name in (measure, cell, clip):
        if name not in table:
            raise ValueError(f"no column {name!r}; there are {', '.join(map(str, table.columns))}")
    for name in (cell, clip):
        if table[name].isna().any():
            raise ValueError(f"column {name!r} has missing values; give each row its {name} or leave it out")
    values = table[measure]
    if values.dtype == object:  # what true, false and None make together
        values = values.convert_dtypes()
    if not pd.api.types.is_numeric_dtype(values) and values.notna().any():
        raise ValueError(f"column {measure!r} holds {values.dtype} values; comparing needs numbers, or true and false")
    values = values.to_numpy(float, na_value=math.nan)
    if np.isinf(values).any():
        raise ValueError(f"column {measure!r} has infinite values, which have no mean")
    cells = list(table[cell].unique())
    if baseline not in cells:
        raise ValueError(f"no cell {baseline!r} in column {cell!r}; there are {', '.join(map(repr, cells))}")
    if len(cells) < 2:
        raise ValueError(f"column {cell!r} has only the cell {baseline!r}; there is nothing to compare it with")

    frame = pd.DataFrame({"clip": list(table[clip]), "cell": list(table[cell]), "value": values})
    means = {name: rows.groupby("clip")["value"].mean() for name, rows in frame.groupby("cell")}
    results = [
        {"cell": name} | _compare_pairs(means[baseline], means[name], num_resamples, seed, confidence)
        for name in cells
        if name != baseline
    ]
    results = pd.DataFrame(results)
    results.insert(results.columns.get_loc("p_value") + 1, "p_holm", holm(results["p_value"]))
    return results


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's correction: p values that hold for all comparisons together. NaN stays NaN and does not count as one."""
    p_values = np.asarray(p_values, float)
    corrected = np.full(len(p_values), math.nan)
    order = [place for place in np.argsort(p_values) if not math.isnan(p_values[place])]
    if order:
        scaled = p_values[order] * np.arange(len(order), 0, -1)
        corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def detectable_difference(sd: float, num_clips: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that a paired comparison of this many clips would probably find.

    The usual approximation, (t(1 - alpha / 2) + t(power)) * sd / sqrt(num_clips) with num_clips - 1 degrees of freedom:
    from five clips on and for powers of 0.8 and more within 2% of the exact noncentral t. It is for one comparison:
    each of many needs a larger difference.

    Args:
        sd: standard deviation of the clips' differences, from a pilot run or `compare`'s own data.
        num_clips: pairs.
        power: how probable it should be to find a difference of that size.
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
    """Rank variants by blind pairwise ratings: one of strength a is preferred to one of b with odds exp(a - b).

    A tie is half a win to each. Every variant also has half a tie with an opponent of average strength, so that one
    that never lost, or that no chain of comparisons connects to the others, gets a finite strength. Beside dozens of
    ratings this weighs next to nothing.

    Args:
        ratings: a row per comparison: `first` and `second`, the variants shown; `outcome`, one of "first", "second" and
            "tie"; `clip`.
        num_resamples: of the clips, for the intervals.
        confidence: of the intervals.

    Returns:
        A row per variant, strongest first:
        variant,
        strength: log-odds; the variants' mean is 0,
        low, high: percentile bootstrap over clips; NaN with fewer than two clips. They say how sure a strength is, not
            whether two variants differ: overlapping intervals can belong to a clear preference.
        num_comparisons: ratings with the variant in them.

    Raises:
        ValueError: a column is missing or has missing values, an outcome is unknown, or a variant meets itself.
    """
    for name in ("first", "second", "outcome", "clip"):
        if name not in ratings:
            raise ValueError(f"no column {name!r}; there are {', '.join(map(str, ratings.columns))}")
        if ratings[name].isna().any():
            raise ValueError(f"column {name!r} has missing values")
    if unknown := set(ratings["outcome"]) - set(OUTCOMES):
        raise ValueError(f"unknown outcome {min(unknown, key=str)!r}; there are {', '.join(OUTCOMES)}")
    if any(first == second for first, second in zip(ratings["first"], ratings["second"], strict=True)):
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
        draws = np.random.default_rng(seed).multinomial(
            len(clip_names), np.full(len(clip_names), 1 / len(clip_names)), num_resamples
        )
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


def _compare_pairs(
    baseline: pd.Series, other: pd.Series, num_resamples: int, seed: int, confidence: float
) -> dict[str, float]:
    """A row of `compare`, less `cell` and `p_holm`, from each clip's mean in either cell."""
    pairs = pd.concat([baseline, other], axis=1, keys=["baseline", "other"])
    num_seen = len(pairs)
    pairs = pairs.dropna()
    before, after = pairs["baseline"].to_numpy(), pairs["other"].to_numpy()
    # What differs by rounding alone does not differ: the test would find the same sign in every clip.
    differences = np.where(np.isclose(after, before, rtol=1e-12, atol=0), 0, after - before)
    num_clips = len(differences)
    low = high = p_value = sd = math.nan
    if num_clips > 1:
        batch = max(_BATCH_ELEMENTS // num_clips, 1)
        sd = float(differences.std(ddof=1))
        tail = stats.norm.cdf(math.sqrt(num_clips / (num_clips - 1)) * stats.t.ppf((1 - confidence) / 2, num_clips - 1))
        low, high = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=num_resamples,
            batch=batch,
            confidence_level=1 - 2 * tail,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        p_value = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=num_resamples,
            batch=batch,
            rng=np.random.default_rng(seed),
        ).pvalue
    return {
        "num_clips": num_clips,
        "num_dropped": num_seen - num_clips,
        "baseline_mean": before.mean() if num_clips else math.nan,
        "mean": after.mean() if num_clips else math.nan,
        "difference": float(differences.mean()) if num_clips else math.nan,
        "low": float(low),
        "high": float(high),
        "p_value": float(p_value),
        "minimum_detectable_difference": math.nan if math.isnan(sd) else detectable_difference(sd, num_clips),
    }


def _strengths(wins: np.ndarray) -> np.ndarray:
    """Most probable strengths, centred, (..., K), from the wins of each over each, (..., K, K); by Newton's method."""
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
