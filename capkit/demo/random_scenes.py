"""Random scenes by seed: which objects, where, what they do, and which scenes are held out from training."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from capkit.demo import scenes
from capkit.demo.facts import Facts, see
from capkit.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLAIN_COLOURS,
    REACH,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    USUAL_BACKGROUNDS,
    Scene,
    Thing,
    pick,
)
from capkit.video import FrameSampling

# Probability of each size, by number of objects. Fewer scenes with large objects have room for all, which these shares
# make up for in part.
SIZE_SHARES = {1: (0.2, 0.4, 0.4), 2: (0.25, 0.4, 0.35), 3: (0.5, 0.35, 0.15)}
Path = tuple[np.ndarray, np.ndarray, np.ndarray]
"""x, y and diameter over time."""


def make_scene(seed: int, held_out: bool = False, any_background: bool = False) -> Scene:
    """The scene of this seed, always the same. No held-out scene has a description that a training scene has.

    Args:
        any_background: put a plain one of any colour behind the scene, unless its camera pans. A few held-out scenes
            keep their own, because training may show them in front of every other.
    """
    scene = _make_scene(seed, held_out)
    return _on_any_colour(scene, np.random.default_rng([int(held_out), seed, 1]), held_out) if any_background else scene


def _make_scene(seed: int, held_out: bool) -> Scene:
    rng = np.random.default_rng([int(held_out), seed])
    # Drawn before the loop, or kinds of scenes that are rejected often would be rare.
    count, is_panned = int(rng.choice(4, p=[0.05, 0.4, 0.37, 0.18])), rng.random() < 0.12
    while True:
        scene = _random_scene(rng, held_out, count, is_panned)
        if scene is None:
            continue
        facts = _chat_facts(scene)
        num_events = sum((t.appears > 0) + (t.disappears < 1e9) + (t.changes < 1e9) for t in scene.things)
        is_clear = (
            len(facts.objects) == len(scene.things)
            and len(facts.events) == num_events
            and facts.camera is not None
            and (bool(scene.pan) or all(seen.motion for seen in facts.objects))
        )
        if is_clear and _is_held_out(facts) == held_out:
            return scene


def _chat_facts(scene: Scene) -> Facts:
    times = scene.timestamps_seconds
    return see(scene, times[FrameSampling("chat").frame_indices(times, scene.fps)])


def name_colour(rgb: ArrayLike) -> str | None:
    """The name in PLAIN_COLOURS of an RGB colour; None where two names would do, or none."""
    shades = [(name, colour) for name, colours in PLAIN_COLOURS.items() for colour in colours]
    distances = np.linalg.norm(_lab([colour for _, colour in shades]) - _lab(rgb), axis=1)
    nearest = {name: distance for distance, (name, _) in sorted(zip(distances, shades, strict=True), reverse=True)}
    (name, first), (_, second) = sorted(nearest.items(), key=lambda item: item[1])[:2]
    return name if first < 30 and second - first > 12 else None


def _lab(rgb: ArrayLike) -> np.ndarray:
    """CIELAB (..., 3) of sRGB colours (..., 3) from 0 to 255, whose distances are about those that people see.

    With a power of 2.2 for sRGB's curve. Source: CIE 15, white point D65.
    """
    linear = (np.asarray(rgb) / 255) ** 2.2
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def _on_any_colour(scene: Scene, rng: Generator, held_out: bool) -> Scene:
    """The scene in front of a plain background whose colour has one name and is none of its objects'."""
    if scene.pan:
        return scene
    colours = np.array([COLOURS[name] for thing in scene.things for name in (thing.colour, thing.new_colour) if name])
    facts = _chat_facts(scene)
    for _ in range(500):  # of some held-out scenes the descriptions with all other backgrounds are for training
        rgb = rng.integers(0, 256, 3)
        if rng.random() < 0.7:  # or white, black and brown, of which there are few shades, would be rare
            rgb = (pick(rng, pick(rng, list(PLAIN_COLOURS.values()))) + rng.integers(-24, 25, 3)).clip(0, 255)
        name = name_colour(rgb)
        is_far = not len(colours) or np.linalg.norm(colours - rgb, axis=1).min() > 90
        if name and is_far and _is_held_out(replace(facts, background=name)) == held_out:
            shade = tuple((rgb - BACKGROUNDS[name][2][0]).tolist())
            return replace(scene, background=name, background_shade=shade)
    return scene


def _is_held_out(facts: Facts) -> bool:
    """True for one description in five. Empty clips, which have few descriptions, count their length as part of it."""
    objects = sorted((*seen.pair, seen.size or "", seen.motion or "") for seen in facts.objects)
    events = [(e.kind, e.second, e.colour, e.shape, e.new_colour) for e in facts.events]
    length = None if objects else len(facts.numbers)
    return zlib.crc32(repr((facts.background, facts.camera, objects, events, length)).encode()) % 5 == 0


