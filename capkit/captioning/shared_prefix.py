"""Many prompts and decodings of one clip, together: its frames are encoded once and stand in the cache once.

All branches are one row of the model's batch. A mask lets each see the video, its own prompt and its own words; so no
keys or values are ever copied, and branches with the same prompt share that too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from capkit.captioning.caches import RoomyCache, crop, read_ids
from capkit.captioning.captioner import Captioner
from capkit.captioning.choosing import RowChoosers, draw_key
from capkit.captioning.decoding import Decoding
from capkit.captioning.generate import Caption, is_end, make_caption
from capkit.captioning.graphs import FIRST_TOKENS
from capkit.cogvlm2 import Prompt, PromptLike, loading, preprocess_frames, rotary_position_ids
from capkit.video import Clip

BRANCHES_TOGETHER = 32  # each also skips over the others' words, which costs more the more there are
VIDEO = 0  # the part that all branches see


class SharedVideo:
    """A clip in the model's cache, to be asked many things.

    Args:
        captioner: from `load_captioner`.
        clip: from `load_clip` or `Clip.from_frames`.
    """

    def __init__(self, captioner: Captioner, clip: Clip):
        self.captioner, self.clip = captioner, clip
        self._features = None
        self._ids, self._cache = None, None

    def caption(self, branches: Sequence[tuple[PromptLike, Decoding]]) -> Iterator[Caption]:
        """A caption for each (prompt, decoding), in order: what `Captioner.caption` gives (token for token in float32).

        Consecutive branches whose frames carry the same numbers go through the model together; beam search goes alone.
        When memory runs out, fewer branches go together.

        Raises:
            ValueError: as in `Prompt`, or the prompt contains the token that marks the frames' positions.
            torch.OutOfMemoryError: one branch alone does not fit.
        """
        max_together = BRANCHES_TOGETHER
        pairs = [(Prompt.of(prompt), decoding) for prompt, decoding in branches]
        kinds = ((decoding.num_beams > 1, prompt.numbers(self.clip)) for prompt, decoding in pairs)
        for (is_beam_search, _), group in groupby(zip(kinds, pairs, strict=True), key=itemgetter(0)):
            remaining = [branch for _, branch in group]
            while remaining:
                pack = remaining[:1] if is_beam_search else remaining[:max_together]
                num_kept_bytes = self.captioner._graph_decoder.num_bytes
                try:
                    captions = [self.captioner.caption(self.clip, *pack[0])] if is_beam_search else self._caption(pack)
                except (RuntimeError, MemoryError) as error:
                    if (len(pack) == 1 and not num_kept_bytes) or not loading.is_out_of_memory(error):
                        raise
                    max_together = len(pack) // 2 or 1
                    self.captioner._graph_decoder.forget()
                    error.__traceback__ = None  # it holds the frames whose tensors are to be freed
                    gc.collect()
                    torch.cuda.empty_cache()
                    continue
                yield from captions
                remaining = remaining[len(pack) :]

    @torch.inference_mode()
    def _caption(self, branches: Sequence[tuple[Prompt, Decoding]]) -> list[Caption]:
        """One pack of branches whose frames carry the same numbers."""
        started = time.perf_counter()
        model, processor = self.captioner.model, self.captioner.processor
        decodings = [decoding for _, decoding in branches]
        video_ids = processor.video_ids(self.clip, branches[0][0])
        prompts = list(dict.fromkeys(prompt for prompt, _ in branches))
        prompt_of_branch = [prompts.index(prompt) for prompt, _ in branches]
        cache = self._video_cache(video_ids)
        try:
            row = SharedRow(model, cache, video_ids)
            texts = [*map(processor.text_ids, prompts)]
            hidden = torch.stack([states[-1] for states in row.read_texts(texts)])
            prefilled = time.perf_counter()
            choosers = RowChoosers(decodings, [draw_key(self.clip)] * len(branches))
            graphs = self.captioner._graph_decoder
            if graphs.is_useful and graphs.lock.acquire(blocking=False):
                try:
                    new_ids, logprobs = _decode_rows(graphs, row, texts, prompt_of_branch, choosers)
                finally:
                    graphs.lock.release()
            else:
                new_ids, logprobs = _choose_all(model, row, hidden[prompt_of_branch], prompt_of_branch, choosers)
        finally:
            crop(cache, len(video_ids))
        # Prefill time is split evenly; decoding time in proportion to tokens.
        prefill_seconds = (prefilled - started) / len(branches)
        token_seconds = (time.perf_counter() - prefilled) / sum(map(len, new_ids))
        return [
            make_caption(ids, row_logprobs, *branch, prefill_seconds + token_seconds * len(ids), model, processor)
            for branch, ids, row_logprobs in zip(branches, new_ids, logprobs, strict=True)
        ]

    @property
    def features(self) -> torch.Tensor:
        """The encoded frames, (T, tokens_per_frame, hidden_size)."""
        if self._features is None:
            self._features = encode_frames(self.captioner, self.clip.frames)
        return self._features

    def _video_cache(self, video_ids: list[int]) -> RoomyCache:
        """Keys and values of bos, frames and their numbers; one set at a time is kept."""
        if self._ids != video_ids:
            self._ids, self._cache = None, None
            cache = RoomyCache(self.captioner.model.config)
            read_ids(self.captioner.model, cache, video_ids, self.features)
            self._ids, self._cache = video_ids, cache
        return self._cache

    @property
    def num_cache_bytes(self) -> int:
        """Bytes of keys and values that are held now."""
        layers = self._cache.layers if self._cache is not None else ()
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@torch.inference_mode()
def encode_frames(captioner: Captioner, frames: np.ndarray) -> torch.Tensor:
    """Features (T, tokens_per_frame, hidden_size) of uint8 RGB frames (T, H, W, 3)."""
    pixels = preprocess_frames(frames, captioner.processor.image_size)
    return captioner.model.model.get_video_features(pixels.to(captioner.model.device))


class SharedRow:
    """One row of tokens in which each part sees the video, itself and the part it follows on from.

    Args:
        model: the model.
        cache: keys and values of the video, to which all that is read is added; crop it afterwards.
        video_ids: of what the cache holds.
    """

    def __init__(self, model, cache: RoomyCache, video_ids: list[int]):
        self.model, self.cache, self.device = model, cache, model.device
        positions = rotary_position_ids(torch.tensor([video_ids]), model.config.video_token_id)
        self.num_video, self.next_position = len(video_ids), int(positions[0, -1]) + 1
        self.parts = torch.full((len(video_ids),), VIDEO, device=self.device)  # whose each position is

    def read_texts(self, texts: list[list[int]]) -> tuple[torch.Tensor, ...]:
        """Part 1, 2, ...: each text, right after the video. Hidden states of each, (its length, hidden_size)."""
        ids = [token for text in texts for token in text]
        parts = [number for number, text in enumerate(texts, 1) for _ in text]
        positions = [self.next_position + place for text in texts for place in range(len(text))]
        self.lengths = [len(text) for text in texts]
        return self._forward(ids, parts, parts, positions).split(self.lengths)

    def read_words(self, ids: list[int], branches: list[int], texts: list[int], step: int) -> torch.Tensor:
        """The next word of some branches, which follow on from these texts; hidden states (branches, hidden_size)."""
        own = [len(self.lengths) + 1 + branch for branch in branches]
        before = [text + 1 for text in texts]
        return self._forward(ids, own, before, [self.next_position + self.lengths[text] + step for text in texts])

    def _forward(self, ids, own, before, positions):
        own, before = torch.tensor([own, before], device=self.device)
        self.parts = torch.cat([self.parts, own])
        seen = (self.parts == VIDEO) | (self.parts == own[:, None]) | (self.parts == before[:, None])
        seen = seen.tril(len(self.parts) - len(own))  # no token sees what comes later
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)
        outputs = self.model.model(
            inputs_embeds=self.model.model.embed(torch.tensor([ids], device=self.device)),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions], device=self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[0]


def _decode_rows(graphs, row, texts, of_branch, choosers) -> tuple[list[list[int]], list[list[float]]]:
    """Each branch's new tokens and their log probabilities: a row each, with keys and values of its own."""
    model, num_before = row.model, row.num_video
    length = num_before + max(map(len, texts)) - 1
    step = graphs.step(len(of_branch), length + min(max(choosers.max_new_tokens), FIRST_TOKENS))
    step.begin(length)
    held = [(layer.keys, layer.values) for layer in row.cache.layers]
    step.write(slice(None), num_before, [(keys[:, :, :num_before], values[:, :, :num_before]) for keys, values in held])
    start = num_before
    for number, text in enumerate(texts):
        rows, end = [place for place, of in enumerate(of_branch) if of == number], start + len(text) - 1
        step.write(rows, length, [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in held])
        step.ids[rows], step.positions[rows] = text[-1], row.next_position + len(text) - 1
        start = end + 1
    return graphs.decode(step, choosers, partial(is_end, config=model.config))


def _choose_all(model, row, hidden, of_branch, choosers) -> tuple[list[list[int]], list[list[float]]]:
    """Each branch's new tokens and their log probabilities: all in one row. A branch that has ended is dropped."""
    new_ids, logprobs = [[] for _ in of_branch], [[] for _ in of_branch]
    live, step = list(range(len(of_branch))), 0
    while live:
        scores = model.lm_head(hidden).float()
        history = torch.tensor([new_ids[branch] for branch in live], dtype=torch.long, device=scores.device)
        chosen, sure = choosers.choose(history, scores, step, live)
        for branch, token, logprob in zip(live, *torch.stack([chosen.double(), sure.double()]).tolist(), strict=True):
            new_ids[branch].append(int(token))
            logprobs[branch].append(logprob)
        live = [
            branch
            for branch in live
            if len(new_ids[branch]) < choosers.max_new_tokens[branch] and not is_end(new_ids[branch][-1], model.config)
        ]
        if live:
            prompts = [of_branch[branch] for branch in live]
            hidden = row.read_words([new_ids[branch][-1] for branch in live], live, prompts, step)
        step += 1
    return new_ids, logprobs
