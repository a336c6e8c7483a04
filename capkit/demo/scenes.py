"""Short clips of simple shapes: what there is, and how it is drawn. `capkit.demo.planning.make_scene` plans them.

Lengths are in short sides of the frame: the square in its middle, all that the model sees, is 1 x 1, x to the right and
y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from capkit.video import Clip, FrameSampling, VideoInfo

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
# By the number of objects. Plans with large objects find room less often, which these shares make up for in part.
SIZE_SHARES = {1: (0.2, 0.4, 0.4), 2: (0.25, 0.4, 0.35), 3: (0.5, 0.35, 0.15)}
MOTIONS = ("still", "left", "right", "up", "down", "bounces", "orbits", "grows", "shrinks")
# Name: how it is called with an article, how after "is", and its colours, lower or darker first. Before a plain one, a
# pan would look like moving objects.
BACKGROUNDS = {
    "grey": ("a plain grey background", "plain grey", [(176, 178, 180)]),
    "dark blue": ("a plain dark blue background", "plain dark blue", [(52, 70, 122)]),
    "beige": ("a plain beige background", "plain beige", [(204, 184, 146)]),
    "pink": ("a plain pink background", "plain pink", [(240, 172, 190)]),
    "meadow": ("a green meadow under a pale sky", "a green meadow under a pale sky", [(150, 190, 96), (168, 206, 234)]),
    "striped wall": ("a striped wall", "a striped wall", [(96, 140, 140), (146, 186, 184)]),
    "checkered wall": ("a checkered wall", "a checkered wall", [(126, 108, 96), (176, 158, 146)]),
}
UNSEEN_PAIRS = {
    ("red", "star"),
    ("blue", "triangle"),
    ("green", "circle"),
    ("yellow", "cross"),
    ("white", "square"),
}
"""Pairs of colour and shape that only held-out scenes have."""


def _outlines():
    """Each shape's corners, (n, 2), in diameters from its middle."""

    def around(count, radius, start=0.0):
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
REACH = 0.55  # of any outline from its middle along x or y, in diameters, tilted or not
SMOOTHING = 4  # outlines are drawn this much larger


