"""A cache with room to grow in holds what transformers' own would."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache

from capkit import Captioner, Decoding
from capkit.captioning import EAGER_BATCHES, RoomyCache
from capkit.captioning.caches import MOST_STATIC_TOKENS, ROOM, StaticCaches, crop, read_rows
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
    caches, random = (DynamicCache(config=CONFIG), RoomyCache(CONFIG)), torch.Generator().manual_seed(0)
    for length in (7, 1, 1, ROOM, 1, 3 * ROOM):
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
    cache, random = RoomyCache(CONFIG), torch.Generator().manual_seed(0)
    grow([cache], 9, random)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(ROOM):
        grow([cache], 1, random)
    assert cache.layers[0].keys.data_ptr() == before
    grow([cache], 1, random)
    assert cache.layers[0].keys.data_ptr() != before and cache.get_seq_length() == 9 + ROOM + 1


def test_rows_of_different_length_are_read_as_if_alone(captioner, random_clip):
    clips, prompts = [random_clip(4, 1), random_clip(1, 2), random_clip(2, 3)], ["Why?", "Who is there?", "Where?"]
    inputs = captioner.processor(clips, prompts)
    with torch.inference_mode():
        together = read_rows(captioner.model, inputs)
        for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            alone = read_rows(captioner.model, captioner.processor([clip], [prompt]))
            length = alone.get_seq_length()
            for whole, one in zip(together.layers, alone.layers, strict=True):
                assert torch.equal(whole.keys[row, :, -length:], one.keys[0])
                assert torch.equal(whole.values[row, :, -length:], one.values[0])


@pytest.mark.parametrize("template", ["chat", "vqa", "base"])
def test_batches_of_any_mix_say_what_each_clip_says_alone(captioner, random_clip, template):
    clips, few = [random_clip(count, count) for count in (1, 5, 2, 3)], Decoding(max_new_tokens=8)
    together = captioner.caption_batch(clips, {"text": "What happens?", "template": template}, few)
    alone = [captioner.caption(clip, {"text": "What happens?", "template": template}, few) for clip in clips]
    assert [caption.token_ids for caption in together] == [caption.token_ids for caption in alone]


@pytest.fixture
def static(captioner, monkeypatch):
    """A captioner whose every batch is decoded with a static cache, as on a GPU, and what was taken for them."""
    monkeypatch.setattr("capkit.captioning.caches.STATIC_DEVICES", ("cpu",))
    monkeypatch.setattr("capkit.captioning.caches.EAGER_BATCHES", 0)
    used, get = [], StaticCaches.get

    def watched(*asked):
        used.append(get(*asked))
        return used[-1]

    monkeypatch.setattr(StaticCaches, "get", watched)
    return Captioner(captioner.model, captioner.processor), used


def is_static(model_kwargs, *_):
    """What transformers asks before it compiles, but for the device."""
    return isinstance(model_kwargs["past_key_values"], StaticCache)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}])
def test_a_static_cache_gives_the_same_tokens(captioner, random_clip, static, settings):
    decoding = Decoding(max_new_tokens=8, **settings)
    for seed, count in enumerate((3, 1, 4, 2)):  # the second and the fourth time what was there before is forgotten
        clips = [random_clip(1 + (seed + number) % 4, seed + number) for number in range(count)]
        found = static[0].caption_batch(clips, decoding=decoding)
        expected = [captioner.caption(clip, decoding=decoding) for clip in clips]
        assert [caption.token_ids for caption in found] == [caption.token_ids for caption in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert [type(cache) for cache in static[1] if cache is not None] == [StaticCache] * 4


def test_decoding_is_compiled_once_for_batches_of_one_size(captioner, random_clip, static, monkeypatch):
    model, captured = captioner.model, []

    def keep_graph(graph, inputs):
        captured.append(graph)
        return graph

    compiled = torch.compile(model.__call__, backend=keep_graph, fullgraph=True)
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", is_static)
    monkeypatch.setattr(model, "get_compiled_call", lambda _: compiled)
    decoding = Decoding(max_new_tokens=6)
    try:
        for counts in ((3, 2, 1, 4), (1, 1, 5), (2, 2, 2, 2), (4, 1, 1)):
            clips = [random_clip(count, count) for count in counts]
            found = static[0].caption_batch(clips, "What happens?", decoding=decoding)
            expected = captioner.caption_batch(clips, "What happens?", decoding=decoding)
            assert [caption.token_ids for caption in found] == [caption.token_ids for caption in expected]
    finally:
        torch.compiler.reset()
    assert len(captured) == 1 and len({id(cache) for cache in static[1] if cache is not None}) == 1


def test_where_compiling_fails_captions_come_all_the_same(captioner, random_clip, static, monkeypatch):
    def fail(**_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(captioner.model, "_valid_auto_compile_criteria", is_static)
    monkeypatch.setattr(captioner.model, "get_compiled_call", lambda _: fail)
    clips, decoding = [random_clip(2), random_clip(3)], Decoding(max_new_tokens=4)
    with pytest.warns(UserWarning, match="not compiled, which is slower: .*no compiler"):
        found = static[0].caption_batch(clips, decoding=decoding)
    again = static[0].caption_batch(clips, decoding=decoding)
    assert static[1][1] is None and [c.token_ids for c in again] == [c.token_ids for c in found]


def test_few_batches_long_captions_and_threads_are_not_compiled_for(captioner, monkeypatch):
    monkeypatch.setattr("capkit.captioning.caches.STATIC_DEVICES", ("cpu",))
    caches = StaticCaches(captioner.model)
    given = [caches.get(3, 700, 200) for _ in range(EAGER_BATCHES + 2)]
    assert given[:EAGER_BATCHES] == [None] * EAGER_BATCHES and given[-1] is given[-2] is not None
    assert caches.size == (4, 1024)
    for _ in range(EAGER_BATCHES + 1):
        assert caches.get(3, 700, MOST_STATIC_TOKENS + 1) is None
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(caches.get, 3, 700, 200).result() is None
    monkeypatch.setattr("capkit.captioning.caches.STATIC_DEVICES", ("cuda",))
    assert not StaticCaches(captioner.model).is_useful


def test_layers_of_different_length_are_cropped_to_one():
    """Memory that runs out inside a layer leaves those before it longer."""
    cache, random = RoomyCache(CONFIG), torch.Generator().manual_seed(0)
    grow([cache], 9, random)
    expected = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.update(*torch.randn(2, 2, 3, 4, 4, generator=random), 0)
    crop(cache, 9)
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    crop(RoomyCache(CONFIG), 0)  # nothing was read yet
