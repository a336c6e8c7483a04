"""Reading exactly the wanted frames of a video file, with PyAV.

A frame is identified by the presentation time that the decoder gives it. A file's packets are listed without decoding;
they tell when frames are shown. Each frame that is decoded is checked against that list. If one differs, or if the list
cannot be trusted, the whole file is decoded once to learn the times.

FFmpeg is not imported before a file is read, and torch never, so that a worker process starts fast.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from capkit.video.bitstream import has_display_orientation, is_picture, is_random_access_point, num_shown_frames
from capkit.video.container import DECODERS, OUT_OF_MEMORY, VideoError, VideoFile
from capkit.video.pictures import Pictures, VideoInfo
from capkit.video.seen import Frames, SeenFrames

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream

Times = NDArray[np.float64]
Choose = Callable[[Times, VideoInfo], list[int]]

# Codecs whose packets show one frame each, apart from fields and hidden frames. All codecs without references do, too.
ONE_FRAME_PER_PACKET = frozenset(("h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video"))
MAX_REORDERED = 16  # frames of H.264 and H.265 between decoding and showing
MAX_CHECKED = 3000  # a file with uneven frame times and at most so many frames is read from its start, without seeking
MAX_FRAME_RATE = 1000  # a higher one is the unit of time, as in raw DV
FRAMES_PER_SEEK = 8  # decoding so many costs about as much as a seek


@dataclass(frozen=True)
class _Key:
    """A packet flagged as a keyframe: its presentation and decoding time."""

    pts: int
    dts: int | None


@dataclass(frozen=True)
class _Listing:
    """The frames that a player shows, in that order. Times are in the stream's time base."""

    pts: list[int] | None
    """Presentation times; None if frames can only be counted."""
    timestamps_seconds: Times
    info: VideoInfo
    """Height and width as stored."""
    keys: list[_Key]
    """In order of time, the first at or before the first frame; empty if the frames were listed by decoding."""

    @property
    def path(self) -> str:
        return str(self.info.path)

    @property
    def is_even(self) -> bool:
        """Whether all frames last about equally long."""
        steps = np.diff(self.pts or [0])
        return not steps.size or steps.max() < 1.5 * steps.min()


class _NotAsListed(VideoError):
    """Decoding gives other frames than were listed."""


class Viewer(Protocol):
    """What looks at frames as they are decoded."""

    def set_format(self, frame: VideoFrame, video: VideoFile) -> None:
        """Called with every frame before anything else."""

    def wants(self, index: int) -> bool:
        """Whether damage of this frame is an error."""

    def take(self, index: int, frame: VideoFrame, video: VideoFile) -> None:
        """Look at a frame."""


AnyViewer = TypeVar("AnyViewer", bound=Viewer)


def read_frames(
    path: str, choose: Choose, memory_bytes: int | None = None, image_size: int | None = None
) -> tuple[Frames | SeenFrames, list[int], Times, VideoInfo]:
    """Read the frames that `choose` picks.

    Args:
        path: video file.
        choose: from timestamps_seconds, float64 (n,), and a `VideoInfo` to the indices of the wanted frames. It is
            called again if the file's packets told of other frames.
        memory_bytes: the most that the frames may take; None: no limit.
        image_size: keep only what a model that sees squares of this side sees; None: full frames.

    Returns:
        frames, uint8 RGB (T, H, W, 3), or `SeenFrames`; their indices; their timestamps_seconds, float64 (T,); the
        file's `VideoInfo`.

    Raises:
        VideoError: the file cannot be read, or not all wanted frames can be decoded.
        MemoryError: not enough memory.
    """
    with _ffmpeg_errors(path):
        if listing := _list_packets(path):
            may_seek = listing.is_even or listing.info.num_frames > MAX_CHECKED
            for by_seeking in (True, False) if may_seek else (False,):
                with suppress(_NotAsListed):
                    return _read(listing, choose, memory_bytes, image_size, by_seeking)
        return _read(_list_by_decoding(path), choose, memory_bytes, image_size, by_seeking=False)


