"""Grounding: the differences are those of scoring the videos in question one by one."""

import dataclasses

import numpy as np
import pytest
import torch

from capkit import Caption, Clip, Decoding, Prompt
from capkit.captioning import GREY, SharedVideo, count_supported, ground

pytestmark = pytest.mark.golden  # caches and masks, on the oldest transformers too
TEXT = "A red star moves to the left, and then a blue circle appears at second 3."


@pytest.fixture
def clip(random_clip):
    return random_clip(5)


def with_grey(clip, frames):
    changed = clip.frames.copy()
    changed[frames] = GREY
    return Clip.from_frames(changed, clip.timestamps_seconds)


@pytest.mark.parametrize("template", ["chat", "vqa", "base"])
def test_each_way_is_what_scoring_that_video_gives(captioner, clip, template):
    prompt = Prompt("What happens?", template)
    grounding = ground(captioner, clip, TEXT, prompt)
    score = captioner.score(clip, TEXT, prompt)
    assert (grounding.token_ids, grounding.tokens) == (score.token_ids, score.tokens)
    assert grounding.logprobs == pytest.approx(np.array(score.logprobs), abs=2e-4)
    grey = captioner.score(with_grey(clip, slice(None)), TEXT, prompt)
    assert grounding.support == pytest.approx(np.subtract(score.logprobs, grey.logprobs), abs=4e-4)
    assert grounding.total_support == pytest.approx(score.total_logprob - grey.total_logprob, abs=4e-3)
    assert grounding.leaning.shape == (5, len(score.token_ids))
    for frame in range(5):
        without = captioner.score(with_grey(clip, frame), TEXT, prompt)
        assert grounding.leaning[frame] == pytest.approx(np.subtract(score.logprobs, without.logprobs), abs=4e-4)


def test_several_captions_go_together_and_each_is_what_it_is_alone(captioner, clip):
    few = Decoding(max_new_tokens=7)
    generated = [
        captioner.caption(clip, Prompt("Why?", history=[("Who?", "She.")]), few),
        captioner.caption(clip, Prompt("Why?", "vqa"), dataclasses.replace(few, temperature=1.0)),
        captioner.caption(clip, Prompt("When?", frame_numbers="seconds"), few),
    ]
    captions = [TEXT, *generated, "Short."]
    together = ground(captioner, clip, captions)
    for caption, grounding in zip(captions, together, strict=True):
        alone = ground(captioner, clip, caption)
        assert grounding.token_ids == alone.token_ids
        assert grounding.support == pytest.approx(alone.support, abs=4e-4)
        assert grounding.leaning == pytest.approx(alone.leaning, abs=4e-4)
    for caption, grounding in zip(generated, together[1:], strict=False):  # a Caption's own tokens and settings
        assert grounding.logprobs == pytest.approx(np.array(caption.logprobs), abs=2e-4)


def test_frames_are_encoded_once(captioner, clip, monkeypatch):
    counted, encode = [], captioner.model.model.get_video_features
    monkeypatch.setattr(
        captioner.model.model, "get_video_features", lambda pixels: counted.append(len(pixels)) or encode(pixels)
    )
    ground(captioner, clip, [TEXT, "Short."])
    assert sum(counted) == 5 + 1  # and one grey frame for all


def test_words_take_their_tokens_together(captioner, clip):
    grounding = ground(captioner, clip, "Ein grüner Stern, \U0001f31f!")
    assert "".join(word for word, _ in grounding.words).startswith("EingrünerStern,")
    taken = [range(*tokens.indices(len(grounding.tokens))) for _, tokens in grounding.words]
    assert [place for places in taken for place in places] == list(range(len(grounding.tokens)))
    assert grounding.of_words(grounding.support).sum() == pytest.approx(grounding.total_support)
    assert grounding.of_words(grounding.leaning).shape == (5, len(grounding.words))


