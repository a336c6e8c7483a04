"""Statements are judged as `check` judges texts, orders are counted right, and the command goes on where it stopped."""

import itertools
import json
import re

import numpy as np
import pytest
from scipy import stats

from capkit import FrameSampling
from capkit.demo import measures
from capkit.demo.evaluation import check
from capkit.demo.facts import Event, Facts, Seen, see
from capkit.demo.measures import tables
from capkit.demo.orders import auc, correlate_cells, order_cells, order_within_clips, resample
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import COLOURS, SHAPES
from capkit.demo.statements import share_told, share_true, statements, swap_word
from capkit.demo.wording import make_example

FACTS = Facts(
    "grey",
    (Seen("red", "star", "small", "left", 0, 7), Seen("blue", "circle", None, "grows", 2, 7)),
    (Event("appears", 2, "blue", "circle"), Event("changes", 5, "red", "star", "white")),
    "still",
    tuple(range(8)),
)
TEXT = (
    "The background is plain grey. There are two objects. A small red star moves to the left. "
    "At second 2, a blue circle appears and grows. The red star turns white at second 5. The camera does not move."
)


def judged(text, facts=FACTS):
    """(kind, truth, words) of each statement."""
    return {(one.kind, one.is_true, text[slice(*one.span)]) for one in statements(text, facts)}


def test_each_statement_has_its_words():
    assert judged(TEXT) == {
        ("background", True, "grey"),
        ("count", True, "two objects"),
        *{("size", True, "small"), ("colour", True, "red"), ("shape", True, "star")},
        *{("motion", True, "moves to the left"), ("motion", True, "grows")},
        *{
            ("colour", True, "blue"),
            ("shape", True, "circle"),
            ("event", True, "appears"),
            ("second", True, "second 2"),
        },
        *{("event", True, "turns white"), ("second", True, "second 5"), ("camera", True, "camera does not move")},
    }
    assert share_true(statements(TEXT, FACTS)) == share_told(statements(TEXT, FACTS), FACTS) == 1


@pytest.mark.parametrize(
    "old, new, wrong",
    [
        ("grey", "pink", {"pink"}),
        ("two", "three", {"three objects"}),
        ("small", "large", {"large"}),
        ("moves to the left", "rises", {"rises"}),
        ("grows", "stands still", {"stands still"}),
        ("red star", "green star", {"green"}),  # the star, in another colour
        ("red star", "red cross", {"cross"}),
        (
            "red star",
            "green cross",
            {"green", "cross", "small", "moves to the left", "turns white"},
        ),  # not there at all
        ("second 2", "second 4", {"second 4"}),
        ("appears", "vanishes", {"vanishes"}),
        ("turns white", "turns black", {"turns black"}),
        ("camera does not move", "camera pans left", {"camera pans left"}),
    ],
)
def test_what_is_wrong_is_found_where_it_stands(old, new, wrong):
    text = TEXT.replace(old, new)
    assert {words for _, is_true, words in judged(text) if not is_true} == wrong
    assert 0 < share_told(statements(text, FACTS), FACTS) <= 1
    assert not check(text, FACTS)["no_wrong_statement"]


def test_what_is_told_is_counted_once_and_what_is_left_out_is_missed():
    told = share_told(statements("A red star. The red star moves to the left. A red star.", FACTS), FACTS)
    assert told == pytest.approx(3 / 12)  # of background, two objects with 4 and 3, two events with their seconds
    assert share_told(statements("Nothing.", FACTS), FACTS) == share_true([]) == 0


def all_facts(num_scenes):
    for seed in range(num_scenes):
        scene = make_scene(seed, held_out=seed % 2 == 1)
        times = scene.timestamps_seconds
        yield see(scene, times[FrameSampling("chat").frame_indices(times, scene.fps)])


def test_a_text_has_a_wrong_statement_where_check_finds_one():
    rng, num_wrong = np.random.default_rng(0), 0
    for facts in all_facts(150):
        text = make_example(facts, rng, "detailed", "chat").answer
        assert all(one.is_true for one in statements(text, facts)), (text, facts)
        assert share_told(statements(text, facts), facts) == 1, (text, facts)
        for words in (COLOURS, SHAPES, ("left", "right"), ("one", "two", "three")):
            changed = re.sub(rf"\b({'|'.join(words)})\b", lambda _, words=words: rng.choice([*words]), text)
            is_right = all(one.is_true for one in statements(changed, facts))
            assert is_right == check(changed, facts)["no_wrong_statement"], (changed, facts)
            num_wrong += not is_right
    assert num_wrong > 150


def test_a_swapped_word_makes_one_statement_false():
    rng, swapped = np.random.default_rng(1), 0
    for facts in all_facts(60):
        text = make_example(facts, rng, "detailed", "chat").answer
        if changed := swap_word(text, facts):
            old, new = text.split(), changed.split()
            assert len(old) == len(new) and sum(a != b for a, b in zip(old, new, strict=True)) == 1
            assert not check(changed, facts)["no_wrong_statement"]
            assert sum(not one.is_true for one in statements(changed, facts)) == 1
            assert swap_word(changed, facts) is None  # its wrong words would not be known
            swapped += 1
    assert swapped > 40


@pytest.fixture
def numbers():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 5, (40, 7)) + np.arange(7) / 2
    measure = truth + rng.normal(0, 2, (40, 7))
    measure[3, 2] = np.nan
    return measure, truth / 5, resample(40)


