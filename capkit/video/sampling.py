"""Frame sampling: which frames of a video the model sees, as pure functions from frame times to frame indices."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capkit.text import unknown_name

STRATEGIES = ("chat", "base", "uniform", "fps")
DECODERS = ("pyav", "decord")
MAX_RATE = 1e9  # no frames are nearer to each other, and ticks of a higher rate would be rounded to the same time
MAX_NUM_FRAMES = 10**6  # "base" repeats frames, so that more would take minutes before they are found too many
BASE_SECONDS = 60  # "base" samples the first minute (CogVideo tools/caption)


def chat_indices(timestamps_seconds: ArrayLike, num_frames: int = 24) -> list[int]:
    """For each second 0, 1, ..., round(last time), the frame nearest to it; the first one, if two are equally near.

    Equal to the original model's "chat" strategy (CogVideo tools/caption), computed in float32 like decord's times.
    Where frames are more than a second apart, the same frame can be the nearest to several seconds and is repeated.

    Args:
        timestamps_seconds: start times of the frames, shape (n,), n >= 1.
        num_frames: at most this many.

    Raises:
        ValueError: no times, times that are not finite, or `num_frames` below 1.
    """
    times = _times(timestamps_seconds).astype(np.float32)
    seconds = range(min(round(float(times.max())) + 1, at_least_one("num_frames", num_frames)))
    return [int(np.abs(times - np.float32(second)).argmin()) for second in seconds]


def base_indices(num_video_frames: int, average_fps: float, num_frames: int = 24) -> list[int]:
    """`num_frames` indices evenly spaced over the frames of the first minute; short clips repeat frames.

    Equal to the original model's "base" strategy (CogVideo tools/caption), which counts frames and ignores their times.

    Raises:
        ValueError: no frames, `num_frames` below 1, or a frame rate that is not positive and finite.
    """
    first_minute = int(BASE_SECONDS * positive("average_fps", average_fps)) or 1  # at least the first frame
    last = min(at_least_one("num_video_frames", num_video_frames), first_minute) - 1
    return np.linspace(0, last, at_least_one("num_frames", num_frames), dtype=int).tolist()


def uniform_indices(timestamps_seconds: ArrayLike, num_frames: int = 24) -> list[int]:
    """The frames nearest to `num_frames` evenly spaced times from the first frame to the last, without repeats.

    The result is shorter if the clip has fewer frames, or if several times are nearest to the same frame.

    Raises:
        ValueError: as `chat_indices`.
    """
    times = _times(timestamps_seconds)
    if len(times) <= at_least_one("num_frames", num_frames):
        return list(range(len(times)))
    return sorted({int(np.abs(times - time).argmin()) for time in np.linspace(times.min(), times.max(), num_frames)})


def fps_indices(timestamps_seconds: ArrayLike, frames_per_second: float, num_frames: int = 24) -> list[int]:
    """The frames nearest to 0, 1 / frames_per_second, 2 / frames_per_second, ... s, without repeats.

    At most `num_frames`.

    Raises:
        ValueError: as `chat_indices`, or `frames_per_second` not positive and finite.
    """
    times = _times(timestamps_seconds)
    rate = min(positive("frames_per_second", frames_per_second), MAX_RATE)
    limit = at_least_one("num_frames", num_frames)
    indices: list[int] = []
    tick, last = 0, times.max() + 1e-6  # a rounding error must not exclude the tick of the last frame
    while len(indices) < limit and tick / rate <= last:
        nearest = int(np.abs(times - tick / rate).argmin())
        if nearest not in indices:
            indices.append(nearest)
        later = times[times > times[nearest]]
        if not later.size:
            break
        # Skip to the first tick that is nearer to a later frame, so that a huge rate takes no longer than a small one.
        tick = max(tick + 1, math.ceil((times[nearest] + later.min()) / 2 * rate))
    return indices


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video the model sees.

    "chat": one frame a second from the start, as in the original. "base": evenly over the first minute, as in the
    original. "uniform": evenly over the whole clip or window. "fps": `frames_per_second` from the start.

    Attributes:
        strategy: one of these names.
        num_frames: at most this many frames.
        frames_per_second: for "fps" only.
        decoder: "pyav", or "decord" for the same frames as decord 0.6.0 decodes them, to equal the original tool to the
            last bit; a file from which decord gives other frames is a `VideoError`.

    Raises:
        ValueError: an unknown strategy, a number out of range, or a setting that the strategy does not use.
    """

    strategy: str
    num_frames: int = 24
    frames_per_second: float | None = None
    decoder: str = "pyav"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(unknown_name("frame sampling", self.strategy, STRATEGIES, "there are"))
        if self.decoder not in DECODERS:
            raise ValueError(f"unknown decoder {self.decoder!r}; choose one of {', '.join(DECODERS)}")
        object.__setattr__(self, "num_frames", at_least_one("num_frames", self.num_frames))
        if self.num_frames > MAX_NUM_FRAMES:
            raise ValueError(f"num_frames must be at most {MAX_NUM_FRAMES}; got {self.num_frames}")
        if self.strategy == "fps":
            if self.frames_per_second is None:
                raise ValueError('"fps" needs frames_per_second: {"strategy": "fps", "frames_per_second": 2}')
            object.__setattr__(self, "frames_per_second", positive("frames_per_second", self.frames_per_second))
        elif self.frames_per_second is not None:
            raise ValueError(f'frames_per_second has no effect with strategy {self.strategy!r}; it belongs to "fps"')

    @classmethod
    def of(cls, frame_sampling: "FrameSamplingLike") -> "FrameSampling":
        """A FrameSampling from the name of a strategy, a dict of the fields, or a FrameSampling."""
        if isinstance(frame_sampling, FrameSampling):
            return frame_sampling
        if isinstance(frame_sampling, dict):
            names = [field.name for field in fields(cls)]
            if unknown := [name for name in frame_sampling if name not in names]:
                reason = unknown_name("field", unknown[0], names, "known")
                raise ValueError(f"frame sampling {frame_sampling!r}: {reason}")
            if "strategy" not in frame_sampling:
                raise ValueError(f"frame sampling {frame_sampling!r}: needs strategy, one of {', '.join(STRATEGIES)}")
            return cls(**frame_sampling)
        return cls(frame_sampling)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `FrameSampling.of` reads them back. `decoder` only if it is not PyAV."""
        values = asdict(self)
        if self.decoder == "pyav":
            del values["decoder"]  # requests of stores written before it existed stay equal
        return values

    def frame_indices(
        self,
        timestamps_seconds: ArrayLike,
        average_fps: float,
        start_seconds: float = 0.0,
        end_seconds: float | None = None,
        only_frames: Sequence[int] | None = None,
    ) -> list[int]:
        """Indices of the sampled frames, all with start_seconds <= time < end_seconds; empty if the window has none.

        Args:
            timestamps_seconds: start times of all the video's frames, shape (n,), in order.
            average_fps: frames per second as the file says; only "base" uses it.
            only_frames: indices to choose among, such as those that a trainer takes; None for all.
        """
        check_window(start_seconds, end_seconds)
        times = _times(timestamps_seconds)
        places = np.arange(len(times))
        if only_frames is not None:
            places = np.intersect1d(places, only_frames)
            average_fps *= len(places) / (np.ptp(places) + 1) if len(places) else 1
        if start_seconds != 0 or end_seconds is not None:  # else negative times count too, as in the original
            end = math.inf if end_seconds is None else end_seconds
            places = places[(times[places] >= start_seconds) & (times[places] < end)]
        if not len(places):
            return []
        times = times[places] - start_seconds
        if self.strategy == "chat":
            indices = chat_indices(times, self.num_frames)
        elif self.strategy == "base":
            indices = base_indices(len(times), average_fps, self.num_frames)
        elif self.frames_per_second is not None:  # "fps"
            indices = fps_indices(times, self.frames_per_second, self.num_frames)
        else:
            indices = uniform_indices(times, self.num_frames)
        return places[indices].tolist()


FrameSamplingLike = FrameSampling | str | dict[str, Any]
"""What `FrameSampling.of` takes."""


def check_window(start_seconds: float, end_seconds: float | None) -> None:
    """Raise ValueError unless 0 <= start_seconds < end_seconds, where None is the end of the video."""
    if finite_float(start_seconds) is None or start_seconds < 0:
        raise ValueError(f"start_seconds must be a finite number, not negative; got {start_seconds!r}")
    if end_seconds is not None and (finite_float(end_seconds) is None or end_seconds <= start_seconds):
        raise ValueError(f"end_seconds must be None or above start_seconds, {start_seconds:g}; got {end_seconds!r}")


def positive(name: str, value: Any) -> float:
    """`value` as a float; ValueError with `name` unless it is a finite number above 0."""
    if (number := finite_float(value)) is None or number <= 0:
        raise ValueError(f"{name} must be a positive number; got {value!r}")
    return number


def at_least_one(name: str, value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
    return int(value)


def finite_float(value: Any) -> float | None:
    """A finite number, NumPy's too, as a plain float; None for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    # Through str: float(np.float32(0.8)) is another request than 0.8, and float(10**400) raises.
    number = float(str(value)) if isinstance(value, (int, np.floating)) else float(value)
    return number if math.isfinite(number) else None


def _times(timestamps_seconds: ArrayLike) -> NDArray[np.float64]:
    times = np.asarray(timestamps_seconds, dtype=np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all():
        raise ValueError(f"timestamps_seconds must be finite numbers, shape (n,), n >= 1; got shape {times.shape}")
    return times
