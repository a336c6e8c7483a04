"""Blind ratings: nothing on screen tells the two apart, nothing rated is lost or asked again."""

import base64
import json
import re

import pandas as pd
import pytest
from PIL import Image

from capkit import CaptionStore
from capkit.playground import BlindRating
from capkit.playground.blind import rankings, read_ratings, variant_name

PROMPTS = ("Describe it.", "What happens?", "Why?")


def record(video, prompt, text, **fields):
    made = {
        "request": f"{video} {prompt}",
        "video": f"/clips/{video}.mp4",
        "prompt": prompt,
        "template": "chat",
        "frame_sampling": {"strategy": "chat", "num_frames": 24, "frames_per_second": None},
        "decoding": {"max_new_tokens": 2048},
        "status": "ok" if text else "error",
        "text": text,
        "error": None if text else "broken",
        "strip": "none.webp",
    }
    return made | fields


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for video in "abcdef":
        for prompt in PROMPTS[:2]:
            store.append(record(video, prompt, f" <b>{video}</b> in answer {PROMPTS.index(prompt)}"))
    store.append(record("a", PROMPTS[2], None))  # failed: nothing to compare
    store.append(record("g", PROMPTS[0], "alone"))
    return store


def test_every_pair_is_shown_once_in_an_order_of_its_seed(store, tmp_path):
    rating = BlindRating(store, tmp_path / "ratings.jsonl")
    assert sorted(clip for clip, *_ in rating.pairs) == [f"/clips/{video}.mp4" for video in "abcdef"]
    assert rating.pairs == BlindRating(store, tmp_path / "ratings.jsonl").pairs
    others = [BlindRating(store, tmp_path / "ratings.jsonl", seed=seed).pairs for seed in range(1, 5)]
    assert any(pairs != rating.pairs for pairs in others)
    firsts = [first for pairs in others for _, first, _ in pairs]
    assert 4 <= sum(PROMPTS[0] in first for first in firsts) <= 20  # either may stand on either side


def test_nothing_tells_where_a_caption_comes_from(store, tmp_path):
    rating = BlindRating(store, tmp_path / "ratings.jsonl")
    assert not any(prompt in rating.shown.value for prompt in PROMPTS)
    assert "&lt;b&gt;" in rating.shown.value and "<b>a" not in rating.shown.value
    assert rating.static()._repr_html_() == rating.shown.value


def test_ratings_are_kept_and_a_second_sitting_goes_on(store, tmp_path):
    path = tmp_path / "sub" / "ratings.jsonl"
    rating = BlindRating(store, path, seed=3)
    pairs = list(rating.pairs)
    for button, outcome in zip(rating.buttons.children, ("first", "tie", "second"), strict=True):
        button.click()
        assert read_ratings(path)[-1]["outcome"] == outcome
    assert [(one["clip"], one["first"], one["second"]) for one in read_ratings(path)] == pairs[:3]
    again = BlindRating(store, path, seed=3)
    assert again.pairs == pairs[3:]
    for _ in range(3):
        again.rate("tie")
    assert "All rated" in again.shown.value and all(button.disabled for button in again.buttons.children)
    with pytest.raises(ValueError, match="outcome"):
        again.rate("tie")


def test_the_better_variant_comes_first(store, tmp_path):
    rating = BlindRating(store, tmp_path / "ratings.jsonl")
    while rating.pairs:
        _, first, _ = rating.pairs[0]
        rating.rate("first" if PROMPTS[1] in first else "second")
    table, pairs = rankings(read_ratings(tmp_path / "ratings.jsonl"))
    assert PROMPTS[1] in table["variant"][0] and table["strength"][0] > 0
    assert PROMPTS[1] in pairs["stronger"][0] and pairs["difference"][0] == pytest.approx(2 * table["strength"][0])


