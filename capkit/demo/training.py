"""Train the demo model from nothing: clips that we draw, a small tokenizer, CogVLM2-Video's architecture, small.

transformers' Trainer does the training, of a `capkit.demo.heads.TrainingModel`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
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
    SPECIAL,
    Examples,
    Frames,
    draw_clips,
    tokens_that_matter,
    train_tokenizer,
)
from capkit.demo.heads import TrainingModel

FRAMES_PER_STEP = 192
FEATURE_LENGTH = 2.0
TOKENIZER_CLIPS, VISION_CLIPS, CLIPS_AT_A_TIME = 3000, 16000, 3200
"""The tokenizer and the vision tower learn from so many; so many are drawn before their pictures are let go."""
INTERVIEWS = 0.6
"""Share of clips that are asked many questions in a row, in the last stage."""


def new_model(tokenizer: PreTrainedTokenizerFast) -> CogVLM2VideoForConditionalGeneration:
    """CogVLM2-Video with random weights, small enough for a laptop."""
    bos, eos, pad = tokenizer.convert_tokens_to_ids(SPECIAL[:3])
    config = CogVLM2VideoConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
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
    model = CogVLM2VideoForConditionalGeneration(config)
    _tell_places(model.model.vision.patch_embedding.position_embedding.weight)
    return model


@torch.no_grad()
def _tell_places(positions):
    """Begin with patches that know their column and row: what small random weights say of places is drowned by the
    first block's normalised output, and then the bridge never learns it."""
    side = IMAGE_SIZE // PATCH_SIZE
    steps = torch.linspace(-1, 1, side)
    ways = torch.randn(2, positions.shape[1])
    positions[1:] += steps.repeat(side)[:, None] * ways[0] + steps.repeat_interleave(side)[:, None] * ways[1]


class _Log(TrainerCallback):
    """Stop when the time is up; one line of log a time, kept for the plot."""

    def __init__(self, stage: str, until: float, history: Path):
        self.stage, self.until, self.history = stage, until, history

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.until:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = {"stage": self.stage, "step": state.global_step, "time": time.time()} | logs
        with open(self.history, "a") as file:
            file.write(json.dumps(line) + "\n")


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of blocks, AdamW for all else.

    After 400 steps of the language model 78 % of the tokens that matter were right; with AdamW alone 66 %.

    Args:
        model: whose weights to change; those that need a gradient now.
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

    def _groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


class _Trainer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = MuonAndAdamW(self.model, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None):
        return _ByLength(self.train_dataset.num_frames, self.args.per_device_train_batch_size)