class TestOrders:
    """Against scipy and plain loops."""

    def test_cells(self, numbers):
        measure, truth, samples = numbers
        means = np.nanmean(measure, axis=0), truth.mean(axis=0)
        value, low, high = correlate_cells(*numbers)
        assert value == pytest.approx(stats.spearmanr(*means)[0], abs=1e-4) and -1 <= low <= value <= high <= 1
        pairs = [*itertools.combinations(range(7), 2)]
        different = [(a, b) for a, b in pairs if abs(means[1][a] - means[1][b]) >= 0.01]
        right = [(means[0][a] > means[0][b]) == (means[1][a] > means[1][b]) for a, b in different]
        (share, low, high), count = order_cells(*numbers, pairs)
        assert (share, count) == (pytest.approx(np.mean(right), abs=1e-4), len(different)) and low <= share <= high
        assert order_cells(truth, truth, samples, pairs)[0] == pytest.approx([1, 0.95, 1], abs=0.05)
        assert order_cells(np.ones_like(truth), truth, samples, pairs)[0][0] == 0.5  # ties are half
        assert order_cells(truth, np.ones_like(truth), samples, pairs) == ([None] * 3, 0)

    def test_within_clips(self, numbers):
        right = [
            (m[a] > m[b]) == (t[a] > t[b])
            for m, t in zip(*numbers[:2], strict=True)
            for a, b in itertools.combinations(range(7), 2)
            if t[a] != t[b] and np.isfinite(m[a] + m[b])
        ]
        (share, low, high), count = order_within_clips(*numbers)
        assert (share, count) == (pytest.approx(np.mean(right), abs=1e-4), len(right)) and low < share < high

    def test_wrong_statements(self):
        rng = np.random.default_rng(3)
        wrong, clips = rng.random(300) < 0.2, rng.integers(0, 30, 300)
        scores = np.round(rng.normal(0, 1, 300) - wrong, 1)  # with ties
        value, low, high = auc(scores, wrong, clips, resample(30))
        u = stats.mannwhitneyu(scores[~wrong], scores[wrong]).statistic / (wrong.sum() * (~wrong).sum())
        assert value == pytest.approx(u, abs=1e-4) and low < value < high
        assert auc(scores, np.zeros(300, bool), clips, resample(30)) == [None] * 3

    def test_intervals_of_95_percent_cover(self):
        covered = []
        for seed in range(100):
            rng = np.random.default_rng(seed)
            wrong, clips = rng.random(400) < 0.3, np.repeat(np.arange(80), 5)
            scores = rng.normal(0, 1, 400) - wrong + rng.normal(0, 1, 80)[clips] * 0.5
            _, low, high = auc(scores, wrong, clips, resample(80, 200, seed))
            covered.append(low <= stats.norm.cdf(1 / np.sqrt(2 * 1.25)) <= high)
        assert np.mean(covered) > 0.88


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measures, "PROMPTS", measures.PROMPTS[:2])
    monkeypatch.setattr(measures, "DECODINGS", [measures.GREEDY, measures.SAMPLED[-1]])
    out, words = tmp_path / "measures.json", tmp_path / "words.jsonl"
    command = ["--clips", "3", "--out", str(out), "--folder", str(tmp_path)]
    append_lines = measures.append_lines

    def stop(path, line):
        append_lines(path, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(measures, "append_lines", stop)
        measures.main(command)
    first = words.read_text()
    assert first.count("\n") == 1 and not out.exists()
    measures.main(command)
    assert words.read_text().startswith(first) and words.read_text().count("\n") == 3
    results = json.loads(out.read_text())
    assert (results["clips"], results["cells"], results["captions"]) == (3, 4, 12)
    assert {row["measure"] for row in results["orders"]} == set(measures.MEASURES)
    assert all(row["pairs_of_captions"] for row in results["orders"])
    shown = [table.to_string() for table in tables(out)]
    assert capsys.readouterr().out.strip().endswith("\n\n".join(shown))
    with monkeypatch.context() as patched:  # all is done
        patched.setattr(measures, "ground", None)
        measures.main(command)
    again = json.loads(out.read_text())
    assert again | {"created": ""} == results | {"created": ""}


def test_words_have_the_scores_of_their_tokens():
    """Against `Captioner.score` of the same text."""
    import capkit

    demo = capkit.load_captioner("demo", device="cpu")
    scene = make_scene(3, held_out=True)
    clip = scene.sample()
    caption = demo.caption(clip)
    scores = measures._scores(capkit.captioning.ground(demo, clip, caption.text, leave_one_out=False))
    total = demo.score(clip, caption.text).total_logprob
    assert scores["text"] == caption.text.strip()
    assert [scores["text"][start:end].strip() for start, end, *_ in scores["words"]] == caption.text.split()
    assert sum(word[3] for word in scores["words"]) == pytest.approx(scores["log P"], abs=0.01)
    assert scores["log P"] == pytest.approx(total, abs=0.01)


def test_what_notebook_03_says_of_measures_holds_for_the_figures_beside_it():
    results = json.loads(measures.RESULTS.read_text())
    value = {
        (row["measure"], kind): row[kind][0]
        for row in results["orders"]
        if row["truth"] == "both"
        for kind in ("cells", "prompts", "decodings")
    }
    area = {(row["mistakes"], row["measure"]): row["auc"][0] for row in results["wrong_statements"]}
    assert value["supported_words", "cells"] == max(value[name, "cells"] for name in measures.MEASURES)
    assert min(value["supported_words", kind] for kind in ("prompts", "decodings")) > 0.9
    assert value["num_words", "prompts"] > 0.9 and value["num_words", "decodings"] < 0.5
    for name in ("support", "mean_logprob", "agreement"):
        assert value[name, "prompts"] < 0.55 and value[name, "decodings"] > 0.7
    for mistakes in ("greedy", "sampled"):
        assert area[mistakes, "support"] < area[mistakes, "log P"] < 0.9
    assert min(area["swapped", name] for name in ("support", "log P")) > 0.95
