"""Shared-prefix decoding: encode and cache a clip once, decode many prompts and settings from it.

Prompts are read as parts of one row, where a mask lets each attend to the video and itself. On a CPU, branches are then
decoded in rows of their own behind one cache of the video, on a GPU behind copies of it, elsewhere as more parts of the
first row.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch.nn import functional as F

from capkit.captioning.caches import PreallocatedCache, PromptCache, crop, layer_tensors
from capkit.captioning.captioner import Captioner
from capkit.captioning.chains import ask_steps, next_question
from capkit.captioning.choosing import RowChoosers, draw_key
from capkit.captioning.decoding import Decoding
from capkit.captioning.generate import Caption, is_end, make_caption
from capkit.captioning.graphs import FIRST_TOKENS, GraphDecoder
from capkit.cogvlm2 import (
    GROUPED_SDPA,
    CogVLM2VideoForConditionalGeneration,
    Prompt,
    PromptLike,
    rotary_position_ids,
)
from capkit.video import Clip

MAX_BRANCHES = 32  # together: as parts of one row, attention also computes the masked positions of all others
VIDEO = 0  # the part that all others attend to

Branch = tuple[Prompt, Decoding]
Generated = tuple[list[list[int]], list[list[float]]]  # new tokens of each branch, and their log probabilities


class SharedVideo:
    """A clip that is encoded and cached once, to be captioned with many prompts and decodings.

    Args:
        captioner: from `load_captioner`.
        clip: from `load_clip` or `Clip.from_frames`.
    """

    def __init__(self, captioner: Captioner, clip: Clip) -> None:
        self.captioner, self.clip = captioner, clip
        self._features: torch.Tensor | None = None
        self._kept = PromptCache(captioner.model)

    def caption(self, branches: Sequence[tuple[PromptLike, Decoding]]) -> Iterator[Caption]:
        """A caption for each (prompt, decoding), in order: that of `Captioner.caption` (token for token in float32).

        Consecutive branches with the same frame numbers are decoded together, except in beam search. When memory runs
        out, the number of branches is halved. Steps that several prompts share are answered once for each decoding.

        Raises:
            ValueError: as in `Captioner.caption`, before any branch is decoded.
            torch.OutOfMemoryError: one branch alone does not fit.
        """
        pairs = [(Prompt.of(prompt), decoding) for prompt, decoding in branches]
        for prompt, decoding in pairs:
            decoding.check_prefix(prompt.answer_prefix)
        for prompt in {prompt for prompt, _ in pairs}:
            self.captioner.tokens_that_fit(self.clip, prompt)

        def ask(places: Sequence[int], prompts: Sequence[Prompt]) -> list[Caption]:
            questions = [(prompt, pairs[place][1]) for place, prompt in zip(places, prompts, strict=True)]
            times = Counter(questions)
            made = dict(zip(times, self._answer([*times]), strict=True))
            return [replace(made[branch], seconds=made[branch].seconds / times[branch]) for branch in questions]

        # In beam search, the captioner asks the steps itself.
        chains = [replace(prompt, steps=()) if decoding.num_beams > 1 else prompt for prompt, decoding in pairs]
        answers = ask_steps(chains, ask)
        last = [
            (prompt if decoding.num_beams > 1 else next_question(prompt, given), decoding)
            for (prompt, decoding), given in zip(pairs, answers, strict=True)
        ]
        for caption, (prompt, _), given in zip(self._answer(last), pairs, answers, strict=True):
            yield caption.with_steps(prompt, given)

    def _answer(self, pairs: Sequence[Branch]) -> Iterator[Caption]:
        """A caption for each branch; only those in beam search may have steps."""
        most = MAX_BRANCHES

        def remember(num_branches: int) -> None:
            nonlocal most
            most = num_branches // 2 or 1

        fitting = {
            prompt: self.captioner.tokens_that_fit(self.clip, prompt) for prompt in {prompt for prompt, _ in pairs}
        }
        kinds = ((decoding.num_beams > 1, prompt.numbers(self.clip)) for prompt, decoding in pairs)
        for (is_beam_search, _), group in groupby(zip(kinds, pairs, strict=True), key=itemgetter(0)):
            together = [branch for _, branch in group]
            if is_beam_search:
                yield from (self.captioner.caption(self.clip, *branch) for branch in together)
            else:
                run = partial(self._caption, fitting=fitting)
                yield from self.captioner.in_batches(run, together, most, remember)

    @torch.inference_mode()
    def _caption(self, branches: Sequence[Branch], fitting: dict[Prompt, int]) -> list[Caption]:
        """Branches with the same frame numbers, decoded together; at most `fitting` tokens of each prompt."""
        started = time.perf_counter()
        model, processor = self.captioner.model, self.captioner.processor
        limits = [min(decoding.max_new_tokens, fitting[prompt]) for prompt, decoding in branches]
        prefix = processor.video_ids(self.clip, branches[0][0])
        prompts = list(dict.fromkeys(prompt for prompt, _ in branches))
        prompt_of_branch = [prompts.index(prompt) for prompt, _ in branches]
        texts = [*map(processor.text_ids, prompts)]
        if all(prompt.history for prompt in prompts):  # what the texts begin with is read once, and kept with the video
            num_shared = min(len(os.path.commonprefix(texts)), min(map(len, texts)) - 1)
            prefix += texts[0][:num_shared]
            texts = [text[num_shared:] for text in texts]
        cache = self._kept.read(prefix, self._encoded)
        try:
            row = SharedRow(model, cache, prefix)
            hidden = torch.stack([states[-1] for states in row.prefill(texts)])
            prefilled = time.perf_counter()
            decodings = [replace(branch[1], max_new_tokens=most) for branch, most in zip(branches, limits, strict=True)]
            prefixes = [processor.prefix_ids(prompt) for prompt, _ in branches]
            keys = [draw_key(self.clip)] * len(branches)
            choosers = RowChoosers(decodings, keys, processor.tokenizer, prefixes)
            graphs = self.captioner._graph_decoder
            if graphs.is_useful and graphs.lock.acquire(blocking=False):
                try:
                    new_ids, logprobs = _decode_rows(graphs, row, texts, prompt_of_branch, choosers)
                finally:
                    graphs.lock.release()
            else:
                new_ids, logprobs = _decode_branches(row, hidden[prompt_of_branch], prompt_of_branch, choosers)
        finally:
            crop(cache, len(prefix))
        # Prefill time is split evenly; decoding time in proportion to tokens.
        prefill_seconds = (prefilled - started) / len(branches)
        token_seconds = (time.perf_counter() - prefilled) / sum(map(len, new_ids))
        return [
            make_caption(ids, row_logprobs, *branch, most, prefill_seconds + token_seconds * len(ids), model, processor)
            for branch, most, ids, row_logprobs in zip(branches, limits, new_ids, logprobs, strict=True)
        ]

    def _encoded(self) -> torch.Tensor:
        """The frames' features."""
        if self._features is None:
            self._features = encode_frames(self.captioner, self.clip)
        return self._features


