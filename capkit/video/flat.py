"""Tell drawings of plain shapes from footage, by their flat colours."""

from __future__ import annotations

import numpy as np

from capkit.video.seen import Frames

MOST_FRAMES = 6  # that are looked at, evenly spaced
BORDER = 4  # pixels at each side that are left out: in a picture strip, what is beside a frame colours them
STEP = 8  # levels, of 255, between a pixel's neighbours: more is an edge
NEAR = 8  # levels: colours as near as this are one
MOST_COLOURS = 8  # two of a background, three of objects, and what they turn into
LEAST_SHARE = 0.5


def is_drawing(frames: Frames) -> bool:
    """Whether frames show a few plain colours, as clips of the demo model do, and footage does not.

    Args:
        frames: uint8 RGB (T, H, W, 3), as the model sees them, or from a picture strip.
    """
    return plain_share(frames) >= LEAST_SHARE


def plain_share(frames: Frames) -> float:
    """Share of the pixels that are on no edge and have one of the clip's eight commonest colours."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, MOST_FRAMES).round().astype(int))
    pixels = frames[chosen, BORDER:-BORDER, BORDER:-BORDER].astype(np.int16)
    middle = pixels[:, 1:-1, 1:-1]
    down = np.abs(pixels[:, 2:, 1:-1] - pixels[:, :-2, 1:-1]).max(axis=-1)
    across = np.abs(pixels[:, 1:-1, 2:] - pixels[:, 1:-1, :-2]).max(axis=-1)
    flat = middle[np.maximum(down, across) < STEP]
    others = flat
    for _ in range(MOST_COLOURS):
        if not len(others):
            break
        codes = (others // NEAR).astype(np.int64) @ (1024, 32, 1)
        commonest = np.median(others[codes == np.bincount(codes).argmax()], axis=0)
        others = others[np.abs(others - commonest).max(axis=1) > NEAR]
    return (len(flat) - len(others)) / (middle.size // 3)