def read_timestamps(path: str) -> tuple[Times, VideoInfo]:
    """Start times in seconds, float64 (n,), of all frames of a file, and its `VideoInfo`; if possible without decoding.

    Height and width are as stored.

    Raises:
        VideoError, MemoryError: as `read_frames`.
    """
    with _ffmpeg_errors(path):
        listing = _list_packets(path) or _list_by_decoding(path)
    return listing.timestamps_seconds, listing.info


def view_frames(path: str, start: Callable[[Times, VideoInfo], AnyViewer]) -> AnyViewer:
    """Decode a complete file, and show its frames in order to a viewer.

    Args:
        path: video file.
        start: makes the viewer, from what `read_timestamps` returns. It is called again if the file's packets told of
            other frames.

    Returns:
        The viewer, once it was shown all frames that can be decoded.

    Raises:
        VideoError, MemoryError: as `read_frames`.
    """

    def view(listing: _Listing) -> AnyViewer:
        viewer = start(listing.timestamps_seconds, listing.info)
        with VideoFile(path) as video:
            _decode(video, listing, None, listing.info.num_frames - 1, viewer)
        return viewer

    with _ffmpeg_errors(path):
        if listing := _list_packets(path):
            with suppress(_NotAsListed):
                return view(listing)
        return view(_list_by_decoding(path))


@contextmanager
def _ffmpeg_errors(path: str) -> Iterator[None]:
    """Raise a VideoError or a MemoryError in place of an error of FFmpeg or of the file system."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        if error.errno in OUT_OF_MEMORY:
            raise MemoryError from error
        raise VideoError(path, f"damaged: reading it ends in {error.strerror!r}") from error
    except OSError as error:  # it has vanished, or the disk fails
        raise VideoError(path, f"cannot be read: {error.strerror}") from error


# ---- listing ---------------------------------------------------------------------------------------------------------


def _list_packets(path: str) -> _Listing | None:
    """List the frames without decoding; None if the packets do not tell them reliably."""
    with VideoFile(path) as video:
        is_known = video.codec in ONE_FRAME_PER_PACKET and video.has_presentation_times
        if not is_known and not video.stream.codec_context.codec.intra_only:
            return None
        extradata = video.stream.codec_context.extradata
        pts: list[int] = []
        keys: list[_Key] = []
        last = duration = 0
        for packet in video.packets():
            if not packet.size:
                continue
            num_shown = num_shown_frames(video.codec, memoryview(packet), extradata)
            if packet.pts is None or num_shown > 1 or not is_picture(video.codec, memoryview(packet)):
                return None
            if _changes_headers(packet, extradata) or (not keys and not _is_ordinary_start(video, packet)):
                return None
            if packet.is_keyframe:
                keys.append(_Key(packet.pts, packet.dts))
            if num_shown and not packet.is_discard:  # discarded: outside the edit list
                pts.append(packet.pts)
                if packet.pts >= last:
                    last, duration = packet.pts, packet.duration or 0
        if not pts:
            raise VideoError(path, "holds no frames")
        order = np.argsort(pts, kind="stable")
        pts.sort()
        are_keys_in_order = all(a.pts < b.pts for a, b in zip(keys, keys[1:], strict=False))
        is_reordered_much = np.abs(order - np.arange(len(order))).max() > MAX_REORDERED
        if len(set(pts)) < len(pts) or keys[0].pts > pts[0] or not are_keys_in_order or is_reordered_much:
            return None
        return _listing(video, pts, video.time_base, duration, keys)


def _changes_headers(packet: Packet[VideoStream], extradata: bytes | None) -> bool:
    """Whether a packet brings a palette or other headers, which later ones need and would not have after a seek."""
    new = packet.get_sidedata("new_extradata") if packet.has_sidedata("new_extradata") else None
    return packet.has_sidedata("palette") or (new is not None and bytes(new) != extradata)


def _is_ordinary_start(video: VideoFile, packet: Packet[VideoStream]) -> bool:
    """Whether decoding can start at a file's first packet, and it tells no turn that would be missed after a seek."""
    data, extradata = bytes(packet), video.stream.codec_context.extradata
    return (
        packet.is_keyframe
        and is_random_access_point(video.codec, data, extradata)
        and not has_display_orientation(video.codec, data, extradata)
    )


