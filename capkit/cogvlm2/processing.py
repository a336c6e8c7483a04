"""Turn frames and prompts into the model's inputs: normalised pixels, token ids, padding."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from capkit.cogvlm2 import loading
from capkit.cogvlm2.checkpoint import read_config
from capkit.cogvlm2.prompt import DEFAULT_PROMPT, Prompt, PromptLike
from capkit.cogvlm2.tokenizer import read_tokenizer
from capkit.text import encodable
from capkit.video import MEAN, STD, Clip, model_pixels


def preprocess_frames(frames: np.ndarray | torch.Tensor, image_size: int) -> torch.Tensor:
    """`capkit.video.model_pixels` of uint8 RGB frames (T, H, W, 3): float32 (T, 3, image_size, image_size)."""
    array = frames.numpy(force=True) if isinstance(frames, torch.Tensor) else frames
    return torch.from_numpy(model_pixels(array, image_size))


def pixels_to_frames(pixel_values: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: uint8 RGB (T, S, S, 3) from float (T, 3, S, S)."""
    pixels = (pixel_values.float().numpy(force=True) * STD + MEAN) * 255
    return pixels.round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


class CogVLM2VideoProcessor(ProcessorMixin):
    """Turn clips and prompts into model inputs, and tokens back into text (`decode`, `batch_decode`).

    Args:
        tokenizer: the checkpoint's (Llama-3's in the published ones).
        image_size: side of the vision tower's square input, in pixels.
        tokens_per_frame: image positions of a frame, begin and end included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_size: int = 224, tokens_per_frame: int = 66) -> None:
        super().__init__(tokenizer)
        self.image_size, self.tokens_per_frame = image_size, tokens_per_frame

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, revision: str | None = None
    ) -> CogVLM2VideoProcessor:
        """Load from the published layout: tokenizer files and `config.json`; no remote code.

        Raises:
            CheckpointError: no such folder or name, or the tokenizer's files are missing or damaged.
        """
        folder = loading.find(pretrained_model_name_or_path, revision, weights=False)
        config = read_config(folder)
        return cls(read_tokenizer(folder, config), config.vision_config.image_size, config.tokens_per_frame)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> Any:
        """Write the tokenizer's files; the published layout has nothing else of a processor."""
        return self.tokenizer.save_pretrained(save_directory)

    def __repr__(self) -> str:
        sizes = f"image_size={self.image_size}, tokens_per_frame={self.tokens_per_frame}"
        return f"{type(self).__name__}({type(self.tokenizer).__name__}, {sizes})"

    def __call__(
        self,
        videos: Clip | np.ndarray | torch.Tensor | Sequence[Clip | np.ndarray | torch.Tensor],
        text: PromptLike | Sequence[PromptLike] = DEFAULT_PROMPT,
        template: str = "chat",
        history: Sequence[tuple[str, str]] = (),
        frame_numbers: str = "index",
        return_mm_token_type_ids: bool = False,
    ) -> BatchFeature:
        """Model inputs for one or several clips, padded on the left.

        Args:
            videos: one clip or a list: `Clip`, or uint8 RGB frames (T, H, W, 3). T may differ between clips.
            text: one prompt (text or `Prompt`) for all clips, or one for each.
            template, history, frame_numbers: the other fields of `Prompt`, for prompts given as texts.
            return_mm_token_type_ids: also return which positions are image positions. The model does not need it.

        Returns:
            `input_ids` and `attention_mask`, int64 (B, N); `pixel_values_videos`, float32 (sum of T, 3, S, S); and
            with `return_mm_token_type_ids` also `mm_token_type_ids`, int64 (B, N), 1 at image positions.

        Raises:
            ValueError: as in `Prompt`, or frames of another shape or dtype.
        """
        several = [videos] if isinstance(videos, (Clip, np.ndarray, torch.Tensor)) else videos
        clips = [video if isinstance(video, Clip) else Clip.from_frames(video) for video in several]
        if not clips:
            raise ValueError("videos: give at least one clip")
        prompts = [
            Prompt(prompt, template, tuple(history), frame_numbers) if isinstance(prompt, str) else Prompt.of(prompt)
            for prompt in one_prompt_each(text, len(clips))
        ]
        rows = [self.prompt_ids(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
        pixels = torch.cat([torch.from_numpy(clip.pixels(self.image_size)) for clip in clips])
        inputs = BatchFeature(self.pad(rows) | {"pixel_values_videos": pixels})
        if return_mm_token_type_ids:
            image = inputs["input_ids"] == self.tokenizer.pad_token_id
            inputs["mm_token_type_ids"] = (image & (inputs["attention_mask"] == 1)).long()
        return inputs

    def prompt_ids(self, clip: Clip, prompt: Prompt) -> list[int]:
        """Token ids of one clip and prompt, not padded: `video_ids` and `text_ids`."""
        return self.video_ids(clip, prompt) + self.text_ids(prompt)

    def video_ids(self, clip: Clip, prompt: Prompt) -> list[int]:
        """Token ids before the prompt's text: bos, image positions and numbers of the frames."""
        ids = [self.tokenizer.bos_token_id]
        for number in prompt.numbers(clip):
            ids += [self.tokenizer.pad_token_id] * self.tokens_per_frame
            ids += [] if number is None else self._encode(str(number))
        return ids

    def text_ids(self, prompt: Prompt) -> list[int]:
        """Token ids after the frames: the prompt's text, and `prefix_ids`.

        Raises:
            ValueError: the text contains the token that marks image positions.
        """
        ids = self._encode(prompt.full_text) + self.prefix_ids(prompt)
        if self.tokenizer.pad_token_id in ids:
            raise ValueError(f"the prompt contains {self.tokenizer.pad_token}, which marks the frames' positions")
        return ids

    def prefix_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt's `answer_prefix`, as `continuation_ids`; none without one."""
        return self.continuation_ids(prompt.answer_prefix) if prompt.answer_prefix else []

    def continuation_ids(self, text: str, answer_prefix: str = "") -> list[int]:
        """Token ids of a text as the continuation of a prompt: with a space after `Answer:`.

        Args:
            text: the answer.
            answer_prefix: of the prompt, with which the text begins; the ids are of what follows.

        Raises:
            ValueError: no text, an empty one, one that is not UTF-8, or one that lacks the prefix or ends with it.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text={reprlib.repr(text)}: there is no text to score")
        if answer_prefix:
            if not text.lstrip().startswith(answer_prefix):
                reason = f"does not begin with answer_prefix={answer_prefix!r}; score it with a prompt without one"
                raise ValueError(f"text={reprlib.repr(text)}: {reason}")
            if not (rest := text.lstrip().removeprefix(answer_prefix)):
                raise ValueError(f"text={reprlib.repr(text)}: there is no text behind answer_prefix to score")
            return self._encode(rest)
        return self._encode(text if text[:1].isspace() else " " + text)

    def _encode(self, text: str) -> list[int]:
        if encodable(text) != text:
            raise ValueError(f"text={reprlib.repr(text)}: is not UTF-8, or was cut within a character")
        return self.tokenizer.encode(text, add_special_tokens=False)

    def pad(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, int64 (B, N), from rows of ids, padded on the left."""
        return dict(self.tokenizer.pad({"input_ids": list(rows)}, padding_side="left", return_tensors="pt"))


def one_prompt_each(prompts: PromptLike | Sequence[PromptLike], num_clips: int) -> list[PromptLike]:
    """A list of one prompt for each clip, from one prompt for all or a list.

    Raises:
        ValueError: another type, or prompts and clips differ in number.
    """
    if isinstance(prompts, (str, Prompt, dict)):
        return [prompts] * num_clips
    if not isinstance(prompts, Sequence) or len(prompts) != num_clips:
        count = f"{len(prompts)} prompts" if isinstance(prompts, Sequence) else repr(prompts)
        raise ValueError(f"{count} for {num_clips} clips: give one prompt, or one for each clip")
    return list(prompts)
