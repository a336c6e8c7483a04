"""Reading exactly the wanted frames from a video file, with decord where it is exact and PyAV elsewhere.

Both give the same frames under the same indices. No other module uses decord or PyAV. Neither is imported before a file
is read, and torch never, so that a worker process starts fast.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

DECORD_VERSION = "0.6.0"
Frames = NDArray[np.uint8]
Times = NDArray[np.float64]


class VideoError(Exception):
    """A video cannot be read: `path` is the file, `reason` says why and, where possible, what to do."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)  # both, so that it can be pickled
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video file, or about frames in memory."""

    path: str | None
    """None for frames in memory."""
    num_frames: int
    """Number of frames that a player shows."""
    average_fps: float
    duration_seconds: float
    """From the first frame's start to the last frame's end."""
    height: int
    """Height of the frames in pixels, after rotation."""
    width: int
    codec: str | None
    """FFmpeg's name, such as "h264"."""


class _Packet(NamedTuple):
    """An encoded frame; times in the stream's time base."""

    pts: int | None  # presentation time
    duration: int
    is_keyframe: bool
    is_shown: bool
    dts: int | None  # decoding time


@dataclass(frozen=True)
class _Listing:
    """The frames that a player shows, in that order, listed without decoding."""

    pts: list[int] | None  # presentation times; None where frames can only be counted
    keyframe_pts: list[int]
    timestamps_seconds: Times
    info: VideoInfo  # height and width as stored, before rotation
    decord_is_exact: bool


def read_frames(
    path: str, choose: Callable[[Times, VideoInfo], list[int]]
) -> tuple[Frames, list[int], Times, VideoInfo]:
    """Read the frames that `choose` picks.

    Args:
        path: video file.
        choose: from timestamps_seconds, float64 (n,), and a `VideoInfo` to the indices of the wanted frames.

    Returns:
        frames, uint8 RGB (T, H, W, 3); their indices; their timestamps_seconds, float64 (T,); the file's `VideoInfo`.

    Raises:
        VideoError: the file cannot be read, or not all wanted frames can be decoded.
        MemoryError: not enough memory.
    """
    readers: list[Future] = []
    with _ffmpeg_errors(path):  # imports av first
        decord = _import_decord(path)
        with ThreadPoolExecutor(1) as pool:  # decord lists the packets too when it opens a file, so do both in parallel

            def open_decord() -> None:
                if decord:
                    readers.append(pool.submit(decord.VideoReader, os.path.abspath(path)))

            listing = _list_frames(path, open_decord)
        times = listing.timestamps_seconds
        indices = choose(times, listing.info)
        frames = None
        if decord and readers and listing.decord_is_exact:
            frames = _frames_by_decord(decord, readers[0], listing, indices)
        if frames is None:
            frames = _frames_by_av(listing, indices)
    return frames, indices, times[indices], replace(listing.info, height=frames.shape[1], width=frames.shape[2])


def read_timestamps(path: str) -> tuple[Times, VideoInfo]:
    """Start times in seconds, float64 (n,), of all frames of a file, and its `VideoInfo`, without decoding.

    Height and width are as stored, before rotation.

    Raises:
        VideoError, MemoryError: as `read_frames`.
    """
    with _ffmpeg_errors(path):
        listing = _list_frames(path)
    return listing.timestamps_seconds, listing.info