def _list_by_decoding(path: str) -> _Listing:
    """List the frames by decoding all of them."""
    import av

    with VideoFile(path) as video:
        pts: list[int | None] = []
        dts: list[int] = []
        duration, problem = 0, ""
        for packet in video.packets():
            if packet.size and packet.dts is not None:
                dts.append(packet.dts)
            if pts and packet.size and not problem and not is_picture(video.codec, memoryview(packet)):
                problem = f"damaged: after frame {len(pts) - 1}, it goes on without pictures of its codec {video.codec}"
            try:
                frames = video.decode(packet)
            except av.error.FFmpegError as error:
                if pts and not problem:  # before the first frame, references may be missing
                    problem = f"damaged: after frame {len(pts) - 1}, decoding ends in {error.strerror!r}"
                continue
            for frame in frames:
                pts.append(frame.pts)
                duration = frame.duration
        if not pts:
            raise VideoError(path, "holds no frames that can be decoded")
        if problem:
            raise VideoError(path, problem)
        ticks = [time for time in pts if time is not None]
        if not video.has_presentation_times:
            return _listing_without_times(video, ticks, dts, len(pts))
        if len(ticks) < len(pts):
            raise VideoError(path, f"gives no time for {len(pts) - len(ticks)} of {len(pts)} frames")
        for i in range(len(ticks) - 1):
            if ticks[i + 1] < ticks[i]:
                seconds = float((ticks[i] - ticks[0]) * video.time_base)
                back = float((ticks[i] - ticks[i + 1]) * video.time_base)
                problem = f"after frame {i} (at {seconds:.2f} s) they go back by {back:.2f} s"
                raise VideoError(path, f"its times contradict each other: {problem}")
        return _listing(video, ticks, video.time_base, duration, [])


def _listing_without_times(video: VideoFile, pts: list[int], dts: list[int], num_frames: int) -> _Listing:
    """From the times that FFmpeg guesses for frames and packets of a format that does not store them."""
    if len(dts) == num_frames:  # a frame is shown when a frame is decoded
        return _listing(video, sorted(dts), video.time_base, 0, [], has_pts=False)
    if len(pts) == num_frames and pts == sorted(set(pts)):
        return _listing(video, pts, video.time_base, 0, [], has_pts=False)
    if not dts and video.frame_rate:
        return _listing(video, list(range(num_frames)), 1 / video.frame_rate, 0, [], has_pts=False)
    raise VideoError(video.path, f"gives no times: {len(dts)} packets for {num_frames} frames")


def _listing(
    video: VideoFile, ticks: list[int], time_base: Fraction, duration: int, keys: list[_Key], has_pts: bool = True
) -> _Listing:
    """Frames at `ticks` of `time_base`, the last of which lasts `duration` (0: as long as others)."""
    if len(ticks) == 1 and video.has_picture_format:
        raise VideoError(video.path, "a single picture, not a video")
    tick_seconds = float(time_base)
    # Exact up to here; from here on in float32 as in decord, so that ties are broken as in the original.
    relative = (np.array(ticks, np.int64) - ticks[0]).astype(np.float32).astype(np.float64)
    times = (relative * tick_seconds).astype(np.float32).astype(np.float64)
    span = (ticks[-1] - ticks[0]) * tick_seconds
    fps = float(video.frame_rate or 0)
    if not 0 < fps <= MAX_FRAME_RATE:
        fps = (len(ticks) - 1) / (span or 1) or 1.0
    duration_seconds, codec = span + (duration * tick_seconds or 1 / fps), video.stream.codec_context
    facts = (len(ticks), fps, duration_seconds, codec.height, codec.width, video.codec)
    info = VideoInfo(video.path, *facts, num_video_streams=video.num_video_streams)
    return _Listing(ticks if has_pts else None, times, info, keys)


# ---- decoding --------------------------------------------------------------------------------------------------------