@torch.inference_mode()
def encode_frames(captioner: Captioner, clip: Clip) -> torch.Tensor:
    """Features (T, tokens_per_frame, hidden_size) of a clip's frames."""
    pixels = torch.from_numpy(clip.pixels(captioner.processor.image_size))
    return captioner.model.model.get_video_features(pixels.to(captioner.model.device))


class SharedRow:
    """One row of tokens in which each part attends to the video, to itself and to the part that it continues.

    Args:
        model: the model.
        cache: keys and values of the video, and of what all texts begin with; those of the parts are added, crop it
            afterwards.
        video_ids: ids of what the cache holds.
    """

    def __init__(
        self, model: CogVLM2VideoForConditionalGeneration, cache: PreallocatedCache, video_ids: list[int]
    ) -> None:
        self.model, self.cache, self.device = model, cache, model.device
        positions = rotary_position_ids(torch.tensor([video_ids]), model.config.video_token_id)
        self.num_video, self.next_position = len(video_ids), int(positions[0, -1]) + 1
        self.parts = torch.full((len(video_ids),), VIDEO, device=self.device)  # the part of each position

    def prefill(self, texts: list[list[int]]) -> tuple[torch.Tensor, ...]:
        """Read each text as the continuation of the video; hidden states (length, hidden_size) of each."""
        ids = [token for text in texts for token in text]
        parts = [number for number, text in enumerate(texts, 1) for _ in text]
        positions = [self.next_position + place for text in texts for place in range(len(text))]
        self.lengths = [len(text) for text in texts]
        return self._forward(ids, parts, parts, positions).split(self.lengths)

    def decode(self, ids: list[int], branches: list[int], texts: list[int], step: int) -> torch.Tensor:
        """Read the next token of each branch, after its text; hidden states (branches, hidden_size)."""
        own = [len(self.lengths) + 1 + branch for branch in branches]
        before = [text + 1 for text in texts]
        return self._forward(ids, own, before, [self.next_position + self.lengths[text] + step for text in texts])

    def _forward(self, ids: list[int], own: list[int], before: list[int], positions: list[int]) -> torch.Tensor:
        """Read tokens of the parts `own`, which continue the parts `before`."""
        # One copy to the device: each waits for it.
        own_parts, before_parts, new_ids, places = torch.tensor([own, before, ids, positions], device=self.device)
        self.parts = torch.cat([self.parts, own_parts])
        seen = (self.parts == VIDEO) | (self.parts == own_parts[:, None]) | (self.parts == before_parts[:, None])
        seen = seen.tril(len(self.parts) - len(own))  # causal
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)
        outputs = self.model.model(
            inputs_embeds=self.model.model.embed(new_ids[None]),
            attention_mask=mask[None, None],
            position_ids=places[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[0]


def _decode_rows(
    graphs: GraphDecoder, row: SharedRow, texts: list[list[int]], prompt_of_branch: list[int], choosers: RowChoosers
) -> Generated:
    """Decode each branch in a row of its own, with its own copy of keys and values."""
    model, num_before = row.model, row.num_video
    length = num_before + max(map(len, texts)) - 1
    step = graphs.step(len(prompt_of_branch), length + min(max(choosers.max_new_tokens), FIRST_TOKENS))
    step.begin(length)
    held = layer_tensors(row.cache)
    step.write(slice(None), num_before, [(keys[:, :, :num_before], values[:, :, :num_before]) for keys, values in held])
    start = num_before
    for number, text in enumerate(texts):
        rows, end = [i for i, prompt in enumerate(prompt_of_branch) if prompt == number], start + len(text) - 1
        step.write(rows, length, [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in held])
        step.ids[rows], step.positions[rows] = text[-1], row.next_position + len(text) - 1
        start = end + 1
    return graphs.decode(step, choosers, partial(is_end, config=model.config))


class _OwnRows:
    """Each branch in a row of its own behind the shared video: its text, then its new tokens.

    Args:
        row: has read the video and the texts.
        texts: the number of each branch's text.
    """

    def __init__(self, row: SharedRow, texts: list[int]) -> None:
        self.model, longest = row.model, max(row.lengths)
        layers = layer_tensors(row.cache)
        self.prefix = [(keys[:, :, : row.num_video], values[:, :, : row.num_video]) for keys, values in layers]
        ends = np.cumsum(row.lengths) + row.num_video
        # Texts end together; what comes before a shorter one is of others, and masked.
        places = torch.tensor([range(end - longest, end) for end in ends[texts].tolist()], device=row.device)
        self.cache = PreallocatedCache(self.model.config)
        for number, tensors in enumerate(layers):
            keys, values = (tensor[0][:, places].transpose(0, 1) for tensor in tensors)
            self.cache.update(keys, values, number)
        lengths = torch.tensor(row.lengths, device=row.device)[texts]
        self.positions = row.next_position + lengths[:, None]
        self.seen = torch.arange(longest, device=row.device) >= longest - lengths[:, None]

    def read(self, ids: list[int]) -> torch.Tensor:
        """Read the next token of each row; hidden states (rows, hidden_size)."""
        self.seen = F.pad(self.seen, (0, 1), value=True)
        hidden = torch.finfo(self.model.dtype).min
        mask = torch.zeros(self.seen.shape, dtype=self.model.dtype).masked_fill(~self.seen, hidden)
        outputs = self.model.model(
            inputs_embeds=self.model.model.embed(torch.tensor(ids, device=self.seen.device)[:, None]),
            attention_mask=mask[:, None, None],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            prefix=self.prefix,
        )
        self.positions = self.positions + 1
        return outputs.last_hidden_state[:, 0]

    def keep(self, rows: list[int]) -> None:
        """Leave out all but these rows."""
        self.cache.batch_select_indices(torch.tensor(rows, device=self.seen.device))
        self.seen, self.positions = self.seen[rows], self.positions[rows]


def _decode_branches(
    row: SharedRow, hidden: torch.Tensor, prompt_of_branch: list[int], choosers: RowChoosers
) -> Generated:
    """Decode branches together; those that have ended are left out."""
    takes_prefix = row.device.type == "cpu" and row.model.config._attn_implementation == GROUPED_SDPA
    own = _OwnRows(row, prompt_of_branch) if takes_prefix else None
    new_ids: list[list[int]] = [[] for _ in prompt_of_branch]
    logprobs: list[list[float]] = [[] for _ in prompt_of_branch]
    live, step, config = list(range(len(prompt_of_branch))), 0, row.model.config
    while live:
        scores = row.model.lm_head(hidden).float()
        known = [new_ids[branch] for branch in live]
        history = torch.tensor(known, dtype=torch.long, device=scores.device)
        chosen = torch.stack([tensor.double() for tensor in choosers.choose(history, scores, step, live, known)])
        for branch, token, logprob in zip(live, *chosen.tolist(), strict=True):
            new_ids[branch].append(int(token))
            logprobs[branch].append(logprob)
        going = [
            place
            for place, branch in enumerate(live)
            if len(new_ids[branch]) < choosers.max_new_tokens[branch] and not is_end(new_ids[branch][-1], config)
        ]
        if own and 0 < len(going) < len(live):
            own.keep(going)
        live = [live[place] for place in going]
        last = [new_ids[branch][-1] for branch in live]
        if live and own:
            hidden = own.read(last)
        elif live:
            hidden = row.decode(last, live, [prompt_of_branch[branch] for branch in live], step)
        step += 1
    return new_ids, logprobs