@dataclass(frozen=True)
class Thing:
    """An object and its path. Times are seconds from the clip's start."""

    colour: str
    shape: str
    size: str
    motion: str
    diameter: float
    x: float
    y: float
    travel: float = 0.0
    """How far it moves; how high it bounces; the radius of its orbit; its last diameter by its first."""
    period: float = 1.0
    """Of bouncing and orbiting; negative against the clock."""
    phase: float = 0.0
    tilt: float = 0.0
    """Degrees."""
    shade: tuple[int, int, int] = (0, 0, 0)
    """Added to its colour."""
    appears: float = 0.0
    disappears: float = 1e9
    changes: float = 1e9
    new_colour: str = ""
    ends: float = 1.0
    """When its path ends: at the end of the clip, or where it disappears."""

    def colour_at(self, seconds):
        return self.new_colour if seconds >= self.changes else self.colour

    def is_there(self, seconds):
        return (self.appears <= seconds) & (seconds < self.disappears)

    def place(self, seconds):
        """Middle x, y and diameter, each of the shape of `seconds`, before any pan."""
        seconds = np.asarray(seconds, dtype=float)
        share = np.clip((seconds - self.appears) / (self.ends - self.appears), 0, 1)
        x, y, diameter = self.x + 0 * share, self.y + 0 * share, self.diameter + 0 * share
        turn = 2 * np.pi * (seconds / self.period + self.phase)
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
    """A clip, planned; `draw`, `sample` and `write_mp4` show it."""

    num_frames: int
    fps: int
    height: int
    """Pixels, even."""
    width: int
    background: str
    background_shade: tuple[int, int, int]
    background_start: float
    """Where its pattern begins."""
    pan: float
    """How far the camera turns to the right over the clip; negative to the left."""
    things: tuple[Thing, ...]

    @property
    def duration_seconds(self):
        return self.num_frames / self.fps

    @property
    def timestamps_seconds(self):
        """When each frame is shown, float64 (num_frames,)."""
        return np.arange(self.num_frames) / self.fps

    def panned(self, seconds):
        """How far the camera has turned to the right by then."""
        return self.pan * np.clip(np.asarray(seconds) / self.duration_seconds, 0, 1)

    def visible(self, seconds):
        """(thing, its colour now, x, y, diameter) of each thing there is at this moment, in the middle square."""
        there = [thing for thing in self.things if thing.is_there(seconds)]
        places = [[float(value) for value in thing.place(seconds)] for thing in there]
        shift = float(self.panned(seconds))
        return [(t, t.colour_at(seconds), x - shift, y, d) for t, (x, y, d) in zip(there, places, strict=True)]

    def draw(self, seconds):
        """The frame at that moment, uint8 RGB (height, width, 3)."""
        side = min(self.height, self.width)
        left, top = (self.width - side) / 2, (self.height - side) / 2
        start = round((float(self.panned(seconds)) + max(0.0, -self.pan)) * side)
        picture = self._backdrop.crop((start, 0, start + self.width, self.height))
        for thing, colour, x, y, diameter in self.visible(seconds):
            angle = np.radians(thing.tilt)
            turned = OUTLINES[thing.shape] @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
            corners = turned * (diameter * side) + [left + x * side, top + y * side]
            corner, beyond = np.floor(corners.min(0)).astype(int), np.ceil(corners.max(0)).astype(int) + 1
            mask = Image.new("L", tuple(int(n) for n in (beyond - corner) * SMOOTHING))
            # Pillow's pixels are points, the first one at 0.
            ImageDraw.Draw(mask).polygon(((corners - corner) * SMOOTHING - 0.5).ravel().tolist(), fill=255)
            picture.paste(_shaded(COLOURS[colour], thing.shade), tuple(corner.tolist()), mask.reduce(SMOOTHING))
        return np.array(picture)

    @cached_property
    def _backdrop(self):
        """The background as wide as a pan may need it."""
        side = min(self.height, self.width)
        width = self.width + round(abs(self.pan) * side) + 1
        low, *high = (_shaded(colour, self.background_shade) for colour in BACKGROUNDS[self.background][2])
        if not high:
            return Image.new("RGB", (width, self.height), low)
        x = np.arange(width)[None] / side + self.background_start
        y = (np.arange(self.height)[:, None] - (self.height - side) / 2) / side
        if self.background == "meadow":  # hills, so that a pan shows
            is_low = y > 0.55 + 0.1 * np.sin(2 * np.pi * x / 0.9)
        elif self.background == "striped wall":
            is_low = (x / 0.25).astype(int) % 2 + 0 * y > 0
        else:
            is_low = ((x / 0.25).astype(int) + np.floor(y / 0.25).astype(int)) % 2 > 0
        return Image.fromarray(np.where(is_low[..., None], np.uint8(low), np.uint8(high[0])))

    def sample(self, frame_sampling="chat") -> Clip:
        """The clip as `load_clip` would read it from a file, without one; only the frames chosen are drawn."""
        sampling, times = FrameSampling.of(frame_sampling), self.timestamps_seconds
        chosen = sampling.frame_indices(times, self.fps)
        drawn = {index: self.draw(times[index]) for index in set(chosen)}
        frames = np.stack([drawn[index] for index in chosen])
        info = VideoInfo(None, self.num_frames, float(self.fps), self.duration_seconds, self.height, self.width, None)
        return Clip(frames, chosen, times[chosen], info, sampling)

    def write_mp4(self, path):
        """Encode the whole clip as H.264; returns `path`."""
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(self.fps), options={"preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, "yuv420p"
            for seconds in self.timestamps_seconds:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(self.draw(seconds), format="rgb24")))
            container.mux(stream.encode())
        return path


def _shaded(colour, shade):
    return tuple(min(255, max(0, a + b)) for a, b in zip(colour, shade, strict=True))


def pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]
