"""Choosing tokens: penalties, filters and draws that depend on neither batch nor device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from capkit.captioning.decoding import Decoding
from capkit.captioning.steering import SteerRows
from capkit.video import Clip


def chosen_logprobs(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """log softmax at the chosen ids: (..., V) and (...) -> (...)."""
    return logits.gather(-1, chosen[..., None]).squeeze(-1) - logits.logsumexp(-1)


def draw_key(clip: Clip) -> int:
    """Checksum of a grid of a clip's pixels: the clip's part in the random numbers of `Chooser`."""
    return clip.checksum


class Chooser(LogitsProcessor):
    """Logits processor that picks the next token itself and masks all others; keeps its log probability.

    Each row's random numbers depend on the seed and the clip alone, so that a row's caption depends neither on the
    rows beside it nor on the device. Noise is seeded per clip, so that results across clips are independent: else two
    seeds compared over many clips would differ more often than chance allows.

    Args:
        decodings: one for each row; they may differ only in the settings of `_PER_ROW`.
        draw_keys: `draw_key` of each row's clip.
        prompt_length: length of the prompts that come before the new tokens in generate()'s `input_ids`.
        tokenizer: the model's; needed for forbidden words and word biases only.
        prefixes: token ids of each row's answer prefix; none for no prefixes.
    """

    def __init__(
        self,
        decodings: Sequence[Decoding],
        draw_keys: Sequence[int],
        prompt_length: int = 0,
        tokenizer: Any = None,
        prefixes: Sequence[Sequence[int]] = (),
    ) -> None:
        self.logprobs: list[torch.Tensor] = []  # a (B,) tensor a step
        self.prompt_length = prompt_length
        decoding = decodings[0]
        self.steering: SteerRows | None = None
        if decoding.is_steered:
            self.steering = SteerRows(tokenizer, decoding, prefixes or [()] * len(decodings), prompt_length)
        self.penalties: list[Callable[..., torch.Tensor]] = []
        self.warpers: list[Callable[..., torch.Tensor]] = []
        if decoding.repetition_penalty != 1:
            self.penalties.append(_GeneratedOnly(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty), self))
        if decoding.no_repeat_ngram_size:
            self.penalties.append(_GeneratedOnly(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size), self))
        self.samples = decoding.samples
        if self.samples:
            self.streams = [(one.seed or 0, key) for one, key in zip(decodings, draw_keys, strict=True)]
            self.warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
            self.warpers += [TopKLogitsWarper(decoding.top_k)] if decoding.top_k else []
            self.warpers += [_TopP(decoding.top_p)] if decoding.top_p < 1 else []
            self.warpers += [MinPLogitsWarper(decoding.min_p)] if decoding.min_p else []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen, logprobs = self.choose(input_ids, scores, len(self.logprobs))
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)

    def choose(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        step: int,
        rows: Sequence[int] = (),
        new_ids: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token number `step` of these rows (all if empty) and its log probability: int64 and float32 (B,).

        `new_ids` are the new tokens in `input_ids`, where the CPU has them.
        """
        adjusted = scores
        if self.steering is not None:
            known = input_ids[:, self.prompt_length :].tolist() if new_ids is None else new_ids
            adjusted = self.steering.steer(known, scores, rows)
        for process in [*self.penalties, *self.warpers]:
            adjusted = process(input_ids, adjusted)
        if self.samples:
            # Gumbel-max trick: the argmax after adding Gumbel noise is a draw from softmax. With a cumulative sum over
            # a large vocabulary, rounding would change far more draws.
            adjusted = adjusted + _gumbel_noise([self.streams[row] for row in rows] or self.streams, step, adjusted)
        chosen = adjusted.argmax(-1)
        return chosen, chosen_logprobs(scores, chosen)


_PER_ROW = ("seed", "max_new_tokens")  # settings in which the rows of one Chooser may differ


