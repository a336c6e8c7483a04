"""Keys and values: a cache that grows without being copied for each token, one of fixed size, and filling them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from capkit.cogvlm2 import image_mask, place_features, rotary_position_ids

ROOM = 256  # positions that are allocated beyond those needed
READ_TOGETHER = 256  # positions, where others stand before them
STATIC_DEVICES = ("cuda",)  # where generate() compiles decoding into CUDA graphs if the cache is static
STATIC_POSITIONS = 512  # a static cache has room for a multiple of so many
MOST_STATIC_TOKENS = 1024  # new ones; room for all that more might take costs more than graphs gain
EAGER_BATCHES = 4  # of a size come before one is compiled for, which takes as long as some captions


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


class StaticCaches:
    """A static cache that is used again for every batch of its size, so that what was compiled for it serves again.

    Rows are a power of two and positions a multiple of STATIC_POSITIONS, so that there are few sizes.

    Args:
        model: the model.
    """

    def __init__(self, model):
        self.model, self.size, self._cache, self._asked = model, None, None, Counter()
        quantizer = getattr(model, "hf_quantizer", None)
        self.is_useful = model.device.type in STATIC_DEVICES and (quantizer is None or quantizer.is_compileable)

    def get(self, num_rows: int, num_positions: int, num_new_tokens: int) -> StaticCache | None:
        """An empty cache with room for all that, of `size` (rows, positions); None where it does not pay."""
        # CUDA graphs belong to the thread that made them.
        if not self.is_useful or threading.current_thread() is not threading.main_thread():
            return None
        positions = -(-(num_positions + num_new_tokens) // STATIC_POSITIONS) * STATIC_POSITIONS
        size = (1 << (num_rows - 1).bit_length(), positions)
        self._asked[size] += 1
        if num_new_tokens > MOST_STATIC_TOKENS or self._asked[size] <= EAGER_BATCHES:
            return None
        if size != self.size:
            self.forget()
            self.size, self._cache = size, StaticCache(config=self.model.config, max_cache_len=positions)
        self._cache.reset()
        return self._cache

    def forget(self) -> None:
        """Free the memory."""
        self.size = self._cache = None


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


def read_rows(
    model, inputs: Mapping[str, torch.Tensor], whole: Cache | None = None, num_rows: int | None = None
) -> Cache:
    """Keys and values of a batch's prompts, each but for its last token, which is left to `generate()`.

    A row at a time: no more than one clip's frames are ever in the vision tower, no time goes into padding, and each
    row gets exactly what it would get alone.

    Args:
        model: the model.
        inputs: from the processor, on the model's device: B rows, padded on the left to N positions.
        whole: an empty cache to fill; None for a new one.
        num_rows: at least B; those beyond it are the first one again.

    Returns:
        N - 1 positions of `num_rows` rows. Nothing sensible where there is padding, which the attention mask hides.
    """
    ids, taking_part = inputs["input_ids"], inputs["attention_mask"].bool()
    num_positions = image_mask(ids, model.config.video_token_id).sum(-1)
    clips = inputs["pixel_values_videos"].split((num_positions // model.config.tokens_per_frame).tolist())
    num_rows, end = num_rows or len(ids), ids.shape[1] - 1
    whole = RoomyCache(model.config) if whole is None else whole
    for row, pixels in enumerate(clips):
        one, own = DynamicCache(config=model.config), ids[row, taking_part[row]][:-1]
        read_ids(model, one, own.tolist(), model.model.get_video_features(pixels))
        rows = [row, *range(len(ids), num_rows)] if row == 0 else [row]
        for number, layer in enumerate(one.layers):
            if row == 0:
                empty = layer.keys.new_zeros(num_rows, layer.keys.shape[1], end, layer.keys.shape[3])
                whole.update(empty, empty, number)
            whole.layers[number].keys[rows, :, end - len(own) : end] = layer.keys
            whole.layers[number].values[rows, :, end - len(own) : end] = layer.values
    return whole
