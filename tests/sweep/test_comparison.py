"""Comparisons of cells: against numbers by hand, against scipy, and on simulations whose truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from capkit.sweep import best_cells, compare, conclude
from capkit.sweep.comparison import detectable_difference


def make_table(**values_of_cells):
    """A row per clip and cell: make_table(A=[1, 2], B=[3, 4])."""
    rows = [
        {"video": f"clip {clip}", "prompt": cell, "score": value}
        for cell, values in values_of_cells.items()
        for clip, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def compared(table, baseline="A", measures="score", **settings):
    return compare(table, measures, "prompt", "video", baseline, **settings)


def concluded(table, baseline="A", **settings):
    return conclude(table, compared(table, baseline), "score", "prompt", "video", baseline, **settings)


class TestCompare:
    def test_three_clips_by_hand(self):
        result = compared(make_table(A=[1, 1, 1], B=[2, 3, 4], C=[1, 2, 0]))
        assert result["cell"].tolist() == ["B", "C"] and set(result["measure"]) == {"score"}
        assert result["num_clips"].tolist() == [3, 3] and result["num_dropped"].tolist() == [0, 0]
        assert result["baseline_mean"].tolist() == [1, 1] and result["mean"].tolist() == [3, 1]
        assert result["difference"].tolist() == [2, 0]
        # Of the 8 sign patterns of 1, 2, 3 only two are as extreme; those of 0, 1, -1 all are, and none of them reaches
        # 6 / sqrt(14), as 2 / sqrt(2) is less.
        assert result["p_value"].tolist() == [2 / 8, 1] and result["p_adjusted"].tolist() == [2 / 8, 1]
        assert result[["low", "high", "minimum_detectable_difference"]].isna().all(axis=None)  # of so few clips

    @pytest.mark.parametrize("num_clips", [6, 8])
    def test_p_values_are_those_of_scipy(self, num_clips):
        """Its permutation test, with the maximum over cells as statistic, cell after cell without the more extreme."""
        rng = np.random.default_rng(num_clips)
        differences = rng.normal(size=(num_clips, 4)) + [1.5, 0.7, 0, -0.5]
        cells = {name: column for name, column in zip("BCDE", differences.T, strict=True)}
        result = compared(make_table(A=np.zeros(num_clips), **cells)).set_index("cell")

        def p_of_largest(names):
            columns = np.column_stack([cells[name] for name in names])

            def largest(numbers):  # the clips' numbers, with the signs that scipy gives them
                return np.max(np.abs(np.sign(numbers) @ columns) / np.linalg.norm(columns, axis=0))

            settings = {"permutation_type": "samples", "alternative": "greater", "vectorized": False}
            return stats.permutation_test((np.arange(1.0, num_clips + 1),), largest, **settings).pvalue

        extreme = {name: abs(column.sum()) / np.linalg.norm(column) for name, column in cells.items()}
        order, expected = sorted(cells, key=extreme.get, reverse=True), 0.0
        for place, name in enumerate(order):
            assert result.loc[name, "p_value"] == pytest.approx(p_of_largest([name]))
            expected = max(expected, p_of_largest(order[place:]))
            assert result.loc[name, "p_adjusted"] == pytest.approx(expected)

    def test_agrees_with_the_t_test_of_many_clips(self):
        rng = np.random.default_rng(0)
        before, after = rng.normal(size=(2, 40))
        row = compared(make_table(A=before, B=after + 0.3)).iloc[0]
        differences = after + 0.3 - before
        assert row["difference"] == pytest.approx(differences.mean())
        assert row["p_value"] == row["p_adjusted"]
        assert row["p_value"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.015)
        interval = stats.ttest_1samp(differences, 0).confidence_interval()
        assert [row["low"], row["high"]] == pytest.approx(list(interval), abs=0.05)
        wide = compared(make_table(A=before, B=after + 0.3), confidence=0.99).iloc[0]
        assert wide["low"] < row["low"] and wide["high"] > row["high"]
        expected = (stats.t.ppf(0.975, 39) + stats.t.ppf(0.8, 39)) * differences.std(ddof=1) / math.sqrt(40)
        assert row["minimum_detectable_difference"] == pytest.approx(expected)

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

    def test_fewer_than_two_pairs_are_not_tested(self):
        result = compared(make_table(A=[1, 2, 3], B=[2, None, None], C=[None, None, None], D=[2, 4, 6.5]))
        assert result[["p_value", "p_adjusted"]].isna().all(axis=1).tolist() == [True, True, False]
        assert result["num_clips"].tolist() == [1, 0, 3]
        assert result["difference"].tolist() == [1, pytest.approx(math.nan, nan_ok=True), pytest.approx(6.5 / 3)]
        assert result["p_adjusted"][2] == result["p_value"][2]  # what could not be tested is no comparison

    def test_equal_cells_do_not_differ_and_constant_differences_have_no_interval(self):
        table = make_table(A=[0.3] * 12, B=[0.3] * 12, C=[0.3 + 1e-8] * 12, D=[0.5] * 12)  # C differs by rounding
        result = compared(table).set_index("cell")
        assert result["difference"].tolist() == pytest.approx([0, 0, 0.2])
        assert result[["low", "high", "minimum_detectable_difference"]].isna().all(axis=None)
        assert result["p_adjusted"].tolist() == [1, 1, 2 / 2**12]

    def test_shares_and_missing_flags(self):
        table = make_table(A=[True, False, False, None], B=[True, True, True, True])
        row = compared(table).iloc[0]
        assert (row["baseline_mean"], row["mean"], row["num_dropped"]) == (pytest.approx(1 / 3), 1, 1)
        nullable = compared(table.assign(score=table["score"].astype("boolean"))).iloc[0]
        pd.testing.assert_series_equal(row, nullable)

    def test_one_correction_for_all_measures(self):
        rng = np.random.default_rng(2)
        table = make_table(A=rng.normal(size=9), B=rng.normal(size=9) + 1.2)
        table = table.assign(noise=rng.normal(size=18), again=table["score"] * 2 + 5)
        alone, together = compared(table), compared(table, measures=["score", "noise"])
        assert together["measure"].tolist() == ["score", "noise"]
        assert together["p_value"][0] == alone["p_value"][0] and together["p_adjusted"][0] >= alone["p_adjusted"][0]
        assert together["high"][0] - together["low"][0] > alone["high"][0] - alone["low"][0]
        same = compared(table, measures=["score", "again"])  # a second column that says the same costs nothing
        assert same["p_adjusted"].tolist() == [alone["p_adjusted"][0]] * 2

    def test_same_seed_same_numbers(self):
        rng = np.random.default_rng(2)
        table = make_table(A=rng.normal(size=30), B=rng.normal(size=30), C=rng.normal(size=30))
        pd.testing.assert_frame_equal(compared(table), compared(table))
        assert not compared(table, seed=1)["low"].equals(compared(table)["low"])

    def test_any_values_name_cells_and_clips(self):
        table = pd.DataFrame({"score": [1.0, 2, 3, 5], "prompt": [0.5, 0.5, 0.1, 0.1], "video": [7, 8, 7, 8]})
        assert compared(table, 0.1)["cell"].tolist() == [0.5]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"measures": "scor"}, "no column 'scor'; there are video, prompt, score"),
            ({"cell": "promt"}, "no column 'promt'"),
            ({"clip": "vid"}, "no column 'vid'"),
            ({"baseline": "Z"}, "no cell 'Z' in column 'prompt'; there are 'A', 'B'"),
            ({"measures": "video"}, "column 'video' holds .* values; comparing needs numbers"),
            ({"table": make_table(A=[1, 2])}, "only the cell 'A'"),
            ({"table": make_table(A=[1, math.inf], B=[1, 2])}, "infinite"),
            ({"table": make_table(A=[1, 2], B=[1, 2]).assign(video=["x", None] * 2)}, "'video' has missing values"),
        ],
    )
    def test_what_cannot_be_compared(self, change, message):
        arguments = {"table": make_table(A=[1, 2], B=[1, 2]), "measures": "score", "cell": "prompt", "clip": "video"}
        with pytest.raises(ValueError, match=message):
            compare(**(arguments | {"baseline": "A"} | change))


class TestConclude:
    def test_a_cell_that_is_shown_to_be_better(self):
        rng = np.random.default_rng(0)
        clips = rng.normal(size=8) * 3
        cells = {
            name: clips + rng.normal(size=8) * 0.1 + gain for name, gain in zip("ABCD", (0, 1, 2, -1), strict=True)
        }
        conclusion = concluded(make_table(**cells))
        assert conclusion.is_shown and conclusion.chosen == "C" and conclusion.may_be_best == ["C"]
        gain = (cells["C"] - cells["A"]).mean()
        assert f"'C' is better than the baseline 'A' by {gain:.3g} [" in str(conclusion)
        assert "corrected p 0.0078 (8 clips, 3 comparisons by score). May be the best: 'C'" in str(conclusion)
        lower = concluded(make_table(**cells), larger_is_better=False)
        assert lower.is_shown and lower.chosen == "D" and lower.may_be_best == ["D"]

    def test_nothing_shown_keeps_the_baseline(self):
        table = make_table(A=[1, 2, 3, 4, 5, 6], B=[2, 3, 4, 5, 6, 3], C=[0, 3, 2, 5, 4, 7])
        conclusion = concluded(table)
        assert not conclusion.is_shown and conclusion.chosen == "A"
        assert conclusion.may_be_best == ["A", "B", "C"] and "all cells" in str(conclusion)
        assert "no cell is shown to be better than the baseline 'A' (6 clips, 2 comparisons by score)" in str(
            conclusion
        )
        assert "could not be found with so many clips" in str(conclusion)
        few = concluded(make_table(A=[1, 2, 3], B=[11, 12, 13.5]))
        assert not few.is_shown and "corrected p is 0.25, and with so few clips it cannot be below 0.05" in str(few)
        worse = make_table(A=[1, 2, 3, 4, 5, 6], B=[0, 1, 2, 3, 4, 4.5])  # a p of 0.03, but of a worse cell
        assert "(6 clips, 1 comparison by score): none is ahead; differences below" in str(concluded(worse))

    def test_ties_go_to_the_preferred_cell(self):
        clips = np.arange(8.0)
        gain = np.array([1, 1.1] * 4)
        table = make_table(A=clips, B=clips + gain + 1e-9, C=clips + gain)
        assert concluded(table).chosen == "B" and concluded(table, preference=["C", "B"]).chosen == "C"
        assert concluded(table.assign(score=table["score"] * 1e-9)).chosen == "B"

    def test_a_cell_does_not_win_because_its_hard_clips_failed(self):
        clips = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
        good, easy_only = clips + [1, 1.1] * 5, np.where(clips > 3, clips + [0.5, 0.6] * 5, math.nan)
        conclusion = concluded(make_table(A=clips, good=good, easy=easy_only))
        assert conclusion.chosen == "good"


def simulate(num_sweeps, num_clips, num_cells, effect):
    """Sweeps over clips that differ a lot among themselves; cell 1 is better by `effect`."""
    rng = np.random.default_rng(3)
    for seed in range(num_sweeps):
        values = rng.normal(size=(num_clips, 1)) * 5 + rng.normal(size=(num_clips, num_cells))
        values[:, 1] += effect
        table = make_table(**{f"cell {cell}": column for cell, column in enumerate(values.T)})
        yield table, compared(table, "cell 0", num_flips=300, seed=seed)


class TestErrorRates:
    NUM_SWEEPS = 200

    def test_where_nothing_differs(self):
        results = [result for _, result in simulate(self.NUM_SWEEPS, 12, 6, 0)]
        found = sum((result["p_adjusted"] < 0.05).any() for result in results)
        uncorrected = sum((result["p_value"] < 0.05).any() for result in results)
        missed = sum(not ((result["low"] <= 0) & (result["high"] >= 0)).all() for result in results)
        low, high = stats.binom.interval(0.999, self.NUM_SWEEPS, 0.05)
        assert found <= high < uncorrected and low <= missed <= high

    def test_where_one_cell_differs(self):
        # The differences' SD is sqrt(2): this is the difference that 12 clips find four times in five.
        effect = detectable_difference(math.sqrt(2), 12)
        results = [result.iloc[0] for _, result in simulate(self.NUM_SWEEPS, 12, 2, effect)]
        assert np.mean([row["p_adjusted"] < 0.05 for row in results]) == pytest.approx(0.8, abs=0.1)
        assert np.mean([row["low"] <= effect <= row["high"] for row in results]) == pytest.approx(0.95, abs=0.05)
        detectable = np.mean([row["minimum_detectable_difference"] for row in results])
        assert detectable == pytest.approx(effect, rel=0.1)

    def test_the_best_cell_is_among_those_that_may_be(self):
        held = [
            "cell 1" in best_cells(table, "score", "prompt", "video", num_flips=300)
            for table, _ in simulate(self.NUM_SWEEPS, 8, 5, 0)
        ]
        assert self.NUM_SWEEPS - sum(held) <= stats.binom.interval(0.999, self.NUM_SWEEPS, 0.05)[1]
        better = [best_cells(table, "score", "prompt", "video") for table, _ in simulate(20, 30, 5, 2.5)]
        assert better == [["cell 1"]] * 20


@pytest.mark.soak
@pytest.mark.parametrize("num_clips", [6, 12, 30])
@pytest.mark.parametrize("num_cells", [5, 15, 63])
def test_soak_error_rates_and_power(num_clips, num_cells):
    """Without a difference, and with one as large as in the table of power; 300 sweeps each."""
    num_sweeps = 300
    nothing = list(simulate(num_sweeps, num_clips, num_cells + 1, 0))
    winners = [conclude(t, r, "score", "prompt", "video", "cell 0").is_shown for t, r in nothing]
    found = [(result["p_adjusted"] < 0.05).any() for _, result in nothing]
    covered = [((result["low"] <= 0) & (result["high"] >= 0)).all() for _, result in nothing]
    effect = math.sqrt(2) * {6: 2.5, 12: 1.34, 30: 0.74}[num_clips]
    power = [r["p_adjusted"][0] < 0.05 for _, r in simulate(num_sweeps, num_clips, num_cells + 1, effect)]
    print(
        f"\n{num_clips} clips, {num_cells} cells: winners {np.mean(winners):.3f}, false alarms {np.mean(found):.3f}, "
        f"joint coverage {np.mean(covered):.3f}, power at {effect:.2f} {np.mean(power):.3f}"
    )
    assert np.mean(winners) <= 0.07


class TestDetectableDifference:
    @pytest.mark.parametrize("num_clips", [6, 12, 100])
    @pytest.mark.parametrize("power", [0.8, 0.9])
    def test_has_the_power_it_promises(self, num_clips, power):
        difference = detectable_difference(2.0, num_clips, power=power)
        shift = difference / (2.0 / math.sqrt(num_clips))
        assert stats.nct.sf(stats.t.ppf(0.975, num_clips - 1), num_clips - 1, shift) == pytest.approx(power, abs=0.02)

    def test_scales_and_refuses(self):
        assert detectable_difference(2, 20) == pytest.approx(2 * detectable_difference(1, 20))
        assert detectable_difference(1, 20, alpha=0.01) > detectable_difference(1, 20)
        assert detectable_difference(1, 20, num_comparisons=5) == detectable_difference(1, 20, alpha=0.01)
        assert math.isnan(detectable_difference(0, 20)) and math.isnan(detectable_difference(1, 5))
        for wrong in ({"sd": -1}, {"power": 1}, {"alpha": 0}):
            with pytest.raises(ValueError, match="needs sd >= 0"):
                detectable_difference(**({"sd": 1, "num_clips": 9} | wrong))
