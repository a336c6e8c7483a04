"""Decoding on a GPU: static caches, and a decoding step that is recorded as a CUDA graph and replayed.

Launched one by one, the thousand kernels of a step take longer than the GPU needs to run them. Recording takes about as
long as a step, so it pays from the first caption on.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.generation.streamers import BaseStreamer

from capkit.captioning.caches import PromptCache, layer_tensors, prefill_each
from capkit.captioning.choosing import RowChoosers
from capkit.cogvlm2 import loading, rotary_position_ids
from capkit.text import warn

STATIC_DEVICES = ("cuda",)  # where this module is used
STATIC_POSITIONS = 512  # cache sizes are multiples of this
FIRST_TOKENS = 256  # new tokens that fit into the first cache; rows that need more move to a larger one
COMPILE_AFTER = 8000  # steps of a size, by when as much time was lost as compiling takes (about 7 s)
MEMORY_SHARE = 0.25  # of the GPU's memory, for caches that are kept


class GraphPool:
    """Torch's memory pool for the graphs of a model, kept as long as this object.

    Torch gives a pool up with its last graph, and then refuses to record another one in it.

    Attributes:
        handle: what torch knows the pool by.
        newest: the graph recorded last, which keeps the pool where no step needs it any more.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.newest: torch.cuda.CUDAGraph | None = None


