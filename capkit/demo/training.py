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
    Frames,
    content_tokens,
    draw_clips,
    train_tokenizer,
)
from capkit.demo.heads import TrainingModel
from capkit.files import output_folder
from capkit.video import at_least_one, positive

FRAMES_PER_STEP = 192
FEATURE_LENGTH = 2.0
TOKENIZER_CLIPS, VISION_CLIPS, CLIPS_AT_A_TIME = 3000, 16000, 3200
"""Clips for the tokenizer and for the vision tower; clips drawn before their pictures are freed."""
INTERVIEWS = 0.6
"""Share of clips with several questions in a row, in the last stage."""


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


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of blocks, AdamW for all other weights.

    After 400 steps of the language model 78 % of the content tokens were right; with AdamW alone 66 %.

    Args:
        model: trains its weights that require a gradient now.
        learning_rate: of both; Muon's steps are scaled to AdamW's.
        weight_decay: of both.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float, weight_decay: float):
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        blocks = [name for name in weights if ".layers." in name or ".linear_proj." in name]
        matrices = {name: weights.pop(name) for name in blocks if weights[name].ndim == 2}
        self.parts = [
            torch.optim.Muon(matrices.values(), learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(weights.values(), learning_rate, (0.9, 0.98), weight_decay=weight_decay),
        ]
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever passed
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


class _ByLength(Sampler):
    """A random order in which clips of one batch have nearly the same number of frames, so that little is padded."""

    def __init__(self, num_frames: list[int], batch_size: int):
        self.num_frames, self.batch_size = num_frames, batch_size

    def __len__(self) -> int:
        return len(self.num_frames)

    def __iter__(self) -> Iterator[int]:
        chunks = torch.randperm(len(self)).split(16 * self.batch_size)
        order = [index for chunk in chunks for index in sorted(chunk.tolist(), key=self.num_frames.__getitem__)]
        batches = torch.tensor(order).split(self.batch_size)
        return iter([index for i in torch.randperm(len(batches)) for index in batches[i].tolist()])


class _Trainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        data: Any = self.train_dataset
        return _ByLength(data.num_frames, self.args.per_device_train_batch_size)


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
        start_from: a checkpoint, as in `load_captioner`, whose weights and tokenizer to begin with. With `vision_steps`
            0 its vision tower stays as it is.

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
    held_out = draw_clips(range(num_held_out), held_out=True, num_workers=num_workers)
    if captioner is not None:
        model, processor = captioner.model, captioner.processor
    else:
        tokenizer = train_tokenizer(draw_clips(range(min(num_clips, TOKENIZER_CLIPS)), num_workers=num_workers))
        model = new_model(tokenizer)
        processor = CogVLM2VideoProcessor(tokenizer, IMAGE_SIZE, model.config.tokens_per_frame)
    training = TrainingModel(model, content_tokens(processor.tokenizer), bf16)

    def frames() -> tuple[Frames, Frames]:
        drawn = draw_clips(range(min(num_clips, VISION_CLIPS)), num_workers=num_workers)
        return Frames(drawn, recoloured=0.75), Frames(held_out)

    def examples(first: int, interviews: float) -> tuple[Examples, Examples]:
        grey = _encode(model, [np.full((1, IMAGE_SIZE, IMAGE_SIZE, 3), GREY, np.uint8)])[0][0]
        clips, features = [], []
        # In parts, or the pictures would fill the memory.
        for start in range(first, first + num_clips, CLIPS_AT_A_TIME):
            seeds = range(start, min(start + CLIPS_AT_A_TIME, first + num_clips))
            drawn = draw_clips(seeds, num_workers=num_workers)
            for clip, encoded in zip(drawn, _encode(model, _frames(drawn)), strict=True):
                # One clip in ten has two events, and only these teach to look for the second event.
                repeats = 3 if len(clip.facts.events) == 2 else 1
                clips += repeats * [clip.without_pictures()]
                features += repeats * [encoded]
        return (
            Examples(clips, features, processor, misheard=0.3, grey=grey, interviews=interviews),
            Examples(held_out, _encode(model, _frames(held_out)), processor, interviews=interviews),
        )

    for name, num_steps, num_rows, rate, make_data in (
        ("vision", vision_steps, FRAMES_PER_STEP, vision_learning_rate, frames),
        ("model", steps, batch_size, learning_rate, lambda: examples(0, 0.0)),
        ("questions", question_steps, batch_size, learning_rate / 2, lambda: examples(num_clips, INTERVIEWS)),
    ):
        folder, log = output_dir / "trainer" / name, _Log(name, until, output_dir / "history.jsonl")
        if num_steps and not _train_stage(training, folder, num_steps, num_rows, rate, make_data, seed, log):
            break
        if name == "vision":
            if vision_steps:
                _scale_features(model, held_out)
            model.model.vision.requires_grad_(False)
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
    training: TrainingModel,
    folder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    make_data: Callable[[], tuple[Frames | Examples, Frames | Examples]],
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
        label_names=["cells" if log.stage == "vision" else "labels"],
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
