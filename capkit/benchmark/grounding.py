"""Grounding captions in frames: many together beside one by one, and with each frame left out. Part of
`capkit.benchmark`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from capkit.benchmark.measuring import seconds_of, take_turns
from capkit.captioning import Caption, Captioner, Decoding, attend, ground
from capkit.cogvlm2 import Prompt
from capkit.video import Clip


class Compared(NamedTuple):
    """Seconds of the baseline and of capkit, and the largest difference of a log probability, in nats."""

    seconds: tuple[float, float]
    difference: float


def random_captions(captioner: Captioner, num_captions: int, num_tokens: int) -> list[Caption]:
    """Captions of random tokens: what they say does not matter to the time."""
    most = captioner.model.config.vocab_size - 3  # without special tokens
    draws = np.random.default_rng(0).integers(most // 2, most, (num_captions, num_tokens))
    logprobs = [0.0] * num_tokens
    return [
        Caption(captioner.processor.decode(ids), ids, logprobs, "length", Prompt(), Decoding(), 0.0)
        for ids in draws.tolist()
    ]


def measure_together(captioner: Captioner, clip: Clip, captions: Sequence[Caption], num_alone: int) -> Compared:
    """Ground captions of a clip in one call, beside one call for each; the time of `num_alone` stands for all."""

    device, ground_all = captioner.model.device, partial(ground, captioner, clip, leave_one_out=False)
    alone, expected = seconds_of(lambda: [ground_all(caption) for caption in captions[:num_alone]], device)
    together, found = seconds_of(partial(ground_all, captions), device)
    difference = max(np.abs(one.support - other.support).max() for one, other in zip(expected, found, strict=False))
    return Compared((alone * len(captions) / len(expected), together), float(difference))


def measure_left_out(captioner: Captioner, clip: Clip, caption: Caption, repeats: int) -> Compared:
    """Ground a caption with each frame left out in turn, beside scoring it once."""
    score, grounding = partial(captioner.score, clip, caption), partial(ground, captioner, clip, caption)
    found: Any = grounding()
    difference = np.abs(found.logprobs - np.array(score().logprobs)).max()
    seconds = take_turns((score, grounding), repeats, captioner.model.device, warm_up=False)
    return Compared((seconds[0], seconds[1]), float(difference))


def score_and_attend(captioner: Captioner, clip: Clip, caption: Caption) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Scoring a caption, and measuring where its words look: each one pass over frames, prompt and caption."""
    return partial(captioner.score, clip, caption), partial(attend, captioner, clip, caption)
