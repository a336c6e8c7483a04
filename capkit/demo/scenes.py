"""Scenes of simple moving shapes, and drawing them as frames or mp4. `capkit.demo.random_scenes` makes random ones.

Lengths are fractions of the frame's short side. Coordinates are those of the central square, which is all that the
model sees: (0, 0) is its top left corner, (1, 1) its bottom right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from capkit.video import Clip, FrameSampling, FrameSamplingLike, VideoInfo

T = TypeVar("T")

COLOURS = {
    "red": (214, 30, 34),
    "orange": (250, 132, 14),
    "yellow": (248, 226, 26),
    "green": (8, 130, 46),
    "blue": (30, 84, 236),
    "purple": (146, 36, 176),
    "white": (252, 252, 252),
    "black": (16, 14, 16),
}
SIZES = {"small": 0.30, "medium": 0.42, "large": 0.55}  # diameters
DIRECTIONS = ("left", "right", "up", "down")
MOTIONS = ("still", *DIRECTIONS, "bounces", "orbits", "grows", "shrinks")
# Name: (noun phrase, phrase after "is", RGB colours, lower or darker first). No camera pans over a plain one: it would
# look like moving objects.
USUAL_BACKGROUNDS = {
    "grey": ("a plain grey background", "plain grey", [(176, 178, 180)]),
    "dark blue": ("a plain dark blue background", "plain dark blue", [(52, 70, 122)]),
    "beige": ("a plain beige background", "plain beige", [(204, 184, 146)]),
    "pink": ("a plain pink background", "plain pink", [(240, 172, 190)]),
    "meadow": ("a green meadow under a pale sky", "a green meadow under a pale sky", [(150, 190, 96), (168, 206, 234)]),
    "striped wall": ("a striped wall", "a striped wall", [(96, 140, 140), (146, 186, 184)]),
    "checkered wall": ("a checkered wall", "a checkered wall", [(126, 108, 96), (176, 158, 146)]),
}
# What a plain background of any colour is called: by the nearest of these, RGB.
PLAIN_COLOURS = {
    "grey": [(176, 178, 180), (128, 128, 128), (84, 84, 86)],
    "dark blue": [(52, 70, 122), (10, 14, 120)],
    "beige": [(204, 184, 146), (232, 220, 190)],
    "pink": [(240, 172, 190), (250, 110, 170)],
    "white": [(252, 252, 252)],
    "black": [(14, 14, 16)],
    "red": [(214, 30, 34), (150, 20, 30)],
    "orange": [(250, 132, 14)],
    "yellow": [(248, 226, 26), (250, 240, 140)],
    "green": [(8, 130, 46), (40, 200, 60), (16, 240, 30)],
    "dark green": [(10, 66, 28)],
    "light green": [(160, 226, 150)],
    "blue": [(30, 84, 236), (10, 16, 240)],
    "light blue": [(150, 204, 246), (173, 216, 230)],
    "turquoise": [(50, 196, 196), (20, 240, 240)],
    "purple": [(146, 36, 176), (92, 24, 120)],
    "brown": [(112, 68, 34), (139, 69, 19)],
}
BACKGROUNDS = USUAL_BACKGROUNDS | {
    name: (f"a plain {name} background", f"plain {name}", colours[:1])
    for name, colours in PLAIN_COLOURS.items()
    if name not in USUAL_BACKGROUNDS
}
UNSEEN_PAIRS = {("red", "star"), ("blue", "triangle"), ("green", "circle"), ("yellow", "cross"), ("white", "square")}
"""Pairs of colour and shape that occur in held-out scenes only."""


def _outlines() -> dict[str, np.ndarray]:
    """Each shape's corners relative to its middle, (n, 2), in diameters."""

    def around(count: int, radius: ArrayLike, start: float = 0.0) -> np.ndarray:
        angles = 2 * np.pi * (np.arange(count) / count + start)
        return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.resize(radius, count)[:, None]

    a, b = 0.17, 0.5
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    return {
        "circle": around(48, 0.5),
        "square": around(4, 0.62, 1 / 8),
        "triangle": around(3, 0.58) + [0, 0.12],
        "star": around(10, [0.56, 0.23]),
        "cross": np.array(cross),
    }


OUTLINES = _outlines()
SHAPES = tuple(OUTLINES)
REACH = 0.55  # largest distance of any outline from its middle along x or y, in diameters, at any tilt
SMOOTHING = 4  # shapes are drawn this many times larger, then reduced