class RowChoosers:
    """Choose tokens for rows whose decodings may differ: rows with the same settings share a `Chooser`.

    Args:
        decodings, draw_keys, tokenizer, prefixes: as for `Chooser`, but decodings may differ in all settings.

    Attributes:
        max_new_tokens: of each row.
        is_steered: whether `choose` needs `new_ids`, on the CPU.
    """

    def __init__(
        self,
        decodings: Sequence[Decoding],
        draw_keys: Sequence[int],
        tokenizer: Any = None,
        prefixes: Sequence[Sequence[int]] = (),
    ) -> None:
        groups: dict[str, list[int]] = {}
        for row, decoding in enumerate(decodings):
            shared = {name: value for name, value in decoding.to_dict().items() if name not in _PER_ROW}
            groups.setdefault(str(shared), []).append(row)
        self.max_new_tokens = [decoding.max_new_tokens for decoding in decodings]
        self.is_steered = any(decoding.is_steered for decoding in decodings)
        prefixes = prefixes or [()] * len(decodings)

        def of(rows: list[int], values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows]

        self._choosers = [
            (Chooser(of(rows, decodings), of(rows, draw_keys), 0, tokenizer, of(rows, prefixes)), rows)
            for rows in groups.values()
        ]
        self._rows: list[int] = []  # of the last call
        # Their choosers, rows in these, places in rows as a list and as a tensor.
        self._parts: list[tuple[Chooser, list[int], list[int], torch.Tensor]] = []

    def choose(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        step: int,
        rows: Sequence[int],
        new_ids: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Chooser.choose`; `input_ids` are new tokens only."""
        if self._rows != list(rows):
            self._rows, self._parts = list(rows), []
            for chooser, members in self._choosers:
                places = [place for place, row in enumerate(rows) if row in members]
                own = [members.index(rows[place]) for place in places]
                self._parts += [(chooser, own, places, torch.tensor(places, device=scores.device))] if places else []
        if len(self._parts) == 1:
            chooser, own, *_ = self._parts[0]
            return chooser.choose(input_ids, scores, step, own, new_ids)
        chosen, logprobs = input_ids.new_zeros(len(scores)), scores.new_zeros(len(scores))
        for chooser, own, places, at in self._parts:
            known = None if new_ids is None else [new_ids[place] for place in places]
            chosen[at], logprobs[at] = chooser.choose(input_ids[at], scores[at], step, own, known)
        return chosen, logprobs


def _gumbel_noise(streams: Sequence[tuple[int, int]], step: int, like: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float32 (B, V), from a hash (SplitMix64) of stream, step and token: the same on every device."""
    starts = np.stack([np.random.SeedSequence([*stream, step]).generate_state(1, np.uint64) for stream in streams])
    bits = _hash_on_cpu(starts, like.shape[-1]) if like.device.type == "cpu" else _hash(starts, like)
    # Float32 is finest near 0, from where the largest noise comes.
    uniform = bits.add_(0.5).mul_(2**-40).clamp_(max=1 - 2**-24)  # 1: noise of -inf
    return uniform.neg_().log1p_().neg_().log_().neg_()


_GOLDEN_RATIO, _SPLITMIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _hash(starts: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """The upper 40 bits of SplitMix64 for each token, float32 (B, V), from uint64 (B, 1)."""

    def signed(number: int) -> int:  # int64 arithmetic wraps around
        return (number + 2**63) % 2**64 - 2**63

    bits = torch.arange(like.shape[-1], device=like.device) * signed(_GOLDEN_RATIO)
    sent = torch.from_numpy(starts.view(np.int64))
    sent = sent.pin_memory() if like.device.type == "cuda" else sent  # a copy from other memory would synchronise
    bits = bits + sent.to(like.device, non_blocking=True)
    for shift, factor in _SPLITMIX:
        bits ^= (bits >> shift) & (2 ** (64 - shift) - 1)  # a logical shift
        bits *= signed(factor)
    bits ^= (bits >> 31) & (2**33 - 1)
    return ((bits >> 24) & (2**40 - 1)).float()


def _hash_on_cpu(starts: np.ndarray, length: int) -> torch.Tensor:
    """`_hash` in a third of the time: torch's shifts are slow on a CPU, and one row at a time stays in its cache."""
    tokens = np.arange(length, dtype=np.uint64) * np.uint64(_GOLDEN_RATIO)
    hashed = np.empty((len(starts), length), np.float32)
    for row, start in enumerate(starts):
        bits = tokens + start
        for shift, factor in _SPLITMIX:
            bits ^= bits >> np.uint64(shift)
            bits *= np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        hashed[row] = bits >> np.uint64(24)
    return torch.from_numpy(hashed)


class _TopP(LogitsProcessor):
    """Mask all but the most probable tokens that together reach `top_p`, and those as probable as the last of them.

    As transformers' TopPLogitsWarper, whose `torch.sort` takes longer on a CPU than all other parts of choosing.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ascending = torch.from_numpy(np.sort(scores.numpy())) if scores.device.type == "cpu" else scores.sort().values
        num_masked = (ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p).sum(-1, keepdim=True)
        least = ascending.gather(-1, num_masked.clamp_max(scores.shape[-1] - 1))
        return scores.masked_fill(scores < least, -torch.inf)


class _GeneratedOnly(LogitsProcessor):
    """A penalty that counts generated tokens only, not those of the prompt."""

    def __init__(self, penalty: Callable[..., torch.Tensor], chooser: Chooser) -> None:
        self.penalty, self.chooser = penalty, chooser

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.penalty(input_ids[:, self.chooser.prompt_length :], scores)
