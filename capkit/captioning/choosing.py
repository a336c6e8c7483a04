"""Choosing the next token: penalties, sampling with noise of each row's own, log probabilities."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from capkit.captioning.decoding import Decoding
from capkit.video import Clip


def chosen_logprobs(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """log softmax at the chosen ids: (..., V) and (...) -> (...)."""
    return logits.gather(-1, chosen[..., None]).squeeze(-1) - logits.logsumexp(-1)


def draw_key(clip: Clip) -> int:
    """A number that tells a clip's frames from others, for `Chooser`: of a grid of their pixels."""
    return zlib.crc32(np.ascontiguousarray(clip.frames[:, ::16, ::16]))


class Chooser(LogitsProcessor):
    """Chooses each row's next token by our own rules, and leaves generate() no other; keeps the model's own log
    probability of it.

    Rows draw from numbers of their own, made from the seed and the clip alone, so that a row's caption does not depend
    on the rows beside it, nor on the device; and clips do not share their luck, or two seeds compared over many clips
    would differ more often than chance allows.

    Args:
        decodings: one for each row. They may differ in seed and max_new_tokens, in nothing else.
        draw_keys: `draw_key` of each row's clip.
        prompt_length: tokens before the first new one, where rows come as generate() passes them.
    """

    def __init__(self, decodings: Sequence[Decoding], draw_keys: Sequence[int], prompt_length: int = 0):
        self.logprobs: list[torch.Tensor] = []  # a (B,) tensor a step
        self.prompt_length = prompt_length
        decoding = decodings[0]
        self.penalties, self.warpers = [], []
        if decoding.repetition_penalty != 1:
            self.penalties.append(_GeneratedOnly(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty), self))
        if decoding.no_repeat_ngram_size:
            self.penalties.append(_GeneratedOnly(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size), self))
        self.samples = decoding.samples
        if self.samples:
            self.streams = [(one.seed or 0, key) for one, key in zip(decodings, draw_keys, strict=True)]
            self.warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
            self.warpers += [TopKLogitsWarper(decoding.top_k)] if decoding.top_k else []
            self.warpers += [TopPLogitsWarper(decoding.top_p)] if decoding.top_p < 1 else []
            self.warpers += [MinPLogitsWarper(decoding.min_p)] if decoding.min_p else []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen, logprobs = self.choose(input_ids, scores, len(self.logprobs))
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)

    def choose(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, step: int, rows: Sequence[int] = ()):
        """Token `step` of some rows, () for all, and its log probability: int64 and float32 (B,)."""
        wanted = scores
        for process in [*self.penalties, *self.warpers]:
            wanted = process(input_ids, wanted)
        if self.samples:
            # The Gumbel trick: the likeliest after noise of its own for each token is a draw from softmax. In a running
            # sum of probabilities over a large vocabulary, rounding would move far more draws to another token.
            wanted = wanted + _gumbel_noise([self.streams[row] for row in rows] or self.streams, step, wanted)
        chosen = wanted.argmax(-1)
        return chosen, chosen_logprobs(scores, chosen)


_OF_A_ROW = ("seed", "max_new_tokens")  # settings in which the rows of one Chooser may differ


class RowChoosers:
    """A `Chooser` for rows whose decodings may differ in everything: one for all those that are alike.

    Args:
        decodings, draw_keys: as for `Chooser`.
    """

    def __init__(self, decodings: Sequence[Decoding], draw_keys: Sequence[int]):
        groups: dict[str, list[int]] = {}
        for row, decoding in enumerate(decodings):
            alike = {
                name: value for name, value in decoding.to_dict().items() if name not in ("seed", "max_new_tokens")
            }
            groups.setdefault(str(alike), []).append(row)
        self.max_new_tokens = [decoding.max_new_tokens for decoding in decodings]
        self._choosers = [
            (Chooser([decodings[row] for row in members], [draw_keys[row] for row in members]), members)
            for members in groups.values()
        ]
        self._rows: list[int] = []
        self._places: list[tuple[Chooser, list[int], torch.Tensor]] = []

    def choose(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, step: int, rows: Sequence[int]):
        """Token `step` of some rows and its log probability, as `Chooser.choose`; `input_ids` are new tokens only."""
        if self._rows != list(rows):
            self._rows, self._places = list(rows), []
            for chooser, members in self._choosers:
                places = [place for place, row in enumerate(rows) if row in members]
                own = [members.index(rows[place]) for place in places]
                self._places += [(chooser, own, torch.tensor(places, device=scores.device))] if places else []
        if len(self._places) == 1:
            chooser, own, _ = self._places[0]
            return chooser.choose(input_ids, scores, step, own)
        chosen, logprobs = input_ids.new_zeros(len(scores)), scores.new_zeros(len(scores))
        for chooser, own, places in self._places:
            chosen[places], logprobs[places] = chooser.choose(input_ids[places], scores[places], step, own)
        return chosen, logprobs


def _gumbel_noise(streams: Sequence[tuple[int, int]], step: int, like: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float32 (B, V): a hash (SplitMix64's) of row, step and token, so that devices need no state."""

    def signed(number):  # int64 arithmetic wraps around
        return (number + 2**63) % 2**64 - 2**63

    starts = [np.random.SeedSequence([*stream, step]).generate_state(1, np.uint64).view(np.int64) for stream in streams]
    bits = torch.arange(like.shape[-1], device=like.device) * signed(0x9E3779B97F4A7C15)
    sent = torch.from_numpy(np.stack(starts))
    sent = sent.pin_memory() if like.device.type == "cuda" else sent  # else the copy waits for all that is under way
    bits = bits + sent.to(like.device, non_blocking=True)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits ^= (bits >> shift) & (2 ** (64 - shift) - 1)  # a shift that fills up with zeros
        bits *= signed(factor)
    bits ^= (bits >> 31) & (2**33 - 1)
    uniform = ((bits >> 24) & (2**40 - 1)).float().add_(0.5).mul_(2**-40)  # finest near 0, which is what wins
    return uniform.neg_().log1p_().neg_().log_().neg_()


class _GeneratedOnly(LogitsProcessor):
    """A penalty that counts generated tokens and not the prompt's."""

    def __init__(self, penalty: LogitsProcessor, chooser: Chooser):
        self.penalty, self.chooser = penalty, chooser

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.penalty(input_ids[:, self.chooser.prompt_length :], scores)
