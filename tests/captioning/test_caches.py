"""A cache with room to grow in holds what transformers' own would."""

import pytest
import torch
from transformers import DynamicCache

from capkit import Decoding
from capkit.captioning.caches import GROWTH, PreallocatedCache, crop, prefill_batch
from capkit.cogvlm2 import CogVLM2VideoConfig

pytestmark = pytest.mark.golden  # on the oldest transformers too
CONFIG = CogVLM2VideoConfig(num_hidden_layers=2)


def grow(caches, length, random, rows=2):
    """The same keys and values for all; what each hands back to attention."""
    for layer in range(2):
        new = torch.randn(2, rows, 3, length, 4, generator=random)
        handed = [cache.update(*new, layer) for cache in caches]
        for keys, values in handed:
            assert torch.equal(keys, handed[0][0]) and torch.equal(values, handed[0][1])


def check_same(caches):
    assert len({cache.get_seq_length() for cache in caches}) == 1
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_holds_what_a_dynamic_cache_holds():
    caches, random = (DynamicCache(config=CONFIG), PreallocatedCache(CONFIG)), torch.Generator().manual_seed(0)
    for length in (7, 1, 1, GROWTH, 1, 3 * GROWTH):
        grow(caches, length, random)
        check_same(caches)
    for cache in caches:
        crop(cache, 5)
    grow(caches, 2, random)
    check_same(caches)
    for cache in caches:  # beam search
        cache.reorder_cache(torch.tensor([1, 1]))
    grow(caches, 1, random)
    check_same(caches)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    grow(caches, 1, random, rows=6)
    check_same(caches)


def test_a_step_does_not_copy_the_cache():
    cache, random = PreallocatedCache(CONFIG), torch.Generator().manual_seed(0)
    grow([cache], 9, random)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(GROWTH):
        grow([cache], 1, random)
    assert cache.layers[0].keys.data_ptr() == before
    grow([cache], 1, random)
    assert cache.layers[0].keys.data_ptr() != before and cache.get_seq_length() == 9 + GROWTH + 1


def test_rows_of_different_length_are_read_as_if_alone(captioner, random_clip):
    clips, prompts = [random_clip(4, 1), random_clip(1, 2), random_clip(2, 3)], ["Why?", "Who is there?", "Where?"]
    inputs = captioner.processor(clips, prompts)
    with torch.inference_mode():
        together = prefill_batch(captioner.model, inputs)
        for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            alone = prefill_batch(captioner.model, captioner.processor([clip], [prompt]))
            length = alone.get_seq_length()
            for batch, one in zip(together.layers, alone.layers, strict=True):
                assert torch.equal(batch.keys[row, :, -length:], one.keys[0])
                assert torch.equal(batch.values[row, :, -length:], one.values[0])


@pytest.mark.parametrize("template", ["chat", "vqa", "base"])
def test_batches_of_any_mix_say_what_each_clip_says_alone(captioner, random_clip, template):
    clips, few = [random_clip(count, count) for count in (1, 5, 2, 3)], Decoding(max_new_tokens=8)
    together = captioner.caption_batch(clips, {"text": "What happens?", "template": template}, few)
    alone = [captioner.caption(clip, {"text": "What happens?", "template": template}, few) for clip in clips]
    assert [caption.token_ids for caption in together] == [caption.token_ids for caption in alone]


def test_layers_of_different_length_are_cropped_to_one():
    """Memory that runs out inside a layer leaves those before it longer."""
    cache, random = PreallocatedCache(CONFIG), torch.Generator().manual_seed(0)
    grow([cache], 9, random)
    expected = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.update(*torch.randn(2, 2, 3, 4, 4, generator=random), 0)
    crop(cache, 9)
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    crop(PreallocatedCache(CONFIG), 0)  # nothing was read yet
