"""Which frames a model sees, and reading exactly those from a file.

The index functions are pure: they take times and return positions; `load_clip` reads just the frames that they name, in
a child process that can be killed.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, fields
from numbers import Integral, Real

import numpy as np

from capkit.child import Child
from capkit.reading import VideoError, VideoInfo, read_frames

STRATEGIES = ("chat", "base", "uniform", "fps")
MINUTE = 60  # "base" looks at the first minute (CogVideo tools/caption)


# ---- which frames --------------------------------------------------------------------------------------------------


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
    first_minute = int(MINUTE * _positive("average_fps", average_fps)) or 1  # the first frame is in it, however slow
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
    rate, limit = _positive("frames_per_second", frames_per_second), _at_least_one("num_frames", num_frames)
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
            object.__setattr__(self, "frames_per_second", _positive("frames_per_second", self.frames_per_second))
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
        _check_window(start_seconds, end_seconds)
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


# ---- the clip ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames and where they come from."""

    frames: np.ndarray
    """uint8 RGB, shape (T, H, W, 3)."""
    frame_indices: list[int]
    """T positions among the file's frames in the order in which they are shown, the first is 0."""
    timestamps_seconds: np.ndarray
    """float64, shape (T,): when each frame starts, in the file's time, even where a window was read."""
    info: VideoInfo
    frame_sampling: FrameSampling | None = None
    start_seconds: float = 0.0
    end_seconds: float | None = None

    def __post_init__(self):
        _check_frames(self.frames)
        if len(self.frame_indices) != len(self.frames):
            raise ValueError(f"{len(self.frame_indices)} frame indices for {len(self.frames)} frames")
        if np.shape(self.timestamps_seconds) != (len(self.frames),):
            raise ValueError(f"timestamps of shape {np.shape(self.timestamps_seconds)} for {len(self.frames)} frames")

    @classmethod
    def from_frames(cls, frames, timestamps_seconds=None) -> "Clip":
        """A clip from frames already in memory.

        Args:
            frames: uint8 RGB of shape (T, H, W, 3): an array, a tensor, or a list of T pictures (H, W, 3).
            timestamps_seconds: T times that do not decrease; None: one frame a second from 0.

        Raises:
            ValueError: frames of another type or shape, or times that do not fit them.
        """
        if isinstance(frames, (list, tuple)):
            shapes = {np.shape(frame) for frame in frames}
            if len(shapes) != 1:
                raise ValueError(f"frames must share one shape (height, width, 3); got {sorted(shapes) or 'no frames'}")
            frames = np.stack([np.asarray(frame) for frame in frames])
        frames = np.asarray(frames)
        _check_frames(frames)
        count = len(frames)
        if timestamps_seconds is None:
            timestamps_seconds = range(count)
        times = np.asarray(timestamps_seconds, dtype=np.float64)
        if times.shape != (count,):
            raise ValueError(f"{count} frames need {count} timestamps in seconds; got shape {times.shape}")
        if not np.isfinite(times).all() or (times < 0).any() or (np.diff(times) < 0).any():
            raise ValueError("timestamps_seconds must be finite, not negative and never decrease")
        span = times[-1] - times[0]
        fps = (count - 1) / span if span > 0 else 1.0
        info = VideoInfo(None, count, float(fps), float(span + 1 / fps), frames.shape[1], frames.shape[2], None)
        return cls(frames, list(range(count)), times, info)

    def __len__(self):
        return len(self.frames)

    def __repr__(self):
        sampling = f", {self.frame_sampling}" if self.frame_sampling else ""
        times = f"{self.timestamps_seconds[0]:.2f} to {self.timestamps_seconds[-1]:.2f} s"
        return f"Clip(frames: {self.frames.dtype} {self.frames.shape}, {times}{sampling}, {self.info})"

    def _repr_html_(self):
        from capkit.views import show_clip

        return show_clip(self).html

    @property
    def one_frame_a_second(self) -> bool:
        """Whether frame i is from second i of the window: then the number it carries in the prompt is its second."""
        return [round(time - self.start_seconds) for time in self.timestamps_seconds] == list(range(len(self)))


def load_clip(
    path, frame_sampling="chat", start_seconds=0.0, end_seconds=None, timeout_seconds=60.0, reader=None
) -> Clip:
    """Read the frames that `frame_sampling` chooses between `start_seconds` (included) and `end_seconds` (not).

    decord reads where it is exact, PyAV everything else: the same frames under the same numbers.

    Args:
        path: video file; `~` is expanded.
        frame_sampling: a strategy's name, a `FrameSampling`, or a dict of its fields; counts time from `start_seconds`.
        end_seconds: None for the end of the video.
        timeout_seconds: reading happens in a child process that is killed after this long, because decord can loop for
            ever where no signal reaches it. None reads in this process, without a limit.
        reader: a `ClipReader`, to read many clips in one child process; None starts one for this clip.

    Raises:
        VideoError: the file cannot be read, not all chosen frames can be decoded, or the window holds no frame;
            its subclass `ReaderLost` where reading hung or crashed.
        ValueError: an argument that makes no sense.
    """
    sampling = FrameSampling.of(frame_sampling)
    _check_window(start_seconds, end_seconds)
    if timeout_seconds is not None:
        _positive("timeout_seconds", timeout_seconds)
    path = os.path.expanduser(os.fsdecode(path))
    _check_file(path)
    end_seconds = None if end_seconds is None else float(end_seconds)
    window = (float(start_seconds), end_seconds)
    if timeout_seconds is None:
        return _read(path, sampling, *window)
    with ClipReader() if reader is None else nullcontext(reader) as reader:
        return reader.read(path, sampling, *window, float(timeout_seconds))


