"""KV caches and prefill: a preallocated cache, and filling caches from prompts."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from capkit.cogvlm2 import (
    CogVLM2VideoConfig,
    CogVLM2VideoForConditionalGeneration,
    image_mask,
    place_features,
    rotary_position_ids,
)

GROWTH = 256  # positions that are allocated in advance
PREFILL_CHUNK = 256  # positions per forward pass where the cache is not empty


class PreallocatedCache(DynamicCache):
    """transformers' DynamicCache with memory allocated in advance.

    DynamicCache copies all keys and values for every new token, which takes most of the time of decoding a batch on a
    CPU.
    """

    def __init__(self, config: CogVLM2VideoConfig) -> None:
        super().__init__(config=config)
        self.layers: list[_PreallocatedLayer] = [_PreallocatedLayer() for _ in range(config.num_hidden_layers)]


class _PreallocatedLayer(DynamicLayer):
    """`keys` and `values` are views of the first positions of larger buffers."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._buffers = self.keys, self.values
        end = self.keys.shape[-2] + key_states.shape[-2]
        keys, values = self._buffers
        self._buffers = _append(self.keys, keys, key_states), _append(self.values, values, value_states)
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def _append(filled: torch.Tensor, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Write new positions behind the filled ones, into the buffer or, if they do not fit, a larger one."""
    length, end = filled.shape[-2], filled.shape[-2] + new.shape[-2]
    # Beam search, for one, replaces `keys` by a tensor outside the buffer.
    is_inside = filled.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    if end > buffer.shape[-2] or not is_inside:
        buffer = new.new_empty(*new.shape[:2], end + GROWTH, new.shape[-1])
        buffer[..., :length, :] = filled
    buffer[..., length:end, :] = new
    return buffer


def layer_tensors(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, (B, key-value heads, N, head_dim)."""
    layers: Any = cache.layers  # all of kinds that have keys and values
    return [(layer.keys, layer.values) for layer in layers]


def crop(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` positions.

    Layers may differ in length: when memory runs out inside a layer, those before it already hold the new positions.
    """
    layers: Any = cache.layers
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


class _KeysAndValues(nn.Module):
    """The last decoder layer while a cache is filled: nothing reads what it passes on."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.attention = layer.input_layernorm, layer.self_attn

    def forward(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache,
        **kwargs: Any,
    ) -> torch.Tensor:
        attention, normal = self.attention, self.norm(hidden)
        keys, values = (
            project(normal).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        keys, _ = apply_rotary_pos_emb(keys, keys, *position_embeddings)
        past_key_values.update(keys, values, attention.layer_idx)
        return hidden


def _filling_only(decoder: Any) -> Any:
    """A decoder that shares all weights and leaves out what does not go into a cache."""
    filling = copy.copy(decoder)
    *layers, last = decoder.layers
    filling._modules = decoder._modules | {"layers": nn.ModuleList([*layers, _KeysAndValues(last)])}
    filling._modules["norm"] = nn.Identity()
    return filling


def prefill(
    model: CogVLM2VideoForConditionalGeneration,
    cache: DynamicCache,
    ids: list[int],
    features: torch.Tensor | None = None,
) -> None:
    """Add the missing keys and values of a sequence to a cache.

    Args:
        model: the model.
        cache: holds those of the first ids, or nothing.
        ids: of the complete sequence from bos on.
        features: of the frames that the cache does not hold, from the model's `get_video_features`; None: it holds all.
    """
    all_ids = torch.tensor([ids], device=model.device)
    start = cache.get_seq_length()
    embeds = model.model.embed_tokens(all_ids[:, start:])
    if features is not None:
        embeds = place_features(embeds, image_mask(all_ids, model.config.video_token_id)[:, start:], features)
    positions = rotary_position_ids(all_ids, model.config.video_token_id)
    decoder = _filling_only(model.model)
    # With a filled cache, attention computes masked positions too; chunks keep their number small.
    chunk = PREFILL_CHUNK if start else len(ids)
    for first in range(start, len(ids), chunk):
        end = min(first + chunk, len(ids))
        decoder(
            inputs_embeds=embeds[:, first - start : end - start],
            attention_mask=torch.ones_like(all_ids[:, :end]),
            position_ids=positions[:, first:end],
            past_key_values=cache,
            use_cache=True,
        )


class PromptCache:
    """Keys and values of a prompt, kept so that the next one about the same video is read from where it differs.

    Attributes:
        cache: those of the prompt that was read last.
    """

    def __init__(self, model: CogVLM2VideoForConditionalGeneration) -> None:
        self._model, self._ids = model, list[int]()
        self.cache = PreallocatedCache(model.config)

    def read(self, ids: list[int], features: Callable[[], torch.Tensor]) -> PreallocatedCache:
        """The cache of a sequence from bos on; `features` gives those of its frames where the video is another one."""
        num_same = len(os.path.commonprefix([self._ids, ids]))
        self._ids = []  # in case that memory runs out
        if self._model.config.video_token_id in ids[num_same:]:
            self.cache = PreallocatedCache(self._model.config)
            prefill(self._model, self.cache, ids, features())
        else:
            crop(self.cache, num_same)
            if num_same < len(ids):
                prefill(self._model, self.cache, ids)
        self._ids = ids
        return self.cache


def prefill_each(
    model: CogVLM2VideoForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    kept: Sequence[PromptCache] = (),
) -> Iterator[DynamicCache]:
    """A cache for each prompt of a batch, filled but for the prompt's last token.

    Row by row: only one clip's frames are in the vision tower at a time, padding is not computed, and each row gets
    exactly what it would get alone.

    Args:
        model: the model.
        inputs: from the processor, on the model's device.
        kept: of each row what was read of its video before; what is read now stays in it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    for row, pixels in enumerate(model.split_clips(ids, inputs["pixel_values_videos"])):
        row_ids, features = ids[row, mask[row]][:-1].tolist(), partial(model.model.get_video_features, pixels)
        if kept:
            yield kept[row].read(row_ids, features)
            continue
        cache = DynamicCache(config=model.config)
        prefill(model, cache, row_ids, features())
        yield cache


def prefill_batch(
    model: CogVLM2VideoForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    kept: Sequence[PromptCache] = (),
) -> PreallocatedCache:
    """One cache for all prompts of a batch, filled but for each prompt's last token, which `generate()` reads.

    Args:
        model: the model.
        inputs: from the processor, on the model's device: B rows, padded on the left to N positions.
        kept: as in `prefill_each`.

    Returns:
        N - 1 positions of B rows; zeros at padding, which the attention mask hides.
    """
    num_rows, end = len(inputs["input_ids"]), inputs["input_ids"].shape[1] - 1
    batch = PreallocatedCache(model.config)
    for row, cache in enumerate(prefill_each(model, inputs, kept)):
        start, layers = end - cache.get_seq_length(), layer_tensors(cache)
        if row == 0:
            for number, (keys, _) in enumerate(layers):
                empty = keys.new_zeros(num_rows, keys.shape[1], end, keys.shape[3])
                batch.update(empty, empty, number)
        for (batch_keys, batch_values), (keys, values) in zip(layer_tensors(batch), layers, strict=True):
            batch_keys[row, :, start:end], batch_values[row, :, start:end] = keys[0], values[0]
    return batch
