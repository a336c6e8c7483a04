"""`Captioner`: caption clips alone, in batches or as a stream, and score captions."""

from __future__ import annotations

import gc
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from capkit.captioning.context import check_fits, tokens_that_fit
from capkit.captioning.decoding import Decoding, DecodingLike
from capkit.captioning.features import FrameFeatures
from capkit.captioning.generate import Caption, CaptionStream, Request, continuation_logprobs
from capkit.captioning.graphs import GraphDecoder
from capkit.cogvlm2 import (
    DEFAULT_PROMPT,
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    Prompt,
    PromptLike,
    fingerprint,
    loading,
    one_prompt_each,
)
from capkit.video import Clip

DEMO_CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
GREEDY = Decoding()
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Score:
    """Log probabilities of a text's tokens, given a clip and a prompt.

    Attributes:
        token_ids: the tokens.
        tokens: each token as text; parts of a character split over several tokens show as U+FFFD.
        logprobs: log P(token | clip, prompt, tokens before), in nats.
    """

    token_ids: list[int]
    tokens: list[str]
    logprobs: list[float]

    @property
    def total_logprob(self) -> float:
        """log P(text | clip, prompt), in nats."""
        return float(np.sum(self.logprobs))

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of a token, in nats."""
        return float(np.mean(self.logprobs))


def load_captioner(
    model: str | Path = "demo",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    features_dir: str | Path | None = None,
) -> Captioner:
    """Load a model and its processor for captioning.

    Args:
        model: "demo" for the small model in the package; a folder in the published layout; or a name on the Hugging
            Face hub, such as "THUDM/cogvlm2-llama3-caption" (25 GB).
        device: "auto" is a CUDA GPU where there is one, else the CPU.
        dtype: "auto" is bfloat16 on GPUs that have it, float16 on older ones, float32 on the CPU.
        quantization: None, "4bit" or "8bit", on a CUDA GPU (bitsandbytes: `pip install -e '.[quantize]'`).
        revision: branch, tag or commit on the hub.
        features_dir: folder where features of frames are kept for later runs, see `FrameFeatures`: a clip that was
            captioned before, under any prompt, then needs no vision tower. None: kept in memory only.

    Raises:
        CheckpointError: the checkpoint cannot be found, is damaged or of another kind, or does not fit into memory.
        ValueError: unknown device, dtype or quantization, quantization without a CUDA GPU, a revision of "demo" or of
            a folder, or a `features_dir` that is a file.
        ImportError: quantization is given, but bitsandbytes is not installed.
    """
    device = loading.choose_device(device)
    dtype = loading.choose_dtype(dtype, device)
    if features_dir is not None and Path(features_dir).expanduser().is_file():
        raise ValueError(f"features_dir={str(features_dir)!r}: is a file; name a folder")
    if quantization is not None:
        loading.quantization_config(quantization, dtype, device)  # raises before anything is downloaded
    folder = loading.find(DEMO_CHECKPOINT if model == "demo" else model, revision)
    processor = CogVLM2VideoProcessor.from_pretrained(folder)
    loaded = CogVLM2VideoForConditionalGeneration.from_pretrained(
        folder, device=device, dtype=dtype, quantization=quantization
    )
    captioner = Captioner(loaded.eval(), processor, str(model), fingerprint(folder), quantization)
    kind = "-".join(filter(None, [captioner.fingerprint, captioner.dtype, quantization]))
    loaded.model.frame_features = FrameFeatures(loaded.model.vision, features_dir, kind)
    return captioner


class Captioner:
    """A model and its processor; `load_captioner` makes one.

    Attributes:
        model, processor: the transformers objects.
        name: as given to `load_captioner`.
        fingerprint: digest of configuration, tokenizer and weights, 16 hexadecimal digits.
        quantization: None, "4bit" or "8bit".
    """

    def __init__(
        self,
        model: CogVLM2VideoForConditionalGeneration,
        processor: CogVLM2VideoProcessor,
        name: str = "",
        fingerprint: str = "",
        quantization: str | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.name, self.fingerprint, self.quantization = name, fingerprint, quantization
        self._graph_decoder = GraphDecoder(model)
        self._oom_frames = math.inf  # smallest rows x frames of the longest clip that ran out of memory

    def __repr__(self) -> str:
        return f"Captioner({self.name!r}, {self.dtype} on {self.model.device})"

    @property
    def dtype(self) -> str:
        """The weights' type, such as "bfloat16"."""
        return str(self.model.dtype).removeprefix("torch.")

    def caption(self, clip: Clip, prompt: PromptLike = DEFAULT_PROMPT, decoding: DecodingLike = GREEDY) -> Caption:
        """Caption one clip. With the defaults, the caption is the same as the original caption tool's.

        Args:
            clip: from `load_clip` or `Clip.from_frames`.
            prompt: a text, a `Prompt`, a dictionary of its fields, or a list of questions, see `Prompt.steps`.
            decoding: a `Decoding`, or a dictionary of its fields.

        Raises:
            ValueError: as in `Prompt` and `Decoding`, or frames and prompt are beyond the model's context length.
        """
        return self.caption_batch([clip], [prompt], decoding)[0]

    def caption_batch(
        self,
        clips: Sequence[Clip],
        prompts: PromptLike | Sequence[PromptLike] = DEFAULT_PROMPT,
        decoding: DecodingLike = GREEDY,
        batch_size: int | None = None,
    ) -> list[Caption]:
        """Caption clips in batches; each gets the caption that it would get alone (token for token in float32).

        Clips may differ in length, and prompts in everything. When memory runs out, the batch is halved, and later
        batches of that size are halved from the start.

        Args:
            clips: as in `caption`.
            prompts: one prompt for all, or a list of one for each clip.
            decoding: as in `caption`, the same for all.
            batch_size: clips in a batch; None for all of them.

        Returns:
            One caption for each clip, in order.

        Raises:
            ValueError: as in `caption`, or prompts and clips differ in number.
            torch.OutOfMemoryError: one clip alone does not fit.
        """
        decoding = Decoding.of(decoding)
        if isinstance(clips, (Clip, str, os.PathLike)):
            raise TypeError(f"clips: must be a list of clips, not {reprlib.repr(clips)}; caption() takes one clip")
        pairs = zip(clips, map(Prompt.of, one_prompt_each(prompts, len(clips))), strict=True)
        rows = list(pairs)
        limits = {self._limit(clip, prompt, decoding) for clip, prompt in rows}
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be at least 1, or None for all clips together")
        size, longest = batch_size or max(len(clips), 1), max(map(len, clips), default=1)
        if decoding.num_beams > 1 and (len(limits) > 1 or any(prompt.steps for _, prompt in rows)):
            size = 1
        while size > 1 and size * longest >= self._oom_frames:
            size //= 2

        def run(batch: Sequence[tuple[Clip, Prompt]]) -> list[Caption]:
            return self._request(batch, decoding).run()

        def remember(size: int) -> None:
            self._oom_frames = min(self._oom_frames, size * longest)

        return list(self.in_batches(run, rows, size, remember))

    def in_batches(
        self,
        run: Callable[[Sequence[Item]], list[Result]],
        items: Sequence[Item],
        size: int,
        on_oom: Callable[[int], None],
    ) -> Iterator[Result]:
        """What `run` returns for items, in batches of `size`; when memory runs out, the size is halved.

        `on_oom` is called with the size of each batch that ran out of memory; one item alone raises the error.
        """
        while items:
            batch, num_kept_bytes = items[:size], self._graph_decoder.num_bytes
            try:
                results = run(batch)
            except (RuntimeError, MemoryError) as error:
                if (len(batch) == 1 and not num_kept_bytes) or not loading.is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # it refers to the frames whose tensors are to be freed
            else:
                yield from results
                items = items[len(batch) :]
                continue
            # Outside of the except block: before Python 3.11, the traceback lives until its end.
            if not num_kept_bytes:  # else freeing the caches of earlier batches may be enough
                on_oom(len(batch))
                size = len(batch) // 2 or 1
            self._graph_decoder.forget()
            gc.collect()
            torch.cuda.empty_cache()

    def stream(self, clip: Clip, prompt: PromptLike = DEFAULT_PROMPT, decoding: DecodingLike = GREEDY) -> CaptionStream:
        """Caption one clip and get the text as it is generated: iterate over the result for pieces of text.

        Of a prompt with steps, the last answer comes in pieces, once the others are complete.

        Raises:
            ValueError: as in `caption`, or beam search, which has no text before its end.
        """
        decoding = Decoding.of(decoding)
        if decoding.num_beams > 1:
            raise ValueError(f"num_beams={decoding.num_beams}: beam search has no text before its end; use caption()")
        prompt = Prompt.of(prompt)
        self._limit(clip, prompt, decoding)  # raises here, not in the thread
        return CaptionStream(self._request([(clip, prompt)], decoding))

    def score(self, clip: Clip, caption: Caption | str, prompt: PromptLike | None = None) -> Score:
        """Log probabilities of a caption's tokens under the model.

        Args:
            clip: as in `caption`.
            caption: a `Caption`, whose `token_ids` are scored, so that the sum equals that of its `logprobs`; or a
                text, scored as a continuation of the prompt without an end token. If the prompt has an answer prefix,
                the text begins with it, and what follows is scored.
            prompt: None is the `Caption`'s prompt, after the answers to its steps, and for a text the default prompt.
                A text replaces only the text of the `Caption`'s prompt.

        Raises:
            ValueError: an empty text, one that lacks the answer prefix or ends with it, one that is beyond the model's
                context length, or as in `caption`.
        """
        own_prompt = caption.last_prompt if isinstance(caption, Caption) else Prompt()
        if prompt is not None:
            own_prompt = replace(own_prompt, text=prompt) if isinstance(prompt, str) else Prompt.of(prompt)
        if isinstance(caption, Caption):
            token_ids = caption.token_ids
        else:
            token_ids = self.processor.continuation_ids(caption, own_prompt.answer_prefix)
        check_fits(self.model, self.processor, clip, own_prompt, token_ids)
        inputs = self.processor([clip], own_prompt).to(self.model.device)
        logprobs = continuation_logprobs(self.model, inputs, [token_ids])[0]
        return Score(token_ids, [self.processor.decode([token]) for token in token_ids], logprobs)

    def tokens_that_fit(self, clip: Clip, prompt: PromptLike = DEFAULT_PROMPT) -> int:
        """New tokens that fit behind a clip and a prompt, by the model's context length (`max_position_embeddings`).

        Of a prompt with steps: behind all its questions, for all the answers together.

        Raises:
            ValueError: none fits, or the prompt contains the token that marks image positions.
        """
        return tokens_that_fit(self.model, self.processor, clip, Prompt.of(prompt))

    def _limit(self, clip: Clip, prompt: Prompt, decoding: Decoding) -> int:
        decoding.check_prefix(prompt.answer_prefix)
        return min(decoding.max_new_tokens, self.tokens_that_fit(clip, prompt))

    def _request(self, rows: Sequence[tuple[Clip, Prompt]], decoding: Decoding) -> Request:
        return Request(self.model, self.processor, self._graph_decoder, rows, decoding)
