"""Which frames a model sees: pure functions from times to positions."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

import numpy as np

STRATEGIES = ("chat", "base", "uniform", "fps")
MINUTE = 60  # "base" looks at the first minute (CogVideo tools/caption)


def chat_indices(timestamps_seconds, num_frames=24) -> list[int]:
    """For each second 0, 1, ..., round(last time) the first of the frames nearest to it; at most `num_frames`.

    Exactly what the original model's "chat" strategy chooses (CogVideo tools/caption), in float32 as decord's times.
    Where frames lie far apart, one may be the nearest to several seconds and is repeated.

    Args:
        timestamps_seconds: start times of the frames, shape (n,), n >= 1.

    Raises:
        ValueError: no times, times that are not finite, or `num_frames` below 1.
    """
    times = _times(timestamps_seconds).astype(np.float32)
    seconds = range(min(round(float(times.max())) + 1, _at_least_one("num_frames", num_frames)))
    return [int(np.abs(times - np.float32(second)).argmin()) for second in seconds]


def base_indices(num_video_frames, average_fps, num_frames=24) -> list[int]:
    """`num_frames` positions spread evenly over the first minute, counted in frames; short clips repeat frames.

    Exactly what the original model's "base" strategy chooses (CogVideo tools/caption).

    Raises:
        ValueError: no frames, `num_frames` below 1, or a frame rate that is not positive and finite.
    """
    first_minute = int(MINUTE * positive("average_fps", average_fps)) or 1  # the first frame is in it, however slow
    last = min(_at_least_one("num_video_frames", num_video_frames), first_minute) - 1
    return np.linspace(0, last, _at_least_one("num_frames", num_frames), dtype=int).tolist()


def uniform_indices(timestamps_seconds, num_frames=24) -> list[int]:
    """The frames nearest to `num_frames` times spread evenly from the first frame to the last, each frame once.

    Fewer come back where the clip has fewer, or where several times fall on one long frame. One frame: the first.

    Raises:
        ValueError: as `chat_indices`.
    """
    times = _times(timestamps_seconds)
    if len(times) <= _at_least_one("num_frames", num_frames):
        return list(range(len(times)))
    return sorted({int(np.abs(times - time).argmin()) for time in np.linspace(times.min(), times.max(), num_frames)})


def fps_indices(timestamps_seconds, frames_per_second, num_frames=24) -> list[int]:
    """The frames nearest to 0, 1 / frames_per_second, 2 / frames_per_second, ... s, each once, at most `num_frames`.

    Raises:
        ValueError: as `chat_indices`, or `frames_per_second` not positive and finite.
    """
    times = _times(timestamps_seconds)
    rate, limit = positive("frames_per_second", frames_per_second), _at_least_one("num_frames", num_frames)
    chosen, tick, last = [], 0, times.max() + 1e-6  # a tick may miss the last frame by a rounding error
    while len(chosen) < limit and tick / rate <= last:
        nearest = int(np.abs(times - tick / rate).argmin())
        if nearest not in chosen:
            chosen.append(nearest)
        later = times[times > times[nearest]]
        if not later.size:
            break
        # Jump to the first tick that is nearer to a later frame, so that a huge rate costs no more than a small one.
        tick = max(tick + 1, math.ceil((times[nearest] + later.min()) / 2 * rate))
    return chosen


@dataclass(frozen=True)
class FrameSampling:
    """How frames are chosen.

    "chat": one a second from the start, as the original. "base": spread over the first minute, as the original.
    "uniform": spread over the whole clip or window. "fps": `frames_per_second` from the start.

    Raises:
        ValueError: an unknown strategy, a bad number, or a setting that the strategy does not use.
    """

    strategy: str
    num_frames: int = 24
    """At most this many."""
    frames_per_second: float | None = None
    """For "fps" only."""

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown frame sampling {self.strategy!r}; choose one of {', '.join(STRATEGIES)}")
        object.__setattr__(self, "num_frames", _at_least_one("num_frames", self.num_frames))
        if self.strategy == "fps":
            object.__setattr__(self, "frames_per_second", positive("frames_per_second", self.frames_per_second))
        elif self.frames_per_second is not None:
            raise ValueError(f'frames_per_second has no effect with strategy {self.strategy!r}; it belongs to "fps"')

    @classmethod
    def of(cls, frame_sampling) -> "FrameSampling":
        """A FrameSampling from itself, from a strategy's name, or from a dict of the fields."""
        if isinstance(frame_sampling, cls):
            return frame_sampling
        if isinstance(frame_sampling, dict):
            unknown = set(frame_sampling) - {field.name for field in fields(cls)}
            if unknown or "strategy" not in frame_sampling:
                raise ValueError(
                    f"frame sampling {frame_sampling!r}: strategy, num_frames, frames_per_second are known"
                )
            return cls(**frame_sampling)
        return cls(frame_sampling)

    def frame_indices(self, timestamps_seconds, average_fps, start_seconds=0.0, end_seconds=None) -> list[int]:
        """Positions of the chosen frames, all with start_seconds <= time < end_seconds; an empty list if none is there.

        Args:
            timestamps_seconds: start times of all the video's frames, shape (n,), in order.
            average_fps: frames a second over the whole video; only "base" needs it.
        """
        check_window(start_seconds, end_seconds)
        times = _times(timestamps_seconds)
        first = 0
        if start_seconds != 0 or end_seconds is not None:  # else: every frame at its own time, as in the original
            inside = (times >= start_seconds) & (times < (math.inf if end_seconds is None else end_seconds))
            if not inside.any():
                return []
            first, times = int(inside.argmax()), times[inside] - start_seconds
        if self.strategy == "chat":
            chosen = chat_indices(times, self.num_frames)
        elif self.strategy == "base":
            chosen = base_indices(len(times), average_fps, self.num_frames)
        elif self.strategy == "uniform":
            chosen = uniform_indices(times, self.num_frames)
        else:
            chosen = fps_indices(times, self.frames_per_second, self.num_frames)
        return [first + index for index in chosen]


def check_window(start_seconds, end_seconds):
    if not _is_number(start_seconds) or start_seconds < 0:
        raise ValueError(f"start_seconds must be a number of seconds, not negative; got {start_seconds!r}")
    if end_seconds is not None and (not _is_number(end_seconds) or end_seconds <= start_seconds):
        raise ValueError(
            f"end_seconds must be None or a number above start_seconds, {start_seconds:g}; got {end_seconds!r}"
        )


def _times(timestamps_seconds):
    times = np.asarray(timestamps_seconds, dtype=np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all():
        raise ValueError(f"timestamps_seconds must be one finite number or more, shape (n,); got shape {times.shape}")
    return times


def _at_least_one(name, value):
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
    return int(value)


def positive(name, value):
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number; got {value!r}")
    return float(value)


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
