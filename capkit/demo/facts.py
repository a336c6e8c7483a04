"""What certain frames of a scene show, and nothing else: the truth that texts are made from and checked against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from capkit.demo.scenes import COLOURS, SHAPES, Scene


@dataclass(frozen=True)
class Seen:
    """An object as the frames show it."""

    colour: str
    """At first."""
    shape: str
    size: str | None
    """None where it grows or shrinks."""
    motion: str | None
    """One of MOTIONS; None where the frames do not show it: too few of them, or the camera pans."""
    first: int
    """Number of the first frame that shows it."""
    last: int

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self):
        return f"{self.size} {self.name}" if self.size else self.name


@dataclass(frozen=True)
class Event:
    kind: str
    """"appears", "disappears" or "changes"."""
    second: int
    """Number of the first frame that shows it."""
    colour: str
    """The object's, before."""
    shape: str
    new_colour: str = ""

    @property
    def name(self):
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Facts:
    """What certain frames of a scene show, and nothing else."""

    background: str
    objects: tuple[Seen, ...]
    events: tuple[Event, ...]
    """In the order of time."""
    camera: str | None
    """"left", "right" or "still"; None where the frames do not show it."""
    numbers: tuple[int, ...]
    """That the frames carry; seconds under "chat" sampling."""


def see(scene: Scene, clip, frame_numbers: str = "index") -> Facts:
    """What these frames of the scene show.

    Args:
        clip: a `Clip` of the scene, or the times in seconds of frames of it, in order.
        frame_numbers: which number frames carry, as in the processor.
    """
    times = np.asarray(getattr(clip, "timestamps_seconds", clip), dtype=float)
    start = getattr(clip, "start_seconds", 0.0)
    numbers = tuple(range(len(times)) if frame_numbers == "index" else (round(float(t - start)) for t in times))
    panned = float(np.ptp(scene.panned(times)))
    objects, events = [], []
    for thing in scene.things:
        there = np.flatnonzero(thing.is_there(times))
        if not there.size:
            continue
        colours = [thing.colour_at(times[i]) for i in there]
        pair = (colours[0], thing.shape)
        motion = None if scene.pan else _visible_motion(thing, times[there])
        size = None if thing.motion in ("grows", "shrinks") else thing.size
        objects.append(Seen(*pair, size, motion, numbers[there[0]], numbers[there[-1]]))
        if there[0] > 0:
            events.append(Event("appears", numbers[there[0]], *pair))
        if there[-1] < len(times) - 1:
            events.append(Event("disappears", numbers[there[-1] + 1], *pair))
        if colours[-1] != colours[0]:
            events.append(Event("changes", numbers[there[colours.index(colours[-1])]], *pair, colours[-1]))
    if len(times) < 2 or 0 < panned < 0.1:
        camera = None
    else:
        camera = "still" if not scene.pan else "right" if scene.pan > 0 else "left"
    # In an order that can be learnt from the frames: as they come, then by colour and shape.
    objects.sort(key=lambda o: (o.first, tuple(COLOURS).index(o.colour), SHAPES.index(o.shape)))
    events.sort(key=lambda e: e.second)
    return Facts(scene.background, tuple(objects), tuple(events), camera, numbers)


def _visible_motion(thing, times):
    """The thing's motion if frames at these times show it clearly, else None."""
    if len(times) < 2:
        return None
    x, y, diameter = thing.place(times)
    if thing.motion in ("left", "right"):
        clear = np.ptp(x) > 0.12
    elif thing.motion in ("up", "down"):
        clear = np.ptp(y) > 0.12
    elif thing.motion == "bounces":
        steps = np.diff(y)
        clear = steps[steps > 0].sum() > 0.12 and -steps[steps < 0].sum() > 0.12
    elif thing.motion == "orbits":
        turns = times / abs(thing.period)
        clear = np.ptp(turns) > 0.65 and np.diff(turns).max() < 0.35
    elif thing.motion in ("grows", "shrinks"):
        clear = diameter.max() > 1.25 * diameter.min()
    else:
        clear = True
    return thing.motion if clear else None
