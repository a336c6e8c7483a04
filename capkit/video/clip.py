"""Clips: sampled frames of a video file, read in a process that can be killed, or frames already in memory."""

import os
import reprlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import ArrayLike, NDArray

from capkit.video.container import VideoError
from capkit.video.decord_frames import decode_with_decord
from capkit.video.pictures import VideoInfo
from capkit.video.reading import read_frames
from capkit.video.sampling import FrameSampling, FrameSamplingLike, at_least_one, check_window, positive
from capkit.video.seen import Pixels, Seen, SeenFrames, grid_checksum, model_pixels
from capkit.video.worker import WorkerProcess


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, with their times and where they come from.

    Attributes:
        frames: uint8 RGB, shape (T, H, W, 3); with `seen`, only the squares that the model sees, (T, S, S, 3).
        frame_indices: T indices into the file's frames in the order of showing; the first frame is 0.
        timestamps_seconds: float64, shape (T,): start of each frame, counted from the file's first frame, also if only
            a window was read.
        info: facts about the file; `info.notes` is what may make frames look different from a player's.
        frame_sampling: None for frames in memory.
        start_seconds, end_seconds: the window that was sampled; end None for the end of the video.
        seen: what a model sees, if `load_clip` was given its `image_size`.
    """

    frames: NDArray[np.uint8]
    frame_indices: list[int]
    timestamps_seconds: NDArray[np.float64]
    info: VideoInfo
    frame_sampling: FrameSampling | None = None
    start_seconds: float = 0.0
    end_seconds: float | None = None
    seen: Seen | None = None

    def __post_init__(self) -> None:
        _check_frames(self.frames)
        if len(self.frame_indices) != len(self.frames):
            raise ValueError(f"{len(self.frame_indices)} frame indices for {len(self.frames)} frames")
        if np.shape(self.timestamps_seconds) != (len(self.frames),):
            raise ValueError(f"timestamps of shape {np.shape(self.timestamps_seconds)} for {len(self.frames)} frames")

    @classmethod
    def from_frames(cls, frames: ArrayLike, timestamps_seconds: ArrayLike | None = None) -> "Clip":
        """A clip from frames already in memory.

        Args:
            frames: uint8 RGB of shape (T, H, W, 3): an array, a tensor, or a list of T pictures (H, W, 3).
            timestamps_seconds: T times that do not decrease; None: one frame a second from 0.

        Raises:
            ValueError: frames of another dtype or shape, or times that do not fit them.
        """
        if isinstance(frames, (list, tuple)):
            shapes = {np.shape(frame) for frame in frames}
            if len(shapes) != 1:
                raise ValueError(f"frames must share one shape (height, width, 3); got {sorted(shapes) or 'no frames'}")
            frames = np.stack([_to_array(frame) for frame in frames])
        pixels = _to_array(frames)
        _check_frames(pixels)
        count, height, width, _ = pixels.shape
        times = np.asarray(range(count) if timestamps_seconds is None else timestamps_seconds, dtype=np.float64)
        if times.shape != (count,):
            raise ValueError(f"{count} frames need {count} timestamps in seconds; got shape {times.shape}")
        if not np.isfinite(times).all() or (times < 0).any() or (np.diff(times) < 0).any():
            raise ValueError("timestamps_seconds must be finite, not negative and never decrease")
        span = float(times[-1] - times[0])
        fps = (count - 1) / span if span > 0 else 1.0
        return cls(pixels, list(range(count)), times, VideoInfo(None, count, fps, span + 1 / fps, height, width, None))

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        facts = [f"frames: {self.frames.dtype} {self.frames.shape}"]
        facts.append(f"{self.timestamps_seconds[0]:.2f} to {self.timestamps_seconds[-1]:.2f} s")
        facts += [self.frame_sampling.strategy] if self.frame_sampling else []
        facts += [repr(self.info.path)] if self.info.path else []
        return f"Clip({', '.join(facts + self.info.notes)})"

    @property
    def nbytes(self) -> int:
        """Memory that the pixels take."""
        return self.frames.nbytes + (self.seen.pixels.nbytes if self.seen else 0)

    @property
    def checksum(self) -> int:
        """Checksum of a grid of the full frames' pixels."""
        return self.seen.checksum if self.seen else grid_checksum(self.frames)

    def pixels(self, image_size: int) -> Pixels:
        """What a model sees of the frames, float32 (T, 3, image_size, image_size), see `capkit.video.model_pixels`.

        Raises:
            ValueError: the clip was read for a model of another image size.
        """
        if self.seen is None:
            return model_pixels(self.frames, image_size)
        if (size := self.seen.pixels.shape[-1]) != image_size:
            raise ValueError(f"{self!r} was read with image_size={size}; read it again, with image_size={image_size}")
        return self.seen.pixels

    @property
    def one_frame_a_second(self) -> bool:
        """Whether frame i is nearest to second i of the window: then the frame numbers in the prompt are seconds."""
        return [round(time - self.start_seconds) for time in self.timestamps_seconds] == list(range(len(self)))


