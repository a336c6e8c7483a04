"""An audit's sample and its error rate, against enumeration, scipy's binomial intervals and simulated stores."""

import itertools
import json
import math
import os
from fractions import Fraction

import pytest
from scipy.stats import binomtest

import capkit
from capkit import CaptionStore

ROWS = ["num_in_store", "num_captions", "num_right", "num_wrong", "num_unsure", "num_unmarked"]


def write_store(path, marks, **fields):
    """A store with a caption for each mark; None: not marked. Captions are numbered, and so are their requests."""
    with open(path, "w") as file:
        for number, mark in enumerate(marks):
            record = {"request": f"r{number}", "video": f"/{number}.mp4", "status": "ok", "text": f"Caption {number}."}
            file.write(json.dumps(record | {name: values[number] for name, values in fields.items()}) + "\n")
            if mark is not None:
                line = {"marks": f"r{number}", "mark": mark, "wrong_words": [], "remark": ""}
                file.write(json.dumps(line | {"text": record["text"]}) + "\n")
    return CaptionStore(path)


def with_share(num_wrong, num_captions):
    return ["wrong"] * num_wrong + ["right"] * (num_captions - num_wrong)


class TestTheSample:
    def test_the_same_seed_draws_the_same_and_a_larger_one_begins_with_it(self, tmp_path):
        store = write_store(tmp_path / "a.jsonl", [None] * 200)
        store.append({"request": "e", "video": "/e.mp4", "status": "error", "error": "broken", "text": None})
        sample = capkit.audit(store, 30, seed=5)
        assert len(set(sample.requests)) == 30 and capkit.audit(store.path, 30, seed=5).requests == sample.requests
        assert capkit.audit(store, 60, seed=5).requests[:30] == sample.requests
        assert len({tuple(capkit.audit(store, 30, seed=seed).requests) for seed in range(5)}) == 5
        assert [record["request"] for record in sample] == [record["request"] for record in sample.records]
        for record in list(sample)[:10]:
            store.mark(record, "right")
        store.edit(sample.requests[3], "Edited.")
        assert capkit.audit(store, 30, seed=5).requests == sample.requests
        left = [sample.requests[3], *sample.requests[10:]]
        assert [record["request"] for record in sample] == left  # a mark of another text is none
        assert sorted(capkit.audit(store, 1000).requests) == sorted(f"r{number}" for number in range(200))

    def test_each_caption_is_as_likely_as_another(self, tmp_path):
        store = write_store(tmp_path / "a.jsonl", [None] * 20)
        counts = dict.fromkeys((f"r{number}" for number in range(20)), 0)
        for seed in range(1000):
            for request in capkit.audit(store, 5, seed).requests:
                counts[request] += 1
        assert all(abs(count - 250) < 4 * math.sqrt(1000 * 0.25 * 0.75) for count in counts.values())

    def test_only_from_some_captions(self, tmp_path):
        store = write_store(tmp_path / "a.jsonl", [None] * 40, prompt=["Why?", "What?"] * 20)
        sample = capkit.audit(store, 100, where={"prompt": "Why?"})
        assert sample.num_in_store == 20 and {record["prompt"] for record in sample} == {"Why?"}

    def test_what_cannot_be_drawn_is_an_error(self, tmp_path):
        store = write_store(tmp_path / "a.jsonl", [None] * 3)
        for arguments, where, message in (
            ((0,), None, "num_captions must be a whole number, at least 1; got 0"),
            (("30",), None, "num_captions must be a whole number, at least 1; got '30'"),
            ((2.5,), None, "num_captions must be a whole number, at least 1; got 2.5"),
            ((5,), {"prompt": "Why?"}, "a.jsonl: holds no captions where"),
            ((5,), {"promt": "Why?"}, "unknown column 'promt'; did you mean 'prompt'"),
            ((5,), {"mark": "wrong"}, "has 'mark' in it, which changes while you mark"),
        ):
            with pytest.raises(ValueError, match=message):
                capkit.audit(store, *arguments, where=where)
        with pytest.raises(ValueError, match="holds no captions"):
            capkit.audit(tmp_path / "nothing.jsonl", 5)


