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
        fields = ("text", "finish_reason", "prompt", "decoding")
        assert [getattr(caption, name) for name in fields] == [getattr(alone, name) for name in fields]


def test_other_attention_than_that_of_cpus_decodes_in_one_row(captioner, clip, monkeypatch):
    branches = [(Prompt(text), decoding) for text, decoding in BRANCHES if decoding.num_beams == 1]
    expected = [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)]
    monkeypatch.setattr(captioner.model.config, "_attn_implementation", "sdpa")
    assert [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)] == expected


def test_prompts_longer_than_the_video(captioner, random_clip):
    history = [("How many? " * 40, "Two.")]
    branches = [(Prompt(text, history=past), DECODINGS[0]) for text in PROMPTS for past in ((), history)]
    clip = random_clip(1)
    for branch, caption in zip(branches, SharedVideo(captioner, clip).caption(branches), strict=True):
        assert caption.token_ids == captioner.caption(clip, *branch).token_ids


def test_history_goes_before_every_prompt(captioner, clip):
    history = [("How many?", "Two."), ("Which colour?", "Red.")]
    branches = [(Prompt(text, history=history), DECODINGS[0]) for text in PROMPTS]
    for branch, caption in zip(branches, SharedVideo(captioner, clip).caption(branches), strict=True):
        assert caption.token_ids == captioner.caption(clip, *branch).token_ids


def test_a_branch_does_not_depend_on_those_beside_it(captioner, clip):
    video, branches = SharedVideo(captioner, clip), [branch for branch in BRANCHES if branch[1].num_beams == 1]
    expected = [caption.token_ids for caption in video.caption(branches)]
    random = np.random.default_rng(0)
    for _ in range(4):
        chosen = random.permutation(len(branches))[: random.integers(1, len(branches))]
        captions = video.caption([branches[number] for number in chosen])
        assert [caption.token_ids for caption in captions] == [expected[number] for number in chosen]


def test_more_branches_than_go_together(captioner, clip, monkeypatch):
    branches = [(PROMPTS[0], Decoding(max_new_tokens=4, temperature=1.0, seed=seed)) for seed in range(9)]
    expected = [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)]
    monkeypatch.setattr("capkit.captioning.shared_prefix.MAX_BRANCHES", 4)
    assert [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)] == expected
    assert len({tuple(ids) for ids in expected}) > 1  # seeds matter


def test_frames_are_encoded_once_and_cropped_back(captioner, clip, monkeypatch):
    """After any captions, the cache holds the video and nothing else."""
    counted, encode = [], captioner.model.model.get_video_features
    monkeypatch.setattr(
        captioner.model.model, "get_video_features", lambda pixels: counted.append(len(pixels)) or encode(pixels)
    )
    video, greedy = SharedVideo(captioner, clip), [(prompt, Decoding(max_new_tokens=3)) for prompt in PROMPTS]
    for branches in (greedy, greedy * 5, [(Prompt(text, "vqa"), decoding) for text, decoding in greedy], greedy):
        list(video.caption(branches))
        num_positions = len(captioner.processor.video_ids(clip, Prompt.of(branches[0][0])))
        assert {layer.keys.shape[-2] for layer in video._kept.cache.layers} == {num_positions}
    assert counted == [5]


def test_short_of_memory_fewer_go_together(captioner, clip, monkeypatch):
    """Memory runs out inside a layer, where the layers before it already hold the new positions."""
    branches = [(PROMPTS[0], Decoding(max_new_tokens=4, temperature=1.0, seed=seed)) for seed in range(6)]
    expected = [caption.token_ids for caption in SharedVideo(captioner, clip).caption(branches)]
    mlp, sizes, most = captioner.model.model.layers[1].mlp, [], 2
    forward = mlp.forward

    def short_of_memory(hidden):
        num_branches = hidden.shape[0] * hidden.shape[1]
        if num_branches <= len(branches):  # a decoding step: prompts and videos have more positions
            sizes.append(num_branches)
            if num_branches > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden)

    monkeypatch.setattr(mlp, "forward", short_of_memory)
    video = SharedVideo(captioner, clip)
    assert [caption.token_ids for caption in video.caption(branches)] == expected
    assert sizes[:3] == [6, 3, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(video.caption(branches))
    most = 6
    assert [caption.token_ids for caption in video.caption(branches)] == expected


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