def test_the_end_token_belongs_to_no_word(captioner, clip):
    prompt, end = Prompt("Why?"), captioner.model.config.eos_token_id
    ids = captioner.processor.continuation_ids(TEXT)
    caption = Caption(f" {TEXT}", [*ids, end], [-1.0] * (len(ids) + 1), "eos", prompt, Decoding(), 1.0)
    grounding, plain = ground(captioner, clip, [caption, TEXT], prompt, leave_one_out=False)
    assert grounding.token_ids == ids and grounding.words == plain.words and grounding.words[-1][0] == "3."
    assert grounding.support == pytest.approx(plain.support, abs=4e-4)
    with pytest.raises(ValueError, match="no text to score"):
        ground(captioner, clip, dataclasses.replace(caption, token_ids=[end], text=""))


CLAUSE = "a red star moves to the left, then it"  # 9 words


@pytest.mark.parametrize(
    ("text", "num_counted"),
    [
        (CLAUSE, 9),
        (f"{CLAUSE} stops", 10),
        (" ".join([CLAUSE] * 5), 9),
        (f"{CLAUSE} {CLAUSE.title()}! {CLAUSE}", 9),  # case and punctuation
        (f"{CLAUSE} stops. {CLAUSE} stops. {CLAUSE} grows.", 11),
        (f"{CLAUSE} stops, and {CLAUSE}", 11),
        ("a red star moves to the left; a red star moves to the left.", 14),  # seven words: people say so
        ("so " * 30, 1),
        ("red, blue, " * 10, 2),
        ("* " * 20 + "-", 2),  # words of punctuation alone
        ("", 0),
    ],
)
def test_words_of_a_loop_count_once(text, num_counted):
    """A word counts with its support, at most 1, and not at all where eight in a row have been said before."""
    words = text.split()
    assert count_supported(words, np.full(len(words), 3.0)) == num_counted
    assert count_supported(words, np.full(len(words), -0.5)) == -0.5 * num_counted


def test_a_caption_in_a_loop_has_no_more_supported_words(captioner, clip):
    once, often = ground(captioner, clip, [TEXT, " ".join([TEXT] * 4)], leave_one_out=False)
    assert len(often.words) == 4 * len(once.words)
    assert often.supported_words == pytest.approx(once.supported_words, abs=2e-3)


def test_without_leaving_frames_out(captioner, clip):
    grounding = ground(captioner, clip, TEXT, leave_one_out=False)
    assert grounding.frame_logprobs is None
    assert grounding.support == pytest.approx(ground(captioner, clip, TEXT).support, abs=4e-4)
    with pytest.raises(ValueError, match="leave_one_out"):
        assert grounding.leaning is None


def test_nonsense_is_refused(captioner, clip):
    for captions, settings in (
        ("", {}),
        ([TEXT, " "], {}),
        (TEXT, {"prompt": {"template": "poem"}}),
        (TEXT, {"prompt": ""}),
    ):
        with pytest.raises(ValueError):
            ground(captioner, clip, captions, **settings)
    assert ground(captioner, clip, []) == []


def test_a_cache_in_use_is_not_touched(captioner, clip):
    video, branch = SharedVideo(captioner, clip), [("Why?", Decoding(max_new_tokens=5))]
    before = next(iter(video.caption(branch))).token_ids
    ground(captioner, clip, TEXT)
    assert next(iter(video.caption(branch))).token_ids == before


def test_short_of_memory_fewer_captions_are_scored_together(captioner, clip, monkeypatch):
    """Memory runs out inside a layer, where the layers before it already hold the new positions."""
    captions = [f"{TEXT} {number}" for number in range(20)]
    expected = ground(captioner, clip, captions)
    mlp, sizes, a_text = captioner.model.model.layers[1].mlp, [], 60  # at least; the videos' prefills are longer
    forward, most = mlp.forward, [4 * a_text]
    num_video = len(captioner.processor.video_ids(clip, Prompt()))

    def short_of_memory(hidden):
        if hidden.shape[1] != num_video:
            sizes.append(hidden.shape[1])
            if hidden.shape[1] > most[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden)

    monkeypatch.setattr(mlp, "forward", short_of_memory)
    for grounding, right in zip(ground(captioner, clip, captions, leave_one_out=False), expected, strict=True):
        assert grounding.support == pytest.approx(right.support, abs=4e-4)
    assert max(sizes) > most[0] and min(sizes) < most[0]
    most[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        ground(captioner, clip, captions, leave_one_out=False)
