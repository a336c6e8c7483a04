"""The model's context length: what is beyond it is refused everywhere, and captions end there."""

import dataclasses
import json
import re

import numpy as np
import pytest

import capkit
from capkit import Captioner, CaptionStore, Decoding, Prompt, run_sweep
from capkit.captioning import SharedVideo, ground, score_support
from capkit.cogvlm2 import rotary_position_ids
from capkit.runs import caption_clips, find_clips
from capkit.runs.clips import DEMO_CLIPS

FEW = Decoding(max_new_tokens=12)
CLIPS = sorted(map(str, DEMO_CLIPS.glob("*.mp4")))[:2]
ENDED = "ended by the model's context length, {} positions \\(max_position_embeddings\\), before max_new_tokens=12"


def num_positions(captioner, clip, prompt):
    """From the positions that the model itself gives to the processor's ids."""
    ids = captioner.processor(clip, prompt)["input_ids"]
    return int(rotary_position_ids(ids, captioner.model.config.video_token_id).max()) + 1


@pytest.fixture
def set_room(captioner, monkeypatch):
    """set_room(clip, prompt, n): n new tokens fit behind these; returns max_position_embeddings."""

    def set_room(clip, prompt, room):
        most = num_positions(captioner, clip, prompt) + room
        monkeypatch.setattr(captioner.model.config, "max_position_embeddings", most)
        return most

    return set_room


LONG = "word " * 20_000


@pytest.mark.parametrize(
    "prompt, num_frames, advice",
    [
        (Prompt(LONG), 3, "3 frames take 13, the history 0, the prompt {}; shorten the prompt"),
        (Prompt("Why?", history=[("Who?", LONG)]), 3, "shorten the history"),
        (Prompt("Why?"), 600, "600 frames take {}, the history 0, the prompt {}; use fewer frames"),
        (Prompt(LONG, "vqa"), 3, "shorten the prompt"),
    ],
)
def test_too_much_is_refused_everywhere(captioner, random_clip, prompt, num_frames, advice):
    clip = random_clip(num_frames, height=4, width=4)
    caption = capkit.Caption(" A", [5], [-1.0], "length", prompt, FEW, 1.0)
    for call in (
        lambda: captioner.caption(clip, prompt),
        lambda: captioner.caption(clip, prompt, Decoding(num_beams=2)),
        lambda: captioner.caption_batch([random_clip(), clip], ["Why?", prompt], batch_size=1),
        lambda: captioner.stream(clip, prompt),
        lambda: captioner.score(clip, "A star.", prompt),
        lambda: captioner.score(clip, caption),
        lambda: list(SharedVideo(captioner, clip).caption([("Why?", FEW), (prompt, FEW)])),
        lambda: ground(captioner, clip, "A star.", prompt),
        lambda: ground(captioner, clip, [caption]),
    ):
        with pytest.raises(ValueError, match="at most 2048 positions .max_position_embeddings") as error:
            call()
        assert re.search(advice.replace("{}", r"\d+"), str(error.value))


@pytest.mark.parametrize("template", ["chat", "vqa", "base"])
def test_rotary_positions_count_and_the_last_one_is_used(captioner, random_clip, set_room, template):
    clip, prompt = random_clip(3), Prompt("Why?", template)
    set_room(clip, prompt, 0)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        captioner.caption(clip, prompt, Decoding(max_new_tokens=1))
    set_room(clip, prompt, 1)
    assert captioner.tokens_that_fit(clip, prompt) == 1
    assert len(captioner.caption(clip, prompt, Decoding(max_new_tokens=1)).token_ids) == 1  # and no warning
    ids = captioner.processor.continuation_ids("A green star.")
    set_room(clip, prompt, len(ids))
    score = captioner.score(clip, "A green star.", prompt)
    grounding = ground(captioner, clip, "A green star.", prompt)
    set_room(clip, prompt, len(ids) - 1)
    for refused in (captioner.score, lambda *asked: ground(captioner, *asked)):
        with pytest.raises(
            ValueError, match=f"the text has {len(ids)} tokens, and {len(ids) - 1} fit .* shorten the text"
        ):
            refused(clip, "A green star.", prompt)
    assert score.token_ids == grounding.token_ids == ids


