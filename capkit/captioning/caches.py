"""Keys and values: a cache that grows without being copied for each token, and filling caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from capkit.cogvlm2 import image_mask, place_features, rotary_position_ids

ROOM = 256  # positions that are allocated beyond those needed
READ_TOGETHER = 256  # positions, where others stand before them


class RoomyCache(DynamicCache):
    """transformers' dynamic cache with room to grow in.

    The original is concatenated anew for every token, which takes longer than all else in decoding a batch on a CPU.

    Args:
        config: the model's.
    """

    def __init__(self, config):
        super().__init__(config=config)
        self.layers = [_RoomyLayer() for _ in self.layers]


class _RoomyLayer(DynamicLayer):
    """`keys` and `values` are the first positions of larger tensors."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._rooms = [None, None]
        length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        for place, (held, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
            room = self._rooms[place]
            # Beam search and the like replace `keys` by a tensor of their own.
            if room is None or end > room.shape[-2] or held.untyped_storage().data_ptr() != room.data_ptr():
                room = new.new_empty(*new.shape[:2], end + ROOM, new.shape[-1])
                room[..., :length, :] = held
            room[..., length:end, :] = new
            self._rooms[place] = room
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values


def crop(cache: DynamicCache, length: int) -> None:
    """Forget all but the first positions.

    Layers may differ in length: where memory runs out inside a layer, those before it hold the new positions already.
    """
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def read_ids(model, cache: DynamicCache, ids: list[int], features: torch.Tensor) -> None:
    """Add to the cache what it lacks of the keys and values of a sequence.

    Args:
        model: the model.
        cache: holds those of the first ids, or nothing.
        ids: from bos on, frames' positions included.
        features: of the frames that the cache lacks, from the model's `get_video_features`.
    """
    ids = torch.tensor([ids], device=model.device)
    there, image = cache.get_seq_length(), image_mask(ids, model.config.video_token_id)
    embeds = place_features(model.model.embed_tokens(ids[:, there:]), image[:, there:], features)
    positions = rotary_position_ids(ids, model.config.video_token_id)
    # After something, a causal mask is written out, and all that it hides is computed: in pieces that is little.
    piece = READ_TOGETHER if there else ids.shape[1]
    for first in range(there, ids.shape[1], piece):
        end = min(first + piece, ids.shape[1])
        model.model(
            inputs_embeds=embeds[:, first - there : end - there],
            attention_mask=torch.ones_like(ids[:, :end]),
            position_ids=positions[:, first:end],
            past_key_values=cache,
            use_cache=True,
        )


def read_each(model, inputs: Mapping[str, torch.Tensor]) -> Iterator[DynamicCache]:
    """Keys and values of each prompt of a batch, but for its last token.

    A row at a time: no more than one clip's frames are ever in the vision tower, no time goes into padding, and each
    row gets exactly what it would get alone.

    Args:
        model: the model.
        inputs: from the processor, on the model's device.
    """
    ids, taking_part = inputs["input_ids"], inputs["attention_mask"].bool()
    num_positions = image_mask(ids, model.config.video_token_id).sum(-1)
    clips = inputs["pixel_values_videos"].split((num_positions // model.config.tokens_per_frame).tolist())
    for row, pixels in enumerate(clips):
        cache = DynamicCache(config=model.config)
        read_ids(model, cache, ids[row, taking_part[row]][:-1].tolist(), model.model.get_video_features(pixels))
        yield cache


def read_rows(model, inputs: Mapping[str, torch.Tensor]) -> Cache:
    """Keys and values of a batch's prompts, each but for its last token, which is left to `generate()`.

    Args:
        model: the model.
        inputs: from the processor, on the model's device: B rows, padded on the left to N positions.

    Returns:
        N - 1 positions of B rows. Nothing sensible where there is padding, which the attention mask hides.
    """
    num_rows, end = len(inputs["input_ids"]), inputs["input_ids"].shape[1] - 1
    together = RoomyCache(model.config)
    for row, cache in enumerate(read_each(model, inputs)):
        start = end - cache.get_seq_length()
        for number, layer in enumerate(cache.layers):
            if row == 0:
                empty = layer.keys.new_zeros(num_rows, layer.keys.shape[1], end, layer.keys.shape[3])
                together.update(empty, empty, number)
            together.layers[number].keys[row, :, start:end] = layer.keys[0]
            together.layers[number].values[row, :, start:end] = layer.values[0]
    return together
