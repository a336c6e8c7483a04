"""Train the demo model from nothing: clips that we draw, a small tokenizer, CogVLM2-Video's architecture, small.

transformers' Trainer does the training; here is what it is fed with, and a head that helps the vision tower along.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from capkit.cogvlm2 import CogVLM2VideoConfig, CogVLM2VideoForConditionalGeneration, CogVLM2VideoProcessor
from capkit.cogvlm2.modeling import rotary_position_ids
from capkit.cogvlm2.processing import pixels_to_frames, preprocess_frames, prompt_text
from capkit.demo.facts import Facts, see
from capkit.demo.planning import make_scene
from capkit.demo.scenes import COLOURS, SHAPES
from capkit.demo.wording import Example, make_example
from capkit.frames import Clip

IMAGE_SIZE, PATCH_SIZE = 112, 14
CELLS = IMAGE_SIZE // PATCH_SIZE // 2  # the bridge pools patches 2 x 2: so many cells a side
# Llama-3's: words, digits in groups of at most three, punctuation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]


@dataclass(frozen=True)
class DrawnClip:
    """A scene as the model sees it, and what is true of it.

    Attributes:
        clip: frames of (IMAGE_SIZE, IMAGE_SIZE), already cropped.
        facts: what can be seen.
        cells: int64 (T, CELLS * CELLS, 3): whether an object's middle is in the cell, its colour and its shape.
        places: float32 (T, CELLS * CELLS, 3): where in the cell, x and y, and its diameter; in cells.
    """

    clip: Clip
    facts: Facts
    cells: np.ndarray
    places: np.ndarray


def draw_clip(seed: int, held_out: bool = False) -> DrawnClip:
    """Draw the sampled frames of scene `seed`, cropped as the model will see them."""
    scene = make_scene(seed, held_out)
    clip = scene.sample("chat")
    frames = pixels_to_frames(preprocess_frames(clip.frames, IMAGE_SIZE))
    cells = np.zeros((len(frames), CELLS * CELLS, 3), np.int64)
    places = np.zeros((len(frames), CELLS * CELLS, 3), np.float32)
    for frame, seconds in enumerate(clip.timestamps_seconds):
        for thing, colour, *place in scene.visible(seconds):
            x, y, diameter = (length * CELLS for length in place)
            column, row = (min(max(int(length), 0), CELLS - 1) for length in (x, y))
            cells[frame, row * CELLS + column] = (1, list(COLOURS).index(colour), SHAPES.index(thing.shape))
            places[frame, row * CELLS + column] = (x - column, y - row, diameter)
    return DrawnClip(Clip.from_frames(frames, clip.timestamps_seconds), see(scene, clip), cells, places)


def draw_clips(seeds: Sequence[int], held_out: bool = False, num_workers: int = 2) -> list[DrawnClip]:
    """Draw many, in worker processes."""
    if num_workers < 2:
        return [draw_clip(seed, held_out) for seed in seeds]
    context = multiprocessing.get_context("spawn")
    # One thread each: torch's own would fight over the cores.
    with ProcessPoolExecutor(num_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(draw_clip, seeds, [held_out] * len(seeds), chunksize=100))


def train_tokenizer(clips: Sequence[DrawnClip], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of what is said of clips, with Llama-3's special tokens and its way with digits."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(_SPECIAL), initial_alphabet=alphabet, show_progress=False)
    random = np.random.default_rng(0)
    examples = [make_example(drawn.facts, random) for drawn in clips for _ in range(4)]
    numbers = [str(number) for number in range(100)]
    tokenizer.train_from_iterator([*map(_whole_text, examples), *numbers * 20], trainer)
    bos, eos, pad, _ = _SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, model_max_length=2048)
    fast.add_special_tokens({"additional_special_tokens": _SPECIAL[2:]})
    fast.pad_token, fast.padding_side = pad, "left"
    return fast


def _whole_text(example: Example) -> str:
    return f"{prompt_text(example.prompt, example.template, example.history)} {example.answer}"


def new_model(tokenizer: PreTrainedTokenizerFast) -> CogVLM2VideoForConditionalGeneration:
    """CogVLM2-Video with random weights, small enough for a laptop."""
    bos, eos, pad = tokenizer.convert_tokens_to_ids(_SPECIAL[:3])
    config = CogVLM2VideoConfig(
        vocab_size=len(tokenizer),
        hidden_size=144,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_multi_query_heads=2,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        initializer_range=0.04,
        dtype="float32",
        vision_config={
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_heads": 4,
            "intermediate_size": 384,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "num_positions": (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1,
        },
    )
    return CogVLM2VideoForConditionalGeneration(config)


class Examples(torch.utils.data.Dataset):
    """Clips with something asked and answered about each, worded anew every time.

    Args:
        clips: from `draw_clips`.
        processor: of the model in training.
        style: of `make_example`; None for all, as they come.
    """

    def __init__(self, clips: Sequence[DrawnClip], processor: CogVLM2VideoProcessor, style: str | None = None):
        self.clips, self.processor, self.style = clips, processor, style
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[DrawnClip, list[int], list[int]]:
        drawn = self.clips[index]
        example = make_example(drawn.facts, self.random, self.style)
        return drawn, *self._ids_and_labels(drawn.clip, example)

    def _ids_and_labels(self, clip: Clip, example: Example) -> tuple[list[int], list[int]]:
        """Every answer is to be learnt, those of the history too, but neither questions nor frames."""
        tokenizer = self.processor.tokenizer
        asked = (example.prompt, example.template, example.history)
        num_prompt_text_tokens = len(tokenizer.encode(prompt_text(*asked), add_special_tokens=False))
        frames = self.processor.prompt_ids(clip, *asked)[:-num_prompt_text_tokens]
        text = _whole_text(example)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans, start = [], 0
        for answer in [*(answer for _, answer in example.history), example.answer]:
            start = text.index(f" {answer}", start)
            spans.append((start, start + 1 + len(answer)))
            start = spans[-1][1]
        labels = [
            token if any(first <= begin and end <= last for first, last in spans) else -100
            for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        end_id = tokenizer.eos_token_id
        return [*frames, *encoded["input_ids"], end_id], [-100] * len(frames) + labels + [end_id]

    def collate(self, rows: list[tuple]) -> dict[str, torch.Tensor]:
        """A batch for `TrainingModel.forward`."""
        drawn, ids, labels = zip(*rows, strict=True)
        longest = max(map(len, labels))
        pixels = torch.cat([preprocess_frames(one.clip.frames, IMAGE_SIZE) for one in drawn])
        return self.processor.pad(ids) | {
            "labels": torch.tensor([[-100] * (longest - len(row)) + row for row in labels]),
            "pixel_values_videos": pixels,
            "cells": torch.from_numpy(np.concatenate([one.cells for one in drawn])),
            "places": torch.from_numpy(np.concatenate([one.places for one in drawn])),
        }


class TrainingModel(nn.Module):
    """The model, and a head on the bridge's output that says what is where; the head is thrown away in the end.

    Without it the caption's loss has to teach the vision tower what a star is, which takes much longer.
    """

    def __init__(self, model: CogVLM2VideoForConditionalGeneration):
        super().__init__()
        self.model = model
        self.parts = [1, len(COLOURS), len(SHAPES), 3]
        self.head = nn.Linear(model.config.hidden_size, sum(self.parts))
        self.vision_only = False

    def forward(self, input_ids, attention_mask, labels, pixel_values_videos, cells, places) -> dict[str, torch.Tensor]:
        features = self.model.model.get_video_features(pixel_values_videos)
        loss = self._cell_loss(features[:, 1:-1], cells, places)
        count = (labels != -100).sum()
        if self.vision_only:
            return {"loss": loss, "num_right": torch.zeros_like(count), "num_tokens": count}
        video_token_id = self.model.config.video_token_id
        image = (input_ids == video_token_id) & (attention_mask == 1)
        embeds = self.model.model.embed_tokens(input_ids).masked_scatter(image[..., None], features.flatten(0, 1))
        positions = rotary_position_ids(input_ids, video_token_id)
        hidden = self.model.model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        learnt = F.pad(labels, (0, 1), value=-100)[:, 1:]  # each position says the next token
        logits, learnt = self.model.lm_head(hidden[learnt != -100]), learnt[learnt != -100]
        num_right = (logits.argmax(-1) == learnt).sum()
        return {"loss": F.cross_entropy(logits, learnt) + 0.5 * loss, "num_right": num_right, "num_tokens": count}

    def _cell_loss(self, features, cells, places):
        there, colour, shape, place = self.head(features).split(self.parts, -1)
        loss = F.binary_cross_entropy_with_logits(there.squeeze(-1), cells[..., 0].float())
        at = cells[..., 0] == 1
        if at.any():
            loss = loss + F.smooth_l1_loss(place[at], places[at])
            for logits, column in ((colour, 1), (shape, 2)):
                loss = loss + F.cross_entropy(logits[at], cells[..., column][at])
        return loss


class _Schedule(TrainerCallback):
    """Vision alone first; stop when the time is up; one line of log a time, kept for the plot."""

    def __init__(self, model: TrainingModel, vision_steps: int, minutes: float | None, history: Path):
        self.model, self.vision_steps, self.history = model, vision_steps, history
        self.until = time.monotonic() + 60 * minutes if minutes else float("inf")

    def on_step_begin(self, args, state, control, **kwargs):
        self.model.vision_only = state.global_step < self.vision_steps

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.until:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        with open(self.history, "a") as file:
            file.write(json.dumps({"step": state.global_step, "time": time.time()} | logs) + "\n")


def train(
    output_dir: str | Path,
    steps: int = 30,
    vision_steps: int = 10,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    num_clips: int = 64,
    num_held_out: int = 16,
    minutes: float | None = None,
    num_workers: int = 1,
    seed: int = 0,
) -> Path:
    """Train, and write a checkpoint in the published layout. Called again with the same folder, it goes on.

    Args:
        output_dir: gets `trainer/` (to resume from), `history.jsonl` and `checkpoint/`.
        steps: optimiser steps in all; the learning rate falls to 0 over them along a cosine.
        vision_steps: the first so many train the vision tower and the bridge alone.
        batch_size: clips a step.
        learning_rate: at its highest, after 5 % of the steps.
        num_clips: scenes drawn for training; worded anew each time they come up.
        num_held_out: scenes for the accuracy in `history.jsonl`, from the held-out stream.
        minutes: stop after so long, with a checkpoint to go on from.
        num_workers: processes that draw; 1 draws in this one.
        seed: of weights and order.

    Returns:
        The folder of the checkpoint.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    drawn = draw_clips(range(num_clips), num_workers=num_workers)
    held_out = draw_clips(range(num_held_out), held_out=True, num_workers=num_workers)
    tokenizer = train_tokenizer(drawn[:3000])
    model = new_model(tokenizer)
    processor = CogVLM2VideoProcessor(tokenizer, IMAGE_SIZE, model.config.tokens_per_frame)
    training, examples = TrainingModel(model), Examples(drawn, processor)
    arguments = TrainingArguments(
        output_dir=str(output_dir / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=max(1, min(20, steps // 5)),
        eval_strategy="steps",
        eval_steps=max(1, min(200, steps // 3)),
        save_steps=max(1, min(200, steps // 3)),
        save_total_limit=1,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(
        training,
        arguments,
        data_collator=examples.collate,
        train_dataset=examples,
        eval_dataset=Examples(held_out, processor, "detailed"),
        compute_metrics=lambda p: {"token_accuracy": float(p.predictions[0].sum() / p.predictions[1].sum())},
        callbacks=[_Schedule(training, vision_steps, minutes, output_dir / "history.jsonl")],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir) if _has_run(output_dir) else None)
    model.save_pretrained(output_dir / "checkpoint")
    processor.save_pretrained(output_dir / "checkpoint")
    return output_dir / "checkpoint"


def _has_run(output_dir: Path) -> bool:
    return any((output_dir / "trainer").glob("checkpoint-*"))


def read_history(output_dir: str | Path) -> list[dict[str, Any]]:
    """What was logged: `step`, `loss`, `eval_token_accuracy`, ... a dictionary a line."""
    with open(Path(output_dir) / "history.jsonl") as file:
        return [json.loads(line) for line in file]
