"""Prompts with steps: what asking by hand gives, question by question, on every path; and what that costs."""

import dataclasses
import math
import threading
from collections import Counter

import pytest

import capkit
from capkit import Decoding, Prompt, run_sweep
from capkit.benchmark.models import SIZES, make_captioner, make_clip
from capkit.captioning import SharedVideo, ground, score_support
from capkit.runs import caption_clips, find_clips, new_record, request_settings
from capkit.runs.clips import DEMO_CLIPS

CHAIN = Prompt("Say it in one sentence.", steps=("How many objects are there?", "What do they do?"))
OTHERS = (
    Prompt("Why?"),
    Prompt("Is it so?", "vqa", steps=("Who?",)),
    Prompt("So what?", history=[("Where?", "Here.")], frame_numbers="seconds", steps=CHAIN.steps),
)
DECODINGS = (
    Decoding(max_new_tokens=9),
    Decoding(max_new_tokens=9, temperature=0.9, top_p=0.9, seed=4),
    Decoding(max_new_tokens=9, repetition_penalty=1.3, no_repeat_ngram_size=2),
)
CLIPS = sorted(map(str, DEMO_CLIPS.glob("*.mp4")))[:3]


def by_hand(captioner, clip, prompt, decoding):
    """The captions of all questions, each with the answers before it as its history."""
    captions, history = [], list(prompt.history)
    for question in (*prompt.steps, prompt.text):
        asked = Prompt(question, prompt.template, history, prompt.frame_numbers)
        captions.append(captioner.caption(clip, asked, decoding))
        history.append((question, captions[-1].text.strip()))
    return captions


def check(caption, hand, prompt):
    *steps, last = hand
    assert caption.token_ids == last.token_ids and caption.text == last.text
    assert caption.logprobs == pytest.approx(last.logprobs, abs=5e-4)
    assert (caption.finish_reason, caption.prompt, caption.decoding) == (last.finish_reason, prompt, last.decoding)
    assert caption.steps == tuple(zip(prompt.steps, [step.text.strip() for step in steps], strict=True))
    assert caption.step_finish_reasons == tuple(step.finish_reason for step in steps)


@pytest.fixture(scope="module")
def demo():
    return capkit.load_captioner("demo", device="cpu")


@pytest.mark.golden
@pytest.mark.parametrize("decoding", [*DECODINGS, Decoding(max_new_tokens=5, num_beams=3)], ids=str)
def test_is_what_asking_by_hand_gives(captioner, random_clip, decoding):
    """One clip, a batch of clips and prompts with and without steps, a stream, and many prompts of one clip."""
    clips, prompts = [random_clip(1 + seed, seed) for seed in range(4)], [*OTHERS, CHAIN]
    hands = [by_hand(captioner, clip, *one, decoding) for clip, one in zip(clips, zip(prompts), strict=True)]
    for caption, hand, prompt in zip(captioner.caption_batch(clips, prompts, decoding), hands, prompts, strict=True):
        check(caption, hand, prompt)
    for clip, hand, prompt in zip(clips, hands, prompts, strict=True):
        check(captioner.caption(clip, prompt, decoding), hand, prompt)
        together = SharedVideo(captioner, clip).caption([(one, decoding) for one in prompts])
        for caption, one in zip(together, prompts, strict=True):
            check(caption, by_hand(captioner, clip, one, decoding), one)
        if decoding.num_beams == 1:
            stream = captioner.stream(clip, prompt, decoding)
            assert "".join(stream) == hand[-1].text
            check(stream.caption, hand, prompt)


@pytest.mark.golden
def test_decodings_of_one_clip_together(captioner, random_clip, static):
    clip = random_clip(3)
    branches = [(prompt, decoding) for prompt in (*OTHERS, CHAIN) for decoding in DECODINGS]
    for one in (captioner, static):
        for caption, (prompt, decoding) in zip(SharedVideo(one, clip).caption(branches), branches, strict=True):
            check(caption, by_hand(captioner, clip, prompt, decoding), prompt)


@pytest.mark.golden
def test_with_static_caches_as_on_a_gpu(captioner, random_clip, static):
    clips, prompts = [random_clip(1 + seed, seed) for seed in range(4)], [*OTHERS, CHAIN]
    for decoding in DECODINGS:
        captions = static.caption_batch(clips, prompts, decoding)
        for caption, clip, prompt in zip(captions, clips, prompts, strict=True):
            check(caption, by_hand(captioner, clip, prompt, decoding), prompt)
    stream = static.stream(clips[0], CHAIN, DECODINGS[0])
    assert "".join(stream) == by_hand(captioner, clips[0], CHAIN, DECODINGS[0])[-1].text