class _ByLength(torch.utils.data.Sampler):
    """A random order in which clips of one batch have nearly the same number of frames, or they would be padded."""

    def __init__(self, num_frames: list[int], batch_size: int):
        self.num_frames, self.batch_size = num_frames, batch_size

    def __len__(self):
        return len(self.num_frames)

    def __iter__(self):
        order = torch.randperm(len(self)).split(16 * self.batch_size)
        batches = [b for some in order for b in sorted(some.tolist(), key=self.num_frames.__getitem__)]
        batches = torch.tensor(batches).split(self.batch_size)
        return iter([index for i in torch.randperm(len(batches)) for index in batches[i].tolist()])


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
    """Train, and write a checkpoint in the published layout. Called again with the same folder, it goes on.

    Args:
        output_dir: gets `trainer/` (to resume from), `history.jsonl` and `checkpoint/`.
        steps: optimiser steps of the whole model, on clips and texts.
        vision_steps: steps before them of the vision tower and the bridge alone, on FRAMES_PER_STEP single frames each.
        question_steps: steps after them on as many other clips, of which most are asked many questions in a row; 0 for
            none. Only then the model finds objects by their names.
        batch_size: clips a step.
        learning_rate: at its highest after 5 % of a stage's steps; it falls to 0 along a cosine. Half of it in the last
            stage, or too much of what has been learnt would be lost again.
        vision_learning_rate: the same for the vision tower's stage.
        num_clips: scenes drawn for training; worded anew each time they come up. The vision tower learns from the first
            VISION_CLIPS of them.
        num_held_out: scenes for the accuracy in `history.jsonl`, from the held-out stream.
        minutes: stop after so long, with a checkpoint to go on from.
        num_workers: processes that draw; 1 draws in this one.
        seed: of weights and order.
        bf16: multiply in bfloat16, where the processor does so faster.
        start_from: a checkpoint, as for `load_captioner`, whose weights and tokenizer to begin with; None for nothing.
            With `vision_steps` 0 its vision tower stays as it is.

    Returns:
        The folder of the checkpoint.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    torch.manual_seed(seed)
    held_out = draw_clips(range(num_held_out), held_out=True, num_workers=num_workers)
    if start_from:
        captioner = load_captioner(start_from, dtype="float32")
        model, processor = captioner.model, captioner.processor
    else:
        tokenizer = train_tokenizer(draw_clips(range(min(num_clips, TOKENIZER_CLIPS)), num_workers=num_workers))
        model = new_model(tokenizer)
        processor = CogVLM2VideoProcessor(tokenizer, IMAGE_SIZE, model.config.tokens_per_frame)
    training = TrainingModel(model, tokens_that_matter(processor.tokenizer), bf16)

    def frames():
        drawn = draw_clips(range(min(num_clips, VISION_CLIPS)), num_workers=num_workers)
        return Frames(drawn, recoloured=0.75), Frames(held_out)

    def examples(seeds, interviews):
        grey = _encode(model, [np.full((1, IMAGE_SIZE, IMAGE_SIZE, 3), GREY, np.uint8)])[0][0]
        clips, features = _drawn_and_encoded(model, seeds, num_workers)
        # One clip in ten has two events, and only they teach to look for the second once the first has been told.
        often = [i for i, one in enumerate(clips) for _ in range(3 if len(one.facts.events) == 2 else 1)]
        clips, features = [clips[i] for i in often], [features[i] for i in often]
        return (
            Examples(clips, features, processor, misheard=0.3, grey=grey, interviews=interviews),
            Examples(held_out, _encode(model, _frames(held_out)), processor, interviews=interviews),
        )

    told, further = range(num_clips), range(num_clips, 2 * num_clips)
    for name, num_steps, num_rows, rate, make_data in (
        ("vision", vision_steps, FRAMES_PER_STEP, vision_learning_rate, frames),
        ("model", steps, batch_size, learning_rate, lambda: examples(told, 0.0)),
        ("questions", question_steps, batch_size, learning_rate / 2, lambda: examples(further, INTERVIEWS)),
    ):
        folder, log = output_dir / "trainer" / name, _Log(name, until, output_dir / "history.jsonl")
        if num_steps and not _train_stage(training, folder, num_steps, num_rows, rate, make_data, seed, log):
            break
        if name == "vision":
            if vision_steps:
                _level(model, held_out)
            model.model.vision.requires_grad_(False)
    model.save_pretrained(output_dir / "checkpoint")
    processor.save_pretrained(output_dir / "checkpoint")
    return output_dir / "checkpoint"


def _drawn_and_encoded(model, seeds, num_workers):
    """Clips without their pictures, and the features of each; piece by piece, or the pictures would fill the memory.

    Those that the vision tower has learnt from are drawn again, which takes a minute.
    """
    clips, features = [], []
    for first in range(0, len(seeds), CLIPS_AT_A_TIME):
        drawn = draw_clips(seeds[first : first + CLIPS_AT_A_TIME], num_workers=num_workers)
        features += _encode(model, _frames(drawn))
        clips += [one.without_pictures() for one in drawn]
    return clips, features


def _frames(clips):
    return [drawn.clip.frames for drawn in clips]


@torch.no_grad()
def _level(model, clips):
    """Make frames' features as long as FEATURE_LENGTH: far longer ones would drown what the decoder adds to them."""
    length = torch.cat(_encode(model, _frames(clips))).float()[:, 1:-1].norm(dim=-1).mean()
    model.model.vision.linear_proj.dense_4h_to_h.weight *= FEATURE_LENGTH / length


@torch.no_grad()
def _encode(model, frames):
    """Features of each clip's frames, in half precision."""
    features = []
    for first in range(0, len(frames), 32):
        some = frames[first : first + 32]
        pixels = preprocess_frames(np.concatenate(some), IMAGE_SIZE).to(model.device)
        features += model.model.get_video_features(pixels).half().cpu().split([*map(len, some)])
    return features


def _train_stage(training, folder, steps, batch_size, learning_rate, make_data, seed, log):
    """Train, or go on, or take the weights of what has been trained before; True when the stage is done."""
    last = get_last_checkpoint(folder) if folder.exists() else None
    if last and last.endswith(f"-{steps}"):
        load_model(training, Path(last) / "model.safetensors")
        return True
    examples, held_out = make_data()
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
        data_collator=examples.collate,
        train_dataset=examples,
        eval_dataset=held_out,
        compute_metrics=_accuracy,
        callbacks=[log],
    )
    trainer.train(resume_from_checkpoint=last)
    return trainer.state.global_step == steps


def _accuracy(predicted):
    num_right, num_asked = predicted.predictions
    return {"accuracy": float(num_right.sum() / num_asked.sum())}


def read_history(output_dir: str | Path) -> list[dict[str, Any]]:
    """What was logged: `stage`, `step`, `loss`, `eval_loss`, `eval_accuracy`, ... a dictionary a line."""
    with open(Path(output_dir) / "history.jsonl") as file:
        return [json.loads(line) for line in file]