@contextmanager
def _ffmpeg_errors(path: str) -> Iterator[None]:
    """Raise a VideoError or a MemoryError in place of an error of FFmpeg."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise VideoError(path, f"damaged: reading it ends in {error.strerror!r}") from error


def _open(path: str) -> tuple[InputContainer, VideoStream]:
    """PyAV's container and its main video stream, the same as decord's."""
    import av

    try:  # absolute, because FFmpeg takes "a:b.mp4" for a protocol; tags need not be UTF-8
        container = av.open(os.path.abspath(path), metadata_errors="replace")
    except av.error.FFmpegError as error:
        with open(path, "rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"
        cut_short = "an MP4 whose index cannot be read: the end of the file is probably missing (incomplete download?)"
        raise VideoError(path, cut_short if is_mp4 else f"not a video that can be read ({error.strerror})") from error
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:  # a cover
        problem = "has no video stream, only sound" if container.streams.audio else "has no video stream"
    elif stream.codec_context is None:
        problem = "its video codec is not one that can be decoded here"
    else:
        stream.thread_type = av.codec.context.ThreadType.AUTO
        return container, stream
    container.close()
    raise VideoError(path, problem)


def _list_frames(path: str, open_decord: Callable[[], None] = lambda: None) -> _Listing:
    """List the frames from the packets alone, without decoding.

    Args:
        open_decord: called early if the container is one that decord may read exactly.

    Raises:
        VideoError: among others, the file was cut short.
    """
    import av

    size, declared = os.path.getsize(path), _declared_size(path)
    if declared > size + 1:  # some AVI writers count a padding byte
        raise VideoError(path, f"cut short: it should have {declared} bytes and has {size} (incomplete download?)")
    container, stream = _open(path)
    with container:
        codec, flags = stream.codec_context.codec.canonical_name, container.format.flags
        is_mp4, is_matroska, is_avi = (name in container.format.name for name in ("mp4", "matroska", "avi"))
        if is_mp4 or is_matroska:
            open_decord()
        packets = []  # in decoding order
        for packet in container.demux(stream):
            if packet.size:
                # Not shown: frames outside the edit list, and VP8's alternate reference frames.
                is_shown = not packet.is_discard and (codec != "vp8" or bool(bytes(packet)[0] & 0x10))
                packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, is_shown, packet.dts))
        if is_mp4:
            # The index is exact, and includes the frames that edit lists hide. All video streams are checked, because
            # FFmpeg chooses another main stream if the file's main one has lost its frames.
            ends = [entry.pos + entry.size for video in container.streams.video for entry in video.index_entries]
            num_present = sum(end <= size for end in ends)
            if num_present < len(ends):
                counts = f"its index promises {len(ends)} frames, the file holds {num_present}"
                raise VideoError(path, f"cut short: {counts} (incomplete download?)")
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        height, width = stream.codec_context.height, stream.codec_context.width
        start, time_base = stream.start_time, float(stream.time_base or 0)

    pts = [packet.pts for packet in packets if packet.pts is not None]
    dts = [packet.dts for packet in packets if packet.dts is not None]
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe] or [0]
    shown = [i for i, packet in enumerate(packets) if packet.is_shown and i >= keys[0]]  # before it, nothing decodes
    # In containers that do not store presentation times FFmpeg guesses them, correctly only if nothing is reordered.
    guessed = is_avi or bool(flags & av.format.Flags.no_timestamps.value)  # type: ignore[operator]  # wrong stub: int
    timed = len(set(pts)) == len(packets) and (not guessed or pts == dts)
    if timed:
        shown = sorted((i for i in shown if pts[i] >= pts[keys[0]]), key=pts.__getitem__)
    if not shown:
        raise VideoError(path, "holds no frames")
    # decord counts frames from a keyframe. It silently returns wrong frames if keyframes are not shown in the order in
    # which they are stored (open groups of pictures), if packets are hidden, or if it seeks without an index.
    decord_is_exact = (is_mp4 or is_matroska) and timed and len(shown) == len(packets)
    decord_is_exact = decord_is_exact and all(shown[i] == i for i in keys)

    if timed or len(dts) == len(packets):
        ticks = sorted((pts if timed else dts)[i] for i in shown)
    elif rate:
        ticks, start, time_base = list(range(len(shown))), 0, 1 / float(rate)
    else:
        raise VideoError(path, "gives neither times for its frames nor a frame rate")
    zero = start if decord_is_exact and start is not None else ticks[0]
    # decord's arithmetic, in float32, so that ties are broken as in the original
    times = (np.array(ticks, np.float32) - np.float32(zero)).astype(np.float64) * time_base
    times = times.astype(np.float32).astype(np.float64)
    span = (ticks[-1] - ticks[0]) * time_base
    fps = float(rate or (len(ticks) - 1) / (span or 1) or 1)
    last_duration = packets[shown[-1]].duration * time_base if timed else 0
    duration = span + (last_duration or 1 / fps)
    info = VideoInfo(path, len(shown), fps, duration, height, width, codec)
    keyframe_pts = sorted(pts[i] for i in keys) if timed else []
    return _Listing(ticks if timed else None, keyframe_pts, times, info, decord_is_exact)


def _declared_size(path: str) -> int:
    """The file's size in bytes according to its headers (MP4: up to the end of its index); 0 if they do not give it."""
    with open(path, "rb") as file:
        head = file.read(4096)
        if head[:4] == b"RIFF":  # AVI
            length = int.from_bytes(head[4:8], "little")
            return 0 if length == 2**32 - 1 else 8 + length
        if head[:4] == b"\x1aE\xdf\xa3":  # Matroska: everything is in one segment, whose length has variable width
            at = head.find(b"\x18S\x80g", 0, -12) + 4
            num_bytes = 9 - head[at].bit_length()
            length = int.from_bytes(head[at : at + num_bytes], "big") % 2 ** (7 * num_bytes)
            unknown = at < 4 or length == 2 ** (7 * num_bytes) - 1  # as in a live stream
            return 0 if unknown else at + num_bytes + length
        at = 0
        while head[4:8] == b"ftyp":  # MP4: boxes. With part of an index FFmpeg would read only the streams in that part
            file.seek(at)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            length = int.from_bytes(box[8:], "big") if length == 1 else length
            if len(box) < 8 or length < 8:
                break
            at += length
            if box[4:8] == b"moov":
                return at
    return 0


