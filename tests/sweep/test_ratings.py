"""Bradley-Terry strengths of blind ratings: by hand, against a fit with scipy, and on simulations."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from capkit.sweep import bradley_terry, bradley_terry_pairs
from capkit.sweep.ratings import holm


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6, math.nan]).tolist() == pytest.approx([1, 1, math.nan], nan_ok=True)
    assert holm([0.02, math.nan]).tolist() == pytest.approx([0.02, math.nan], nan_ok=True)
    assert holm([]).tolist() == []


def make_ratings(*rows):
    """make_ratings(("x", "y", "tie"), ...): each of a clip of its own."""
    ratings = pd.DataFrame(rows, columns=["first", "second", "outcome"])
    return ratings.assign(clip=range(len(ratings)))


class TestBradleyTerry:
    def test_two_variants_by_hand(self):
        ratings = make_ratings(*[("x", "y", "first")] * 6, *[("y", "x", "first")] * 2)
        result = bradley_terry(ratings).set_index("variant")
        assert list(result.index) == ["x", "y"] and result["num_comparisons"].tolist() == [8, 8]
        strength = result["strength"]["x"]
        assert strength == pytest.approx(-result["strength"]["y"])
        # Wins equal expected wins, up to half a tie with an opponent of strength 0.
        expected_wins = 8 / (1 + math.exp(-2 * strength))
        assert 6 + 0.25 == pytest.approx(expected_wins + 0.5 / (1 + math.exp(-strength)))
        assert 2 * strength == pytest.approx(math.log(6 / 2), rel=0.1)

    def test_the_side_says_nothing_and_a_tie_is_half_a_win(self):
        ratings = make_ratings(("x", "y", "first"), ("y", "z", "tie"), ("z", "x", "second"), ("x", "z", "tie"))
        flipped = ratings.assign(
            first=ratings["second"],
            second=ratings["first"],
            outcome=ratings["outcome"].map({"first": "second", "second": "first", "tie": "tie"}),
        )
        strengths = bradley_terry(ratings).set_index("variant")["strength"]
        pd.testing.assert_series_equal(bradley_terry(flipped).set_index("variant")["strength"], strengths)
        assert strengths.idxmax() == "x" and strengths.sum() == pytest.approx(0)
        tied = bradley_terry(make_ratings(("x", "y", "tie"), ("y", "x", "tie")))
        assert tied["strength"].tolist() == pytest.approx([0, 0])
        halves = [("x", "y", "first"), ("x", "y", "second"), ("x", "y", "first"), ("x", "y", "tie")]
        wins = [("x", "y", "first")] * 5 + [("x", "y", "second")] * 3
        doubled = bradley_terry(make_ratings(*halves * 2))["strength"]
        assert doubled.tolist() == pytest.approx(bradley_terry(make_ratings(*wins))["strength"].tolist())

    def test_known_strengths_are_found(self):
        rng = np.random.default_rng(4)
        truth = {"w": -0.9, "x": -0.3, "y": 0.2, "z": 1.0}
        within = []
        for _ in range(10):
            rows = []
            for _ in range(300):
                first, second = rng.choice(list(truth), 2, replace=False)
                wins = rng.random() < 1 / (1 + math.exp(truth[second] - truth[first]))
                rows.append((first, second, "first" if wins else "second"))
            result = bradley_terry(make_ratings(*rows)).set_index("variant")
            within += [result["low"][name] <= strength <= result["high"][name] for name, strength in truth.items()]
            assert result.loc["z", "strength"] == pytest.approx(1.0, abs=0.6)
        assert list(result.index) == ["z", "y", "x", "w"]
        assert np.mean(within) == pytest.approx(0.95, abs=0.1)

    def test_undefeated_and_unconnected_variants_stay_finite(self):
        ratings = make_ratings(*[("best", "worst", "first")] * 500, ("lone", "pair", "second"))
        result = bradley_terry(ratings)
        assert np.isfinite(result[["strength", "low", "high"]]).all(axis=None)
        assert result["variant"].tolist() == ["best", "pair", "lone", "worst"]
        assert result["strength"].abs().max() < 10

    def test_intervals_come_from_clips(self):
        rows = [("x", "y", "first")] * 15 + [("x", "y", "second")] * 5
        many = bradley_terry(make_ratings(*rows))
        few = bradley_terry(make_ratings(*rows).assign(clip=[0] * 10 + [1] * 10))
        assert few["strength"].tolist() == pytest.approx(many["strength"].tolist())
        one = bradley_terry(make_ratings(*rows).assign(clip=0))
        assert one["strength"].notna().all() and one[["low", "high"]].isna().all(axis=None)
        assert (many["low"] < many["strength"]).all() and (many["strength"] < many["high"]).all()
        # Five times the same ratings, of the same clips, are not more evidence about other clips.
        again = pd.concat([make_ratings(*rows)] * 5)
        widths = [(result["high"] - result["low"]).max() for result in (many, bradley_terry(again))]
        assert widths[1] > 0.85 * widths[0]

    def test_errors_are_those_of_a_logistic_regression(self):
        """With a rating a clip and no ties: the curvature's error, by differentiating the likelihood numerically."""
        rng = np.random.default_rng(5)
        rows = [(*rng.choice(list("xyz"), 2, replace=False), rng.choice(["first", "second"])) for _ in range(60)]
        ratings = make_ratings(*rows)

        def likelihood(strengths):
            total = sum(0.25 * (stats.logistic.logcdf(one) + stats.logistic.logcdf(-one)) for one in strengths)
            for first, second, outcome in rows:
                gap = strengths["xyz".index(first)] - strengths["xyz".index(second)]
                total += stats.logistic.logcdf(gap if outcome == "first" else -gap)
            return -total

        best = optimize.minimize(likelihood, np.zeros(3), tol=1e-12).x
        result = bradley_terry(ratings).set_index("variant").loc[list("xyz")]
        assert result["strength"].tolist() == pytest.approx(list(best - best.mean()), abs=1e-4)
        step = np.eye(3) * 1e-3
        hessian = [
            [
                (
                    likelihood(best + a + b)
                    - likelihood(best + a - b)
                    - likelihood(best - a + b)
                    + likelihood(best - a - b)
                )
                / 4e-6
                for b in step
            ]
            for a in step
        ]
        centre = np.eye(3) - 1 / 3
        errors = np.sqrt(np.diag(centre @ np.linalg.inv(hessian) @ centre))
        half = (result["high"] - result["low"]).to_numpy() / 2 / stats.t.ppf(0.975, 59)
        assert (half >= errors * 0.999).all() and half == pytest.approx(errors, rel=0.15)

    def test_one_variant_against_another(self):
        rows = (
            [("x", "y", "first")] * 18 + [("x", "y", "second")] * 2 + [("y", "z", "first"), ("y", "z", "second")] * 10
        )
        pairs = bradley_terry_pairs(make_ratings(*rows)).set_index(["stronger", "weaker"])
        strengths = bradley_terry(make_ratings(*rows)).set_index("variant")["strength"]
        row = pairs.loc["x", "y"]
        assert row["difference"] == pytest.approx(strengths["x"] - strengths["y"]) and row["low"] > 0
        assert row["p_adjusted"] < 0.05 < pairs.loc[[("y", "z"), ("z", "y")][("z", "y") in pairs.index], "p_adjusted"]
        assert len(pairs) == 3 and (pairs["p_adjusted"] >= pairs["p_value"]).all()
        assert bradley_terry_pairs(make_ratings(*rows).assign(clip=0))[["low", "p_value"]].isna().all(axis=None)

    def test_equal_variants_are_told_apart_in_one_of_twenty_ratings(self):
        rng = np.random.default_rng(6)
        found = covered = 0
        for _ in range(200):
            ratings = make_ratings(*[("x", "y", rng.choice(["first", "second"])) for _ in range(20)])
            found += bradley_terry_pairs(ratings)["p_value"][0] < 0.05
            covered += (bradley_terry(ratings)["low"][0] <= 0) and (bradley_terry(ratings)["high"][0] >= 0)
        assert found <= stats.binom.interval(0.999, 200, 0.05)[1] and covered >= 0.93 * 200

    def test_nothing_rated_yet(self):
        assert list(bradley_terry(make_ratings())) == ["variant", "strength", "low", "high", "num_comparisons"]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (("x", "y", "left"), "unknown outcome 'left'; there are first, second, tie"),
            (("x", "x", "tie"), "compared with itself"),
            (("x", None, "tie"), "'second' has missing values"),
        ],
    )
    def test_ratings_that_make_no_sense(self, row, message):
        with pytest.raises(ValueError, match=message):
            bradley_terry(make_ratings(("x", "y", "tie"), row))
        with pytest.raises(ValueError, match="no column 'clip'"):
            bradley_terry(make_ratings(("x", "y", "tie")).drop(columns="clip"))
