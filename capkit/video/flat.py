"""Tell drawings of plain shapes from footage, by their flat colours."""

from __future__ import annotations

import numpy as np

from capkit.video.seen import Frames

MOST_FRAMES = 4  # that are looked at, evenly spaced
BORDER = 4  # pixels at each side that are left out: in a picture strip, what is beside a frame colours them
EDGE = 8  # levels, of 255, between a pixel's neighbours: more is an edge
SAME, SHADE = 6, 20  # levels from a colour: pixels up to the first have it, others up to the second are shades of it
MOST_COLOURS = 7  # two of a background, three objects, and what two of them turn into
REACH = 3  # pixels: edges of shapes are no wider
MOST_UNEXPLAINED = 0.13


def is_drawing(frames: Frames) -> bool:
    """Whether frames show a few plain colours, as clips of the demo model do and footage does not.

    Args:
        frames: uint8 RGB (T, H, W, 3), as the model sees them, or from a picture strip.
    """
    return unexplained_share(frames) <= MOST_UNEXPLAINED


def unexplained_share(frames: Frames) -> float:
    """Share of pixels that neither have one of the clip's commonest colours nor are near such pixels.

    These are texture, gradients and shades. A colour is looked for among pixels that are on no edge.
    """
    from scipy.ndimage import maximum_filter  # only where it is needed: it takes a while

    chosen = np.unique(np.linspace(0, len(frames) - 1, MOST_FRAMES).round().astype(int))
    pixels = frames[chosen, BORDER:-BORDER, BORDER:-BORDER].astype(np.int16)
    down = np.abs(pixels[:, 2:, 1:-1] - pixels[:, :-2, 1:-1]).max(axis=-1)
    across = np.abs(pixels[:, 1:-1, 2:] - pixels[:, 1:-1, :-2]).max(axis=-1)
    is_flat = np.maximum(down, across) < EDGE
    is_explained = np.zeros(is_flat.shape, bool)
    places, colours = np.flatnonzero(is_flat), pixels[:, 1:-1, 1:-1][is_flat]
    for _ in range(MOST_COLOURS):
        if not len(places):
            break
        bins = (colours // EDGE).astype(np.int32) @ np.array([1024, 32, 1], np.int32)
        colour = colours[bins == np.bincount(bins).argmax()].mean(axis=0)
        colour = colours[np.abs(colours - colour).max(axis=1) <= SAME].mean(axis=0)
        distance = np.abs(colours - colour).max(axis=1)
        is_explained.flat[places[distance <= SAME]] = True
        places, colours = places[distance > SHADE], colours[distance > SHADE]
    near = maximum_filter(is_explained, size=(1, 2 * REACH + 1, 2 * REACH + 1))
    return 1 - float(near.mean())
