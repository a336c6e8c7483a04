"""Train the demo model from nothing: drawn clips, a small tokenizer, and a small CogVLM2-Video.

transformers' Trainer trains a `capkit.demo.heads.TrainingModel` in three stages, which can be interrupted and resumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import Sampler
from transformers import EvalPrediction, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from capkit.captioning import GREY, load_captioner
from capkit.cogvlm2 import (
    CogVLM2VideoConfig,
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    preprocess_frames,
)
from capkit.demo.examples import (
    IMAGE_SIZE,
    PATCH_SIZE,
    DrawnClip,
    Examples,
    content_tokens,
    draw_clips,
    train_tokenizer,
)
from capkit.demo.heads import AdaptingModel, TrainingModel
from capkit.demo.optimiser import MuonAndAdamW
from capkit.demo.single_frames import Backgrounds, Frames, draw_pairs
from capkit.files import output_folder
from capkit.video import at_least_one, positive

FRAMES_PER_STEP = 192
FEATURE_LENGTH = 2.0
TOKENIZER_CLIPS, VISION_CLIPS, ADAPTING_CLIPS, CLIPS_AT_A_TIME = 3000, 16000, 4000, 3200
"""Clips for the tokenizer, for a vision tower and for adapting a trained one; clips drawn before their pictures are
freed."""
FURTHER_SEEDS = 200_000
"""The first scene that a trained model learns from: earlier ones it may know."""
INTERVIEWS = 0.4
"""Share of clips with several questions in a row, in the last stage."""
STEERED = 0.2
"""Share of the other clips, in both stages of texts, with a begun answer or a chain of prompts."""
HEADS_STEPS, HEADS_LEARNING_RATE = 100, 3e-3
"""Of new heads on a trained model, before they teach it anything."""
Data = Frames | Backgrounds | Examples


def new_model(tokenizer: PreTrainedTokenizerFast) -> CogVLM2VideoForConditionalGeneration:
    """CogVLM2-Video with random weights, small enough for a laptop."""
    config = CogVLM2VideoConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
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
    model = CogVLM2VideoForConditionalGeneration(config)
    # Position embeddings begin with column and row. Small random ones would be drowned by the first block's normalised
    # output, and then the bridge never learns places.
    side = IMAGE_SIZE // PATCH_SIZE
    steps = torch.linspace(-1, 1, side)
    positions = model.model.vision.patch_embedding.position_embedding.weight
    across, down = torch.randn(2, positions.shape[1])
    with torch.no_grad():
        positions[1:] += steps.repeat(side)[:, None] * across + steps.repeat_interleave(side)[:, None] * down
    return model


class _Log(TrainerCallback):
    """Stop at a time, and append each log of the Trainer to a file of JSON lines."""

    def __init__(self, stage: str, until: float, history: Path):
        self.stage, self.until, self.history = stage, until, history

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.until:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = {"stage": self.stage, "step": state.global_step, "time": time.time()} | logs
        with open(self.history, "a") as file:
            file.write(json.dumps(line) + "\n")


class _ByLength(Sampler):
    """A random order in which rows of one batch have nearly the same length, so that little is padded."""

    def __init__(self, data: Data, batch_size: int):
        self.data, self.batch_size = data, batch_size

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        for chunk in torch.randperm(len(self)).split(16 * self.batch_size):
            lengths = torch.tensor([self.data.length(index) for index in chunk.tolist()])
            batches = chunk[lengths.argsort()].split(self.batch_size)
            for i in torch.randperm(len(batches)):
                yield from batches[i].tolist()


class _Trainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        data: Any = self.train_dataset
        return _ByLength(data, self.args.per_device_train_batch_size)


def train(
    output_dir: str | Path,
    steps: int = 20,
    vision_steps: int = 10,
    question_steps: int = 5,
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    vision_learning_rate: float = 3e-3,
    num_clips: int = 64,
    num_held_out: int = 16,
    minutes: float | None = None,
    num_workers: int = 1,
    seed: int = 0,
    bf16: bool = False,
    start_from: str | Path | None = None,
) -> Path:
    """Train, and write a checkpoint in the published layout. Called again with the same folder, it resumes.

    Args:
        output_dir: gets `trainer/` (to resume from), `history.jsonl` and `checkpoint/`.
        steps: optimiser steps of the language model, on clips and texts.
        vision_steps: steps before them of the vision tower and the bridge alone, on FRAMES_PER_STEP single frames each.
        question_steps: steps after them on as many other clips, most with several questions in a row; 0 for none. Only
            in these the model learns to find objects by their names.
        batch_size: clips a step.
        learning_rate: the maximum, after 5 % of a stage's steps; it falls to 0 along a cosine. Half of it in the last
            stage, or too much of what has been learnt would be lost again.
        vision_learning_rate: the same for the vision tower's stage.
        num_clips: scenes drawn for training, worded anew each time they come up; the first VISION_CLIPS of them train
            the vision tower.
        num_held_out: held-out scenes for the accuracy in `history.jsonl`.
        minutes: stop after so long, with a checkpoint to resume from.
        num_workers: processes that draw; 1 draws in this one.
        seed: of weights and order.
        bf16: autocast to bfloat16, where the processor is faster with it.
        start_from: a checkpoint, as in `load_captioner`, whose weights and tokenizer to begin with. Its vision tower
            learns new backgrounds only, and with `vision_steps` 0 it stays as it is. Then HEADS_STEPS train new heads
            alone. It is shown other scenes.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: a number out of range, or a folder that cannot be written.
        CheckpointError: there is no checkpoint to start from.
    """
    for name, number in (("vision_steps", vision_steps), ("steps", steps), ("question_steps", question_steps)):
        if number:
            at_least_one(name, number)
    numbers = (("batch_size", batch_size), ("num_clips", num_clips), ("num_held_out", num_held_out))
    for name, number in (*numbers, ("num_workers", num_workers)):
        at_least_one(name, number)
    for name, value in (("learning_rate", learning_rate), ("vision_learning_rate", vision_learning_rate)):
        positive(name, value)
    if minutes is not None:
        positive("minutes", minutes)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}: must be from 0 to {2**32 - 1}")
    output_dir = output_folder(output_dir)
    captioner = load_captioner(start_from, dtype="float32") if start_from else None
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    torch.manual_seed(seed)
    first_seed = FURTHER_SEEDS if captioner else 0

    def seeds(most: int) -> range:
        return range(first_seed, first_seed + min(num_clips, most))

    held_out = draw_clips(range(num_held_out), held_out=True, num_workers=num_workers, any_background=True)
    if captioner is not None:
        model, processor = captioner.model, captioner.processor
    else:
        drawn = draw_clips(seeds(TOKENIZER_CLIPS), num_workers=num_workers, any_background=True)
        tokenizer = train_tokenizer(drawn)
        model = new_model(tokenizer)
        processor = CogVLM2VideoProcessor(tokenizer, IMAGE_SIZE, model.config.tokens_per_frame)
    training = TrainingModel(model, content_tokens(processor.tokenizer), bf16)
    # What is trained already is not to see anything but backgrounds in a new way.
    vision: TrainingModel | AdaptingModel = training if captioner is None else AdaptingModel(model)

    def backgrounds() -> tuple[Backgrounds, Backgrounds]:
        drawn = draw_pairs(seeds(ADAPTING_CLIPS), num_workers=num_workers)
        return Backgrounds(drawn), Backgrounds(draw_pairs(range(num_held_out), held_out=True, num_workers=num_workers))

    def frames() -> tuple[Frames, Frames]:
        drawn = draw_clips(seeds(VISION_CLIPS), num_workers=num_workers, any_background=True)
        return Frames(drawn, recoloured=0.75), Frames(held_out)

    def examples(first: int, interviews: float, count: int = num_clips) -> tuple[Examples, Examples]:
        grey = _encode(model, [np.full((1, IMAGE_SIZE, IMAGE_SIZE, 3), GREY, np.uint8)])[0][0]
        clips, features = [], []
        # In parts, or the pictures would fill the memory.
        for start in range(first, first + count, CLIPS_AT_A_TIME):
            part = range(start, min(start + CLIPS_AT_A_TIME, first + count))
            drawn = draw_clips(part, num_workers=num_workers, any_background=True)
            for clip, encoded in zip(drawn, _encode(model, _frames(drawn)), strict=True):
                # One clip in ten has two events, and only these teach to look for the second event.
                repeats = 3 if len(clip.facts.events) == 2 else 1
                clips += repeats * [clip.without_pictures()]
                features += repeats * [encoded]
        return (
            Examples(clips, features, processor, misheard=0.3, grey=grey, interviews=interviews, steered=STEERED),
            Examples(held_out, _encode(model, _frames(held_out)), processor, interviews=interviews),
        )

    def for_heads() -> tuple[Examples, Examples]:
        return examples(first_seed, 0.0, min(num_clips, ADAPTING_CLIPS))

    def make_interviews() -> tuple[Examples, Examples]:
        return examples(first_seed + num_clips, INTERVIEWS)

    make_frames, frames_per_step = (
        (frames, FRAMES_PER_STEP) if captioner is None else (backgrounds, FRAMES_PER_STEP // 2)
    )
    heads_steps = min(HEADS_STEPS, steps + question_steps) if captioner else 0
    for name, trained, num_steps, num_rows, rate, make_data in (
        ("vision", vision, vision_steps, frames_per_step, vision_learning_rate, make_frames),
        ("heads", training, heads_steps, batch_size, HEADS_LEARNING_RATE, for_heads),
        ("model", training, steps, batch_size, learning_rate, lambda: examples(first_seed, 0.0)),
        ("questions", training, question_steps, batch_size, learning_rate / 2, make_interviews),
    ):
        training.requires_grad_(True)
        model.requires_grad_(name != "heads")
        model.model.vision.requires_grad_(name == "vision")
        folder, log = output_dir / "trainer" / name, _Log(name, until, output_dir / "history.jsonl")
        if num_steps and not _train_stage(trained, folder, num_steps, num_rows, rate, make_data, seed, log):
            break
        if name == "vision" and vision_steps and captioner is None:
            _scale_features(model, held_out)
    model.save_pretrained(output_dir / "checkpoint")
    processor.save_pretrained(output_dir / "checkpoint")
    return output_dir / "checkpoint"


def _frames(clips: Sequence[DrawnClip]) -> list[np.ndarray]:
    return [drawn.clip.frames for drawn in clips]


@torch.no_grad()
def _scale_features(model: CogVLM2VideoForConditionalGeneration, clips: Sequence[DrawnClip]) -> None:
    """Give features the mean length FEATURE_LENGTH: far longer ones would drown what the decoder adds to them."""
    length = torch.cat(_encode(model, _frames(clips))).float()[:, 1:-1].norm(dim=-1).mean()
    model.model.vision.linear_proj.dense_4h_to_h.weight *= FEATURE_LENGTH / length


@torch.no_grad()
def _encode(model: CogVLM2VideoForConditionalGeneration, frames: list[np.ndarray]) -> list[torch.Tensor]:
    """Features of each clip's frames, in half precision."""
    features: list[torch.Tensor] = []
    for first in range(0, len(frames), 32):
        batch = frames[first : first + 32]
        pixels = preprocess_frames(np.concatenate(batch), IMAGE_SIZE).to(model.device)
        features += model.model.get_video_features(pixels).half().cpu().split([*map(len, batch)])
    return features