def test_the_demo_model(demo):
    clip, few = capkit.load_clip(CLIPS[0]), Decoding(max_new_tokens=40)
    hand = by_hand(demo, clip, CHAIN, few)
    check(demo.caption(clip, [*CHAIN.steps, CHAIN.text], few), hand, CHAIN)
    check(next(SharedVideo(demo, clip).caption([(CHAIN, few)])), hand, CHAIN)
    assert {step.finish_reason for step in hand} == {"eos"} and len({step.text for step in hand}) == 3


def test_scores_are_those_of_the_last_answer(captioner, random_clip):
    clip = random_clip()
    caption = captioner.caption(clip, CHAIN, DECODINGS[0])
    assert captioner.score(clip, caption).logprobs == pytest.approx(caption.logprobs, abs=1e-4)
    asked = Prompt(CHAIN.text, history=caption.steps)
    assert caption.last_prompt == asked
    assert captioner.score(clip, caption, "Why?") == captioner.score(
        clip, caption, dataclasses.replace(asked, text="Why?")
    )
    grounded, by_text = ground(captioner, clip, [caption, caption.text.strip()], asked, leave_one_out=False)
    assert sum(grounded.logprobs) == pytest.approx(captioner.score(clip, caption).total_logprob, abs=1e-3)
    with pytest.raises(ValueError, match="steps: are asked one after another"):
        captioner.score(clip, "A text.", CHAIN)


def test_support_is_measured_with_the_answers(demo, tmp_path):
    records = run_sweep(demo, CLIPS[:1], prompts=[CHAIN], decodings=[{"max_new_tokens": 20}]).records
    text = records[0]["text"]
    asked = Prompt(CHAIN.text, history=list(zip(records[0]["steps"], records[0]["step_answers"], strict=True)))
    grounding = ground(demo, capkit.load_clip(CLIPS[0]), text, asked, leave_one_out=False)
    assert score_support(demo, records)["support"][0] == pytest.approx(grounding.support.mean(), abs=1e-3)


# ---- cost ----------------------------------------------------------------------------------------------------------

TEN = Prompt(
    "Sum it up in one sentence.", steps=[f"What happens in part {number} of this video?" for number in range(10)]
)


@pytest.fixture
def counted(monkeypatch):
    """A thin model with the frames of the benchmark's "small" one; counts positions in its decoder, and frames."""
    shape = SIZES["tiny"].config
    vision = {name: SIZES["small"].config["vision_config"][name] for name in ("image_size", "num_positions")}
    config = shape | {"vision_config": shape["vision_config"] | vision}
    size = dataclasses.replace(SIZES["small"], config=config)
    _, captioner = make_captioner(size, device="cpu", dtype="float32")
    count, model = Counter(), captioner.model.model
    model.layers[0].register_forward_hook(lambda *args: count.update(positions=args[-1].shape[:-1].numel()))
    encode = model.get_video_features
    monkeypatch.setattr(model, "get_video_features", lambda pixels: count.update(frames=len(pixels)) or encode(pixels))
    return captioner, make_clip(size, 0), count


def test_ten_questions_and_a_summary_cost_at_most_a_third(counted):
    """Of asking them one by one, each with all frames, in positions that the decoder computes."""
    captioner, clip, count = counted
    few = Decoding(max_new_tokens=24)
    hand = by_hand(captioner, clip, TEN, few)
    one_by_one = dict(count)
    assert one_by_one["frames"] == 11 * 24
    for way in (
        lambda: captioner.caption(clip, TEN, few),
        lambda: next(SharedVideo(captioner, clip).caption([(TEN, few)])),
    ):
        count.clear()
        caption = way()
        check(caption, hand, TEN)
        print(one_by_one, dict(count))
        assert count["frames"] == 24 and count["positions"] <= one_by_one["positions"] / 3
        # The video once; each question once, each answer twice: when it is chosen, and as history.
        video, texts = (
            len(captioner.processor.video_ids(clip, TEN)),
            len(captioner.processor.text_ids(caption.last_prompt)),
        )
        assert count["positions"] < video + texts + 11 * few.max_new_tokens + 50


def test_steps_that_prompts_share_are_answered_once(counted):
    captioner, clip, count = counted
    few = Decoding(max_new_tokens=8)
    (alone,) = SharedVideo(captioner, clip).caption([(CHAIN, few)])
    before = count.pop("positions")
    prompts = [dataclasses.replace(CHAIN, text=text) for text in (CHAIN.text, "Why?", "Who?")]
    first, *others = SharedVideo(captioner, clip).caption([(prompt, few) for prompt in prompts])
    assert first.token_ids == alone.token_ids and {other.steps for other in others} == {alone.steps}
    assert count["positions"] < 1.1 * before