def test_a_hand_edit_is_what_is_rated(store, tmp_path):
    for video in "abcdef":
        store.edit(f"{video} {PROMPTS[0]}", "by hand")
    assert "by hand" in BlindRating(store, tmp_path / "ratings.jsonl").shown.value


def test_what_was_stopped_half_way_is_not_rated(store, tmp_path):
    store.append(record("g", PROMPTS[1], "half a") | {"finish_reason": "stopped"})
    assert not any("/g.mp4" in clip for clip, *_ in BlindRating(store, tmp_path / "ratings.jsonl").pairs)


def test_only_the_variants_asked_for(store, tmp_path):
    store.append(record("a", PROMPTS[2], "a third"))
    names = [variant_name(record("a", prompt, "x")) for prompt in PROMPTS]
    rating = BlindRating(store, tmp_path / "ratings.jsonl", variants=names[1:])
    assert [set(pair) for _, *pair in rating.pairs] == [set(names[1:])]
    with pytest.raises(ValueError, match="two variants"):
        BlindRating(store, tmp_path / "ratings.jsonl", variants=names[:1])


def test_windows_of_a_video_are_clips_and_no_variants(tmp_path):
    store, windows = CaptionStore(tmp_path / "captions.jsonl"), [(0.0, 2.0), (4.0, 6.0)]
    for start, end in windows:
        window = {"start_seconds": start, "end_seconds": end, "strip": f"{start:g}.webp"}
        store.append(record("a", PROMPTS[0], f"{start} zero", request=f"0 {start}", **window))
    with pytest.raises(ValueError, match="no clip has captions of two variants"):
        BlindRating(store, tmp_path / "ratings.jsonl")
    for start, end in windows:
        window = {"start_seconds": start, "end_seconds": end, "strip": f"{start:g}.webp"}
        store.append(record("a", PROMPTS[1], f"{start} one", request=f"1 {start}", **window))
        write_strip(store, f"{start:g}.webp", "red" if start else "blue")
    rating, seen = BlindRating(store, tmp_path / "ratings.jsonl"), []
    assert len(rating.pairs) == 2 and len({clip for clip, *_ in rating.pairs}) == 2
    assert len({frozenset(names) for _, *names in rating.pairs}) == 1
    while rating.pairs:
        (start,) = {start for start, _ in windows if f"{start} zero" in rating.shown.value}
        assert f"{start} one" in rating.shown.value and f"{start:g} to {start + 2:g} s" in rating.shown.value
        assert shown_strips(rating) == [store.strips.joinpath(f"{start:g}.webp").read_bytes()]
        seen.append(start)
        rating.rate("tie")
    assert sorted(seen) == [0.0, 4.0] and rankings(read_ratings(tmp_path / "ratings.jsonl"))[0][
        "num_comparisons"
    ].tolist() == [2, 2]


def test_each_caption_has_the_frames_that_it_was_made_from(tmp_path):
    store = CaptionStore(tmp_path / "captions.jsonl")
    for name, colour in (("chat", "red"), ("uniform", "blue")):
        sampling = {"strategy": name, "num_frames": 3, "frames_per_second": None}
        made = record("a", PROMPTS[0], f"by {name}", request=name, frame_sampling=sampling, strip=f"{name}.webp")
        store.append(made)
        write_strip(store, f"{name}.webp", colour)
    rating = BlindRating(store, tmp_path / "ratings.jsonl")
    order = sorted(("chat", "uniform"), key=lambda name: rating.shown.value.index(f"by {name}"))
    assert shown_strips(rating) == [store.strips.joinpath(f"{name}.webp").read_bytes() for name in order]


def write_strip(store, name, colour):
    store.strips.mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(store.strips / name, "webp")