def _random_scene(rng: Generator, held_out: bool, count: int, is_panned: bool) -> Scene | None:
    """A scene, which may be unclear, or None where the objects find no room."""
    fps = pick(rng, (8, 10, 12, 15, 24, 25, 30))
    num_frames = int(rng.uniform(4, 12) * fps)
    end = num_frames / fps
    short, aspect = 2 * int(rng.integers(56, 121)), pick(rng, (9 / 16, 1, 4 / 3, 16 / 9))
    height, width = (short, 2 * round(short * aspect / 2)) if aspect >= 1 else (2 * round(short / aspect / 2), short)
    background = pick(rng, [name for name, (*_, rgb) in USUAL_BACKGROUNDS.items() if len(rgb) > is_panned])
    pan = float(rng.uniform(0.22, 0.34)) * pick(rng, (-1, 1)) if is_panned else 0.0
    pairs = _random_pairs(rng, count, held_out)
    things: list[Thing] = []
    taken: list[Path] = []
    times = np.linspace(0, end, 40)
    for (colour, shape), events in zip(pairs, _random_events(rng, count, round((num_frames - 1) / fps)), strict=True):
        settings: dict[str, Any] = {"ends": events.get("disappears", end), **events}
        if "changes" in events:
            used = {*(pair[0] for pair in pairs), *(thing.new_colour for thing in things)}
            free = [new for new in COLOURS if new not in used and (held_out or (new, shape) not in UNSEEN_PAIRS)]
            settings["new_colour"] = pick(rng, free)
        settings |= {"colour": colour, "shape": shape}
        settings["size"] = tuple(SIZES)[int(rng.choice(3, p=SIZE_SHARES[count]))]
        placed = _find_room(rng, taken, settings, pan, times)
        if placed is None:
            return None
        things.append(placed[0])
        taken.append(placed[1])
    red, green, blue = rng.integers(-7, 8, 3).tolist()
    start = float(rng.uniform(0, 0.9))
    return Scene(num_frames, fps, height, width, background, (red, green, blue), start, pan, tuple(things))


def _random_pairs(rng: Generator, count: int, held_out: bool) -> list[tuple[str, str]]:
    """`count` different pairs of colour and shape."""
    seen = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in UNSEEN_PAIRS]
    pairs = [seen[i] for i in rng.permutation(len(seen))[:count]]
    if held_out and count and rng.random() < 0.3:
        pairs[int(rng.integers(count))] = pick(rng, sorted(UNSEEN_PAIRS))
    return pairs


def _random_events(rng: Generator, count: int, last_second: int) -> list[dict[str, float]]:
    """Times of events of each object, by name of the event: at most two in all, two seconds or more apart."""
    events: list[dict[str, float]] = [{} for _ in range(count)]
    if not count:
        return events
    seconds = sorted(rng.integers(1, last_second, int(rng.choice(3, p=[0.38, 0.37, 0.25]))).tolist())
    if len(seconds) == 2 and seconds[1] - seconds[0] < 2:
        seconds.pop()
    times = [second - rng.uniform(0.2, 0.8) for second in seconds]  # well before the frame that shows it first
    chosen = rng.integers(0, count, len(times))
    if len(times) == 2 and chosen[0] == chosen[1]:
        events[chosen[0]].update(appears=times[0], disappears=times[1])
    else:
        for time, i in zip(times, chosen, strict=True):
            events[i][pick(rng, ("appears", "disappears", "changes"))] = time
    return events


def _find_room(
    rng: Generator, taken: list[Path], settings: dict[str, Any], pan: float, times: np.ndarray
) -> tuple[Thing, Path] | None:
    """An object that stays inside the central square and clear of the paths taken, and its own path; or None."""
    for _ in range(4):
        # Orbits are offered twice, because they seldom find room beside others.
        motion = "still" if pan or rng.random() < 0.12 else pick(rng, (*scenes.MOTIONS[1:], "orbits"))
        thing = _random_path(rng, settings, motion)
        x, y, diameter = thing.place(times)
        x, reach = x - pan * times / times[-1], REACH * diameter.max()
        ys = (*y, 0, -thing.travel) if motion == "bounces" else y  # `times` may miss the ends of a bounce
        low = np.array([reach - x.min(), reach - min(ys)])
        room = np.array([1 - reach - x.max(), 1 - reach - max(ys)]) - low
        starts = np.full((1, 2), 0.5) if motion == "orbits" else low + room * rng.random((64, 2))
        free = np.full(len(starts), True)
        for other_x, other_y, other_diameter in taken:
            distances = np.hypot(starts[:, :1] + x - other_x, starts[:, 1:] + y - other_y)
            free &= (distances > 0.53 * (diameter + other_diameter)).all(1)
        if free.any():
            start_x, start_y = starts[free.argmax()].tolist()
            return replace(thing, x=start_x, y=start_y), (start_x + x, start_y + y, diameter)
    return None


def _random_path(rng: Generator, settings: dict[str, Any], motion: str) -> Thing:
    """An object whose path starts at (0, 0), or has its middle there."""
    diameter, travel, period = SIZES[settings["size"]] + rng.uniform(-0.02, 0.02), 0.0, 1.0
    room = 1 - 2 * REACH * diameter
    if motion in ("grows", "shrinks"):
        diameter, travel = rng.uniform(0.26, 0.32), rng.uniform(1.7, 2.0)
        if motion == "shrinks":
            diameter, travel = diameter * travel, 1 / travel
    elif motion in scenes.DIRECTIONS:
        travel = rng.uniform(0.85, 1) * room
    elif motion == "bounces":
        travel, period = rng.uniform(0.7, 1) * room, rng.uniform(2.5, 4)
    elif motion == "orbits":
        travel, period = rng.uniform(0.85, 1) * room / 2, rng.uniform(4, 8) * pick(rng, (-1, 1))
    path: dict[str, Any] = {"motion": motion, "x": 0.0, "y": 0.0, "diameter": diameter, "travel": travel}
    path |= {"period": period, "phase": rng.random(), "tilt": rng.uniform(-8, 8)}
    return Thing(**path, shade=tuple(rng.integers(-12, 13, 3).tolist()), **settings)
