"""Clips of plain shapes drawn without `capkit.demo`: corners filled by matplotlib, on backgrounds with CSS's names."""

import numpy as np
from matplotlib.colors import CSS4_COLORS, to_rgb
from matplotlib.path import Path

from capkit import Clip

SIDE, NUM_FRAMES = 160, 8
OBJECTS = {
    "red": "firebrick crimson red".split(),
    "orange": "darkorange orange".split(),
    "yellow": "gold yellow".split(),
    "green": "green forestgreen".split(),
    "blue": "royalblue".split(),
    "purple": "darkmagenta purple darkviolet".split(),
    "white": "white snow".split(),
    "black": "black".split(),
}
BACKGROUNDS = {
    "white": "white snow".split(),
    "black": "black".split(),
    "grey": "grey silver darkgrey dimgrey".split(),
    "red": "red crimson darkred firebrick".split(),
    "orange": "darkorange".split(),
    "yellow": "yellow gold".split(),
    "green": "green forestgreen limegreen lime".split(),
    "light green": "lightgreen palegreen".split(),
    "blue": "blue royalblue mediumblue".split(),
    "dark blue": "navy darkblue".split(),
    "light blue": "lightblue skyblue lightskyblue".split(),
    "turquoise": "turquoise mediumturquoise cyan".split(),
    "purple": "purple darkviolet darkorchid indigo".split(),
    "pink": "pink lightpink hotpink".split(),
    "beige": "tan wheat burlywood".split(),
    "brown": "saddlebrown".split(),
}
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}


def corners(shape):
    """The shape's corners around (0, 0), (n, 2), about 1 wide."""
    around = {"circle": (60, [0.5]), "square": (4, [0.65]), "triangle": (3, [0.6]), "star": (10, [0.56, 0.24])}
    if shape == "cross":
        a, b = 0.16, 0.5
        xs = [-a, a, a, b, b, a, a, -a, -a, -b, -b, -a]
        ys = [-b, -b, -a, -a, a, a, b, b, a, a, -a, -a]
        return np.stack([xs, ys], 1)
    count, radii = around[shape]
    angles = 2 * np.pi * (np.arange(count) / count + (1 / 8 if shape == "square" else 0))
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.resize(radii, count)[:, None]


def rgb(css_name):
    return np.round(255 * np.array(to_rgb(CSS4_COLORS[css_name])))


def draw(background, colour, shape, size, places):
    """uint8 (T, SIDE, SIDE, 3): the shape at each of the places (x, y), all in shares of the side."""
    steps = (np.arange(3 * SIDE) + 0.5) / (3 * SIDE)
    points = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    frames = []
    for place in places:
        inside = Path(corners(shape) * size + place).contains_points(points)
        share = inside.reshape(SIDE, 3, SIDE, 3).mean((1, 3))[..., None]
        frames.append(share * rgb(colour) + (1 - share) * rgb(background))
    return np.round(np.stack(frames)).astype(np.uint8)


def plain_shapes(num_clips, seed=0):
    """(clip of one frame a second, name of the background, colour, shape, motion) of random plain shapes."""
    rng = np.random.default_rng(seed)

    def one_of(choices):
        return choices[int(rng.integers(len(choices)))]

    while num_clips:
        name, colour, shape = (
            one_of(list(BACKGROUNDS)),
            one_of(list(OBJECTS)),
            one_of(["circle", "square", "triangle", "star", "cross"]),
        )
        background, paint, motion = one_of(BACKGROUNDS[name]), one_of(OBJECTS[colour]), one_of(list(MOVES))
        if np.linalg.norm(rgb(background) - rgb(paint)) < 120:
            continue
        size = rng.uniform(0.28, 0.5)
        path = np.linspace(-1, 1, NUM_FRAMES)[:, None] * MOVES[motion] * (0.9 - size) / 2.2
        frames = draw(background, paint, shape, size, 0.5 + path)
        yield Clip.from_frames(frames, [float(second) for second in range(NUM_FRAMES)]), name, colour, shape, motion
        num_clips -= 1
