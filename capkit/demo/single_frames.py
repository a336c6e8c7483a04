"""Single frames, which teach the vision tower what is where, or backgrounds of any colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from capkit.cogvlm2 import pixels_to_frames, preprocess_frames
from capkit.demo.examples import CELLS, IMAGE_SIZE, UNKNOWN, DrawnClip, in_processes
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import BACKGROUNDS

OTHER_SCENES = 1_000_000  # this far on, in place of scenes that do not serve


def draw_pair(seed: int, held_out: bool = False) -> tuple[np.ndarray, np.ndarray, str]:
    """Frames of a scene, the same in front of grey, and the background's name.

    Frames are uint8 (T, IMAGE_SIZE, IMAGE_SIZE, 3). Scenes of odd seeds stand in front of any colour, those of even
    ones in front of walls and meadows, or these would be taken for plain colours. Of these, and where the camera pans,
    both are the same.
    """
    usual = scene = make_scene(seed, held_out)
    if seed % 2:
        scene = make_scene(seed, held_out, any_background=True)
    while not seed % 2 and len(BACKGROUNDS[scene.background][2]) == 1:
        seed += OTHER_SCENES
        usual = scene = make_scene(seed, held_out)
    taught_on = usual if scene == usual else replace(scene, background="grey", background_shade=(0, 0, 0))
    frames, taught = (preprocess_frames(one.sample("chat").frames, IMAGE_SIZE) for one in (scene, taught_on))
    return pixels_to_frames(frames), pixels_to_frames(taught), scene.background


def draw_pairs(
    seeds: Sequence[int], held_out: bool = False, num_workers: int = 2
) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """`draw_pair` of many scenes, in worker processes."""
    return in_processes(draw_pair, num_workers, seeds, [held_out] * len(seeds))


class Frames(torch.utils.data.Dataset):
    """Single frames and their labels, for the first stage.

    Args:
        clips: from `draw_clips`.
        recoloured: share of frames in false colours, their channels permuted or inverted. If it is not 0, these frames
            alone teach shapes and the others colours: or colours would be learnt first, and then that no star is red
            where training has no red star.
    """

    def __init__(self, clips: Sequence[DrawnClip], recoloured: float = 0.0):
        self.numbers = [(drawn, frame) for drawn in clips for frame in range(len(drawn.clip))]
        self.recoloured, self.random = recoloured, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.numbers)

    def length(self, index: int) -> int:
        """All rows are equally long."""
        return 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        drawn, number = self.numbers[index]
        frame, cells = drawn.clip.frames[number], drawn.cells[number].copy()
        if self.recoloured:
            is_recoloured = self.random.random() < self.recoloured
            cells[:, 1 if is_recoloured else 2] = UNKNOWN
            if is_recoloured:
                frame = frame[..., self.random.permutation(3)]
                frame = 255 - frame if self.random.random() < 0.5 else frame
        return frame, cells, drawn.places[number]

    def collate(self, rows: list[tuple[np.ndarray, ...]]) -> dict[str, torch.Tensor]:
        """A batch for `TrainingModel.forward`, without texts."""
        frames, cells, places = map(np.stack, zip(*rows, strict=True))
        pixels = preprocess_frames(frames, IMAGE_SIZE)
        return {"pixel_values_videos": pixels, "cells": torch.from_numpy(cells), "places": torch.from_numpy(places)}


class Backgrounds(torch.utils.data.Dataset):
    """Single frames, the same in front of grey, where the objects are, and the background: for `AdaptingModel`.

    Args:
        pairs: from `draw_pairs`.
    """

    def __init__(self, pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]):
        self.numbers = [(pair, frame) for pair in pairs for frame in range(len(pair[0]))]

    def __len__(self) -> int:
        return len(self.numbers)

    def length(self, index: int) -> int:
        """All rows are equally long."""
        return 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        (frames, taught, background), number = self.numbers[index]
        frame, grey = frames[number], taught[number]
        is_object = (np.abs(frame.astype(int) - grey).max(-1) < 8).reshape(CELLS, IMAGE_SIZE // CELLS, CELLS, -1)
        return frame, grey, is_object.mean((1, 3)).ravel(), list(BACKGROUNDS).index(background)

    def collate(self, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]) -> dict[str, torch.Tensor]:
        """A batch for `AdaptingModel.forward`."""
        frames, taught, shares, backgrounds = map(np.stack, zip(*rows, strict=True))
        pixels = {"pixel_values_videos": preprocess_frames(frames, IMAGE_SIZE)}
        pixels["taught"] = preprocess_frames(taught, IMAGE_SIZE)
        return pixels | {"shares": torch.from_numpy(shares).float(), "labels": torch.from_numpy(backgrounds)}
