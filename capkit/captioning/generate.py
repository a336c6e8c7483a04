"""Generation: one batch of clips and prompts with one `Decoding`. The only caller of transformers' generate()."""

from __future__ import annotations

import copy
import math
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from capkit.captioning.caches import PreallocatedCache, PromptCache, prefill_batch
from capkit.captioning.chains import ask_steps, next_question
from capkit.captioning.choosing import Chooser, RowChoosers, chosen_logprobs, draw_key
from capkit.captioning.context import tokens_that_fit
from capkit.captioning.decoding import Decoding
from capkit.captioning.graphs import GraphDecoder
from capkit.cogvlm2 import (
    CogVLM2VideoConfig,
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    Prompt,
    rotary_position_ids,
)
from capkit.text import warn
from capkit.video import Clip


@dataclass(frozen=True)
class Caption:
    """A generated caption, with its log probabilities and the settings it was generated with.

    Attributes:
        text: the prompt's answer prefix and the tokens, decoded without special ones. As in the original, a leading
            space of the first word is kept.
        token_ids: the new tokens, those after the answer prefix, including the end token if there is one.
        logprobs: log P(token | clip, prompt, tokens before) of each, in nats, under the model itself: before
            temperature, top-k, top-p and penalties.
        finish_reason: "eos", "length" (max_new_tokens reached, or the model's context length) or "stopped".
        prompt, decoding: the settings.
        seconds: generation time, of the steps too; in a batch, the batch's time divided by its size.
        steps: each of the prompt's steps with the answer to it; fewer if it was stopped before.
        step_finish_reasons: as `finish_reason`, of each step.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt: Prompt
    decoding: Decoding
    seconds: float
    steps: tuple[tuple[str, str], ...] = ()
    step_finish_reasons: tuple[str, ...] = ()

    @property
    def mean_logprob(self) -> float:
        """Mean of `logprobs`, in nats a token; NaN without tokens."""
        return float(np.mean(self.logprobs)) if self.logprobs else math.nan

    @property
    def last_prompt(self) -> Prompt:
        """The question that `text` answers, with the steps and their answers as its history."""
        return self.prompt.after([answer for _, answer in self.steps])

    def with_steps(self, prompt: Prompt, answers: Sequence[Caption]) -> Caption:
        """The answer to a prompt that has steps, from that to its last question, and the answers to its steps."""
        if not answers:
            return self
        return replace(
            self,
            prompt=prompt,
            seconds=self.seconds + sum(answer.seconds for answer in answers),
            steps=tuple((step, answer.text.strip()) for step, answer in zip(prompt.steps, answers, strict=False)),
            step_finish_reasons=tuple(answer.finish_reason for answer in answers),
        )

    def __repr__(self) -> str:
        return f"Caption({self.text!r}, {len(self.token_ids)} tokens, {self.finish_reason})"


class Request:
    """A batch of clips and prompts to be captioned: pixels are made at once, `run` generates.

    In beam search all must have the same limit of new tokens, as it decides which beams are kept: `max_new_tokens`, or
    fewer where fewer fit.
    """

    def __init__(
        self,
        model: CogVLM2VideoForConditionalGeneration,
        processor: CogVLM2VideoProcessor,
        graph_decoder: GraphDecoder,
        rows: Sequence[tuple[Clip, Prompt]],
        decoding: Decoding,
    ) -> None:
        self.clips, self.prompts = zip(*rows, strict=True)
        self.model, self.processor, self.graph_decoder = model, processor, graph_decoder
        self.decoding = decoding
        self.pixels = [torch.from_numpy(clip.pixels(processor.image_size)) for clip in self.clips]
        self.draw_keys = [*map(draw_key, self.clips)]
        self.stop = threading.Event()

    @torch.inference_mode()
    def run(self, streamer: BaseStreamer | None = None) -> list[Caption]:
        prompts, has_steps = self.prompts, any(prompt.steps for prompt in self.prompts)
        # What was read of each clip stays for its next question.
        kept = [PromptCache(self.model) for _ in prompts] if has_steps else []
        answers = ask_steps(prompts, partial(self._answer, kept=kept, is_step=True), self.stop.is_set)
        if has_steps and self.stop.is_set():
            captions = [Caption(p.answer_prefix, [], [], "stopped", p, self.decoding, 0.0) for p in prompts]
        else:
            last = [*map(next_question, prompts, answers)]
            captions = self._answer(range(len(prompts)), last, kept, streamer=streamer)
        return [*map(Caption.with_steps, captions, prompts, answers)]

    def _answer(
        self,
        rows: Sequence[int],
        prompts: Sequence[Prompt],
        kept: Sequence[PromptCache],
        is_step: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> list[Caption]:
        """Captions of some of the clips, with prompts without steps; of a step, log probabilities may be left out."""
        started = time.perf_counter()
        model, processor, decoding, graphs = self.model, self.processor, self.decoding, self.graph_decoder
        questions = [(self.clips[row], prompt) for row, prompt in zip(rows, prompts, strict=True)]
        limits = [min(decoding.max_new_tokens, tokens_that_fit(model, processor, *one)) for one in questions]
        pixels = torch.cat([self.pixels[row] for row in rows])
        ids = processor.pad([processor.prompt_ids(*one) for one in questions])
        inputs = BatchFeature(ids | {"pixel_values_videos": pixels}).to(model.device)
        draw_keys, kept = [self.draw_keys[row] for row in rows], [kept[row] for row in rows] if kept else []
        prefixes = [*map(processor.prefix_ids, prompts)]
        # The graphs serve one thread at a time; others decode without.
        if decoding.num_beams == 1 and graphs.is_useful and graphs.lock.acquire(blocking=False):
            try:
                limited = [replace(decoding, max_new_tokens=limit) for limit in limits]
                choosers = RowChoosers(limited, draw_keys, processor.tokenizer, prefixes)
                ends = partial(is_end, config=model.config)
                new_ids, logprobs = graphs.caption(inputs, choosers, ends, self.stop, streamer, kept)
            finally:
                graphs.lock.release()
        else:
            new_ids, logprobs = self._generate(inputs, limits, draw_keys, prefixes, kept, is_step, streamer)
        seconds = (time.perf_counter() - started) / len(rows)
        return [
            make_caption(ids, row_logprobs, prompt, decoding, limit, seconds, model, processor)
            for ids, row_logprobs, prompt, limit in zip(new_ids, logprobs, prompts, limits, strict=True)
        ]

    def _generate(
        self,
        inputs: BatchFeature,
        limits: Sequence[int],
        draw_keys: Sequence[int],
        prefixes: Sequence[Sequence[int]],
        kept: Sequence[PromptCache],
        is_step: bool,
        streamer: BaseStreamer | None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens of each row, and their log probabilities."""
        decoding, num_rows, config = self.decoding, len(limits), self.model.config
        # A copy that shares the weights: generate() fills what GenerationConfig leaves open from the model's, and would
        # compare the context length with the number of ids. Its annotations do not accept the model's class.
        model: Any = copy.copy(self.model)
        model.generation_config, model.config = GenerationConfig(), copy.copy(config)
        model.config.max_position_embeddings = sys.maxsize
        prompt_length, beams = inputs["input_ids"].shape[1], decoding.num_beams > 1
        chooser = Chooser([decoding] * num_rows, draw_keys, prompt_length, self.processor.tokenizer, prefixes)
        of_beams = [*filter(None, [chooser.steering]), *chooser.penalties]
        cache, pixels = PreallocatedCache(config), inputs["pixel_values_videos"]
        if kept or (num_rows > 1 and not beams):
            cache, pixels = prefill_batch(model, inputs, kept), None
            if beams:
                cache.batch_repeat_interleave(decoding.num_beams)
        new_ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            pixel_values_videos=pixels,
            generation_config=GenerationConfig(
                max_new_tokens=max(limits),
                num_beams=decoding.num_beams,
                do_sample=False,  # the chooser samples
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            ),
            logits_processor=LogitsProcessorList(of_beams if beams else [chooser]),
            stopping_criteria=StoppingCriteriaList([_StopWhen(self.stop)]),
            streamer=streamer,
        )[:, prompt_length:].tolist()
        rows = [until_end(row[:limit], config) for row, limit in zip(new_ids, limits, strict=True)]
        if beams:  # rows change places between steps, so that log probabilities are computed afterwards
            return rows, [[] for _ in rows] if is_step else continuation_logprobs(model, inputs, rows)
        return rows, torch.stack(chooser.logprobs, 1).tolist()


