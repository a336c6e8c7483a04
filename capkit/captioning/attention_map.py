"""Where did the model look? Attention maps: how much each word of a caption attends to each patch of each frame.

They tell where the model looked, which need not be why it chose a word: for that, `ground` makes frames grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from capkit.captioning.attribution import (
    Scorable,
    Text,
    pack_size,
    prompt_and_tokens,
    texts_by_video,
    token_texts,
    words_of,
)
from capkit.captioning.caches import PreallocatedCache, crop, prefill
from capkit.captioning.captioner import Captioner
from capkit.captioning.generate import Caption
from capkit.captioning.shared_prefix import SharedRow, encode_frames
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike, image_mask, watch_attention
from capkit.video import Clip

ACCURACY = (
    "On 200 held-out scenes of the demo model, the place with the most attention lies on the named object for 92 % of "
    "682 words (chance 11 %), and the frame is right within a second for 89 % of 386 words of events (leaving frames "
    "out 63 %, chance 38 %)."
)
"""How often attention is right, from `python -m capkit.demo.attention`; of other models it is not known."""
LOOKED_AT = 2.0
"""A word looks at a patch that gets this many times an even share of the attention that the word pays to patches."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMap:
    """How much a caption's words attend to each patch of each frame: the mean over all layers and heads.

    A patch is one of the G x G squares of a frame that the language model reads as one position, 8 x 8 in the published
    model. A word's attention is the mean of that of its tokens and of the tokens before each of them, which choose it:
    together they find known places about as often as the better of the two. Punctuation does not count. Weights of a
    word sum to less than 1: the rest of its attention goes to text and to frame numbers.

    Attributes:
        token_ids: the N tokens; those after the answer prefix.
        tokens: each token as text; a character split over several tokens belongs to the last of them.
        timestamps_seconds: float64 (T,), of the frames.
        patch_rows: float32 (N + 1, T, G, G), attention of the token before the caption and of its tokens.
        edge_rows: float32 (N + 1, T), their attention to the two positions that begin and end each frame.
    """

    token_ids: list[int]
    tokens: list[str]
    timestamps_seconds: np.ndarray
    patch_rows: np.ndarray
    edge_rows: np.ndarray

    def __repr__(self) -> str:
        """Counts only: the arrays would be pages of numbers. `capkit.views.show_attention` draws them."""
        _, num_frames, rows, columns = self.patch_rows.shape
        return f"AttentionMap({len(self.words)} words, {num_frames} frames of {rows} x {columns} patches)"

    @cached_property
    def words(self) -> list[tuple[str, slice]]:
        """Each word with the slice of its tokens; a token of two words counts for the first."""
        return words_of(self.tokens)

    @cached_property
    def weights(self) -> np.ndarray:
        """float32 (W, T, G, G): attention of each word to each patch."""
        return self._of_words(self.patch_rows)

    @cached_property
    def frame_shares(self) -> np.ndarray:
        """float32 (W, T): how each word's attention is spread over frames; sums to 1 for each word.

        Half of it counts what the patches get, half the two positions that begin and end a frame.
        """
        patches, edges = self.weights.sum((2, 3)), self._of_words(self.edge_rows)
        return patches / patches.sum(1, keepdims=True) / 2 + edges / edges.sum(1, keepdims=True) / 2

    @property
    def frames(self) -> np.ndarray:
        """int (W,): the frame with the largest of `frame_shares`: for words of an event, when it happens."""
        return self.frame_shares.argmax(1)

    @property
    def places(self) -> np.ndarray:
        """int (W, 3): frame, row and column of the patch that each word attends to most."""
        weights = self.weights
        flat = weights.reshape(len(weights), math.prod(weights.shape[1:]))
        return np.stack(np.unravel_index(flat.argmax(1), weights.shape[1:]), 1)

    @property
    def shares(self) -> np.ndarray:
        """float32 (W, T, G, G): `weights` as multiples of an even share of each word's attention to patches."""
        return self.weights / self.weights.mean((1, 2, 3), keepdims=True)

    @property
    def never_looked_at(self) -> np.ndarray:
        """bool (T, G, G): patches to which no word pays `LOOKED_AT` times an even share of its attention.

        What was looked at need not be told: words also look at things that the caption does not name.
        """
        return self.shares.max(0, initial=0) < LOOKED_AT

    def _of_words(self, rows: np.ndarray) -> np.ndarray:
        """The mean over the tokens of each word and those before them, from (N + 1, ...) to (W, ...)."""
        means = [rows[:0]]
        for _, tokens in self.words:
            places = range(tokens.start, tokens.stop)
            spoken = [place for place in places if any(map(str.isalnum, self.tokens[place]))] or [*places]
            means.append((rows[spoken] + rows[np.add(spoken, 1)]).mean(0, keepdims=True) / 2)
        return np.concatenate(means)


