"""The model's context length: how many tokens fit behind a clip and a prompt. Rotary positions count, not tokens."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from capkit.cogvlm2 import (
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    Prompt,
    rotary_position_ids,
)
from capkit.video import Clip


def tokens_that_fit(
    model: CogVLM2VideoForConditionalGeneration, processor: CogVLM2VideoProcessor, clip: Clip, prompt: Prompt
) -> int:
    """New tokens that fit behind a clip and a prompt, by the model's `max_position_embeddings`.

    The patches of a frame share a position, so that 24 numbered frames take about 97.
    Of a prompt with steps: behind all its questions, for all the answers together.

    Raises:
        ValueError: none fits, or as in `CogVLM2VideoProcessor.text_ids`.
        TypeError: no `Clip`, such as a file name.
    """
    if not isinstance(clip, Clip):
        made = "load_clip(path) reads one from a file, Clip.from_frames(frames) makes one of frames"
        raise TypeError(f"clip: must be a Clip, not {reprlib.repr(clip)}; {made}")
    prompt = prompt.after([""] * len(prompt.steps))
    most, num_text = model.config.max_position_embeddings, len(processor.text_ids(prompt))
    positions = rotary_position_ids(torch.tensor([processor.video_ids(clip, prompt)]), model.config.video_token_id)
    num_video = int(positions[0, -1]) + 1
    if (left := most - num_video - num_text) > 0:
        return left
    num_history = num_text - len(processor.text_ids(replace(prompt, history=())))
    longest = {num_video: "use fewer frames", num_history: "shorten the history, to which answers to steps belong"}
    advice = longest.get(max(num_video, num_history, num_text - num_history), "shorten the prompt")
    raise ValueError(
        f"the model reads at most {most} positions (max_position_embeddings), and new tokens need some of them: "
        f"{len(clip)} frames take {num_video}, the history {num_history}, the prompt {num_text - num_history}; {advice}"
    )


def check_fits(
    model: CogVLM2VideoForConditionalGeneration,
    processor: CogVLM2VideoProcessor,
    clip: Clip,
    prompt: Prompt,
    token_ids: Sequence[int],
) -> None:
    """Check that a text fits behind a clip and a prompt.

    Raises:
        ValueError: it does not, or as in `tokens_that_fit`.
    """
    if len(token_ids) > (most := tokens_that_fit(model, processor, clip, prompt)):
        raise ValueError(
            f"the text has {len(token_ids)} tokens, and {most} fit behind the frames and the prompt: the model reads "
            f"at most {model.config.max_position_embeddings} positions (max_position_embeddings); shorten the text"
        )
