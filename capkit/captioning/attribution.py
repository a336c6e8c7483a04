"""Which words of a caption does the video support, and on which frames does each depend?

`support` is pointwise mutual information: the log-likelihood ratio of each token with the video against a grey video.
`leaning` is leave-one-frame-out attribution: the same ratio against the video with one frame grey. Words without
support are those that the language model predicts without the video; they may still be true.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from capkit.captioning.caches import PreallocatedCache, crop, prefill
from capkit.captioning.captioner import Captioner
from capkit.captioning.choosing import chosen_logprobs
from capkit.captioning.context import check_fits
from capkit.captioning.generate import Caption, TextDecoder, is_end
from capkit.captioning.shared_prefix import SharedRow, encode_frames
from capkit.cogvlm2 import (
    DEFAULT_PROMPT,
    CogVLM2VideoProcessor,
    Prompt,
    PromptLike,
    image_mask,
)
from capkit.video import Clip, VideoError, load_clip

ROW_POSITIONS = 512  # of texts in a row: attention also computes each one's masked positions, those of all the others
GREY = 128
"""Red, green and blue, of 255, of a frame without content."""
REPEATED_WORDS = 8
"""So many words that have been said before in the same order are a loop: they say nothing new."""

Scorable = Caption | str | dict[str, Any]
"""A `Caption`, a text or a caption record."""
Text = tuple[list[int], list[int]]
"""Ids of a prompt without the video, and of the new tokens after it."""


@dataclass(frozen=True)
class Grounding:
    """Log probabilities of a caption's tokens with the video, and with all or single frames grey.

    Attributes:
        token_ids: the N tokens; those after the answer prefix.
        tokens: each token as text; a character split over several tokens belongs to the last of them.
        logprobs: float64 (N,), log P(token | video, prompt, tokens before), in nats.
        grey_logprobs: float64 (N,), the same with a grey video of the same frames and numbers.
        frame_logprobs: float64 (T, N), the same with only frame t grey; None without `leave_one_out`.
    """

    token_ids: list[int]
    tokens: list[str]
    logprobs: np.ndarray
    grey_logprobs: np.ndarray
    frame_logprobs: np.ndarray | None

    @property
    def support(self) -> np.ndarray:
        """float64 (N,): log-likelihood ratio of each token with the video against a grey one, in nats."""
        return self.logprobs - self.grey_logprobs

    @property
    def total_support(self) -> float:
        """Sum of `support`: log P(caption | video) - log P(caption | grey), in nats."""
        return float(self.support.sum())

    @property
    def supported_words(self) -> float:
        """Sum of the words' support, of each at most 1 nat: nearly the number of words that the video makes e times
        likelier or more; words that it makes less likely count against them. Words `said_before` do not count.

        Of the measures that need no reference, this one orders captions best by truth and completeness together, on
        the demo model's clips; see `capkit.demo.measures`. It knows only what the model sees: a mistake that the model
        is sure of counts as a true word.
        """
        words = [word for word, _ in self.words]
        return count_supported(words, self.of_words(self.support)) if words else 0.0

    @property
    def leaning(self) -> np.ndarray:
        """float64 (T, N): log-likelihood ratio of each token with frame t against frame t grey, in nats.

        Raises:
            ValueError: there are no `frame_logprobs`.
        """
        if self.frame_logprobs is None:
            raise ValueError("leaning: no frame_logprobs; call ground() with leave_one_out=True")
        return self.logprobs - self.frame_logprobs

    @property
    def words(self) -> list[tuple[str, slice]]:
        """Each word with the slice of its tokens; a token of two words counts for the first."""
        return words_of(self.tokens)

    def of_words(self, values: np.ndarray) -> np.ndarray:
        """Sum token values (..., N), such as `support` or `leaning`, to those of `words` (..., W)."""
        return np.stack([values[..., tokens].sum(-1) for _, tokens in self.words], -1)


def ground(
    captioner: Captioner,
    clip: Clip,
    captions: Scorable | Sequence[Scorable],
    prompt: PromptLike = DEFAULT_PROMPT,
    leave_one_out: bool = True,
) -> Grounding | list[Grounding]:
    """Score captions with the video, with a grey one, and with each frame grey in turn.

    The frames are encoded once. With frame t grey, the cache of what comes before t is reused: with T frames, about
    T / 2 + 1 videos are prefilled in all. Captions are scored in packs, which are halved when memory runs out.

    Args:
        captioner: from `load_captioner`.
        clip: the video.
        captions: one, or several of this clip, which are scored together: `Caption`s (their tokens, without the end
            token), texts, or caption records (their texts). Texts are scored as continuations; `Caption`s and records
            have their own prompts.
        prompt: of texts, as in `Captioner.caption`.
        leave_one_out: False skips the passes with one frame grey: faster, but there is no `leaning`.

    Returns:
        A Grounding for each caption, in order; for one caption that is not in a sequence, the Grounding itself.

    Raises:
        ValueError: as in `Captioner.score`.
    """
    if isinstance(captions, (Caption, str, dict)):
        return _ground_all(captioner, clip, [captions], Prompt.of(prompt), leave_one_out)[0]
    return _ground_all(captioner, clip, captions, Prompt.of(prompt), leave_one_out)


@torch.inference_mode()
def _ground_all(
    captioner: Captioner, clip: Clip, captions: Sequence[Scorable], default: Prompt, leave_one_out: bool
) -> list[Grounding]:
    processor = captioner.processor
    scored = [prompt_and_tokens(captioner, clip, caption, default) for caption in captions]
    seen = encode_frames(captioner, clip)
    grey = encode_frames(captioner, Clip.from_frames(np.full_like(clip.frames[:1], GREY)))
    results: dict[int, Grounding] = {}
    for video_ids, places, texts in texts_by_video(processor, clip, scored):
        passes = _score_passes(captioner, video_ids, texts, seen, grey, leave_one_out)
        for place, (_, new_ids), logprobs in zip(places, texts, zip(*passes, strict=True), strict=True):
            with_video, without, *by_frame = map(np.array, logprobs)
            frames = np.stack(by_frame) if leave_one_out else None
            results[place] = Grounding(list(new_ids), token_texts(processor, new_ids), with_video, without, frames)
    return [results[place] for place in range(len(scored))]


def prompt_and_tokens(captioner: Captioner, clip: Clip, caption: Scorable, default: Prompt) -> tuple[Prompt, list[int]]:
    """The prompt and the tokens to score; without the end token, which belongs to no word.

    Raises:
        ValueError: as in `Captioner.score`.
    """
    model, processor = captioner.model, captioner.processor
    if isinstance(caption, Caption):
        prompt, ids = caption.last_prompt, [token for token in caption.token_ids if not is_end(token, model.config)]
        if not ids:
            raise ValueError(f"text={caption.text!r}: there is no text to score")
    else:
        prompt = default
        if isinstance(caption, dict):
            prompt = Prompt.from_record(caption).after(caption.get("step_answers", ()))
        text = caption["text"] if isinstance(caption, dict) else caption
        ids = processor.continuation_ids(text, prompt.answer_prefix)
    check_fits(model, processor, clip, prompt, ids)
    return prompt, ids


def texts_by_video(
    processor: CogVLM2VideoProcessor, clip: Clip, scored: Sequence[tuple[Prompt, list[int]]]
) -> Iterator[tuple[list[int], list[int], list[Text]]]:
    """The video's ids, the places and the texts of all captions whose prompts give the frames the same numbers."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, _) in enumerate(scored):
        groups.setdefault(tuple(processor.video_ids(clip, prompt)), []).append(place)
    for video_ids, places in groups.items():
        yield list(video_ids), places, [(processor.text_ids(scored[at][0]), scored[at][1]) for at in places]


