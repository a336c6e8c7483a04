"""Captioning: a clip and a prompt in, a caption out."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from capkit.captioning.decoding import Decoding, DecodingLike
from capkit.captioning.generate import Caption, CaptionStream, Request, continuation_logprobs
from capkit.captioning.graphs import GraphDecoder
from capkit.cogvlm2 import (
    DEFAULT_PROMPT,
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    Prompt,
    PromptLike,
    loading,
    one_prompt_each,
)
from capkit.video import Clip

DEMO_CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
GREEDY = Decoding()


@dataclass(frozen=True)
class Score:
    """log P(text | clip, prompt), a token at a time.

    Attributes:
        token_ids: the tokens scored.
        tokens: each of them as text; a character split over several tokens shows as U+FFFD.
        logprobs: log P(token | clip, prompt, tokens before), in nats.
    """

    token_ids: list[int]
    tokens: list[str]
    logprobs: list[float]

    @property
    def total_logprob(self) -> float:
        """log P of the whole text, in nats."""
        return float(np.sum(self.logprobs))

    @property
    def mean_logprob(self) -> float:
        """The same for each token on average."""
        return float(np.mean(self.logprobs))


def load_captioner(
    model: str | Path = "demo",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    revision: str | None = None,
) -> Captioner:
    """Load a checkpoint, ready to caption.

    Args:
        model: "demo" for the small one that comes with capkit; a folder in the published layout; or a name on the
            Hugging Face hub, such as "THUDM/cogvlm2-llama3-caption" (25 GB).
        device: "auto" takes a CUDA GPU where there is one, else the CPU.
        dtype: "auto" is bfloat16 on GPUs that have it, float16 on older ones, float32 on the CPU.
        quantization: None, "4bit" or "8bit" (bitsandbytes: `pip install 'capkit[quantize]'`).
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the checkpoint cannot be found, is damaged or of another kind, or does not fit into memory.
        ValueError: unknown device, dtype or quantization.
        ImportError: quantization without bitsandbytes.
    """
    folder = loading.find(DEMO_CHECKPOINT if model == "demo" else model, revision)
    processor = CogVLM2VideoProcessor.from_pretrained(folder)
    loaded = CogVLM2VideoForConditionalGeneration.from_pretrained(
        folder, device=device, dtype=dtype, quantization=quantization
    )
    return Captioner(loaded.eval(), processor, str(model), loading.fingerprint(folder), quantization)


class Captioner:
    """A model and its processor, made to caption. `load_captioner` makes one.

    Attributes:
        model, processor: the transformers objects.
        name: as given to `load_captioner`.
        fingerprint: 16 hexadecimal digits that tell this model from others, whatever its folder is called.
        quantization: None, "4bit" or "8bit".
    """

    def __init__(
        self,
        model: CogVLM2VideoForConditionalGeneration,
        processor: CogVLM2VideoProcessor,
        name: str = "",
        fingerprint: str = "",
        quantization: str | None = None,
    ):
        self.model, self.processor = model, processor
        self.name, self.fingerprint, self.quantization = name, fingerprint, quantization
        self._graph_decoder = GraphDecoder(model)
        self._num_frames_too_many = math.inf  # in a batch, each clip counted as long as the longest

    def __repr__(self) -> str:
        return f"Captioner({self.name!r}, {self.dtype} on {self.model.device})"

    @property
    def dtype(self) -> str:
        """The weights' type, such as "bfloat16"."""
        return str(self.model.dtype).removeprefix("torch.")

    def caption(
        self,
        clip: Clip,
        prompt: PromptLike = DEFAULT_PROMPT,
        decoding: DecodingLike = GREEDY,
    ) -> Caption:
        """Caption one clip. With the defaults, the caption is the one that the original's caption tool writes.

        Args:
            clip: from `load_clip` or `Clip.from_frames`.
            prompt: a text, or a `Prompt` with another template, earlier turns or other frame numbers.
            decoding: how tokens are chosen: a `Decoding`, or a dictionary of its fields.

        Raises:
            ValueError: as in `Prompt` and `Decoding`.
        """
        return self.caption_batch([clip], prompt, decoding)[0]

    def caption_batch(
        self,
        clips: Sequence[Clip],
        prompts: PromptLike | Sequence[PromptLike] = DEFAULT_PROMPT,
        decoding: DecodingLike = GREEDY,
        batch_size: int | None = None,
    ) -> list[Caption]:
        """Caption many clips together; each gets the caption that it would get alone (token for token in float32).

        Clips may differ in length, and prompts in everything. When memory runs out, the batch is halved, and later
        batches as large are halved at once.

        Args:
            clips: as in `caption`.
            prompts: one prompt for all, or one for each clip.
            decoding: as in `caption`, the same for all.
            batch_size: clips that go through the model together; None for all of them.

        Returns:
            One caption for each clip, in order.

        Raises:
            ValueError: as in `caption`, or prompts and clips differ in number.
            torch.OutOfMemoryError: one clip alone does not fit.
        """
        prompts = [*map(Prompt.of, one_prompt_each(prompts, len(clips)))]
        decoding = Decoding.of(decoding)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be at least 1, or None for all clips together")
        size, captions = batch_size or max(len(clips), 1), []
        longest = max(map(len, clips), default=1)
        while size > 1 and size * longest >= self._num_frames_too_many:
            size //= 2
        while len(captions) < len(clips):
            rows, num_kept_bytes = slice(len(captions), len(captions) + size), self._graph_decoder.num_bytes
            try:
                captions += self._request(clips[rows], prompts[rows], decoding).run()
            except (RuntimeError, MemoryError) as error:
                if (size == 1 and not num_kept_bytes) or not loading.is_out_of_memory(error):
                    raise
                size = min(size, len(clips) - len(captions))
                self._num_frames_too_many = min(self._num_frames_too_many, size * longest)
                size = size // 2 or 1
                self._graph_decoder.forget()
                error.__traceback__ = None  # it holds the frames whose tensors are to be freed
            else:
                continue
            gc.collect()
            torch.cuda.empty_cache()
        return captions

    def stream(
        self,
        clip: Clip,
        prompt: PromptLike = DEFAULT_PROMPT,
        decoding: DecodingLike = GREEDY,
    ) -> CaptionStream:
        """Caption one clip and show the text as it comes: iterate over the result for pieces of text.

        Raises:
            ValueError: as in `caption`; beam search, which has no text before its end.
        """
        decoding = Decoding.of(decoding)
        if decoding.num_beams > 1:
            raise ValueError(f"num_beams={decoding.num_beams}: beam search has no text before its end; use caption()")
        return CaptionStream(self._request([clip], [Prompt.of(prompt)], decoding))

    def score(self, clip: Clip, caption: Caption | str, prompt: PromptLike | None = None) -> Score:
        """How probable the model finds a caption: log P(text | clip, prompt), a token at a time.

        Args:
            clip: as in `caption`.
            caption: a `Caption`, whose own tokens are scored, so that the sum is what generation reported; or a text,
                scored as the model would write it after the prompt (the end token is not counted).
            prompt: None for the `Caption`'s own, or for a text the default prompt.

        Raises:
            ValueError: an empty text, or as in `caption`.
        """
        if isinstance(caption, Caption):
            token_ids, own_prompt = caption.token_ids, caption.prompt
        else:
            token_ids, own_prompt = self.processor.continuation_ids(caption), Prompt()
        inputs = self.processor([clip], own_prompt if prompt is None else Prompt.of(prompt)).to(self.model.device)
        logprobs = continuation_logprobs(self.model, inputs, [token_ids])[0]
        return Score(token_ids, [self.processor.decode([token]) for token in token_ids], logprobs)

    def _request(self, clips: Sequence[Clip], prompts: Sequence[Prompt], decoding: Decoding) -> Request:
        return Request(self.model, self.processor, self._graph_decoder, clips, prompts, decoding)