def attend(
    captioner: Captioner,
    clip: Clip,
    captions: Scorable | Sequence[Scorable],
    prompt: PromptLike = DEFAULT_PROMPT,
) -> AttentionMap | list[AttentionMap]:
    """Measure where the model looks for each word of a caption, in one forward pass.

    `ACCURACY` says how often that is where the named things are, and for words of events when they happen.

    Args:
        captioner, clip, captions, prompt: as in `ground`. Several captions are read together.

    Returns:
        An AttentionMap for each caption, in order; for one caption that is not in a sequence, the AttentionMap itself.

    Raises:
        ValueError: as in `Captioner.score`.
    """
    if isinstance(captions, (Caption, str, dict)):
        return _attend_all(captioner, clip, [captions], Prompt.of(prompt))[0]
    return _attend_all(captioner, clip, captions, Prompt.of(prompt))


@torch.inference_mode()
def _attend_all(captioner: Captioner, clip: Clip, captions: Sequence[Scorable], default: Prompt) -> list[AttentionMap]:
    processor = captioner.processor
    scored = [prompt_and_tokens(captioner, clip, caption, default) for caption in captions]
    features = encode_frames(captioner, clip)
    maps: dict[int, AttentionMap] = {}
    for video_ids, places, texts in texts_by_video(processor, clip, scored):
        rows_of_texts = _read(captioner, video_ids, texts, features)
        for place, (_, new_ids), rows in zip(places, texts, rows_of_texts, strict=True):
            patches = rows[..., 1:-1].unflatten(-1, (math.isqrt(rows.shape[-1]), -1)).numpy()
            edges = (rows[..., 0] + rows[..., -1]).numpy()
            tokens = token_texts(processor, new_ids)
            maps[place] = AttentionMap(list(new_ids), tokens, clip.timestamps_seconds, patches, edges)
    return [maps[place] for place in range(len(scored))]


def _read(
    captioner: Captioner, video_ids: list[int], texts: Sequence[Text], features: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Attention of the last token of each prompt and of its new tokens, float32 (N + 1, T, 1 + G * G + 1).

    To each frame's beginning, its patches and its end.
    """
    model, cache = captioner.model, PreallocatedCache(captioner.model.config)
    prefill(model, cache, video_ids, features)
    image = image_mask(torch.tensor([video_ids]), model.config.video_token_id)
    positions = image[0].nonzero()[:, 0].unflatten(0, features.shape[:2])

    def read_pack(pack: Sequence[Text]) -> list[torch.Tensor]:
        watched, attention = watch_attention(model, len(video_ids))
        row = SharedRow(watched, cache, video_ids)
        try:
            row.prefill([[*prompt, *new_ids] for prompt, new_ids in pack])
        finally:
            crop(cache, len(video_ids))
        by_text = attention.mean().cpu()[:, positions].split(row.lengths)
        return [rows[-len(new_ids) - 1 :] for rows, (_, new_ids) in zip(by_text, pack, strict=True)]

    return captioner.in_batches(read_pack, texts, pack_size(texts), lambda _: None)
