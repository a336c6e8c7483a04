"""One call of generate(): a request in, captions out. transformers' generate() is called here and nowhere else."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from capkit.captioning.caches import RoomyCache, read_rows
from capkit.captioning.choosing import Chooser, RowChoosers, chosen_logprobs, draw_key
from capkit.captioning.decoding import Decoding
from capkit.captioning.graphs import GraphDecoder
from capkit.cogvlm2 import (
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    Prompt,
    rotary_position_ids,
)
from capkit.video import Clip


@dataclass(frozen=True)
class Caption:
    """What the model said of a clip, how sure it was, and what it had been asked.

    Attributes:
        text: decoded without special tokens. As in the original, a leading space of the first word stays.
        token_ids: the new tokens, the end token included when it came.
        logprobs: for each of them, log P(token | clip, prompt, tokens before) under the model itself, in nats; before
            temperature, top-k, top-p and penalties.
        finish_reason: "eos", "length" (max_new_tokens reached) or "stopped".
        prompt, decoding: what it was made with.
        seconds: time it took; in a batch, the batch's time shared out evenly.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt: Prompt
    decoding: Decoding
    seconds: float

    @property
    def mean_logprob(self) -> float:
        """Mean of `logprobs`, in nats a token."""
        return float(np.mean(self.logprobs))

    def __repr__(self) -> str:
        return f"Caption({self.text!r}, {len(self.token_ids)} tokens, {self.finish_reason})"


class Request:
    """One call of generate(): inputs checked and made beforehand, tokens chosen by our own rules."""

    def __init__(
        self,
        model: CogVLM2VideoForConditionalGeneration,
        processor: CogVLM2VideoProcessor,
        graph_decoder: GraphDecoder,
        clips: Sequence[Clip],
        prompts: Sequence[Prompt],
        decoding: Decoding,
    ):
        self.model, self.processor, self.graph_decoder = model, processor, graph_decoder
        self.prompts, self.decoding = prompts, decoding
        self.inputs = processor(clips, prompts)
        self.draw_keys = [*map(draw_key, clips)]
        self.stop = threading.Event()

    @torch.inference_mode()
    def run(self, streamer: BaseStreamer | None = None) -> list[Caption]:
        started = time.perf_counter()
        inputs, decoding = self.inputs.to(self.model.device), self.decoding
        graphs = self.graph_decoder
        # While another thread decodes with graphs, this one does without.
        if decoding.num_beams == 1 and graphs.is_useful and graphs.lock.acquire(blocking=False):
            try:
                choosers = RowChoosers([decoding] * len(self.prompts), self.draw_keys)
                ends = partial(is_end, config=self.model.config)
                rows, logprobs = graphs.caption(inputs, choosers, ends, self.stop, streamer)
            finally:
                graphs.lock.release()
        else:
            rows, logprobs = self._generate(inputs, streamer)
        seconds = (time.perf_counter() - started) / len(rows)
        return [
            make_caption(ids, row_logprobs, prompt, decoding, seconds, self.model, self.processor)
            for ids, row_logprobs, prompt in zip(rows, logprobs, self.prompts, strict=True)
        ]

    def _generate(self, inputs, streamer) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens of each row, and their log probabilities."""
        model, decoding, num_rows, config = self.model, self.decoding, len(self.prompts), self.model.config
        prompt_length, beams = inputs["input_ids"].shape[1], decoding.num_beams > 1
        chooser = Chooser([decoding] * num_rows, self.draw_keys, prompt_length)
        if num_rows > 1 and not beams:
            known = {"past_key_values": read_rows(model, inputs)}
        else:
            known = {"past_key_values": RoomyCache(config), "pixel_values_videos": inputs["pixel_values_videos"]}
        new_ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **known,
            # Made afresh: a generation_config.json beside the weights would set what nobody here asked for.
            generation_config=GenerationConfig(
                max_new_tokens=decoding.max_new_tokens,
                num_beams=decoding.num_beams,
                do_sample=False,  # the chooser samples
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            ),
            logits_processor=LogitsProcessorList(chooser.penalties if beams else [chooser]),
            stopping_criteria=StoppingCriteriaList([_StopWhen(self.stop)]),
            streamer=streamer,
        )[:, prompt_length:].tolist()
        rows = [until_end(row, config) for row in new_ids]
        if beams:  # rows change places between steps: ask afterwards
            return rows, continuation_logprobs(model, inputs, rows)
        return rows, torch.stack(chooser.logprobs, 1).tolist()


def make_caption(
    ids: list[int],
    logprobs: list[float],
    prompt: Prompt,
    decoding: Decoding,
    seconds: float,
    model: CogVLM2VideoForConditionalGeneration,
    processor: CogVLM2VideoProcessor,
) -> Caption:
    """A `Caption` of new tokens, which end with the first end token if there is one."""
    is_full = len(ids) >= decoding.max_new_tokens
    finish_reason = "eos" if is_end(ids[-1], model.config) else "length" if is_full else "stopped"
    text = processor.decode(ids, skip_special_tokens=True)
    return Caption(text, ids, logprobs[: len(ids)], finish_reason, prompt, decoding, seconds)


def is_end(token: int, config) -> bool:
    ends = config.eos_token_id  # a config.json may name one or several
    return token in ends if isinstance(ends, list) else token == ends


def until_end(ids: list[int], config) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if is_end(token, config)), None)]


@torch.inference_mode()
def continuation_logprobs(model, inputs, continuations: list[list[int]]) -> list[list[float]]:
    """log P of each continuation's tokens after each row's prompt, in one pass; rows as the processor made them."""
    longest = max(map(len, continuations))
    tail = torch.tensor([row + [0] * (longest - len(row)) for row in continuations], device=model.device)
    positions = rotary_position_ids(inputs["input_ids"], model.config.video_token_id)
    steps = torch.arange(1, longest + 1, device=tail.device)
    # Embeddings and not ids, among which a generated `video_token_id` would be taken for a frame's.
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
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """generate()'s side of a stream."""

    def __init__(self):
        self.items: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._prompt_has_passed = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_has_passed:
            self.items.put(value.tolist())
        self._prompt_has_passed = True

    def end(self) -> None:
        """The thread says so itself, after an error too."""