def load_clip(
    path: str | bytes | os.PathLike[str],
    frame_sampling: FrameSamplingLike = "chat",
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    timeout_seconds: float | None = 60.0,
    reader: "ClipReader | None" = None,
    memory_bytes: int | None = None,
    image_size: int | None = None,
    with_strip: bool = False,
    only_frames: Sequence[int] | None = None,
) -> Clip:
    """Read the sampled frames of a video, or of its window start_seconds <= time < end_seconds.

    Times are presentation times, counted from the first frame; indices count the frames that a player shows, from 0.
    Frames come upright and with square pixels; `Clip.info` tells how they were turned and scaled.

    Args:
        path: video file; `~` is expanded.
        frame_sampling: name of a strategy, a `FrameSampling` or a dict of its fields; counts from `start_seconds`.
        start_seconds, end_seconds: the window; end None: the end of the video.
        timeout_seconds: a worker process reads and is killed after this time. None: read in this process, without a
            limit.
        reader: a `capkit.video.ClipReader`, to read many clips in one worker process; None: start one for this clip.
        memory_bytes: limit for the clip's frames; on POSIX for all memory of the worker process, which itself needs 100
            MB. None: half of the free memory, at most 8 GiB; with `reader`, its limit.
        image_size: keep only what a model sees that takes squares of this side (`captioner.processor.image_size`): the
            captions are the same, and a clip of 24 frames takes 20 MB whatever its resolution. None: full frames.
        with_strip: with `image_size`, also draw the small picture that goes beside a caption, `clip.seen.strip`.
        only_frames: indices of the file's frames to choose among, such as those that a trainer takes; None for all.

    Raises:
        VideoError: the file cannot be read, not all sampled frames can be decoded, no frame is in the window, or the
            clip takes too much memory; its subclass `ReaderLost` if the worker process crashed or took too long.
        ValueError: an argument out of range.
        TypeError: `path` is no file name.
        ImportError: decord is asked for and cannot be used.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"path={reprlib.repr(path)}: must be the name of a video file")
    sampling = FrameSampling.of(frame_sampling)
    check_window(start_seconds, end_seconds)
    if timeout_seconds is not None:
        timeout_seconds = positive("timeout_seconds", timeout_seconds)
    path = os.path.expanduser(os.fsdecode(path))
    _check_file(path)
    start_seconds, end_seconds = float(start_seconds), None if end_seconds is None else float(end_seconds)
    if memory_bytes is not None:
        memory_bytes = int(positive("memory_bytes", memory_bytes))
    if image_size is not None:
        image_size = at_least_one("image_size", image_size)
    arguments = (path, sampling, start_seconds, end_seconds, image_size, with_strip, only_frames)
    try:
        if timeout_seconds is None:
            limit = memory_bytes or memory_budget()
            return _read(limit, *arguments)
        with ClipReader(memory_bytes) if reader is None else nullcontext(reader) as reader:
            limit = reader.memory_bytes
            return reader.read(timeout_seconds, *arguments)
    except MemoryError:
        limits = f"{limit / 2**30:.1f} GiB (memory_bytes)"
        problem = f"reading it takes more memory than {limits}; sample fewer frames, or allow more"
        raise VideoError(path, problem) from None


def memory_budget() -> int:
    """Default memory for clips in bytes: half of what is free, at most 8 GiB."""
    return min(psutil.virtual_memory().available // 2, 2**33)


class ReaderLost(VideoError):
    """The worker process crashed or hung while it read this file."""


class ReaderHung(ReaderLost):
    """Reading this file took longer than the timeout; the worker process was killed."""


class ClipReader(WorkerProcess):
    """A worker process that reads one clip after the other: `load_clip(..., reader=reader)`.

    A start takes about 0.2 s. After a clip on which the process hangs or crashes, the next one starts a new process.
    Not thread-safe.

    Args:
        memory_bytes: limit for the memory that reading a clip takes (POSIX); a clip that needs more is a `VideoError`.
            None: `memory_budget()`.
    """

    def __init__(self, memory_bytes: int | None = None) -> None:
        self.memory_bytes = memory_budget() if memory_bytes is None else memory_bytes
        super().__init__(__name__, "_read", self.memory_bytes)

    def read(self, timeout_seconds: float, path: str, *arguments: Any) -> Clip:
        """Read a clip in the worker process; `arguments` are those of `_read`, which `load_clip` checks.

        Raises:
            MemoryError: reading takes more than `memory_bytes`.
        """
        try:
            # The frames are in both processes for a moment.
            return self.call(self.memory_bytes // 2, path, *arguments, timeout_seconds=timeout_seconds)
        except TimeoutError as error:
            raise ReaderHung(path, f"reading {error}; raise timeout_seconds if it is a long video") from None
        except ImportError as error:
            if "failed to map segment" in str(error):  # a library for which there was no room
                raise MemoryError from None
            raise
        except ChildProcessError as error:
            if "bad_alloc" in str(error):  # how decord runs out of memory
                raise MemoryError from None
            raise ReaderLost(path, f"the worker process {error}") from None


def _read(
    memory_bytes: int,
    path: str,
    sampling: FrameSampling,
    start_seconds: float,
    end_seconds: float | None,
    image_size: int | None,
    with_strip: bool,
    only_frames: Sequence[int] | None,
) -> Clip:
    def choose(times: NDArray[np.float64], info: VideoInfo) -> list[int]:
        indices = sampling.frame_indices(times, info.average_fps, start_seconds, end_seconds, only_frames)
        if not indices:
            window = f"{start_seconds:g} s and {'the end' if end_seconds is None else f'{end_seconds:g} s'}"
            raise VideoError(path, f"no frame starts between {window}; the video lasts {info.duration_seconds:g} s")
        return indices

    by_decord = sampling.decoder == "decord"  # which needs our full frames, to compare
    frames, indices, times, info = read_frames(path, choose, memory_bytes, None if by_decord else image_size)
    seen = None
    if isinstance(frames, np.ndarray):
        if by_decord:
            frames = decode_with_decord(path, indices, times, frames)
        if image_size is not None:
            frames = SeenFrames.of(frames, image_size)
    if isinstance(frames, SeenFrames):
        frames, seen = frames.finish(with_strip)
    return Clip(frames, indices, times, info, sampling, start_seconds, end_seconds, seen)


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        is_pattern = any(character in path for character in "*?[")
        hint = "; a pattern is for capkit.find_clips" if is_pattern else ""
        raise VideoError(path, "an address, not a file: download it first" if "://" in path else f"no such file{hint}")
    if not os.path.isfile(path):
        raise VideoError(path, "is a folder, not a video" if os.path.isdir(path) else "is not a regular file")
    if not os.access(path, os.R_OK):
        raise VideoError(path, "cannot be read: permission denied")
    if not os.path.getsize(path):
        raise VideoError(path, "is empty: its size is 0 bytes")


def _to_array(frames: Any) -> NDArray[Any]:
    return np.asarray(frames.cpu() if hasattr(frames, "cpu") else frames)  # tensors may be on a GPU


def _check_frames(frames: NDArray[np.uint8]) -> None:
    shape, dtype = np.shape(frames), getattr(frames, "dtype", type(frames))
    if len(shape) == 3:
        raise ValueError(f"frames of shape {shape} look like one picture; a clip of one frame is frames[None]")
    if len(shape) == 4 and shape[1] == 3 != shape[3]:
        raise ValueError(f"frames of shape {shape} have their channels first; transpose them by (0, 2, 3, 1)")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"frames must have the shape (T, height, width, 3), none of them 0; got {shape}")
    if dtype != np.uint8:
        raise ValueError(f"frames must be uint8, from 0 to 255; got {dtype}")