def shown_strips(rating):
    return [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", rating.shown.value)]


def test_damaged_ratings_are_named(store, tmp_path):
    path = tmp_path / "ratings.jsonl"
    rating = BlindRating(store, path)
    rating.rate("first")
    good = read_ratings(path)
    for line in ({"clip": "a"}, good[0] | {"outcome": "both"}, good[0] | {"first": 3}):
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match="is no rating; mend or delete this line"):
            read_ratings(path)
    path.write_text(json.dumps(good[0]) + '\n{"clip": "\u2028')  # a process was killed while it wrote
    with pytest.warns(UserWarning, match="line 2 is not valid JSON; skipped"):
        again = BlindRating(store, path)
        again.rate("tie")
        assert len(read_ratings(path)) == 2 and len(BlindRating(store, path).pairs) == len(rating.pairs) - 1
    assert read_ratings(tmp_path / "none.jsonl") == []


def test_prompts_with_separators_and_a_torn_line_lose_no_rating(store, tmp_path):
    store.append(record("h", "Describe\u2028it\x85 \u2029now.\r", "one"))
    store.append(record("h", PROMPTS[1], "two"))
    path = tmp_path / "ratings.jsonl"
    rating = BlindRating(store, path)
    rated = []
    while len(rating.pairs) > 1:
        rated.append((rating.pairs[0][0], *sorted(rating.pairs[0][1:])))
        rating.rate("tie")
    assert [(one["clip"], *sorted((one["first"], one["second"]))) for one in read_ratings(path)] == rated
    path.write_bytes(path.read_bytes()[:-20])  # the last one is torn: killed while it was written
    with pytest.warns(UserWarning, match=f"line {len(rated)} is not valid JSON"):
        again = BlindRating(store, path)
    assert len(again.pairs) == 2
    again.rate("first")
    with pytest.warns(UserWarning, match=f"line {len(rated)} is not valid JSON"):
        assert [one["outcome"] for one in read_ratings(path)] == ["tie"] * (len(rated) - 1) + ["first"]


def test_undo_brings_back_what_was_rated_or_skipped_also_after_all_are_rated(store, tmp_path):
    path = tmp_path / "ratings.jsonl"
    rating = BlindRating(store, path)
    pairs = list(rating.pairs)
    assert rating.undo_button.disabled
    rating.skip_button.click()
    assert rating.pairs == [*pairs[1:], pairs[0]] and not path.exists()
    for _ in range(6):
        rating.rate("first")
    assert not rating.pairs and rating.skip_button.disabled and len(read_ratings(path)) == 6
    rating.undo_button.click()  # the last, which was skipped at first
    assert rating.pairs == [pairs[0]] and not any(button.disabled for button in rating.buttons.children)
    rating.rate("second")
    assert [one["outcome"] for one in read_ratings(path)] == ["first"] * 5 + ["second"]
    for _ in range(6):
        rating.undo()
    assert rating.pairs == [*pairs[1:], pairs[0]] and read_ratings(path) == []
    rating.undo()
    assert rating.pairs == pairs and rating.undo_button.disabled
    assert BlindRating(store, path).pairs == pairs  # another sitting: nothing is rated


def test_the_ranking_so_far_is_shown_and_on_disk(store, tmp_path):
    path = tmp_path / "ratings.jsonl"
    rating = BlindRating(store, path)
    assert "nothing is rated" in rating.ranking.value
    for _ in range(3):
        _, first, _ = rating.pairs[0]
        rating.rate("first" if PROMPTS[1] in first else "second")
    table = pd.read_csv(tmp_path / "ratings_ranking.csv")
    assert PROMPTS[1] in table["variant"][0] and list(table["num_comparisons"]) == [3, 3]
    assert PROMPTS[1] in pd.read_csv(tmp_path / "ratings_ranking_pairs.csv")["stronger"][0]
    assert f"{table['strength'][0]:.2f}" in rating.ranking.value
    assert BlindRating(store, path).ranking.value == rating.ranking.value  # after a restart
    rating.undo()
    assert list(pd.read_csv(tmp_path / "ratings_ranking.csv")["num_comparisons"]) == [2, 2]
