"""Which frames a model sees, and reading exactly those from a file.

The index functions are pure: they take times and return positions; `load_clip` reads just the frames that they name, in
a child process that can be killed.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from capkit.video.reading import VideoError, VideoInfo, read_frames
from capkit.video.sampling import FrameSampling, check_window, positive
from capkit.video.worker import Child

# ---- which frames --------------------------------------------------------------------------------------------------


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
    check_window(start_seconds, end_seconds)
    if timeout_seconds is not None:
        positive("timeout_seconds", timeout_seconds)
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