def _train_stage(
    training: TrainingModel | AdaptingModel,
    folder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    make_data: Callable[[], tuple[Data, Data]],
    seed: int,
    log: _Log,
) -> bool:
    """Train a stage, resume it, or load its weights where it is done already; returns whether it is done."""
    last = get_last_checkpoint(folder) if folder.exists() else None
    if last and last.endswith(f"-{steps}"):
        training.load_state_dict(load_file(Path(last) / "model.safetensors"))
        return True
    data, held_out = make_data()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=max(1, min(20, steps // 5)),
        eval_strategy="steps",
        eval_steps=max(1, min(200, steps // 3)),
        save_steps=max(1, min(200, steps // 3)),
        save_total_limit=1,
        remove_unused_columns=False,
        label_names=["cells" if isinstance(data, Frames) else "labels"],
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = _Trainer(
        training,
        arguments,
        data_collator=data.collate,
        train_dataset=data,
        eval_dataset=held_out,
        compute_metrics=_accuracy,
        callbacks=[log],
        optimizers=(MuonAndAdamW(training, learning_rate, arguments.weight_decay), None),
    )
    trainer.train(resume_from_checkpoint=last)
    return trainer.state.global_step == steps


def _accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    num_right, num_counted = map(np.sum, evaluated.predictions)
    return {"accuracy": float(num_right / num_counted)}


def read_history(output_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of `history.jsonl`: `stage`, `step`, `loss`, `eval_loss`, `eval_accuracy`, ..."""
    with open(Path(output_dir) / "history.jsonl") as file:
        return [json.loads(line) for line in file]
