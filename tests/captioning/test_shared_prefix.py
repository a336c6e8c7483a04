"""Many prompts and decodings of one clip together: each as it would be alone."""

import numpy as np
import pytest
import torch

from capkit import Decoding, Prompt
from capkit.captioning import SharedVideo

pytestmark = pytest.mark.golden  # caches and masks, on the oldest transformers too
PROMPTS = ("Please describe this video in detail.", "What happens?", "Describe it in one sentence.")
DECODINGS = (
    Decoding(max_new_tokens=12),
    Decoding(max_new_tokens=5),
    Decoding(max_new_tokens=12, temperature=0.9, seed=1),
    Decoding(max_new_tokens=12, temperature=0.9, seed=2),
    Decoding(max_new_tokens=9, temperature=1.2, top_p=0.8, top_k=20, seed=3),
    Decoding(max_new_tokens=12, repetition_penalty=1.4, no_repeat_ngram_size=2),
    Decoding(max_new_tokens=6, num_beams=2),
)
BRANCHES = [(prompt, decoding) for prompt in PROMPTS for decoding in DECODINGS]


@pytest.fixture
def clip(random_clip):
    return random_clip(5)


@pytest.mark.parametrize("template, frame_numbers", [("chat", "index"), ("chat", "seconds"), ("vqa", "index")])
def test_each_branch_is_what_it_would_be_alone(captioner, clip, template, frame_numbers):
    branches = [(Prompt(text, template, frame_numbers=frame_numbers), decoding) for text, decoding in BRANCHES]
    together = list(SharedVideo(captioner, clip).caption(branches))
    for (prompt, decoding), caption in zip(branches, together, strict=True):
        alone = captioner.caption(clip, prompt, decoding)
        assert caption.token_ids == alone.token_ids
        assert caption.logprobs == pytest.approx(alone.logprobs, abs=2e-4)
        told = ("text", "finish_reason", "prompt", "decoding")
        assert [getattr(caption, name) for name in told] == [getattr(alone, name) for name in told]


def test_history_goes_before_every_prompt(captioner, clip):
    history = [("How many?", "Two."), ("Which colour?", "Red.")]
    branches = [(Prompt(text, history=history), DECODINGS[0]) for text in PROMPTS]
    for branch, caption in zip(branches, SharedVideo(captioner, clip).caption(branches), strict=True):
        assert caption.token_ids == captioner.caption(clip, *branch).token_ids


def test_a_branch_does_not_depend_on_those_beside_it(captioner, clip):
    video, branches = SharedVideo(captioner, clip), [branch for branch in BRANCHES if branch[1].num_beams == 1]
    whole = [caption.token_ids for caption in video.caption(branches)]
    random = np.random.default_rng(0)
    for _ in range(4):
        some = random.permutation(len(branches))[: random.integers(1, len(branches))]
        assert [caption.token_ids for caption in video.caption([branches[i] for i in some])] == [whole[i] for i in some]


def test_more_branches_than_go_together(captioner, clip, monkeypatch):
    branches = [(PROMPTS[0], Decoding(max_new_tokens=4, temperature=1.0, seed=seed)) for seed in range(9)]
    whole = [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)]
    monkeypatch.setattr("capkit.captioning.shared_prefix.BRANCHES_TOGETHER", 4)
    assert [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)] == whole
    assert len({tuple(ids) for ids in whole}) > 1  # seeds matter


def test_frames_are_encoded_once_and_kept_once(captioner, clip, monkeypatch):
    counted, encode = [], captioner.model.model.get_video_features
    monkeypatch.setattr(
        captioner.model.model, "get_video_features", lambda pixels: counted.append(len(pixels)) or encode(pixels)
    )
    video, greedy = SharedVideo(captioner, clip), [(prompt, Decoding(max_new_tokens=3)) for prompt in PROMPTS]
    assert video.num_cache_bytes == 0
    list(video.caption(greedy))
    held = video.num_cache_bytes
    list(video.caption(greedy * 5))
    list(video.caption([(Prompt(text, "vqa"), decoding) for text, decoding in greedy]))
    list(video.caption(greedy))
    assert counted == [5]
    config = captioner.model.config
    num_positions = len(captioner.processor.video_ids(clip, Prompt()))
    a_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # float32
    assert held == video.num_cache_bytes == num_positions * a_position


def test_short_of_memory_fewer_go_together(captioner, clip, monkeypatch):
    branches = [(PROMPTS[0], Decoding(max_new_tokens=4, temperature=1.0, seed=seed)) for seed in range(6)]
    whole = [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)]
    forward, sizes = captioner.model.lm_head.forward, []

    def short_of_memory(hidden):
        sizes.append(len(hidden))
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden)

    monkeypatch.setattr(captioner.model.lm_head, "forward", short_of_memory)
    assert [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)] == whole
    assert sizes[:3] == [6, 3, 1]
    monkeypatch.setattr(captioner.model.lm_head, "forward", lambda hidden: short_of_memory(hidden.repeat(3, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        list(SharedVideo(captioner, clip).caption(branches))


def test_bad_settings_are_refused_before_any_work(captioner, clip):
    video = SharedVideo(captioner, clip)
    for prompt in (
        "",
        {"template": "story"},
        {"template": "vqa", "frame_numbers": "seconds"},
        {"template": "base", "history": [("a", "b")]},
    ):
        with pytest.raises(ValueError):
            list(video.caption([(prompt, DECODINGS[0])]))
    with pytest.raises(ValueError, match="marks the frames"):
        list(video.caption([(f"What is {captioner.processor.tokenizer.pad_token}?", DECODINGS[0])]))
    assert list(video.caption([])) == []