@dataclass(frozen=True)
class Thing:
    """An object and its path. Times are in seconds from the clip's start."""

    colour: str
    shape: str
    size: str
    motion: str
    diameter: float
    x: float
    y: float
    travel: float = 0.0  # distance; height of a bounce; radius of an orbit; last diameter / first
    period: float = 1.0  # of bouncing and orbiting; negative for counterclockwise
    phase: float = 0.0
    tilt: float = 0.0  # degrees
    shade: tuple[int, int, int] = (0, 0, 0)  # added to the colour's RGB values
    appears: float = 0.0
    disappears: float = 1e9
    changes: float = 1e9
    new_colour: str = ""
    ends: float = 1.0  # when its path ends: with the clip, or when it disappears

    @property
    def outline(self) -> np.ndarray:
        """Its corners relative to its middle, (n, 2), in diameters."""
        angle = np.radians(self.tilt)
        return OUTLINES[self.shape] @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]

    def colour_at(self, seconds: float) -> str:
        return self.new_colour if seconds >= self.changes else self.colour

    def is_there(self, seconds: float | np.ndarray) -> bool | np.ndarray:
        return (self.appears <= seconds) & (seconds < self.disappears)

    def place(self, seconds: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Middle x, y and diameter at each time, before any pan."""
        times = np.asarray(seconds, dtype=float)
        share = np.clip((times - self.appears) / (self.ends - self.appears), 0, 1)
        x, y, diameter = self.x + 0 * share, self.y + 0 * share, self.diameter + 0 * share
        turn = 2 * np.pi * (times / self.period + self.phase)
        if self.motion in ("left", "right"):
            x = x + share * self.travel * (1 if self.motion == "right" else -1)
        elif self.motion in ("up", "down"):
            y = y + share * self.travel * (1 if self.motion == "down" else -1)
        elif self.motion == "bounces":
            y = y - self.travel * np.abs(np.sin(turn / 2))
        elif self.motion == "orbits":
            x, y = x + self.travel * np.cos(turn), y + self.travel * np.sin(turn)
        elif self.motion in ("grows", "shrinks"):
            diameter = diameter * (1 + share * (self.travel - 1))
        return x, y, diameter


@dataclass(frozen=True)
class Scene:
    """What a clip shows: background, camera movement and objects."""

    num_frames: int
    fps: int
    height: int  # pixels, even
    width: int
    background: str
    background_shade: tuple[int, int, int]
    background_start: float  # horizontal offset of its pattern
    pan: float  # how far the camera pans to the right over the whole clip; negative to the left
    things: tuple[Thing, ...]

    @property
    def duration_seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def timestamps_seconds(self) -> np.ndarray:
        """Time of each frame, float64 (num_frames,)."""
        return np.arange(self.num_frames) / self.fps

    @property
    def side(self) -> int:
        """Side of the central square, in pixels."""
        return min(self.height, self.width)

    def panned(self, seconds: ArrayLike) -> np.ndarray:
        """How far the camera has panned to the right at each time."""
        return self.pan * np.clip(np.asarray(seconds) / self.duration_seconds, 0, 1)

    def visible(self, seconds: float) -> list[tuple[Thing, str, float, float, float]]:
        """(thing, its colour, x, y, diameter) of each object present at this time."""
        visible = []
        for thing in self.things:
            if thing.is_there(seconds):
                x, y, diameter = map(float, thing.place(seconds))
                visible.append((thing, thing.colour_at(seconds), x - float(self.panned(seconds)), y, diameter))
        return visible

    def draw(self, seconds: float) -> np.ndarray:
        """Draw the frame at this time, uint8 RGB (height, width, 3)."""
        side = self.side
        left, top = (self.width - side) / 2, (self.height - side) / 2
        start = round((float(self.panned(seconds)) + max(0.0, -self.pan)) * side)
        picture = self._backdrop.crop((start, 0, start + self.width, self.height))
        for thing, colour, x, y, diameter in self.visible(seconds):
            corners = thing.outline * (diameter * side) + [left + x * side, top + y * side]
            corner, beyond = np.floor(corners.min(0)).astype(int), np.ceil(corners.max(0)).astype(int) + 1
            width, height = (int(n) for n in (beyond - corner) * SMOOTHING)
            mask = Image.new("L", (width, height))
            # Pillow's pixel centres have integer coordinates.
            ImageDraw.Draw(mask).polygon(((corners - corner) * SMOOTHING - 0.5).ravel().tolist(), fill=255)
            picture.paste(_shaded(COLOURS[colour], thing.shade), tuple(corner.tolist()), mask.reduce(SMOOTHING))
        return np.array(picture)

    @cached_property
    def _backdrop(self) -> Image.Image:
        """The background, as wide as the pan needs it."""
        side = self.side
        width = self.width + round(abs(self.pan) * side) + 1
        colours = [_shaded(colour, self.background_shade) for colour in BACKGROUNDS[self.background][2]]
        if len(colours) == 1:
            return Image.new("RGB", (width, self.height), colours[0])
        x = np.arange(width)[None] / side + self.background_start
        y = (np.arange(self.height)[:, None] - (self.height - side) / 2) / side
        if self.background == "meadow":  # with hills, so that a pan is visible
            is_high = y <= 0.55 + 0.1 * np.sin(2 * np.pi * x / 0.9)
        elif self.background == "striped wall":
            is_high = (x / 0.25).astype(int) % 2 + 0 * y == 0
        else:
            is_high = ((x / 0.25).astype(int) + np.floor(y / 0.25).astype(int)) % 2 == 0
        return Image.fromarray(np.array(colours, np.uint8)[is_high.astype(int)])

    def sample(self, frame_sampling: FrameSamplingLike = "chat") -> Clip:
        """The clip that `load_clip` would read from a file of this scene; only the sampled frames are drawn."""
        sampling, times = FrameSampling.of(frame_sampling), self.timestamps_seconds
        chosen = sampling.frame_indices(times, self.fps)
        drawn = {index: self.draw(times[index]) for index in set(chosen)}
        frames = np.stack([drawn[index] for index in chosen])
        info = VideoInfo(None, self.num_frames, float(self.fps), self.duration_seconds, self.height, self.width, None)
        return Clip(frames, chosen, times[chosen], info, sampling)

    def write_mp4(self, path: Path) -> Path:
        """Encode the whole clip as H.264, and return `path`."""
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(self.fps), options={"preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, "yuv420p"
            for seconds in self.timestamps_seconds:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(self.draw(seconds), format="rgb24")))
            container.mux(stream.encode())
        return path


def _shaded(colour: tuple[int, int, int], shade: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(min(255, max(0, a + b)) for a, b in zip(colour, shade, strict=True))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of the choices at random. (`Generator.choice` would turn them into an array.)"""
    return choices[int(rng.integers(len(choices)))]