def pack_size(texts: Sequence[Text]) -> int:
    """How many of these texts are read as one row."""
    return max(ROW_POSITIONS // max(len(prompt) + len(new_ids) for prompt, new_ids in texts), 1)


def score_support(captioner: Captioner, records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """How far the video supports each caption: two columns for the table of a sweep.

    Args:
        captioner: from `load_captioner`; not necessarily the one that wrote the captions.
        records: of a caption store or a sweep. Those of the same frames are scored together.

    Returns:
        Of each record `supported_words`, see `Grounding.supported_words`, and `support`, its tokens' mean in nats; NaN
        where there is no text, one beyond the context length, or no readable video.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, record in enumerate(records):
        if record["status"] == "ok" and record["text"].strip():
            where = (record["video"], str(record["frame_sampling"]), record["start_seconds"], record["end_seconds"])
            groups.setdefault(where, []).append(place)
    columns = {name: [math.nan] * len(records) for name in ("supported_words", "support")}
    for (video, _, *window), places in groups.items():
        try:
            clip = load_clip(video, records[places[0]]["frame_sampling"], *window)
        except VideoError:
            continue
        fitting = []
        for place in places:
            with suppress(ValueError):
                prompt_and_tokens(captioner, clip, records[place], Prompt())
                fitting.append(place)
        groundings = _ground_all(captioner, clip, [records[place] for place in fitting], Prompt(), leave_one_out=False)
        for place, grounding in zip(fitting, groundings, strict=True):
            columns["supported_words"][place] = grounding.supported_words
            columns["support"][place] = grounding.total_support / len(grounding.token_ids)
    return columns


def _score_passes(
    captioner: Captioner,
    video_ids: list[int],
    texts: Sequence[Text],
    seen: torch.Tensor,
    grey: torch.Tensor,
    leave_one_out: bool,
) -> list[list[list[float]]]:
    """Log probabilities of (prompt, new tokens) pairs: with the video, a grey one, and with frame 0, 1, ... grey."""
    model = captioner.model
    size = pack_size(texts)

    def remember(num_texts: int) -> None:
        nonlocal size
        size = num_texts // 2 or 1

    def score(cache: PreallocatedCache) -> list[list[float]]:
        def score_pack(pack: Sequence[Text]) -> list[list[float]]:
            row = SharedRow(model, cache, video_ids)
            try:
                hidden = row.prefill([[*prompt, *new_ids[:-1]] for prompt, new_ids in pack])
            finally:
                crop(cache, len(video_ids))
            return [
                chosen_logprobs(
                    model.lm_head(states[-len(new_ids) :]).float(), torch.tensor(new_ids, device=states.device)
                ).tolist()
                for states, (_, new_ids) in zip(hidden, pack, strict=True)
            ]

        return list(captioner.in_batches(score_pack, texts, size, remember))

    def prefilled(features: torch.Tensor) -> PreallocatedCache:
        cache = PreallocatedCache(model.config)
        prefill(model, cache, video_ids, features)
        return cache

    without = score(prefilled(grey.expand_as(seen)))
    cache = prefilled(seen)
    passes = [score(cache), without]
    if not leave_one_out:
        return passes
    at = image_mask(torch.tensor([video_ids]), model.config.video_token_id)[0].nonzero()[:: seen.shape[1], 0].tolist()
    by_frame = []
    for frame in reversed(range(len(seen))):  # from the last, so that the cache before a frame stays valid
        crop(cache, at[frame])
        prefill(model, cache, video_ids, torch.cat([grey, seen[frame + 1 :]]))
        by_frame.append(score(cache))
    return [*passes, *reversed(by_frame)]


def words_of(tokens: Sequence[str]) -> list[tuple[str, slice]]:
    """Each word of a text with the slice of its tokens; a token of two words counts for the first."""
    words: list[tuple[str, slice]] = []
    ends, first = np.cumsum([len(token) for token in tokens]), 0
    for match in re.finditer(r"\S+", "".join(tokens)):
        last = int(np.searchsorted(ends, match.end())) + 1
        if last > first:
            words.append((match[0], slice(first, last)))
            first = last
    return words


def count_supported(words: Sequence[str], support: np.ndarray) -> float:
    """`Grounding.supported_words` of W words and their support (W,)."""
    return float(np.minimum(support, 1)[~said_before(words)].sum())


def said_before(words: Sequence[str]) -> np.ndarray:
    """bool (W,): whether each word belongs to REPEATED_WORDS or more in a row that came before in the same order.

    Case and punctuation make no difference.
    """
    plain = [re.sub(r"\W", "", word).lower() or word for word in words]
    known, is_repeated = set(), np.zeros(len(plain), bool)
    for first in range(len(plain) - REPEATED_WORDS + 1):
        run = tuple(plain[first : first + REPEATED_WORDS])
        is_repeated[first : first + REPEATED_WORDS] |= run in known
        known.add(run)
    return is_repeated


def token_texts(processor: CogVLM2VideoProcessor, ids: Sequence[int]) -> list[str]:
    """Each token as text; a character split over several tokens belongs to the last of them."""
    decoder = TextDecoder(processor)
    return [decoder.add([token]) for token in ids]
