"""The second day: a new prompt for clips that were captioned before, whose features are stored.

Part of `capkit.benchmark`.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from capkit.benchmark.measuring import take_turns
from capkit.benchmark.models import PROMPTS, Size, make_captioner, make_clip
from capkit.captioning import Captioner, Decoding, FrameFeatures
from capkit.video import Clip


class Reused(NamedTuple):
    """Median seconds to caption clips, encoded anew and with stored features, the tokens, and how many frames were
    encoded although their features were stored."""

    seconds: tuple[float, float]
    expected_ids: list[list[int]]
    ids: list[list[int]]
    num_encoded: int


def store_features(captioner: Captioner, clips: Sequence[Clip], folder: str | Path) -> FrameFeatures:
    """The first day: caption the clips, so that their features are in memory and in a folder."""
    features = FrameFeatures(captioner.model.model.vision, folder)
    captioner.model.model.frame_features = features
    try:
        captioner.caption_batch(clips, PROMPTS[0], Decoding(max_new_tokens=2))
    finally:
        captioner.model.model.frame_features = None
    return features


def measure_reuse(
    captioner: Captioner, clips: Sequence[Clip], num_tokens: int, stored: FrameFeatures | str | Path, repeats: int
) -> Reused:
    """Caption clips together under a new prompt, with and without their features, in turns.

    Args:
        captioner: keeps no features.
        clips: one batch.
        num_tokens: of each caption.
        stored: features in memory, or a folder, from which they are read each time.
        repeats: whose median counts.
    """
    model, found = captioner.model.model, []

    def caption(is_stored: bool) -> list[list[int]]:
        features = stored if isinstance(stored, FrameFeatures) else FrameFeatures(model.vision, stored)
        before = features.num_encoded
        model.frame_features = features if is_stored else None
        try:
            captions = captioner.caption_batch(clips, PROMPTS[1], Decoding(max_new_tokens=num_tokens))
        finally:
            model.frame_features = None
        found.append(features.num_encoded - before)
        return [caption.token_ids for caption in captions]

    expected_ids, ids = caption(False), caption(True)
    pair = partial(caption, False), partial(caption, True)
    anew, reused = take_turns(pair, repeats, captioner.model.device, warm_up=False)
    return Reused((anew, reused), expected_ids, ids, sum(found))


def measure_in_another_process(
    size: Size, device: torch.device, dtype: torch.dtype, num_tokens: int, folder: str | Path, repeats: int
) -> Reused:
    """`measure_reuse` for the first clip in a new process, which makes the same model and reads the features."""
    call = {
        "size": dataclasses.asdict(size),
        "device": str(device),
        "dtype": str(dtype),
        "folder": str(folder),
        "num_tokens": num_tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }
    code = "import sys; from capkit.benchmark.second_day import in_this_process; print(in_this_process(sys.argv[1]))"
    command = [sys.executable, "-c", code, json.dumps(call)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Reused(*json.loads(run.stdout.splitlines()[-1]))


def in_this_process(arguments: str) -> str:
    """What `measure_in_another_process` runs there: from and to JSON."""
    call: dict[str, Any] = json.loads(arguments)
    torch.set_num_threads(call["threads"])
    size = Size(**call["size"])
    _, captioner = make_captioner(size, call["device"], call["dtype"])
    clips = [make_clip(size, 0)]
    return json.dumps(measure_reuse(captioner, clips, call["num_tokens"], call["folder"], call["repeats"]))