@pytest.mark.parametrize("on_graphs", [False, True])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 2}, {"num_beams": 2}])
def test_captions_end_at_the_context_length(captioner, random_clip, set_room, monkeypatch, settings, on_graphs):
    """In a batch, a stream and a sweep each has the tokens of a caption that is asked to be so short."""
    decoding = dataclasses.replace(FEW, **settings)
    clips, prompts = [random_clip(2), random_clip(3)], ["Why?", "Why not?"]
    room = {}
    for clip, prompt in zip(clips, prompts, strict=True):
        room[prompt] = 9 + num_positions(captioner, clips[0], "Why?") - num_positions(captioner, clip, prompt)
    assert 0 < room["Why not?"] < room["Why?"] == 9
    short = [
        captioner.caption(clip, prompt, dataclasses.replace(decoding, max_new_tokens=room[prompt]))
        for clip, prompt in zip(clips, prompts, strict=True)
    ]
    most = set_room(clips[0], "Why?", 9)
    if on_graphs:
        monkeypatch.setattr("capkit.captioning.graphs.STATIC_DEVICES", ("cpu",))
        captioner = Captioner(captioner.model, captioner.processor)
    with pytest.warns(UserWarning, match=ENDED.format(most)):
        together = captioner.caption_batch(clips, prompts, decoding)
    with pytest.warns(UserWarning, match=ENDED.format(most)):
        shared = [
            next(iter(SharedVideo(captioner, clip).caption([(prompt, decoding)])))
            for clip, prompt in zip(clips, prompts, strict=True)
        ]
    for captions in (together, shared):
        assert [caption.token_ids for caption in captions] == [caption.token_ids for caption in short]
        assert {(caption.finish_reason, caption.decoding) for caption in captions} == {("length", decoding)}
        assert [len(caption.logprobs) for caption in captions] == list(map(room.get, prompts))
    assert captioner.score(clips[0], together[0]).logprobs == pytest.approx(together[0].logprobs, abs=1e-4)
    if decoding.num_beams == 1:
        with pytest.warns(UserWarning, match=ENDED.format(most)):
            stream = captioner.stream(clips[0], "Why?", decoding)
            assert "".join(stream) == short[0].text
        assert stream.caption.token_ids == short[0].token_ids


def test_a_clip_or_prompt_beyond_it_does_not_stop_the_others(captioner, tmp_path):
    rows = [{"video": CLIPS[0]}, {"video": CLIPS[1], "prompt": LONG}, {"video": CLIPS[1]}]
    (tmp_path / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    items, store = find_clips(tmp_path / "clips.jsonl"), CaptionStore(tmp_path / "captions.jsonl")
    records = caption_clips(captioner, items, store, decoding=FEW, batch_size=3)
    assert [record["status"] for record in records] == ["ok", "error", "ok"]
    assert CLIPS[1] in records[1]["error"] and "shorten the prompt" in records[1]["error"]
    swept = run_sweep(captioner, CLIPS, prompts=["Why?", LONG, "Who?"], decodings=[FEW])
    assert [record["status"] for record in swept.records] == 2 * ["ok", "error", "ok"]
    edited = swept.records[0] | {"text": LONG}
    columns = score_support(captioner, [swept.records[0] | {"text": "A star."}, edited])
    assert all(np.isnan(column).tolist() == [False, True] for column in columns.values())


def test_what_generation_settings_beside_the_model_say_has_no_effect(new_captioner, random_clip):
    from transformers import GenerationConfig

    captioner, clip = new_captioner, random_clip()
    decodings = [FEW, dataclasses.replace(FEW, temperature=1.0), dataclasses.replace(FEW, num_beams=3)]

    def all_ways():
        alone = [captioner.caption(clip, "Why?", decoding) for decoding in decodings]
        batch, stream = captioner.caption_batch([clip, clip], "Why?", FEW), captioner.stream(clip, "Why?", FEW)
        shared = SharedVideo(captioner, clip).caption([("Why?", decoding) for decoding in decodings])
        scores = captioner.score(clip, "A star.").logprobs
        return [caption.token_ids for caption in (*alone, *batch, stream.caption, *shared)], scores

    before = all_ways()
    first = before[0][0][0]
    for settings in (
        {"repetition_penalty": 5.0},
        {"bad_words_ids": [[first]]},
        {"suppress_tokens": [first]},
        {"forced_eos_token_id": 5},
        {"min_new_tokens": 8, "eos_token_id": 3},
        {"length_penalty": -9.0, "num_beams": 4, "early_stopping": True},
        {"exponential_decay_length_penalty": [1, 9.0]},
        {"sequence_bias": [[[first], -20.0]]},
        {"stop_strings": ["a"], "max_length": 3},
        {"do_sample": True, "temperature": 9.0, "cache_implementation": "static"},
    ):
        captioner.model.generation_config = GenerationConfig(**settings)
        assert all_ways() == before, settings
    config = captioner.model.config
    config.repetition_penalty, config.bad_words_ids, config.min_length = 5.0, [[first]], 50
    assert all_ways() == before
