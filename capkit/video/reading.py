"""Reading exactly the frames that are wanted. The only module that knows decord and PyAV.

decord reads where it is exact, PyAV everything else: the same frames under the same numbers. Neither is imported
(nor is torch) until a file is read, so that a process made to read one starts fast.
"""

import errno
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

DECORD_VERSION = "0.6.0"


class VideoError(Exception):
    """A video that cannot be read: `path` says which, `reason` why and, where there is something to do, what."""

    def __init__(self, path, reason):
        super().__init__(path, reason)  # both, so that it pickles
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    path: str | None
    """File, or None for frames that never were in one."""
    num_frames: int
    """Frames that the file shows."""
    average_fps: float
    duration_seconds: float
    """From the first frame's start to the last frame's end."""
    height: int
    """Pixels, after rotation: the height of the frames."""
    width: int
    codec: str | None
    """FFmpeg's name, such as "h264"."""


@dataclass(frozen=True)
class _Listing:
    """The frames that a file shows, in that order, listed without decoding any."""

    pts: list[int] | None  # when each is shown, in the stream's time base; None where frames can only be counted
    keyframe_pts: list[int]
    timestamps_seconds: np.ndarray
    info: VideoInfo  # height and width as stored, before rotation
    decord_is_exact: bool


def read_frames(path, choose):
    """Read the frames that `choose` picks.

    Args:
        path: video file.
        choose: from timestamps_seconds, float64 (n,), and a `VideoInfo` to the indices of the frames wanted.

    Returns:
        frames, uint8 RGB (T, H, W, 3); their indices; their timestamps_seconds, float64 (T,); the file's `VideoInfo`.

    Raises:
        VideoError: the file cannot be read, or not all frames wanted can be decoded.
        MemoryError: not enough memory.
    """
    import av

    decord, opened = _import_decord(path), []
    try:
        # decord lists the packets too when it opens a file, and lets others run meanwhile.
        with ThreadPoolExecutor(1) as pool:

            def open_it():
                if decord:
                    opened.append(pool.submit(decord.VideoReader, os.path.abspath(path)))

            listing = _list_frames(path, open_it)
        times, info = listing.timestamps_seconds, listing.info
        chosen = choose(times, info)
        frames = _frames_by_decord(decord, opened[0], listing, chosen) if opened and listing.decord_is_exact else None
        if frames is None:
            frames = _frames_by_av(listing, chosen)
    except av.error.FFmpegError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise VideoError(path, f"damaged: reading it ends in {error.strerror!r}") from error
    return frames, chosen, times[chosen], replace(info, height=frames.shape[1], width=frames.shape[2])


def timestamps_or_error(path):
    """timestamps_seconds, float64 (n,), of all the frames that a file shows and its `VideoInfo`, or a `VideoError`.

    Nothing is decoded; height and width are as stored, before rotation.
    """
    import av

    try:
        listing = _list_frames(path)
    except VideoError as error:
        return error.with_traceback(None)
    except av.error.FFmpegError as error:
        return VideoError(path, f"damaged: reading it ends in {error.strerror!r}")
    return listing.timestamps_seconds, listing.info


