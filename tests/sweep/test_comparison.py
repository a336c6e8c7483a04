"""Paired comparisons and ratings: against numbers by hand, against scipy, and on simulations whose truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from capkit.sweep import bradley_terry, compare
from capkit.sweep.comparison import detectable_difference, holm


def make_table(**values_of_cells):
    """A row per clip and cell: make_table(A=[1, 2], B=[3, 4])."""
    rows = [
        {"video": f"clip {clip}", "prompt": cell, "score": value}
        for cell, values in values_of_cells.items()
        for clip, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def compared(table, baseline="A", **settings):
    return compare(table, "score", "prompt", "video", baseline, **settings)


class TestCompare:
    def test_three_clips_by_hand(self):
        result = compared(make_table(A=[1, 1, 1], B=[2, 3, 4], C=[1, 2, 0]))
        assert result["cell"].tolist() == ["B", "C"]
        assert result["num_clips"].tolist() == [3, 3] and result["num_dropped"].tolist() == [0, 0]
        assert result["baseline_mean"].tolist() == [1, 1] and result["mean"].tolist() == [3, 1]
        assert result["difference"].tolist() == [2, 0]
        # Of the 8 sign patterns of 1, 2, 3 only two are as extreme; those of 0, 1, -1 all are.
        assert result["p_value"].tolist() == [pytest.approx(2 / 8), 1]
        assert result["p_holm"].tolist() == [pytest.approx(2 * 2 / 8), 1]
        expected = (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)) * 1 / math.sqrt(3)
        assert result["minimum_detectable_difference"].tolist() == pytest.approx([expected, expected])
        assert (result["low"] >= [1, -1]).all() and (result["high"] <= [3, 1]).all()

    def test_agrees_with_scipy(self):
        rng = np.random.default_rng(0)
        before, after = rng.normal(size=(2, 40))
        row = compared(make_table(A=before, B=after + 0.3)).iloc[0]
        differences = after + 0.3 - before
        assert row["difference"] == pytest.approx(differences.mean())
        assert row["p_value"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.015)
        interval = stats.ttest_1samp(differences, 0).confidence_interval()
        assert [row["low"], row["high"]] == pytest.approx(list(interval), abs=0.03)
        few = compared(make_table(A=before[:8], B=after[:8])).iloc[0]  # a plain percentile interval is a fifth narrower
        low, high = stats.ttest_1samp((after - before)[:8], 0).confidence_interval()
        assert few["high"] - few["low"] == pytest.approx(high - low, rel=0.04)
        wide = compared(make_table(A=before, B=after + 0.3), confidence=0.99).iloc[0]
        assert wide["low"] < row["low"] and wide["high"] > row["high"]

    def test_repeats_of_a_clip_are_one(self):
        rng = np.random.default_rng(1)
        table = make_table(A=rng.normal(size=6), B=rng.normal(size=6) + 1)
        repeats = [table.assign(score=table["score"] + shift) for shift in (-1, 0, 1) for _ in range(5)]
        once, often = compared(table), compared(pd.concat(repeats, ignore_index=True))
        pd.testing.assert_frame_equal(once, often)

    def test_clips_without_a_pair_are_dropped_and_counted(self):
        table = make_table(A=[1, 2, 3, None, 5], B=[2, 4, None, None, 7, 100], C=[1])
        result = compared(table).set_index("cell")
        assert result.loc["B", ["num_clips", "num_dropped"]].tolist() == [3, 3]
        assert (result.loc["B", "baseline_mean"], result.loc["B", "mean"]) == (
            pytest.approx(8 / 3),
            pytest.approx(13 / 3),
        )
        assert result.loc["C", ["num_clips", "num_dropped"]].tolist() == [1, 4]
        some_failed = pd.concat([table, table], ignore_index=True)
        some_failed.loc[len(table) :, "score"] = math.nan
        pd.testing.assert_frame_equal(compared(some_failed).set_index("cell"), result)

    def test_fewer_than_two_pairs_give_no_interval(self):
        result = compared(make_table(A=[1, 2, 3], B=[2, None, None], C=[None, None, None], D=[2, 4, 6.5]))
        unknown = ["low", "high", "p_value", "p_holm", "minimum_detectable_difference"]
        assert result[unknown].iloc[:2].isna().all(axis=None) and result[unknown].iloc[2].notna().all()
        assert result["num_clips"].tolist() == [1, 0, 3]
        assert result["difference"].tolist() == [1, pytest.approx(math.nan, nan_ok=True), pytest.approx(6.5 / 3)]
        assert result["p_holm"][2] == result["p_value"][2]  # what could not be tested is no comparison

    def test_equal_cells_do_not_differ(self):
        table = make_table(A=[0.3] * 12, B=[0.3] * 12, C=[0.1 + 0.2] * 12)  # C differs by rounding
        result = compared(table)
        assert (result[["difference", "low", "high", "minimum_detectable_difference"]] == 0).all(axis=None)
        assert (result[["p_value", "p_holm"]] == 1).all(axis=None)

    def test_a_constant_difference(self):
        row = compared(make_table(A=range(12), B=range(1, 13))).iloc[0]
        assert (row["low"], row["difference"], row["high"]) == (1, 1, 1)
        assert row["p_value"] == 2 / 2**12

    def test_shares_and_missing_flags(self):
        table = make_table(A=[True, False, False, None], B=[True, True, True, True])
        row = compared(table).iloc[0]
        assert (row["baseline_mean"], row["mean"], row["num_dropped"]) == (pytest.approx(1 / 3), 1, 1)
        nullable = compared(table.assign(score=table["score"].astype("boolean"))).iloc[0]
        pd.testing.assert_series_equal(row, nullable)

    def test_same_seed_same_numbers_whatever_else_is_compared(self):
        rng = np.random.default_rng(2)
        table = make_table(A=rng.normal(size=30), B=rng.normal(size=30), C=rng.normal(size=30))
        result = compared(table)
        pd.testing.assert_frame_equal(result, compared(table))
        alone = compared(table[table["prompt"] != "B"]).drop(columns="p_holm")
        pd.testing.assert_frame_equal(alone, result.drop(columns="p_holm").iloc[1:].reset_index(drop=True))
        assert not compared(table, seed=1)["low"].equals(result["low"])

    def test_any_values_name_cells_and_clips(self):
        table = pd.DataFrame({"score": [1.0, 2, 3, 5], "prompt": [0.5, 0.5, 0.1, 0.1], "video": [7, 8, 7, 8]})
        assert compared(table, 0.1)["cell"].tolist() == [0.5]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"measure": "scor"}, "no column 'scor'; there are video, prompt, score"),
            ({"cell": "promt"}, "no column 'promt'"),
            ({"clip": "vid"}, "no column 'vid'"),
            ({"baseline": "Z"}, "no cell 'Z' in column 'prompt'; there are 'A', 'B'"),
            ({"measure": "video"}, "column 'video' holds .* values; comparing needs numbers"),
            ({"table": make_table(A=[1, 2])}, "only the cell 'A'"),
            ({"table": make_table(A=[1, math.inf], B=[1, 2])}, "infinite"),
            ({"table": make_table(A=[1, 2], B=[1, 2]).assign(video=["x", None] * 2)}, "'video' has missing values"),
        ],
    )
    def test_what_cannot_be_compared(self, change, message):
        arguments = {"table": make_table(A=[1, 2], B=[1, 2]), "measure": "score", "cell": "prompt", "clip": "video"}
        with pytest.raises(ValueError, match=message):
            compare(**(arguments | {"baseline": "A"} | change))


class TestErrorRates:
    """Simulated sweeps over 12 clips that differ a lot among themselves."""

    NUM_SWEEPS = 200

    def sweeps(self, effect, names):
        rng = np.random.default_rng(3)
        for _ in range(self.NUM_SWEEPS):
            clips = rng.normal(scale=5, size=12)
            cells = {name: clips + rng.normal(size=12) for name in names}
            cells["B"] = cells["B"] + effect
            yield compared(make_table(**cells), num_resamples=300)

    def test_where_nothing_differs(self):
        results = list(self.sweeps(0, "ABCDE"))
        one = np.array([result["p_value"][0] for result in results])
        family = np.array([result["p_holm"].min() for result in results])
        uncorrected = np.array([result["p_value"].min() for result in results])
        covered = np.array([result["low"][0] <= 0 <= result["high"][0] for result in results])
        low, high = stats.binom.interval(0.999, self.NUM_SWEEPS, 0.05)
        assert low <= (one < 0.05).sum() <= high
        assert (family < 0.05).sum() <= high < (uncorrected < 0.05).sum()
        assert (one < 0.5).mean() == pytest.approx(0.5, abs=0.12)
        assert low <= (~covered).sum() <= high

    def test_where_one_cell_differs(self):
        # The differences' SD is sqrt(2): this is the difference that 12 clips find four times in five.
        effect = detectable_difference(math.sqrt(2), 12)
        results = list(self.sweeps(effect, "AB"))
        found = np.array([result["p_value"][0] < 0.05 for result in results])
        covered = np.array([result["low"][0] <= effect <= result["high"][0] for result in results])
        detectable = np.array([result["minimum_detectable_difference"][0] for result in results])
        assert found.mean() == pytest.approx(0.8, abs=0.1)
        assert covered.mean() == pytest.approx(0.95, abs=0.05)
        assert detectable.mean() == pytest.approx(effect, rel=0.1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6, math.nan]).tolist() == pytest.approx([1, 1, math.nan], nan_ok=True)
    assert holm([0.02, math.nan]).tolist() == pytest.approx([0.02, math.nan], nan_ok=True)
    assert holm([]).tolist() == []


class TestDetectableDifference:
    @pytest.mark.parametrize("num_clips", [5, 12, 100])
    @pytest.mark.parametrize("power", [0.8, 0.9])
    def test_has_the_power_it_promises(self, num_clips, power):
        difference = detectable_difference(2.0, num_clips, power)
        shift = difference / (2.0 / math.sqrt(num_clips))
        assert stats.nct.sf(stats.t.ppf(0.975, num_clips - 1), num_clips - 1, shift) == pytest.approx(power, abs=0.02)

    def test_scales_and_refuses(self):
        assert detectable_difference(2, 20) == pytest.approx(2 * detectable_difference(1, 20))
        assert detectable_difference(1, 20, alpha=0.01) > detectable_difference(1, 20)
        assert detectable_difference(0, 20) == 0
        assert math.isnan(detectable_difference(1, 1))
        for wrong in ({"sd": -1}, {"power": 1}, {"alpha": 0}):
            with pytest.raises(ValueError, match="needs sd >= 0"):
                detectable_difference(**({"sd": 1, "num_clips": 9} | wrong))


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
            result = bradley_terry(make_ratings(*rows), num_resamples=200).set_index("variant")
            within += [result["low"][name] <= strength <= result["high"][name] for name, strength in truth.items()]
            assert result.loc["z", "strength"] == pytest.approx(1.0, abs=0.6)
        assert list(result.index) == ["z", "y", "x", "w"]
        assert np.mean(within) == pytest.approx(0.95, abs=0.1)

    def test_undefeated_and_unconnected_variants_stay_finite(self):
        ratings = make_ratings(*[("best", "worst", "first")] * 500, ("lone", "pair", "second"))
        result = bradley_terry(ratings, num_resamples=100)
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
        assert widths[1] > 0.9 * widths[0]
        pd.testing.assert_frame_equal(bradley_terry(again), bradley_terry(again))
        assert not bradley_terry(again)["low"].equals(bradley_terry(again, seed=1)["low"])

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
