"""Bradley-Terry strengths of variants from blind pairwise ratings, and tests of one variant against another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from capkit.sweep.comparison import ALPHA, Array, require_values
from capkit.sweep.diagnostics import require_columns

OUTCOMES = ("first", "second", "tie")
PRIOR_COMPARISONS = 0.5  # with an opponent of average strength, see bradley_terry


def bradley_terry(ratings: pd.DataFrame, confidence: float = 1 - ALPHA) -> pd.DataFrame:
    """Bradley-Terry strengths of variants from blind pairwise ratings: a is preferred to b with odds exp(a - b).

    A tie is half a win for each. As a weak prior every variant also has half a tie with an opponent of average
    strength, so that variants that never lost, or are not connected to the others, get a finite strength.

    Args:
        ratings: a row per comparison: `first` and `second`, the variants shown; `outcome`, one of "first", "second" and
            "tie"; `clip`.
        confidence: of each interval.

    Returns:
        A row per variant, strongest first:
        variant,
        strength: log-odds; the variants' mean is 0,
        low, high: strength -+ t * standard error, with clips - 1 degrees of freedom and the larger of two errors: of
            the likelihood's curvature, and the sandwich estimate over clips. NaN with fewer than two clips. They are
            of one strength; for two variants see `bradley_terry_pairs`.
        num_comparisons: ratings of the variant.

    Raises:
        ValueError: a column is missing or has missing values, an outcome is unknown, or a variant meets itself.
    """
    fit = _fit(ratings)
    half = fit.standard_errors(np.eye(len(fit.variants))) * fit.quantile(confidence)
    results = pd.DataFrame(
        {
            "variant": fit.variants,
            "strength": fit.strengths,
            "low": fit.strengths - half,
            "high": fit.strengths + half,
            "num_comparisons": fit.num_comparisons,
        }
    )
    return results.sort_values("strength", ascending=False, kind="stable", ignore_index=True)


def bradley_terry_pairs(ratings: pd.DataFrame, confidence: float = 1 - ALPHA) -> pd.DataFrame:
    """Test whether one variant of blind ratings is preferred to another, for each pair; see `bradley_terry`.

    Returns:
        A row per pair:
        stronger, weaker: the variants,
        difference: of their strengths, in log-odds, with its own interval low, high,
        p_value: t test with the standard error of the interval,
        p_adjusted: corrected for the number of pairs (Holm).
    """
    fit = _fit(ratings)
    order = np.argsort(-fit.strengths, kind="stable").tolist()
    pairs = list(itertools.combinations(order, 2))
    contrasts = np.zeros((len(pairs), len(order)))
    for place, (stronger, weaker) in enumerate(pairs):
        contrasts[place, [stronger, weaker]] = 1, -1
    differences, errors = contrasts @ fit.strengths, fit.standard_errors(contrasts)
    half = errors * fit.quantile(confidence)
    p_values = 2 * stats.t.sf(differences / errors, fit.num_clips - 1) if fit.num_clips > 1 else errors
    return pd.DataFrame(
        {
            "stronger": [fit.variants[pair[0]] for pair in pairs],
            "weaker": [fit.variants[pair[1]] for pair in pairs],
            "difference": differences,
            "low": differences - half,
            "high": differences + half,
            "p_value": p_values,
            "p_adjusted": holm(p_values),
        }
    )


def holm(p_values: Sequence[float] | Array) -> Array:
    """Holm's correction of p values for multiple comparisons. NaN stays NaN and does not count as a comparison."""
    values = np.asarray(p_values, float)
    corrected = np.full(len(values), math.nan)
    order = np.argsort(values)[: np.isfinite(values).sum()]  # NaN comes last
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


@dataclass(frozen=True)
class _BradleyTerryFit:
    """Strengths (K,) with what their standard errors need."""

    variants: pd.Index
    strengths: Array
    num_comparisons: npt.NDArray[np.int64]
    num_clips: int
    covariances: list[Array]  # (K, K): from the curvature, and from the spread over clips

    def standard_errors(self, contrasts: Array) -> Array:
        """Of contrasts (P, K) of the centred strengths; NaN with fewer than two clips."""
        if self.num_clips < 2:
            return np.full(len(contrasts), math.nan)
        centred = contrasts - contrasts.mean(axis=1, keepdims=True)
        variances = [((centred @ covariance) * centred).sum(axis=1) for covariance in self.covariances]
        return np.sqrt(np.max(variances, axis=0))

    def quantile(self, confidence: float) -> float:
        return float(stats.t.ppf((1 + confidence) / 2, self.num_clips - 1)) if self.num_clips > 1 else math.nan


def _fit(ratings: pd.DataFrame) -> _BradleyTerryFit:
    columns = ["first", "second", "outcome", "clip"]
    require_columns(ratings, columns)
    require_values(ratings, columns)
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
    strengths = np.zeros(len(variants))
    for _ in range(200):
        gradients, curvature = _derivatives(wins, strengths)
        prior = 1 / (1 + np.exp(-strengths))
        step = np.linalg.solve(curvature, gradients.sum(axis=0) + PRIOR_COMPARISONS * (0.5 - prior))
        step /= max(
            np.abs(step).max(initial=0), 1
        )  # a full step can overshoot where one side has won nearly everything
        strengths = strengths + step
        if np.abs(step).max(initial=0) < 1e-9:
            break
    gradients, curvature = _derivatives(wins, strengths)
    inverse, num_clips = np.linalg.inv(curvature), len(clip_names)
    spread = gradients.T @ gradients * (num_clips / max(num_clips - 1, 1))
    covariances = [inverse, inverse @ spread @ inverse]
    counts = np.bincount(sides, minlength=len(variants))
    return _BradleyTerryFit(
        variants, strengths - strengths.mean() if len(strengths) else strengths, counts, num_clips, covariances
    )


def _derivatives(wins: Array, strengths: Array) -> tuple[Array, Array]:
    """Gradients (clips, K) of the log-likelihood without the prior, and minus its second derivatives with it (K, K)."""
    games = wins + np.swapaxes(wins, -1, -2)
    chances = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    prior = 1 / (1 + np.exp(-strengths))
    weights = games.sum(axis=0) * chances * (1 - chances)
    curvature = np.diag(weights.sum(axis=1) + PRIOR_COMPARISONS * prior * (1 - prior)) - weights
    return (wins - games * chances).sum(axis=-1), curvature
