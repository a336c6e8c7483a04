"""Which words of a caption does the video support, and which frame does each lean on?

The model itself is asked: how probable is the caption with the video, with a grey one, and with one frame grey? A word
that comes as easily without the video is what the language model would have said anyway. It may be true all the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from capkit.captioning.caches import RoomyCache, crop, read_ids
from capkit.captioning.captioner import Captioner
from capkit.captioning.choosing import chosen_logprobs
from capkit.captioning.generate import Caption
from capkit.captioning.shared_prefix import SharedRow, encode_frames
from capkit.cogvlm2 import DEFAULT_PROMPT, CogVLM2VideoProcessor, Prompt, PromptLike, image_mask
from capkit.video import Clip, VideoError, load_clip

GREY = 128
"""Of 255, red, green and blue: a frame that shows nothing."""


@dataclass(frozen=True)
class Grounding:
    """A caption's tokens with and without what the video shows.

    Attributes:
        token_ids: the N tokens.
        tokens: each of them as text; a character split over several tokens comes with the last of them.
        logprobs: float64 (N,), log P(token | video, prompt, tokens before), in nats.
        grey_logprobs: float64 (N,), the same with a grey video of the same frames and numbers.
        frame_logprobs: float64 (T, N), the same with frame t grey and all others as they are; None if not asked for.
    """

    token_ids: list[int]
    tokens: list[str]
    logprobs: np.ndarray
    grey_logprobs: np.ndarray
    frame_logprobs: np.ndarray | None

    @property
    def support(self) -> np.ndarray:
        """float64 (N,): how much likelier each token is with the video than with a grey one, in nats."""
        return self.logprobs - self.grey_logprobs

    @property
    def total_support(self) -> float:
        """The same of the whole caption: log P(caption | video) - log P(caption | grey), in nats."""
        return float(self.support.sum())

    @property
    def leaning(self) -> np.ndarray:
        """float64 (T, N): how much likelier each token is with frame t than without it, in nats.

        Raises:
            ValueError: the frames were not left out one by one.
        """
        if self.frame_logprobs is None:
            raise ValueError("the frames were not left out one by one: call ground() with leave_one_out=True")
        return self.logprobs - self.frame_logprobs

    @property
    def words(self) -> list[tuple[str, slice]]:
        """Each word with the slice of its tokens; a token that belongs to two words counts for the first."""
        text, words, ends = "".join(self.tokens), [], np.cumsum([len(token) for token in self.tokens])
        first = 0
        for found in re.finditer(r"\S+", text):
            last = int(np.searchsorted(ends, found.end())) + 1
            if last > first:
                words.append((found[0], slice(first, last)))
                first = last
        return words

    def of_words(self, values: np.ndarray) -> np.ndarray:
        """Sum token values (..., N), such as `support` or `leaning`, to those of `words` (..., W)."""
        return np.stack([values[..., tokens].sum(-1) for _, tokens in self.words], -1)


@torch.inference_mode()
def ground(
    captioner: Captioner,
    clip: Clip,
    captions: Caption | str | dict[str, Any] | Sequence[Caption | str | dict[str, Any]],
    prompt: PromptLike = DEFAULT_PROMPT,
    leave_one_out: bool = True,
) -> Grounding | list[Grounding]:
    """Score captions with the video, with a grey one, and with each frame grey in turn.

    The frames are encoded once for all of it. With frame t grey, what the model has read before t is not read again:
    with T frames it reads about T / 2 + 1 videos in all.

    Args:
        captioner: from `load_captioner`.
        clip: the video.
        captions: one, or several of this clip, which go through the model together. A text is scored as the model would
            write it after the prompt, as is that of a caption record; of a `Caption` its own tokens are. `Caption`s and
            records have a prompt of their own.
        prompt: for texts, as in `Captioner.caption`.
        leave_one_out: False leaves the frames together, which is quicker; there is no `leaning` then.

    Returns:
        A Grounding for each caption, in order; one for one.

    Raises:
        ValueError: an empty text, or as in `Captioner.caption`.
    """
    if isinstance(captions, (Caption, str, dict)):
        return ground(captioner, clip, [captions], prompt, leave_one_out)[0]
    processor, default = captioner.processor, Prompt.of(prompt)
    scored = [_prompt_and_tokens(processor, caption, default) for caption in captions]
    seen = encode_frames(captioner, clip.frames)
    grey = encode_frames(captioner, np.full_like(clip.frames[:1], GREY))
    groups: dict[tuple[int, ...], list[int]] = {}  # captions whose frames carry the same numbers, by their video's ids
    for place, (own_prompt, _) in enumerate(scored):
        groups.setdefault(tuple(processor.video_ids(clip, own_prompt)), []).append(place)
    results: dict[int, Grounding] = {}
    for video_ids, places in groups.items():
        texts = [(processor.text_ids(scored[place][0]), scored[place][1]) for place in places]
        passes = _score_passes(captioner.model, list(video_ids), texts, seen, grey, leave_one_out)
        for place, (_, new_ids), logprobs in zip(places, texts, zip(*passes, strict=True), strict=True):
            with_video, without, *by_frame = map(np.array, logprobs)
            frames = np.stack(by_frame) if leave_one_out else None
            results[place] = Grounding(list(new_ids), token_texts(processor, new_ids), with_video, without, frames)
    return [results[place] for place in range(len(scored))]


def _prompt_and_tokens(
    processor: CogVLM2VideoProcessor, caption: Caption | str | dict[str, Any], default: Prompt
) -> tuple[Prompt, list[int]]:
    """The prompt that a caption, a record or a text answers, and its tokens."""
    if isinstance(caption, Caption):
        return caption.prompt, caption.token_ids
    if isinstance(caption, dict):
        return Prompt.from_record(caption), processor.continuation_ids(caption["text"])
    return default, processor.continuation_ids(caption)


def mean_support(captioner: Captioner, records: Sequence[dict[str, Any]]) -> list[float]:
    """How far each caption rests on its video: support, in nats a token.

    Args:
        captioner: from `load_captioner`; need not be the one that wrote them.
        records: of a caption store or a sweep. Those of the same frames go through the model together.

    Returns:
        One number for each record; NaN where it has no text or its video cannot be read.
    """
    groups: dict[tuple, list[int]] = {}
    for place, record in enumerate(records):
        if record["status"] == "ok" and record["text"].strip():
            where = (record["video"], str(record["frame_sampling"]), record["start_seconds"], record["end_seconds"])
            groups.setdefault(where, []).append(place)
    found = np.full(len(records), np.nan)
    for (video, _, *window), places in groups.items():
        try:
            clip = load_clip(video, records[places[0]]["frame_sampling"], *window)
        except VideoError:
            continue
        for place, grounding in zip(
            places, ground(captioner, clip, [records[place] for place in places], leave_one_out=False), strict=True
        ):
            found[place] = grounding.total_support / len(grounding.token_ids)
    return found.tolist()


def _score_passes(model, video_ids, texts, seen, grey, leave_one_out):
    """Log probabilities of the texts: with the video, a grey one, and with frame 0, 1, ... grey."""

    def scored(cache):
        row = SharedRow(model, cache, video_ids)
        hidden = row.read_texts([[*prompt, *new_ids[:-1]] for prompt, new_ids in texts])
        crop(cache, len(video_ids))
        return [
            _logprobs(model, states[-len(new_ids) :], new_ids)
            for states, (_, new_ids) in zip(hidden, texts, strict=True)
        ]

    cache = RoomyCache(model.config)
    read_ids(model, cache, video_ids, grey.expand_as(seen))
    without = scored(cache)
    cache = RoomyCache(model.config)
    read_ids(model, cache, video_ids, seen)
    passes = [scored(cache), without]
    if not leave_one_out:
        return passes
    at = image_mask(torch.tensor([video_ids]), model.config.video_token_id)[0].nonzero()[:: seen.shape[1], 0].tolist()
    by_frame = []
    for frame in reversed(range(len(seen))):  # from the last, so that what stands before a frame is as it was
        crop(cache, at[frame])
        read_ids(model, cache, video_ids, torch.cat([grey, seen[frame + 1 :]]))
        by_frame.append(scored(cache))
    return [*passes, *reversed(by_frame)]


def token_texts(processor, ids: Sequence[int]) -> list[str]:
    """Each token as text; a character split over several tokens comes with the last of them."""
    texts = [processor.decode(ids[: count + 1]) for count in range(len(ids))]
    pieces, shown = [], ""
    for text in texts:
        whole = "" if text.endswith("\ufffd") else text[len(shown) :]
        pieces.append(whole)
        shown += whole
    return pieces


def _logprobs(model, hidden, ids):
    return chosen_logprobs(model.lm_head(hidden).float(), torch.tensor(ids, device=hidden.device)).tolist()