class DecodingStep:
    """One decoding step over a static cache, for `num_rows` rows and `num_positions` positions.

    The decoder's layers are written out here: what transformers does for one new token in some 45 kernels a layer takes
    less than 30, and keys and values are not repeated for the query heads that share them. A step that is called again
    and again is compiled, which fuses the small ones.

    Args:
        model: the model.
        num_rows, num_positions: of the cache.
        compile_after: number of calls after which the step is compiled.
        pool: for its graphs, on a GPU.
        stream: of the model's device, to record on; None for a new one.

    Attributes:
        keys, values: of each layer, (num_rows, key-value heads, num_positions, head_dim).
        ids: the tokens to read next, int64 (num_rows, 1).
        positions: their rotary positions, int64 (num_rows, 1).
        mask: what is added to attention scores: 0 where a row sees a position, float32 (num_rows, 1, num_positions).
        length: positions that are filled.
    """

    def __init__(
        self,
        model: Any,
        num_rows: int,
        num_positions: int,
        compile_after: int = COMPILE_AFTER,
        pool: GraphPool | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        config, device = model.config, model.device
        self.model, self.num_rows, self.num_positions = model, num_rows, num_positions
        self._compile_after, self._pool, self._stream = compile_after, pool, stream
        shape = num_rows, config.num_key_value_heads, num_positions, config.head_dim
        count = config.num_hidden_layers
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(count)]
        self.values = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(count)]
        self.ids = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.zeros(num_rows, 1, num_positions, device=device)
        self.length, self._place = 0, torch.zeros(1, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_recorded, self._has_run = device.type == "cuda", False
        self._num_calls, self._read_layer = 0, _read_layer

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self.keys, *self.values])

    def begin(self, length: int) -> None:
        """Clear the cache; the next token goes to position `length`, all positions are masked until written."""
        for tensor in [*self.keys, *self.values]:
            tensor.zero_()  # else infinities or NaN of an earlier row would pass through the mask
        self.mask.fill_(torch.finfo(self.mask.dtype).min)
        self.length = length
        self._place.fill_(length)

    def write(self, rows: Sequence[int] | slice, end: int, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write keys and values (1, heads, N, head_dim) of each layer to the N positions before `end`; unmask them."""
        start = end - layers[0][0].shape[2]
        for number, (keys, values) in enumerate(layers):
            self.keys[number][rows, :, start:end] = keys
            self.values[number][rows, :, start:end] = values
        self.mask[rows, :, start:end] = 0

    def read(self, inputs: Mapping[str, torch.Tensor], kept: Sequence[PromptCache] = ()) -> None:
        """Begin with the prompts of a batch: prefill from the processor's inputs; `kept` as in `prefill_each`."""
        ids = inputs["input_ids"]
        self.begin(ids.shape[1] - 1)
        for row, cache in enumerate(prefill_each(self.model, inputs, kept)):
            self.write([row], self.length, layer_tensors(cache))
        self.ids[: len(ids)] = ids[:, -1:]
        self.positions[: len(ids)] = rotary_position_ids(ids, self.model.config.video_token_id)[:, -1:]

    def move(self, other: DecodingStep, rows: Sequence[int]) -> None:
        """Begin with the contents of these rows of another step."""
        self.begin(other.length)
        mine = slice(len(rows))
        for number in range(len(self.keys)):
            self.keys[number][mine, :, : self.length] = other.keys[number][rows, :, : self.length]
            self.values[number][mine, :, : self.length] = other.values[number][rows, :, : self.length]
        self.mask[mine, :, : self.length] = other.mask[rows, :, : self.length]
        self.ids[mine], self.positions[mine] = other.ids[rows], other.positions[rows]

    def __call__(self) -> torch.Tensor:
        """Logits after `ids`, float32 (num_rows, V), in a buffer that the next call overwrites."""
        self._num_calls += 1
        if self._num_calls == self._compile_after and self._is_recorded:
            self._graph, self._has_run, self._read_layer = None, False, _compiled_layer()
        if self._graph is None and self._has_run and self._is_recorded:
            self._record()
        if self._graph is None:
            self._run()
            self._has_run = True  # what is made at the first call only is there
        else:
            self._graph.replay()
        self.length += 1
        return self._logits

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        handle = self._pool.handle if self._pool else None
        try:
            with (
                torch.cuda.device(self.ids.device),
                torch.cuda.graph(graph, handle, self._stream, capture_error_mode="thread_local"),
            ):
                self._forward()
        except Exception as error:
            if loading.is_out_of_memory(error):
                raise
            warn(f"decoding is not recorded as a CUDA graph, which is slower: {error!r}", stacklevel=2)
            self._is_recorded = False
            return
        self._graph = graph
        if self._pool:
            self._pool.newest = graph

    def _run(self) -> None:
        try:
            self._forward()
        except Exception as error:
            if self._read_layer is _read_layer or loading.is_out_of_memory(error):
                raise
            warn(f"decoding is not compiled, which is slower: {error!r}", stacklevel=3)
            self._read_layer = _read_layer
            self._forward()

    def _forward(self) -> None:
        model, config = self.model.model, self.model.config
        hidden = model.embed_tokens(self.ids)
        cos, sin = model.rotary_emb(hidden, self.positions)
        sin = torch.cat([-sin[..., : config.head_dim // 2], sin[..., config.head_dim // 2 :]], -1)
        scale = torch.ones(config.num_attention_heads + config.num_key_value_heads, 1, device=hidden.device)
        scale[: config.num_attention_heads] = config.head_dim**-0.5
        cos, sin = ((turn.float() * scale).to(hidden.dtype) for turn in (cos, sin))  # queries are scaled, keys are not
        self.mask.index_fill_(2, self._place, 0.0)
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            hidden = self._read_layer(layer, hidden, cos, sin, self.mask, self._place, keys, values)
        self._logits = self.model.lm_head(_normalize(model.norm, hidden)[:, 0]).float()
        self.positions.add_(1)
        self._place.add_(1)


def _read_layer(
    layer: Any,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor,
    place: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """A decoder layer's output (B, 1, D) for one new token a row, whose keys and values go to `place` in the cache."""
    attention, normal = layer.self_attn, _normalize(layer.input_layernorm, hidden)
    num_rows, num_shared, _, width = keys.shape
    num_heads = cos.shape[1] - num_shared
    both = torch.cat([attention.q_proj(normal), attention.k_proj(normal)], -1).view(num_rows, -1, width)
    both = torch.addcmul(both * cos, both.roll(width // 2, -1), sin)
    keys.index_copy_(2, place, both[:, num_heads:, None])
    values.index_copy_(2, place, attention.v_proj(normal).view(num_rows, num_shared, 1, width))
    # The query heads that share keys and values are the rows of one product.
    query = both[:, :num_heads].reshape(num_rows * num_shared, -1, width)
    scores = _product_in_float32(query, keys.flatten(0, 1).transpose(1, 2))
    weights = (scores.view(num_rows, num_heads, -1) + mask).softmax(-1).to(values.dtype)
    attended = torch.bmm(weights.view(num_rows * num_shared, query.shape[1], -1), values.flatten(0, 1))
    hidden = hidden + attention.o_proj(attended.view(num_rows, 1, -1))
    return hidden + layer.mlp(_normalize(layer.post_attention_layernorm, hidden))


@functools.cache
def _compiled_layer() -> Callable[..., torch.Tensor]:
    """`_read_layer` compiled: once for each size, as all layers are alike."""
    return torch.compile(_read_layer, dynamic=False, fullgraph=True)


def _normalize(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Root mean square normalisation in one kernel; transformers' own takes six unless it is compiled."""
    if torch.compiler.is_compiling():
        return norm(hidden)
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _product_in_float32(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if first.device.type == "cuda" and first.dtype != torch.float32:
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.bmm(first, second).float()


class GraphDecoder:
    """Decoding with static caches and CUDA graphs, which are kept by size for later batches.

    Rows are a power of two and positions a multiple of STATIC_POSITIONS, so that there are few sizes.

    Args:
        model: the model.

    Attributes:
        is_useful: whether the model is on a device with CUDA graphs.
        lock: hold it while decoding: the caches serve one call at a time.
        compile_after: number of steps of a size after which they are compiled.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.lock, self.compile_after = model, threading.Lock(), COMPILE_AFTER
        quantizer = getattr(model, "hf_quantizer", None)
        self.is_useful = model.device.type in STATIC_DEVICES and (quantizer is None or quantizer.is_compileable)
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self.forget()

    def forget(self) -> None:
        """Free the memory."""
        self._steps: OrderedDict[tuple[int, int], DecodingStep] = OrderedDict()
        is_cuda = self.model.device.type == "cuda"
        self._pool = GraphPool() if is_cuda else None

    def step(self, num_rows: int, num_positions: int) -> DecodingStep:
        """A kept or new step that is large enough."""
        size = 1 << (num_rows - 1).bit_length(), -(-num_positions // STATIC_POSITIONS) * STATIC_POSITIONS
        if size not in self._steps:
            config, itemsize = self.model.config, self.model.dtype.itemsize
            a_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
            while self._steps and size[0] * size[1] * a_position + self.num_bytes > self._most_bytes:
                self._steps.popitem(last=False)
            self._steps[size] = DecodingStep(self.model, *size, self.compile_after, self._pool, self._stream)
        self._steps.move_to_end(size)
        return self._steps[size]

    @property
    def num_bytes(self) -> int:
        """Size of all kept caches."""
        return sum(step.num_bytes for step in self._steps.values())

    @property
    def _most_bytes(self) -> float:
        device = self.model.device
        is_cuda = device.type == "cuda"
        return MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory if is_cuda else float("inf")

    def caption(
        self,
        inputs: Mapping[str, torch.Tensor],
        choosers: RowChoosers,
        is_end: Callable[[int], bool],
        stop: threading.Event,
        streamer: BaseStreamer | None = None,
        kept: Sequence[PromptCache] = (),
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens of each row of a batch, and their log probabilities: see `decode`; `kept` as in `prefill_each`."""
        num_rows, length = inputs["input_ids"].shape
        step = self.step(num_rows, length + min(max(choosers.max_new_tokens), FIRST_TOKENS))
        step.read(inputs, kept)
        if streamer is not None:
            streamer.put(inputs["input_ids"])
        return self.decode(step, choosers, is_end, stop, streamer)

    def decode(
        self,
        step: DecodingStep,
        choosers: RowChoosers,
        is_end: Callable[[int], bool],
        stop: threading.Event | None = None,
        streamer: BaseStreamer | None = None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens of each row, up to its end token, and their log probabilities.

        Each step is launched before the tokens of the previous one have been copied back, so that the GPU never waits.

        Args:
            step: filled with the rows' prompts but for their last tokens, which are its `ids`.
            choosers: choose the rows' tokens.
            is_end: whether a token ends a caption.
            stop: ends all rows after the current token.
            streamer: receives the tokens of each step.
        """
        limits = choosers.max_new_tokens
        new_ids: list[list[int]] = [[] for _ in limits]
        logprobs: list[list[float]] = [[] for _ in limits]
        rows, live = list(range(len(limits))), set(range(len(limits)))  # those in the step, and those that go on
        history = torch.zeros(len(limits), max(limits), dtype=torch.long, device=step.ids.device)
        sent: deque[tuple[list[int], torch.Tensor, torch.cuda.Event | None]] = deque()

        def receive(num_left: int) -> bool:
            """Take the tokens of all but the last so many steps; whether there is anything left to do."""
            while len(sent) > num_left:
                rows, numbers, event = sent.popleft()
                if event is not None:
                    event.synchronize()
                if streamer is not None and live.intersection(rows):  # not what was launched ahead of the last end
                    streamer.put(numbers[0].long())
                for row, token, logprob in zip(rows, *numbers.tolist(), strict=True):
                    if row in live:
                        new_ids[row].append(int(token))
                        logprobs[row].append(logprob)
                        if is_end(int(token)) or len(new_ids[row]) == limits[row]:
                            live.discard(row)
            return bool(live) and not (stop is not None and stop.is_set())

        for count in range(max(limits)):
            if not receive(0 if step.length == step.num_positions else 1):
                break
            if step.length == step.num_positions:
                going = [place for place, row in enumerate(rows) if row in live]
                larger = self.step(len(going), step.length + 1)
                larger.move(step, going)
                step, rows, history = larger, [rows[place] for place in going], history[going]
            scores = step()[: len(rows)]
            if choosers.is_steered:  # by the text so far; the GPU is at work on the step meanwhile
                receive(0)
            chosen, sure = choosers.choose(history[:, :count], scores, count, rows, [new_ids[row] for row in rows])
            step.ids[: len(rows), 0] = chosen
            history[:, count] = chosen
            numbers = torch.stack([chosen.double(), sure.double()]).to("cpu", non_blocking=True)
            event = torch.cuda.Event() if chosen.device.type == "cuda" else None
            if event is not None:
                event.record(torch.cuda.current_stream(chosen.device))
            sent.append((rows, numbers, event))
        receive(0)
        return new_ids, logprobs