def _read(path, sampling, start_seconds, end_seconds):
    def choose(times, info):
        chosen = sampling.frame_indices(times, info.average_fps, start_seconds, end_seconds)
        if not chosen:
            window = f"{start_seconds:g} s and {'the end' if end_seconds is None else f'{end_seconds:g} s'}"
            raise VideoError(path, f"no frame starts between {window}; the video lasts {info.duration_seconds:g} s")
        return chosen

    frames, chosen, times, info = read_frames(path, choose)
    return Clip(frames, chosen, times, info, sampling, start_seconds, end_seconds)


# ---- the child process ---------------------------------------------------------------------------------------------


class ReaderLost(VideoError):
    """A file that the process reading it did not survive."""


class ReaderHung(ReaderLost):
    """It took too long and was killed."""


class ClipReader:
    """A child process that reads clips, kept from one to the next: `load_clip(..., reader=reader)`.

    Starting one takes about 0.2 s. A process that hangs or dies over a clip is replaced for the next. Not for several
    threads at once.

    Args:
        memory_bytes: most memory that reading a clip may take (POSIX); one that needs more is a `VideoError`.
    """

    def __init__(self, memory_bytes: int | None = None):
        self._memory_bytes = memory_bytes
        self._child = Child(__name__, "_read_or_error", memory_bytes)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return self._child.pid

    def read(self, path, sampling, start_seconds, end_seconds, timeout_seconds) -> Clip:
        """What `load_clip` does once it has checked its arguments."""
        try:
            answer = self._child.call(path, sampling, start_seconds, end_seconds, timeout_seconds=timeout_seconds)
        except TimeoutError as error:
            raise ReaderHung(path, f"reading {error} (timeout_seconds)") from None
        except ChildProcessError as error:
            if "bad_alloc" not in str(error):
                raise ReaderLost(path, f"the process that was reading it {error}") from None
            answer = MemoryError()  # decord's way to say so
        if isinstance(answer, MemoryError):
            limit = "there is" if self._memory_bytes is None else f"{self._memory_bytes / 2**30:.1f} GiB"
            raise VideoError(path, f"reading it takes more memory than {limit}; ask for fewer frames")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Kill the process, if there is one."""
        self._child.close()


def _read_or_error(*arguments):
    """What the child does."""
    try:
        return _read(*arguments)
    except (VideoError, ImportError, MemoryError) as error:
        return error.with_traceback(None)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_file(path):
    if not os.path.exists(path):
        raise VideoError(path, "no such file")
    if not os.path.isfile(path):
        raise VideoError(path, "is a folder, not a video" if os.path.isdir(path) else "is not an ordinary file")
    if not os.access(path, os.R_OK):
        raise VideoError(path, "may not be read: permission denied")
    if not os.path.getsize(path):
        raise VideoError(path, "the file is empty")


def _check_window(start_seconds, end_seconds):
    if not _is_number(start_seconds) or start_seconds < 0:
        raise ValueError(f"start_seconds must be a number of seconds, not negative; got {start_seconds!r}")
    if end_seconds is not None and (not _is_number(end_seconds) or end_seconds <= start_seconds):
        raise ValueError(
            f"end_seconds must be None or a number above start_seconds, {start_seconds:g}; got {end_seconds!r}"
        )


def _check_frames(frames):
    shape, dtype = np.shape(frames), getattr(frames, "dtype", type(frames))
    if len(shape) == 3:
        raise ValueError(f"frames of shape {shape} look like one picture; a clip of one frame is frames[None]")
    if len(shape) == 4 and shape[1] == 3 != shape[3]:
        raise ValueError(f"frames of shape {shape} have their channels first; transpose them by (0, 2, 3, 1)")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"frames must have the shape (T, height, width, 3), none of them 0; got {shape}")
    if dtype != np.uint8:
        raise ValueError(f"frames must be uint8, from 0 to 255; got {dtype}")


def _times(timestamps_seconds):
    times = np.asarray(timestamps_seconds, dtype=np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all():
        raise ValueError(f"timestamps_seconds must be one finite number or more, shape (n,); got shape {times.shape}")
    return times


def _at_least_one(name, value):
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
    return int(value)


def _positive(name, value):
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number; got {value!r}")
    return float(value)


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