def make_caption(
    ids: list[int],
    logprobs: list[float],
    prompt: Prompt,
    decoding: Decoding,
    limit: int,
    seconds: float,
    model: CogVLM2VideoForConditionalGeneration,
    processor: CogVLM2VideoProcessor,
) -> Caption:
    """A `Caption` from new tokens, cut after the first end token.

    Warns where the model's context length ended it: `limit` was reached, which is below `max_new_tokens`.
    """
    finish_reason = "length" if len(ids) >= limit else "stopped"
    if ids and is_end(ids[-1], model.config):
        finish_reason = "eos"
    if finish_reason == "length" and limit < decoding.max_new_tokens:
        warn(  # without the caption's numbers, so that it is shown once
            f"a caption was ended by the model's context length, {model.config.max_position_embeddings} positions "
            f"(max_position_embeddings), before max_new_tokens={decoding.max_new_tokens}",
            stacklevel=2,
        )
    text = prompt.answer_prefix + processor.decode(ids, skip_special_tokens=True)
    return Caption(text, ids, logprobs[: len(ids)], finish_reason, prompt, decoding, seconds)


def is_end(token: int, config: CogVLM2VideoConfig) -> bool:
    ends = config.eos_token_id  # one or several
    return token in ends if isinstance(ends, list) else token == ends