class CaptionStream:
    """A caption on its way: iterate for pieces of text, `stop()` to end it early, `caption` for the whole.

    The pieces joined are `caption.text`. A stream that is dropped stops. An error in the generation is raised where the
    stream is iterated or `caption` is read.
    """

    def __init__(self, request: Request):
        self._request, self._tokens, self._result = request, _TokenQueue(), {}
        self._token_ids: list[int] = []
        self._shown = ""
        # The thread does not know this object, so that dropping it is noticed.
        arguments = (request, self._tokens, self._result)
        self._thread = threading.Thread(target=_generate_into, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        processor = self._request.processor
        while (ids := self._tokens.items.get()) is not None:
            self._token_ids += ids
            text = processor.decode(self._token_ids, skip_special_tokens=True)
            if len(text) > len(self._shown) and not text.endswith("\ufffd"):  # else the rest of a character is to come
                return self._show(text)
        self._tokens.items.put(None)  # the next call ends too
        if len(self.caption.text) > len(self._shown):
            return self._show(self.caption.text)
        raise StopIteration

    def _show(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def stop(self) -> None:
        """End the generation after the token at hand; `caption` then holds what was said so far."""
        self._request.stop.set()

    def __del__(self):
        self.stop()

    @property
    def caption(self) -> Caption:
        """The whole caption; waits for it."""
        self._thread.join()
        if "error" in self._result:
            raise self._result["error"]
        return self._result["caption"]


def _generate_into(request: Request, tokens: _TokenQueue, result: dict) -> None:
    try:
        result["caption"] = request.run(tokens)[0]
    except BaseException as error:  # to be raised in the thread that reads the stream
        result["error"] = error
    finally:
        tokens.items.put(None)
