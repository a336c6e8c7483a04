"""Ground truth of a clip: what the given frames of a scene show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capkit.demo.scenes import COLOURS, SHAPES, Scene, Thing
from capkit.video import Clip


@dataclass(frozen=True)
class Seen:
    """An object as the frames show it."""

    colour: str  # at first
    shape: str
    size: str | None  # None where it grows or shrinks
    motion: str | None  # one of MOTIONS; None where the frames do not show it: too few of them, or the camera pans
    first: int  # number of the first frame that shows it
    last: int

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.name}" if self.size else self.name


@dataclass(frozen=True)
class Event:
    """A change of an object."""

    kind: str  # "appears", "disappears" or "changes"
    second: int  # number of the first frame that shows it
    colour: str  # of the object, before
    shape: str
    new_colour: str = ""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Facts:
    """Ground truth of a clip."""

    background: str
    objects: tuple[Seen, ...]  # in the order in which texts name them: by first frame, then by colour and shape
    events: tuple[Event, ...]  # in order of time
    camera: str | None  # "left", "right" or "still"; None where the frames do not show it
    numbers: tuple[int, ...]  # of the frames; seconds under "chat" sampling


def see(scene: Scene, clip: Clip | Sequence[float] | np.ndarray, frame_numbers: str = "index") -> Facts:
    """What these frames of the scene show.

    Args:
        clip: a `Clip` of the scene, or the times of its frames in seconds, in order.
        frame_numbers: "index" or "seconds", as in the processor.
    """
    times = np.asarray(getattr(clip, "timestamps_seconds", clip), dtype=float)
    start = getattr(clip, "start_seconds", 0.0)
    numbers = tuple(range(len(times)) if frame_numbers == "index" else (round(float(t - start)) for t in times))
    objects, events = [], []
    for thing in scene.things:
        there = np.flatnonzero(thing.is_there(times))
        if not there.size:
            continue
        colours = [thing.colour_at(times[i]) for i in there]
        motion = None if scene.pan else _visible_motion(thing, times[there])
        size = None if thing.motion in ("grows", "shrinks") else thing.size
        objects.append(Seen(colours[0], thing.shape, size, motion, numbers[there[0]], numbers[there[-1]]))
        happened = []
        if there[0] > 0:
            happened.append(("appears", there[0], ""))
        if there[-1] < len(times) - 1:
            happened.append(("disappears", there[-1] + 1, ""))
        if colours[-1] != colours[0]:
            happened.append(("changes", there[colours.index(colours[-1])], colours[-1]))
        events += [Event(kind, numbers[i], colours[0], thing.shape, new) for kind, i, new in happened]
    camera = "right" if scene.pan > 0 else "left" if scene.pan else "still"
    is_camera_visible = len(times) > 1 and not 0 < np.ptp(scene.panned(times)) < 0.1
    objects.sort(key=lambda seen: (seen.first, tuple(COLOURS).index(seen.colour), SHAPES.index(seen.shape)))
    events.sort(key=lambda event: event.second)
    return Facts(scene.background, tuple(objects), tuple(events), camera if is_camera_visible else None, numbers)


def _visible_motion(thing: Thing, times: np.ndarray) -> str | None:
    """The object's motion if frames at these times show it clearly, else None."""
    if len(times) < 2:
        return None
    x, y, diameter = thing.place(times)
    is_clear: bool | np.bool_ = True
    if thing.motion in ("left", "right"):
        is_clear = np.ptp(x) > 0.12
    elif thing.motion in ("up", "down"):
        is_clear = np.ptp(y) > 0.12
    elif thing.motion == "bounces":
        steps = np.diff(y)
        is_clear = steps[steps > 0].sum() > 0.12 and -steps[steps < 0].sum() > 0.12
    elif thing.motion == "orbits":
        turns = times / abs(thing.period)
        is_clear = np.ptp(turns) > 0.65 and np.diff(turns).max() < 0.35
    elif thing.motion in ("grows", "shrinks"):
        is_clear = diameter.max() > 1.25 * diameter.min()
    return thing.motion if is_clear else None