def until_end(ids: list[int], config: CogVLM2VideoConfig) -> list[int]:
    """New tokens up to the first end token, that one included."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if is_end(token, config)), None)]


@torch.inference_mode()
def continuation_logprobs(
    model: CogVLM2VideoForConditionalGeneration, inputs: BatchFeature, continuations: list[list[int]]
) -> list[list[float]]:
    """Log probabilities of one continuation for each row of the processor's inputs, in one forward pass."""
    longest = max(map(len, continuations))
    tail = torch.tensor([row + [0] * (longest - len(row)) for row in continuations], device=model.device)
    positions = rotary_position_ids(inputs["input_ids"], model.config.video_token_id)
    steps = torch.arange(1, longest + 1, device=tail.device)
    # As embeddings: among ids, a generated `video_token_id` would be taken for an image position.
    embeds = [model.model.embed(inputs["input_ids"], inputs["pixel_values_videos"]), model.model.embed(tail)]
    logits = model(
        inputs_embeds=torch.cat(embeds, 1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(tail)], 1),
        position_ids=torch.cat([positions, positions[:, -1:] + steps], 1),
        use_cache=False,
        logits_to_keep=longest + 1,
    ).logits[:, :-1]
    logprobs = chosen_logprobs(logits.float(), tail)
    return [row[: len(ids)].tolist() for row, ids in zip(logprobs, continuations, strict=True)]


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """Streamer that puts new tokens into a queue; None marks the end."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:  # generate() puts the prompt first
            self.items.put(value.tolist())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing: the thread marks the end itself, also after an error."""


class TextDecoder:
    """Decode tokens as they come: only the last ones are decoded anew, with those before them as context.

    Args:
        processor: the model's.
        settings: of its `decode`.
    """

    def __init__(self, processor: CogVLM2VideoProcessor, **settings: Any) -> None:
        self._decode = partial(processor.decode, **settings)
        self._ids: list[int] = []
        self._start = self._end = 0  # of the context

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; none while a character is incomplete."""
        self._ids += ids
        before, text = self._decode(self._ids[self._start : self._end]), self._decode(self._ids[self._start :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text[len(before) :]


class CaptionStream:
    """A caption being generated: iterate for pieces of text, `stop()` to end it early, `caption` for the result.

    The pieces joined are `caption.text`. Deleting the stream stops the generation. Iterating and reading `caption`
    raise errors of the generation.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._tokens = request, _TokenQueue()
        self._result: dict[str, Any] = {}
        self._decoder = TextDecoder(request.processor, skip_special_tokens=True)
        self._prefix = request.prompts[0].answer_prefix  # until it is shown
        self._num_shown = len(self._prefix)  # characters
        # The thread holds no reference to this object, so that deleting it stops the generation.
        arguments = (request, self._tokens, self._result)
        self._thread = threading.Thread(target=_generate_into, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if prefix := self._prefix:
            self._prefix = ""
            return prefix
        while (ids := self._tokens.items.get()) is not None:
            if piece := self._decoder.add(ids):
                self._num_shown += len(piece)
                return piece
        self._tokens.items.put(None)  # the next call ends too
        if rest := self.caption.text[self._num_shown :]:
            self._num_shown += len(rest)
            return rest
        raise StopIteration

    def stop(self) -> None:
        """End the generation after the current token; `caption` then contains the text so far."""
        self._request.stop.set()

    def __del__(self) -> None:
        self.stop()

    @property
    def caption(self) -> Caption:
        """The complete caption; waits for the end of the generation."""
        self._thread.join()
        if "error" in self._result:
            raise self._result["error"]
        return self._result["caption"]


def _generate_into(request: Request, tokens: _TokenQueue, result: dict[str, Any]) -> None:
    try:
        result["caption"] = request.run(tokens)[0]
    except BaseException as error:  # raised in the thread that reads the stream
        result["error"] = error
    finally:
        tokens.items.put(None)
