"""Attention maps: the weights are those that transformers' eager attention gives for the complete sequence."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from paths import GOLDEN

from capkit import Caption, Decoding, Prompt
from capkit.captioning import LOOKED_AT, attend
from capkit.cogvlm2 import CogVLM2VideoForConditionalGeneration

pytestmark = pytest.mark.golden  # masks and the dispatch of attention, on the oldest transformers too
TEXT = "A red star moves to the left, and then a blue circle appears at second 3."


@pytest.fixture
def clip(random_clip):
    return random_clip(5)


@pytest.fixture(scope="module")
def eager():
    return CogVLM2VideoForConditionalGeneration.from_pretrained(GOLDEN, device="cpu", attn_implementation="eager")


@torch.inference_mode()
def expected_rows(eager, processor, clip, prompt, new_ids):
    """Attention of the last token of the prompt and of the new ones to each position of a frame, (N + 1, T, P)."""
    inputs = processor([clip], prompt)
    ids = torch.cat([inputs["input_ids"], torch.tensor([new_ids])], 1)
    outputs = eager(input_ids=ids, pixel_values_videos=inputs["pixel_values_videos"], output_attentions=True)
    mean = torch.stack(outputs.attentions).mean((0, 1, 2))
    image = (ids[0] == eager.config.video_token_id).nonzero()[:, 0].reshape(len(clip), -1)
    return mean[-len(new_ids) - 1 :][:, image].numpy()


@pytest.mark.parametrize("template", ["chat", "vqa", "base"])
def test_weights_are_those_of_eager_attention(captioner, eager, clip, template):
    prompt = Prompt("What happens?", template)
    looked = attend(captioner, clip, TEXT, prompt)
    rows = expected_rows(eager, captioner.processor, clip, prompt, looked.token_ids)
    patches, edges = rows[..., 1:-1], rows[..., 0] + rows[..., -1]
    np.testing.assert_allclose(looked.patch_rows.reshape(patches.shape), patches, atol=1e-5)
    np.testing.assert_allclose(looked.edge_rows, edges, atol=1e-5)
    assert "".join(looked.tokens).strip() == TEXT
    assert looked.timestamps_seconds.tolist() == [0, 1, 2, 3, 4]


def test_a_word_has_the_mean_of_its_tokens_and_those_before_them_without_punctuation(captioner, clip):
    looked = attend(captioner, clip, TEXT)
    grid = looked.patch_rows.shape[-1]
    assert [word for word, _ in looked.words] == TEXT.split()
    assert looked.weights.shape == (len(TEXT.split()), 5, grid, grid)
    for at, (_, tokens) in enumerate(looked.words):
        letters = [i for i in range(tokens.start, tokens.stop) if looked.tokens[i].strip(" ,.")]
        rows = [looked.patch_rows[i] / 2 + looked.patch_rows[i + 1] / 2 for i in letters]
        np.testing.assert_allclose(looked.weights[at], np.mean(rows, axis=0), rtol=1e-5)
        frame, row, column = looked.places[at]
        assert looked.weights[at, frame, row, column] == looked.weights[at].max()
    totals = looked.weights.sum((1, 2, 3))
    assert (totals > 0).all() and (totals <= 1).all()
    np.testing.assert_allclose(looked.frame_shares.sum(1), 1, rtol=1e-5)
    most = looked.shares.max(0)
    assert ((most >= LOOKED_AT) == ~looked.never_looked_at).all()
    assert (looked.shares.mean((1, 2, 3)) == pytest.approx(1)) and looked.frames.tolist() == [
        shares.argmax() for shares in looked.frame_shares
    ]


def test_several_captions_go_together_and_each_is_what_it_is_alone(captioner, clip):
    few = Decoding(max_new_tokens=7)
    generated = [
        captioner.caption(clip, Prompt("Why?", history=[("Who?", "She.")]), few),
        captioner.caption(clip, Prompt("When?", frame_numbers="seconds"), few),
    ]
    captions = [TEXT, *generated, "Short."]
    for caption, looked in zip(captions, attend(captioner, clip, captions), strict=True):
        alone = attend(captioner, clip, caption)
        assert looked.token_ids == alone.token_ids
        np.testing.assert_allclose(looked.patch_rows, alone.patch_rows, atol=1e-6)
        np.testing.assert_allclose(looked.edge_rows, alone.edge_rows, atol=1e-6)


def test_a_caption_and_a_record_are_read_as_their_text_is(captioner, clip):
    prompt, end = Prompt("Why?"), captioner.model.config.eos_token_id
    ids = captioner.processor.continuation_ids(TEXT)
    caption = Caption(f" {TEXT}", [*ids, end], [-1.0] * (len(ids) + 1), "eos", prompt, Decoding(), 1.0)
    text, *others = attend(captioner, clip, [TEXT, caption, {**prompt.to_record(), "text": TEXT}], prompt)
    for looked in others:
        assert looked.token_ids == text.token_ids == ids
        np.testing.assert_allclose(looked.patch_rows, text.patch_rows, atol=1e-6)


def test_the_model_stays_as_it_is_and_may_have_hooks(captioner, clip, golden_copy):
    """Models in 4 bit have accelerate's hooks on all modules, in place of their `forward`."""
    import capkit

    before = captioner.score(clip, TEXT).logprobs
    looked = attend(captioner, clip, TEXT)
    assert captioner.score(clip, TEXT).logprobs == before
    hooked = capkit.load_captioner(golden_copy, device="cpu")
    for module in hooked.model.modules():
        add_hook_to_module(module, ModelHook())
    np.testing.assert_allclose(attend(hooked, clip, TEXT).patch_rows, looked.patch_rows, atol=1e-6)


def test_short_of_memory_fewer_captions_are_read_together(captioner, clip, monkeypatch):
    captions = [f"{TEXT} {number}" for number in range(20)]
    expected = attend(captioner, clip, captions)
    mlp, sizes = captioner.model.model.layers[1].mlp, []
    forward, num_video = mlp.forward, len(captioner.processor.video_ids(clip, Prompt()))

    def short_of_memory(hidden):
        if hidden.shape[1] != num_video:
            sizes.append(hidden.shape[1])
            if hidden.shape[1] > 240:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden)

    monkeypatch.setattr(mlp, "forward", short_of_memory)
    for looked, right in zip(attend(captioner, clip, captions), expected, strict=True):
        np.testing.assert_allclose(looked.patch_rows, right.patch_rows, atol=1e-6)
    assert max(sizes) > 240 > min(sizes)


def test_nonsense_is_refused(captioner, clip):
    for captions, settings, message in (
        ("", {}, "text"),
        ([TEXT, " "], {}, "text"),
        (TEXT, {"prompt": {"template": "poem"}}, "poem"),
        (TEXT * 200, {}, "max_position_embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(captioner, clip, captions, **settings)
    with pytest.raises(TypeError, match="clip"):
        attend(captioner, "clip.mp4", TEXT)
    assert attend(captioner, clip, []) == []
    (odd,) = attend(captioner, clip, [" ..."])
    assert [word for word, _ in odd.words] == ["..."] and odd.weights.sum() > 0
    assert dataclasses.replace(odd, tokens=[""] * len(odd.tokens)).places.shape == (0, 3)
