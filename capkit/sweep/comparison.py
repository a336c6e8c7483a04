"""Compare cells of a sweep: joint sign-flip tests, simultaneous intervals, and which cells may be the best.

The unit is the clip, because captions of one clip resemble each other: repeats of a clip are averaged first, and every
comparison is of the same clips under two cells. All cells and measures that are looked at are compared at once: each
clip's differences keep or flip their signs together, in all cells, so that what the cells have in common is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from capkit.sweep.diagnostics import require_columns

ALPHA = 0.05
LEAST_CLIPS = 5  # for intervals
TIE = 1e-6  # relative difference of means that counts as none: float32 rounds at 1e-7

Array = npt.NDArray[np.float64]


def compare(
    table: pd.DataFrame,
    measures: str | Sequence[str],
    cell: str,
    clip: str,
    baseline: Hashable,
    num_flips: int = 10_000,
    seed: int = 0,
    confidence: float = 1 - ALPHA,
) -> pd.DataFrame:
    """Compare measures in every cell with the same clips' measures in the baseline cell.

    Several captions of a clip in a cell count as their average. A clip that lacks the measure in one of the two cells
    is dropped from the pair. Look at `num_dropped`: if clips are dropped because hard ones fail, the rest is biased.

    Tests are sign flips of clips, jointly over all cells and measures, with the statistic |sum d| / sqrt(sum d²) and
    Westfall and Young's step-down maximum. All patterns are tried where there are at most `num_flips`, else so many
    random ones. However many comparisons, p can fall to 2 ** (1 - clips): to 0.06 with five clips, 0.03 with six.

    Args:
        table: a row per caption.
        measures: columns of numbers or booleans (their mean is a share); may have missing values. Name all that you
            look at: the correction is for these.
        cell: column that identifies the cell, such as the prompt.
        clip: column that identifies the clip: "clip" of a sweep's table. Of many windows of few videos rather "video",
            because windows of one video resemble each other.
        baseline: the value in column `cell` that the others are compared with.
        num_flips: patterns of signs.
        confidence: with which all intervals hold at once.

    Returns:
        A row for each measure and other cell, in the order in which they appear:
        measure, cell,
        num_clips: clips measured in both cells,
        num_dropped: other clips, with rows in at least one of the two,
        baseline_mean, mean, difference: over the pairs; the difference is cell minus baseline,
        low, high: simultaneous intervals of the differences: bootstrap t with the same flips of the residuals and one
            factor for all. NaN with fewer than five pairs, or if all differences are equal.
        p_value: of this comparison alone, two-sided,
        p_adjusted: corrected for all rows.
        minimum_detectable_difference: see `detectable_difference`, with these clips, their standard deviation and so
            many comparisons.

    Raises:
        ValueError: a column is missing or not numeric, there is no such baseline, or no other cell.
    """
    names = [measures] if isinstance(measures, str) else list(measures)
    means = [_means(table, name, cell, clip) for name in names]
    cells = list(table[cell].unique())
    if baseline not in cells:
        raise ValueError(f"no cell {baseline!r} in column {cell!r}; there are {', '.join(map(repr, cells))}")
    others = [name for name in cells if name != baseline]
    if not others:
        raise ValueError(f"column {cell!r} has only the cell {baseline!r}; there is nothing to compare it with")
    pairs = [(mean[baseline].to_numpy(), mean[name].to_numpy()) for mean in means for name in others]
    differences = np.column_stack([_subtract(after, before) for before, after in pairs])
    flips = _flips(len(differences), num_flips, seed)
    single, adjusted = _test(differences, flips)
    factor = _interval_factor(differences, flips, confidence)
    num_rows = table.groupby(clip)[cell].agg(set)
    rows = []
    for place, ((before, after), (name, other)) in enumerate(zip(pairs, itertools.product(names, others), strict=True)):
        own = differences[:, place]
        is_pair = ~np.isnan(own)
        num_clips, sd = int(is_pair.sum()), _sd(own)
        num_present = sum(bool(present & {baseline, other}) for present in num_rows)
        difference = float(own[is_pair].mean()) if num_clips else math.nan
        half = factor * sd / math.sqrt(num_clips) if num_clips >= LEAST_CLIPS and sd > 0 else math.nan
        rows.append(
            {
                "measure": name,
                "cell": other,
                "num_clips": num_clips,
                "num_dropped": num_present - num_clips,
                "baseline_mean": float(before[is_pair].mean()) if num_clips else math.nan,
                "mean": float(after[is_pair].mean()) if num_clips else math.nan,
                "difference": difference,
                "low": difference - half,
                "high": difference + half,
                "p_value": single[place],
                "p_adjusted": adjusted[place],
                "minimum_detectable_difference": detectable_difference(sd, num_clips, len(pairs)),
            }
        )
    return pd.DataFrame(rows)


def best_cells(
    table: pd.DataFrame,
    measure: str,
    cell: str,
    clip: str,
    larger_is_better: bool = True,
    num_flips: int = 10_000,
    seed: int = 0,
) -> list[Hashable]:
    """The cells that may be the best: those not shown to be worse than another one.

    Each cell is compared with all others at once, one-sided, with the tests of `compare` at the level 0.05. The truly
    best cell is missing in at most one of twenty sweeps.

    Args:
        table, measure, cell, clip, num_flips, seed: as in `compare`.
        larger_is_better: of the measure.
    """
    means = _means(table, measure, cell, clip)
    flips = _flips(len(means), num_flips, seed)
    values = means.to_numpy() * (1 if larger_is_better else -1)
    best = []
    for place, name in enumerate(means.columns):
        others = np.delete(values, place, axis=1)
        ahead = np.column_stack([_subtract(other, values[:, place]) for other in others.T]) if others.size else others
        totals = _scaled_sums(ahead, flips) if ahead.size else np.zeros((1, 1))
        largest = np.concatenate([totals.max(axis=1), (-totals).max(axis=1)])  # a pattern of signs, and its opposite
        if (largest >= largest[0] * (1 - 1e-9)).mean() > ALPHA or largest[0] <= 0:
            best.append(name)
    return best


@dataclass(frozen=True)
class Conclusion:
    """What a comparison shows about the best cell.

    Attributes:
        chosen: the winner if one is shown, else the baseline.
        is_shown: the winner is better than the baseline, with a corrected p below 0.05.
        may_be_best: see `best_cells`.
        sentence: all this in words, with the numbers.
    """

    chosen: Hashable
    is_shown: bool
    may_be_best: list[Hashable]
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def conclude(
    table: pd.DataFrame,
    comparison: pd.DataFrame,
    measure: str,
    cell: str,
    clip: str,
    baseline: Hashable,
    larger_is_better: bool = True,
    preference: Sequence[Hashable] = (),
) -> Conclusion:
    """Choose the best cell, if it is shown to be better than the baseline; else the baseline.

    Of several that are, the one with the largest mean over the clips that all of them have. Means that differ by
    rounding only are ties.

    Args:
        table, measure, cell, clip, baseline: as in `compare`.
        comparison: of `compare`.
        larger_is_better: of the measure.
        preference: of tied cells the first one in this order is taken.
    """
    rows = comparison[comparison["measure"] == measure]
    sign = 1 if larger_is_better else -1
    better = rows[(rows["p_adjusted"] < ALPHA) & (sign * rows["difference"] > 0)]
    may_be_best = best_cells(table, measure, cell, clip, larger_is_better)
    names = "all cells" if len(may_be_best) == table[cell].nunique() else ", ".join(map(repr, may_be_best))
    num_clips, num_compared = int(rows["num_clips"].max()), len(comparison)
    against = f"{num_clips} clips, {num_compared} comparison{'s' * (num_compared != 1)} by {measure}"
    if better.empty:
        ahead = rows[sign * rows["difference"] > 0]["p_adjusted"].dropna()
        detectable = rows["minimum_detectable_difference"].median()
        why = f"of those ahead of it, the smallest corrected p is {ahead.min():.2g}" if len(ahead) else "none is ahead"
        if len(ahead) and 2.0 ** (1 - num_clips) >= ALPHA:
            why += ", and with so few clips it cannot be below 0.05"
        elif math.isfinite(detectable):
            why += f"; differences below about {detectable:.2g} could not be found with so many clips"
        sentence = f"no cell is shown to be better than the baseline {baseline!r} ({against}): {why}"
        return Conclusion(baseline, False, may_be_best, f"{sentence}. May be the best: {names}.")
    means = _means(table, measure, cell, clip)[list(better["cell"])].dropna().mean() * sign
    order = {name: place for place, name in enumerate([*preference, *means.index])}
    tied = means[means >= means.max() - TIE * abs(means.max())].index
    chosen = min(tied, key=lambda name: list(order).index(name)) if len(tied) else better["cell"].iloc[0]
    row = better.set_index("cell").loc[chosen]
    interval = f" [{row['low']:.3g}, {row['high']:.3g}]" if math.isfinite(row["low"]) else ""
    sentence = f"{chosen!r} is better than the baseline {baseline!r} by {abs(row['difference']):.3g}{interval}"
    sentence += f", corrected p {row['p_adjusted']:.2g} ({against}). May be the best: {names}."
    return Conclusion(chosen, True, may_be_best, sentence)


def detectable_difference(
    sd: float, num_clips: int, num_comparisons: int = 1, power: float = 0.8, alpha: float = ALPHA
) -> float:
    """The smallest true difference that is found with probability `power` among so many comparisons of so many clips.

    (t(1 - alpha / 2k) + t(power)) * sd / sqrt(num_clips) with num_clips - 1 degrees of freedom: within 2% of the exact
    noncentral t for one comparison, five clips or more and a power of at least 0.8; a little too large for several.

    Args:
        sd: standard deviation of the clips' differences, in the measure's unit.
        num_clips: pairs.
        num_comparisons: k, made at once.
        alpha: two-sided level of all tests together.

    Returns:
        The difference, in the measure's unit; NaN where it is unknown: no spread, or so few clips that no difference
        can be shown.

    Raises:
        ValueError: a negative sd, or power or alpha not between 0 and 1.
    """
    if sd < 0 or not 0 < power < 1 or not 0 < alpha < 1:
        raise ValueError(f"needs sd >= 0, 0 < power < 1, 0 < alpha < 1; got {sd=}, {power=}, {alpha=}")
    if sd == 0 or num_clips < 2 or 2.0 ** (1 - num_clips) >= alpha:
        return math.nan
    quantiles = stats.t.ppf([1 - alpha / 2 / num_comparisons, power], num_clips - 1)
    return float(quantiles.sum() * sd / math.sqrt(num_clips))


def _means(table: pd.DataFrame, measure: str, cell: str, clip: str) -> pd.DataFrame:
    """Mean of a measure for each clip (rows) and cell (columns), NaN where there is none."""
    require_columns(table, [measure, cell, clip])
    require_values(table, [cell, clip])
    column = table[measure]
    if column.dtype == object:  # such as booleans with None
        column = column.convert_dtypes()
    if not pd.api.types.is_numeric_dtype(column) and column.notna().any():
        raise ValueError(f"column {measure!r} holds {column.dtype} values; comparing needs numbers or booleans")
    values = column.to_numpy(float, na_value=math.nan)
    if np.isinf(values).any():
        raise ValueError(f"column {measure!r} has infinite values, which have no mean")
    frame = pd.DataFrame({"clip": list(table[clip]), "cell": list(table[cell]), "value": values})
    means = frame.groupby(["clip", "cell"], sort=False)["value"].mean().unstack("cell")
    return means.reindex(columns=list(table[cell].unique()))


def _subtract(after: Array, before: Array) -> Array:
    """Differences, with rounding errors as 0: a test would find the same sign in every clip."""
    return np.where(np.isclose(after, before, rtol=TIE, atol=0), 0, after - before)


def _flips(num_clips: int, num_flips: int, seed: int) -> Array:
    """Signs (F, num_clips), the first row all 1: every pattern up to its opposite, or random ones."""
    if 2 ** (num_clips - 1) <= num_flips:
        patterns = itertools.product((1.0, -1.0), repeat=max(num_clips - 1, 0))
        return np.array([(1.0, *rest) for rest in patterns])[:, :num_clips]
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (num_flips, num_clips))
    signs[0] = 1
    return signs


def _scaled_sums(differences: Array, flips: Array) -> Array:
    """sum d / sqrt(sum d²) (F, K) of differences (N, K) under flips (F, N). NaN counts as 0."""
    known = np.nan_to_num(differences)
    norms = np.sqrt((known**2).sum(axis=0))
    return flips @ (known / np.where(norms > 0, norms, 1))


def _test(differences: Array, flips: Array) -> tuple[Array, Array]:
    """p of each column (N, K), alone and by the step-down maximum over columns; NaN with fewer than two pairs."""
    totals = np.abs(_scaled_sums(differences, flips))
    observed = totals[0] * (1 - 1e-9)
    single = (totals >= observed).mean(axis=0)
    order = np.argsort(-observed)
    largest = np.maximum.accumulate(totals[:, order[::-1]], axis=1)[:, ::-1]  # of a column and all less extreme ones
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate((largest >= observed[order]).mean(axis=0))
    is_unknown = (~np.isnan(differences)).sum(axis=0) < 2
    single[is_unknown] = adjusted[is_unknown] = math.nan
    return single, adjusted


def _sd(differences: Array) -> float:
    """Standard deviation of the differences that are known; 0 where they are equal but for rounding."""
    known = differences[~np.isnan(differences)]
    if len(known) < 2 or np.ptp(known) <= TIE * np.abs(known).max():
        return 0.0
    return float(known.std(ddof=1))


def _interval_factor(differences: Array, flips: Array, confidence: float) -> float:
    """By how many standard errors all columns' means (N, K) are off at most, with this confidence."""
    is_known = ~np.isnan(differences)
    columns = [
        place for place, own in enumerate(differences.T) if is_known[:, place].sum() >= LEAST_CLIPS and _sd(own) > 0
    ]
    if not columns:
        return math.nan
    chosen, num_clips = differences[:, columns], is_known[:, columns].sum(axis=0)
    residuals = np.nan_to_num(chosen - np.nanmean(chosen, axis=0))
    means, squares = flips @ residuals / num_clips, (residuals**2).sum(axis=0)
    variances = np.maximum(squares - num_clips * means**2, 1e-12 * squares) / (num_clips - 1)
    largest = np.abs(means / np.sqrt(variances / num_clips)).max(axis=1)
    return float(np.quantile(largest, confidence, method="higher"))


def require_values(table: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if table[name].isna().any():
            raise ValueError(f"column {name!r} has missing values; give each row its {name} or leave it out")