class TestTheErrorRate:
    def test_the_counts_and_what_is_not_known_widens_the_interval(self, tmp_path):
        marks = [*with_share(10, 100), *[None] * 900]
        sample = capkit.audit(write_store(tmp_path / "a.jsonl", marks), 1000)
        (row,) = sample.error_rate().to_dict("records")
        assert [row[name] for name in ROWS] == [1000, 1000, 90, 10, 0, 900] and row["share_wrong"] == 0.1
        assert (row["low"], row["high"]) == (0.01, 0.91)  # as if the others were right, and wrong
        marks[100:] = ["unsure"] * 50 + ["right"] * 850
        (row,) = capkit.audit(write_store(tmp_path / "b.jsonl", marks), 1000).error_rate().to_dict("records")
        assert [row[name] for name in ROWS] == [1000, 1000, 940, 10, 50, 0]
        assert (row["low"], row["high"]) == (0.01, 0.06) and row["share_wrong"] == pytest.approx(10 / 950)

    def test_of_a_store_that_is_in_the_sample_as_a_whole_the_share_is_known(self, tmp_path):
        sample = capkit.audit(write_store(tmp_path / "a.jsonl", with_share(3, 12)), 50)
        (row,) = sample.error_rate().to_dict("records")
        assert row["low"] == row["high"] == row["share_wrong"] == 0.25
        assert str(sample).startswith(
            "12 captions of 12 to mark, 0 left; 3 of 12 are wrong, 25.0%, 95 % interval 25.0%"
        )
        assert str(sample).endswith("the interval is for this store, not for clips to come")
        sample = capkit.audit(write_store(tmp_path / "b.jsonl", with_share(3, 12) + [None] * 99), 12)
        assert "most of the store" not in str(sample)

    def test_by_a_column(self, tmp_path):
        store = write_store(tmp_path / "a.jsonl", with_share(30, 60), prompt=["Why?"] * 40 + ["What?"] * 20)
        table = capkit.audit(store, 60).error_rate(by="prompt").set_index("prompt")
        assert table.loc["Why?", "share_wrong"] == 0.75 and table.loc["What?", "share_wrong"] == 0
        assert table.loc["Why?", "num_in_store"] == 40 and table.loc["What?", "high"] == 0
        sample = capkit.audit(store, 20, seed=1)
        table = sample.error_rate(by="prompt").set_index("prompt")
        assert table["num_captions"].sum() == 20 and table["num_in_store"].to_dict() == {"Why?": 40, "What?": 20}
        assert list(sample.error_rate(by="dtype")["dtype"]) == [""]  # a column that all records of captions have
        with pytest.raises(ValueError, match="by: unknown column 'promt'; did you mean 'prompt'"):
            sample.error_rate(by="promt")

    @pytest.mark.parametrize("num_in_store, num_captions", [(12, 5), (9, 8), (10, 2)])
    def test_as_enumerating_all_samples_has_it(self, tmp_path, num_in_store, num_captions):
        """For each number of wrong captions in the store, how often a sample has at least, and at most, so many."""
        samples = list(itertools.combinations(range(num_in_store), num_captions))

        def chance(wrong_in_store, is_at_least, num_wrong):
            """That a sample has more (or fewer) wrong captions than so many, and half of that it has as many."""
            found = [sum(place < wrong_in_store for place in sample) for sample in samples]
            beyond = sum(count > num_wrong if is_at_least else count < num_wrong for count in found)
            return (beyond + Fraction(found.count(num_wrong), 2)) / len(samples)

        for num_wrong in range(num_captions + 1):
            possible = [
                wrong
                for wrong in range(num_wrong, num_in_store - num_captions + num_wrong + 1)
                if min(chance(wrong, True, num_wrong), chance(wrong, False, num_wrong)) > Fraction(1, 40)
            ]
            low, high = interval(tmp_path, num_wrong, num_captions, num_in_store)
            assert (low * num_in_store, high * num_in_store) == pytest.approx((min(possible), max(possible)))

    @pytest.mark.parametrize("num_wrong, num_captions", [(0, 40), (3, 40), (20, 40), (39, 40), (40, 40), (10, 100)])
    def test_of_a_large_store_as_scipys_binomial_intervals(self, tmp_path, num_wrong, num_captions):
        low, high = interval(tmp_path, num_wrong, num_captions, 20_000)
        exact = binomtest(num_wrong, num_captions).proportion_ci(method="exact")
        wilson = binomtest(num_wrong, num_captions).proportion_ci(method="wilson")
        assert exact.low - 0.001 <= low and high <= exact.high + 0.001  # mid-p is a little narrower
        assert abs(low - wilson.low) < 0.03 and abs(high - wilson.high) < 0.03


def interval(folder, num_wrong, num_captions, num_in_store):
    """The interval of a sample with so many wrong captions, drawn from a store of this size."""
    store = write_store(folder / "captions.jsonl", [None] * num_in_store)
    sample = capkit.audit(store, num_captions)
    with open(store.path, "a") as file:
        for request, mark in zip(sample.requests, with_share(num_wrong, num_captions), strict=True):
            line = {"marks": request, "mark": mark, "wrong_words": [], "remark": "", "text": f"Caption {request[1:]}."}
            file.write(json.dumps(line) + "\n")
    assert sample.error_rate()["num_wrong"][0] == num_wrong
    return tuple(sample.error_rate()[["low", "high"]].iloc[0])


# ---- how often the interval holds the truth --------------------------------------------------------------------------


def coverage(folder, num_wrong, num_in_store, num_captions, num_seeds):
    """Of audits of a store whose captions are all marked, by seed: how many intervals hold the share that is wrong."""
    store = write_store(folder / "captions.jsonl", with_share(num_wrong, num_in_store))
    rows = (capkit.audit(store, num_captions, seed).error_rate().iloc[0] for seed in range(num_seeds))
    return sum(row.low <= num_wrong / num_in_store <= row.high for row in rows) / num_seeds


def test_the_interval_holds_the_truth_as_often_as_it_says(tmp_path):
    assert 0.93 <= coverage(tmp_path, 24, 120, 50, 300) <= 0.98


@pytest.mark.soak
@pytest.mark.parametrize("num_in_store, num_captions", [(100, 50), (100, 80), (400, 50), (400, 80), (400, 200)])
def test_coverage_over_many_shares(tmp_path, num_in_store, num_captions):
    """Printed for each share. The mean lies within 93 to 98 %; single ones may not, because captions are whole."""
    num_seeds, held = int(os.environ.get("CAPKIT_SOAK_AUDITS", 300)), []
    for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
        held.append(coverage(tmp_path, round(share * num_in_store), num_in_store, num_captions, num_seeds))
        print(
            f"{num_captions} of {num_in_store}, {share:.0%} wrong: in {held[-1]:.1%} of {num_seeds} intervals",
            flush=True,
        )
    assert 0.93 <= sum(held) / len(held) <= 0.98 and min(held) > 0.9