# ---- ends before its time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "In this clip,"])
def test_stop_ends_all(captioner, random_clip, monkeypatch, tmp_path, prefix):
    generate, calls, is_ready, streams = captioner.model.generate, [], threading.Event(), []

    def stopped_at_the_second(*args, **kwargs):
        calls.append(1)
        is_ready.wait(10)
        if len(calls) == 2:
            streams[0].stop()
        return generate(*args, **kwargs)

    monkeypatch.setattr(captioner.model, "generate", stopped_at_the_second)
    clip = random_clip()
    streams.append(captioner.stream(clip, dataclasses.replace(CHAIN, answer_prefix=prefix), DECODINGS[0]))
    is_ready.set()
    assert "".join(streams[0]) == streams[0].caption.text == prefix
    caption = streams[0].caption
    assert (caption.token_ids, caption.finish_reason) == ([], "stopped") and len(calls) == 2
    assert len(caption.steps) == 2 and caption.step_finish_reasons == ("length", "stopped")
    assert math.isnan(caption.mean_logprob)
    store = capkit.CaptionStore(tmp_path / "captions.jsonl")
    store.append(new_record(request_settings(captioner, CLIPS[0], CHAIN, DECODINGS[0]), caption, clip))
    (record,) = store.current()
    assert record["status"] == "ok" and record["mean_logprob"] is None and store.done() == set()
    assert record["step_answers"] == [answer for _, answer in caption.steps]


@pytest.fixture
def cramped(captioner, monkeypatch):
    """cramped(clip, n): n tokens fit behind the clip and the questions of the chain, for all answers together."""

    def limit(clip, num_tokens):
        most = captioner.model.config.max_position_embeddings - captioner.tokens_that_fit(clip, CHAIN) + num_tokens
        monkeypatch.setattr(captioner.model.config, "max_position_embeddings", most)

    return limit


def test_an_error_in_a_step_is_of_its_row_alone(captioner, cramped, tmp_path):
    """The complete clip has no room for its last question behind two answers; a window of four frames has."""
    uniform, few = {"strategy": "uniform", "num_frames": 24}, Decoding(max_new_tokens=9)
    items = find_clips([{"video": CLIPS[0], "end": 0.12}, {"video": CLIPS[0]}])
    part, complete = (capkit.load_clip(item.video, uniform, item.start, item.end) for item in items)
    assert len(complete) - len(part) > 15
    cramped(complete, 12)
    with pytest.raises(ValueError, match="reads at most .* the history [1-9]"):
        captioner.caption(complete, CHAIN, few)
    records = caption_clips(captioner, items, tmp_path / "a.jsonl", CHAIN, few, uniform, batch_size=2)
    assert [record["status"] for record in records] == ["ok", "error"]
    assert records[0]["text"] == captioner.caption(part, CHAIN, few).text
    assert "reads at most" in records[1]["error"] and "step_answers" not in records[1]
    axes = {"prompts": [CHAIN, "Why?"], "decodings": [few], "frame_samplings": [uniform]}
    result = run_sweep(captioner, items, tmp_path / "b.jsonl", **axes)
    assert [record["status"] for record in result.records] == ["ok", "ok", "error", "ok"]


def test_a_run_that_ends_within_a_chain_goes_on_with_nothing_twice(captioner, tmp_path, monkeypatch):
    items, store, few = find_clips(CLIPS), capkit.CaptionStore(tmp_path / "a.jsonl"), Decoding(max_new_tokens=4)
    generate, calls = captioner.model.generate, []

    def ended_at_the_fifth(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(captioner.model, "generate", ended_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        caption_clips(captioner, items, store, CHAIN, few)
    assert len(store.lines()) == 1
    records = caption_clips(captioner, items, store, CHAIN, few)
    assert len(calls) == 5 + 2 * 3 and store.lines() == records and len(records) == 3
    for record in records:
        caption = captioner.caption(capkit.load_clip(record["video"]), CHAIN, few)
        assert (record["text"], record["steps"]) == (caption.text, list(CHAIN.steps))
        assert record["step_answers"] == [answer for _, answer in caption.steps]
        assert record["step_finish_reasons"] == ["length", "length"]


def test_what_cannot_be_asked_is_refused_before_any_work(captioner, random_clip, cramped):
    clip = random_clip()
    special = captioner.processor.tokenizer.pad_token
    for prompt, message in (
        ([], "must be a text"),
        (["Why?", ""], "must be a text that is not empty"),
        (["", "Why?"], "steps='': must be a text"),
        ({"steps": "Why?"}, r"steps='Why\?': must be a list of questions"),
        ({"steps": ["Why?"], "template": "base"}, 'steps: no effect under template "base"'),
        ([f"{special}?", "Why?"], "marks the frames"),
    ):
        for call in (
            captioner.caption,
            captioner.stream,
            lambda clip, prompt: captioner.caption_batch([clip], [prompt]),
        ):
            with pytest.raises(ValueError, match=message):
                call(clip, prompt)
    with pytest.raises(ValueError, match="2 prompts for 1 clips"):
        captioner.caption_batch([clip], ["Who?", "Why?"])
    with pytest.raises(ValueError, match="steps: are asked one after another"):
        captioner.processor(clip, CHAIN)
    cramped(clip, 0)
    with pytest.raises(ValueError, match="reads at most"):
        captioner.stream(clip, CHAIN)