def _frames_by_decord(decord: ModuleType, opened: Future, listing: _Listing, indices: list[int]) -> Frames | None:
    """uint8 (T, H, W, 3); None if decord fails: then PyAV reads them, or reports a clear error."""
    try:
        reader = opened.result()
        if len(reader) != listing.info.num_frames:
            return None
        batch = reader.get_batch(indices)
    except (decord.DECORDError, RuntimeError, AssertionError, UnicodeError):  # all that decord raises over a file
        return None
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # the user may have set decord's bridge


def _frames_by_av(listing: _Listing, indices: list[int]) -> Frames:
    """uint8 (T, H, W, 3). Seeks to the keyframe before each wanted frame; frames missed that way are read in order."""
    import av

    path, wanted = str(listing.info.path), set(indices)
    decoded: dict[int, Frames] = {}
    container, stream = _open(path)
    with container:
        if (pts := listing.pts) is not None:
            keys = listing.keyframe_pts
            for key_pts, group in groupby(sorted(wanted), lambda index: keys[bisect_right(keys, pts[index]) - 1]):
                try:
                    container.seek(key_pts, stream=stream)
                except av.error.FFmpegError:
                    break  # a format without seeking
                decoded |= _decode(listing, container, stream, set(group), key_pts)
    if missing := wanted - decoded.keys():
        container, stream = _open(path)
        with container:
            decoded |= _decode(listing, container, stream, missing)
    if missing := wanted - decoded.keys():
        raise _damaged(listing, min(missing))
    return np.stack([decoded[index] for index in indices])


def _decode(
    listing: _Listing, container: InputContainer, stream: VideoStream, wanted: set[int], key_pts: int | None = None
) -> dict[int, Frames]:
    """Decode from the keyframe with `key_pts` (None: from the start); returns those of the `wanted` frames that came.

    Raises:
        VideoError: a wanted frame is damaged.
    """
    import av

    position: dict[int | None, int] = {listing.pts[index]: index for index in wanted} if listing.pts else {}
    decoded: dict[int, Frames] = {}
    started, damaged, count = key_pts is None, False, 0
    for packet in container.demux(stream):
        started = started or packet.pts == key_pts
        try:
            frames = packet.decode() if started else []
        except av.error.FFmpegError:
            frames, damaged = [], True
        for frame in frames:
            if key_pts is not None and (frame.pts is None or frame.pts < key_pts):
                continue  # depends on frames before the keyframe
            if position and key_pts is None and frame.key_frame:
                damaged = False
            damaged = damaged or frame.is_corrupt
            index = position.get(frame.pts) if position else count
            count += 1
            if index in wanted:
                if damaged:  # errors that the decoder concealed persist until the next keyframe
                    raise _damaged(listing, index)
                decoded[index] = _to_rgb(frame, listing.info)
                if wanted <= decoded.keys():
                    return decoded
    return decoded


def _damaged(listing: _Listing, index: int) -> VideoError:
    info, seconds = listing.info, listing.timestamps_seconds[index]
    reason = f"damaged: frame {index} of {info.num_frames} (at {seconds:.2f} s) cannot be decoded"
    return VideoError(str(info.path), reason)


def _to_rgb(frame: VideoFrame, info: VideoInfo) -> Frames:
    # As decord does: at the declared size, should it change within the file; POINT is nearest to its 10-bit colours.
    pixels = frame.to_ndarray(format="rgb24", width=info.width, height=info.height, interpolation="POINT")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _import_decord(path: str) -> ModuleType | None:
    """decord 0.6.0, or None where it cannot be imported."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError):  # no wheel for this machine, or one that does not load: PyAV reads all
        return None
    if decord.__version__ != DECORD_VERSION:
        problem = f"not read, because decord {decord.__version__} may silently return wrong frames, as decord2 does"
        remedy = f"pip uninstall decord2, then pip install --force-reinstall decord=={DECORD_VERSION}"
        raise VideoError(path, f"{problem}: {remedy}")
    return decord