def _open(path):
    """PyAV's container and its main video stream, the one that decord chooses too."""
    import av

    try:  # by an absolute path, because FFmpeg takes "a:b.mp4" for a protocol; and tags need not be UTF-8
        container = av.open(os.path.abspath(path), metadata_errors="replace")
    except av.error.FFmpegError as error:
        with open(path, "rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"
        lost = "an MP4 whose index cannot be read: the end of the file is probably missing (incomplete download?)"
        raise VideoError(path, lost if is_mp4 else f"not a video that can be read ({error.strerror})") from error
    stream, problem = container.streams.best("video"), None
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # a cover picture is no video
        problem = "has no video stream, only sound" if container.streams.audio else "has no video stream"
    elif stream.codec_context is None:
        problem = "its video codec is not one that can be decoded here"
    if problem:
        container.close()
        raise VideoError(path, problem)
    stream.thread_type = "AUTO"
    return container, stream


def _list_frames(path, may_be_exact=lambda: None):
    """List the frames from the packets alone, which is quick. A file that was cut short is an error.

    `may_be_exact` is called before, where the container is one that decord may read exactly.
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
            may_be_exact()
        packets = []  # (shown when, for how long, is a keyframe, is shown, decoded when), in the order of decoding
        for packet in container.demux(stream):
            if packet.size:
                # Not shown: what an edit list cuts away, and VP8's alternate reference pictures.
                is_shown = not packet.is_discard and (codec != "vp8" or bool(bytes(packet)[0] & 0x10))
                packets.append((packet.pts, packet.duration or 0, packet.is_keyframe, is_shown, packet.dts))
        if is_mp4:
            # Exact, and indifferent to edit lists, which cut frames away by right. All video streams, because FFmpeg
            # takes another for the main one where that has lost its frames.
            ends = [entry.pos + entry.size for video in container.streams.video for entry in video.index_entries]
            there = sum(end <= size for end in ends)
            if there < len(ends):
                counts = f"its index promises {len(ends)} frames, the file holds {there}"
                raise VideoError(path, f"cut short: {counts} (incomplete download?)")
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        height, width = stream.codec_context.height, stream.codec_context.width
        start, time_base = stream.start_time, float(stream.time_base)

    pts, dts = [packet[0] for packet in packets], [packet[4] for packet in packets]
    keys = [i for i, packet in enumerate(packets) if packet[2]] or [0]
    shown = [packet for packet in packets[keys[0] :] if packet[3]]  # nothing decodes before the first keyframe
    # Where a container does not store when frames are shown, FFmpeg guesses, and is right only without reordering.
    guessed = is_avi or bool(flags & av.format.Flags.no_timestamps.value)
    timed = None not in pts and len(set(pts)) == len(pts) and (not guessed or pts == dts)
    if timed:
        shown = sorted(packet for packet in shown if packet[0] >= pts[keys[0]])
    if not shown:
        raise VideoError(path, "holds no frames")
    # decord counts frames on from a keyframe. So it returns others than asked for, in silence, where a keyframe is not
    # shown at the place at which it is stored (open groups of pictures), where packets are hidden, and where seeking is
    # not by an index.
    decord_is_exact = (is_mp4 or is_matroska) and timed and len(shown) == len(packets)
    decord_is_exact = decord_is_exact and all(shown[i][0] == pts[i] for i in keys)

    ticks = sorted(packet[0] if timed else packet[4] for packet in shown) if timed or None not in dts else None
    if ticks is None and not rate:
        raise VideoError(path, "gives neither times for its frames nor a frame rate")
    if ticks is None:
        ticks, start, time_base = range(len(shown)), 0, 1 / float(rate)
    zero = start if decord_is_exact and start is not None else ticks[0]
    # decord's arithmetic, in float32, so that ties fall as in the original
    times = (np.array(ticks, np.float32) - np.float32(zero)).astype(np.float64) * time_base
    times = times.astype(np.float32).astype(np.float64)
    span = (ticks[-1] - ticks[0]) * time_base
    fps = float(rate or (len(ticks) - 1) / (span or 1) or 1)
    duration = span + (shown[-1][1] * time_base if timed and shown[-1][1] else 1 / fps)
    info = VideoInfo(path, len(shown), fps, duration, height, width, codec)
    keyframe_pts = sorted(pts[i] for i in keys) if timed else []
    return _Listing(list(ticks) if timed else None, keyframe_pts, times, info, decord_is_exact)


def _declared_size(path) -> int:
    """How many bytes the file says it has (an MP4: to the end of its index); 0 if it does not, like MPEG streams."""
    with open(path, "rb") as file:
        head = file.read(4096)
        if head[:4] == b"RIFF":  # AVI
            length = int.from_bytes(head[4:8], "little")
            return 0 if length == 2**32 - 1 else 8 + length
        if head[:4] == b"\x1aE\xdf\xa3":  # Matroska: all is in one segment, whose length has a length of its own
            at = head.find(b"\x18S\x80g", 0, -12) + 4
            num_bytes = 9 - head[at].bit_length()
            length = int.from_bytes(head[at : at + num_bytes], "big") % 2 ** (7 * num_bytes)
            unknown = at < 4 or length == 2 ** (7 * num_bytes) - 1  # as in a live stream
            return 0 if unknown else at + num_bytes + length
        at = 0
        while head[4:8] == b"ftyp":  # MP4: boxes. FFmpeg makes do with the streams that half an index describes
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


def _frames_by_decord(decord, opened, listing, indices):
    """uint8 (T, H, W, 3), or None where decord cannot do it: PyAV then either can, or says in words why nobody can."""
    try:
        reader = opened.result()
        if len(reader) != listing.info.num_frames:
            return None
        batch = reader.get_batch(indices)
    except (decord.DECORDError, RuntimeError, AssertionError, UnicodeError):  # all that it raises over a file
        return None
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # the user may have set decord's bridge


def _frames_by_av(listing, indices):
    """uint8 (T, H, W, 3). Seeks to the last keyframe before each wanted frame; what that misses, it reads in order."""
    import av

    wanted, found = sorted(set(indices)), {}
    container, stream = _open(listing.info.path)
    with container:
        if listing.pts:
            keys = listing.keyframe_pts
            for key_pts, group in groupby(wanted, lambda index: keys[bisect_right(keys, listing.pts[index]) - 1]):
                try:
                    container.seek(key_pts, stream=stream)
                except av.error.FFmpegError:
                    break  # a format without seeking
                _collect(listing, container, stream, set(group), found, key_pts)
    missing = set(wanted) - set(found)
    if missing:
        container, stream = _open(listing.info.path)
        with container:
            _collect(listing, container, stream, missing, found)
    for index in wanted:
        if index not in found:
            raise _damaged(listing, index)
    return np.stack([found[index] for index in indices])


def _collect(listing, container, stream, wanted, found, key_pts=None):
    """Decode from the keyframe shown at `key_pts` (None: from the start) until the `wanted` frames are in `found`."""
    import av

    position = {listing.pts[index]: index for index in wanted} if listing.pts else None
    started, damaged, count = key_pts is None, False, 0
    for packet in container.demux(stream):
        started = started or packet.pts == key_pts
        try:
            frames = packet.decode() if started else []
        except av.error.FFmpegError:
            frames, damaged = [], True
        for frame in frames:
            if key_pts is not None and (frame.pts is None or frame.pts < key_pts):
                continue  # refers to pictures from before the keyframe
            if position and key_pts is None and frame.key_frame:
                damaged = False
            damaged = damaged or frame.is_corrupt
            index = position.get(frame.pts) if position else count
            count += 1
            if index in wanted:
                if damaged:  # what was concealed goes on until the next keyframe
                    raise _damaged(listing, index)
                found[index] = _to_rgb(frame, listing.info)
                if wanted <= found.keys():
                    return


def _damaged(listing, index):
    info, seconds = listing.info, listing.timestamps_seconds[index]
    return VideoError(info.path, f"damaged: frame {index} of {info.num_frames} (at {seconds:.2f} s) cannot be decoded")


def _to_rgb(frame, info):
    # As decord does: the declared size, should it change on the way; POINT comes nearest to its colours of 10 bits.
    pixels = frame.to_ndarray(format="rgb24", width=info.width, height=info.height, interpolation="POINT")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _import_decord(path):
    """decord 0.6.0, or None where it has no wheel."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError):  # no wheel for this machine, or one that does not load: PyAV reads all
        return None
    if decord.__version__ != DECORD_VERSION:
        problem = f"not read, because decord {decord.__version__} may return wrong frames in silence, as decord2 does"
        remedy = f"pip uninstall decord2, then pip install --force-reinstall decord=={DECORD_VERSION}"
        raise VideoError(path, f"{problem}: {remedy}")
    return decord