def _read(
    listing: _Listing, choose: Choose, memory_bytes: int | None, image_size: int | None, by_seeking: bool
) -> tuple[Frames | SeenFrames, list[int], Times, VideoInfo]:
    """As `read_frames`, from keyframes before the wanted frames, or in order from the file's start."""
    indices = choose(listing.timestamps_seconds, listing.info)
    pictures = Pictures(listing.info, indices, memory_bytes, image_size)
    with VideoFile(listing.path) as video:
        all_in_order = [(None, listing.info.num_frames - 1)]
        for key, last in _groups(listing, sorted(set(indices))) if by_seeking else all_in_order:
            _decode(video, listing, key, last, pictures)
    for index in sorted(indices):
        if pictures.wants(index):
            raise _damaged(listing, index)
    return pictures.frames, indices, listing.timestamps_seconds[indices], pictures.describe()


def _groups(listing: _Listing, wanted: list[int]) -> list[tuple[_Key, int]]:
    """Keyframes to seek to, each with the last wanted frame to decode from there."""
    pts, key_pts = listing.pts or [], [key.pts for key in listing.keys]
    groups: list[tuple[_Key, int]] = []
    for index in wanted:
        key = listing.keys[bisect_right(key_pts, pts[index]) - 1]
        if groups and (key == groups[-1][0] or bisect_left(pts, key.pts) - groups[-1][1] <= FRAMES_PER_SEEK):
            groups[-1] = (groups[-1][0], index)
        else:
            groups.append((key, index))
    return groups


def _decode(video: VideoFile, listing: _Listing, key: _Key | None, last: int, pictures: Viewer) -> None:
    """Decode from a keyframe, or from the start, to the frame with the index `last`, taking the wanted frames.

    Raises:
        _NotAsListed: the packet is no keyframe, or other frames come than those listed.
        VideoError: a wanted frame is damaged.
    """
    import av

    pts, not_as_listed = listing.pts, _NotAsListed(listing.path, "decoding gives other frames than it lists")
    index = 0 if key is None or pts is None else bisect_left(pts, key.pts)  # of the frame that must come next
    is_at_key = key is not None and pts is not None and pts[index] == key.pts  # otherwise it is not shown
    is_damaged, sound_keys = False, set()
    for packet in video.packets() if key is None else video.packets_from(key.pts, key.dts):
        extradata = video.stream.codec_context.extradata
        if packet.is_keyframe and is_random_access_point(video.codec, bytes(packet), extradata):
            sound_keys.add(packet.pts)
        elif key and not sound_keys:
            raise not_as_listed
        try:
            frames = video.decode(packet)
        except av.error.FFmpegError:
            frames, is_damaged = [], True  # decoders conceal errors, which persist until the next keyframe
        for frame in frames:
            pictures.set_format(frame, video)
            if key and frame.pts is not None and frame.pts < key.pts:
                continue  # refers to frames before the keyframe
            is_key = frame.key_frame or video.codec in DECODERS
            if is_at_key and not is_key:
                raise not_as_listed
            is_at_key = False
            if pts is not None and (index == len(pts) or frame.pts != pts[index]):
                found = bisect_left(pts, frame.pts, index) if frame.pts is not None else len(pts)
                if not is_damaged or found == len(pts) or pts[found] != frame.pts:
                    raise not_as_listed
                index = found  # damaged frames did not come
            if is_key and frame.pts in sound_keys:
                is_damaged = False
            is_damaged = is_damaged or frame.is_corrupt
            if listing.keys and frame.interlaced_frame and not listing.is_even:
                raise not_as_listed  # fields may be packets of their own elsewhere
            if is_damaged and pictures.wants(index):
                raise _damaged(listing, index)
            pictures.take(index, frame, video)
            index += 1
            if index > last + frame.interlaced_frame:  # were fields packets of their own, the next frame tells
                return
    if index <= last and not is_damaged:
        raise not_as_listed


def _damaged(listing: _Listing, index: int) -> VideoError:
    place = f"frame {index} of {listing.info.num_frames} (at {listing.timestamps_seconds[index]:.2f} s)"
    return VideoError(listing.path, f"damaged: {place} cannot be decoded")
