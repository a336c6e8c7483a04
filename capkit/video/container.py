"""An open video file: which formats are videos, its main stream and decoder, and whether it was cut short."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from capkit.video.bitstream import has_slice
from capkit.video.headers import NONE, Cropping, declared_size, matroska_cropping, mp4_cropping

if TYPE_CHECKING:
    from av import Packet, VideoCodecContext, VideoFrame, VideoStream
    from av.container import InputContainer
    from typing_extensions import Self

# FFmpeg's demuxers of videos. All others are shut out: some draw text, open single pictures, other files or addresses.
FORMATS = (
    "mov mp4 m4a 3gp 3g2 mj2 matroska webm asf asf_o av1 avi cavsvideo dnxhd dv flic flv gif apng gxf h261 "
    "h263 h264 hevc ivf jpeg_pipe kux live_flv m4v mjpeg mpeg mpegts mpegvideo mxf nsv nut obu ogg rm roq swf "
    "vc1 vc1test vvc wtv yuv4mpegpipe "
).split()
PICTURE_BRANDS = ("avif", "heic", "heix", "mif1")  # of MP4 files that hold a picture
DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own do not notice damage
EXPLODING = ("hevc", "mjpeg", "mpeg1video", "mpeg2video")  # H.264 would refuse good files after a seek
DECODING_TIMES_ONLY = ("avi", "asf", "asf_o", "mxf")
GUESSED_DURATION = ("mpegts", "mpeg")  # formats of which FFmpeg takes the duration from the last packets
TAIL_BYTES = 4096
OUT_OF_MEMORY = (errno.ENOMEM, errno.EAGAIN)  # the latter where a thread cannot start


class VideoError(Exception):
    """A video cannot be read: `path` is the file, `reason` says why and, where possible, what to do."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)  # both, so that it can be pickled
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{str(self.path):.1000}: {self.reason}"


class VideoFile:
    """An open video file. Errors of FFmpeg come as they are.

    Attributes:
        stream: PyAV's main video stream.
        codec: FFmpeg's name, such as "h264".
        time_base: seconds, the unit of all times.
        cropping: pixels at the (top, bottom, left, right) of the decoded pictures that the file's headers cut away.

    Raises:
        VideoError: the file is no video, its codec is unknown, or it was cut short.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        size, declared = os.path.getsize(path), declared_size(path)
        if declared > size + 1:  # some AVI writers count a padding byte
            raise VideoError(path, f"cut short: it should have {declared} bytes and has {size} (incomplete download?)")
        self._container, self.stream = _open(path)
        if "mp4" in self._container.format.name and self.stream.frames > size:  # listing them could take all memory
            counts = f"its index promises {self.stream.frames} frames, the file holds {size} bytes"
            raise VideoError(path, f"cut short: {counts} (incomplete download?)")
        self.codec = self.stream.codec_context.codec.canonical_name
        self.time_base = self.stream.time_base or Fraction(0)
        self.cropping = _cropping(path, self._container, self.stream)
        self._decoder = _open_decoder(self.stream)
        self._headers = b""
        self._own_frame: VideoFrame | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    @property
    def frame_rate(self) -> Fraction | None:
        """Average frames per second, as far as the file tells."""
        return self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate

    @property
    def num_video_streams(self) -> int:
        """How many videos the file holds, without cover pictures."""
        return sum(not _is_cover(stream) for stream in self._container.streams.video)

    @property
    def sample_aspect_ratio(self) -> Fraction:
        """Width of a pixel divided by its height: of the file, or of the latest frame in formats that store none."""
        codec = self.stream.codec_context.sample_aspect_ratio
        stores_none = self._container.format.name in ("mpegts", "mpeg")
        return Fraction((not stores_none and self.stream.sample_aspect_ratio) or codec or 1)

    @property
    def has_picture_format(self) -> bool:
        """Whether files of this format are often single pictures."""
        return self._container.format.name in ("gif", "apng", "jpeg_pipe")

    @property
    def has_presentation_times(self) -> bool:
        """Whether the format stores them for reordered frames, too; otherwise FFmpeg guesses, and wrongly."""
        import av

        stores_none = self._container.format.flags & av.format.Flags.no_timestamps.value  # type: ignore[operator]  # int
        return self._container.format.name not in DECODING_TIMES_ONLY and not stores_none

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """All packets from the start, in decoding order; the last one is empty.

        Raises:
            VideoError: at the end, if the file turns out to be cut short.
        """
        last, end = None, 0
        for packet in self._container.demux(self.stream):
            if packet.size:
                last, end = packet, max(end, _end(packet))
            yield packet
        if last is not None and (problem := self._find_what_is_missing(last, float(end * self.time_base))):
            raise VideoError(self.path, f"cut short: {problem} (incomplete download?)")

    def packets_from(self, pts: int, dts: int | None) -> Iterator[Packet[VideoStream]]:
        """The packets from the one with these times on. Nothing, if it cannot be found by seeking."""
        import av

        for target in (pts, dts):  # the index of a file has the one, that of FFmpeg the other
            if target is None:
                continue
            with suppress(av.error.FFmpegError):  # a format without seeking
                self._container.seek(target, stream=self.stream)
                self._headers = b""
                if self._decoder.is_open:
                    self._decoder.flush_buffers()
                packets = self._container.demux(self.stream)
                for packet in packets:
                    if packet.pts == pts and packet.dts == dts:
                        yield packet
                        yield from packets
                        return
                    if packet.dts is not None and dts is not None and packet.dts > dts:
                        break

    def decode(self, packet: Packet[VideoStream]) -> list[VideoFrame]:
        """The frames that a packet completes, in the order of showing; those of an empty packet are the last ones.

        Raises:
            FFmpegError: the packet is damaged.
            MemoryError: not enough memory.
        """
        import av

        if packet.size and not has_slice(self.codec, memoryview(packet), self.stream.codec_context.extradata):
            self._headers += bytes(packet)  # go with the next picture; alone, FFmpeg takes them for damage
            return []
        if self._headers and packet.size and not packet.is_discard:  # which cannot be set
            packet, self._headers = _prepend(self._headers, packet), b""
        if self._decoder is not self.stream.codec_context and not self._own_frame:
            with suppress(av.error.FFmpegError):
                self._own_frame = next(iter(self.stream.codec_context.decode(packet)), None)
        try:
            return self._decoder.decode(packet)
        except av.error.FFmpegError as error:
            if error.errno in OUT_OF_MEMORY:
                raise MemoryError from error
            bytearray(16 * self._decoder.width * self._decoder.height)  # a MemoryError, if that was the cause
            raise

    def with_side_data(self, frame: VideoFrame) -> VideoFrame:
        """The frame, or one of FFmpeg's own decoder, which unlike others passes on what the headers tell: its turn."""
        return self._own_frame or frame

    def _find_what_is_missing(self, last: Packet[VideoStream], seconds: float) -> str:
        """Why the file must have been cut short, or ""; `last` is the last packet, `seconds` the latest time."""
        size, name = os.path.getsize(self.path), self._container.format.name
        if "mp4" in name:
            # The index is exact, and includes the frames that edit lists hide. All video streams are checked, because
            # FFmpeg chooses another main stream if the file's main one has lost its frames.
            num_promised = num_present = 0
            for video in self._container.streams.video:
                num_promised += len(video.index_entries)
                num_present += sum(entry.pos + entry.size <= size for entry in video.index_entries)
            is_cut = num_present < num_promised
            return f"its index promises {num_promised} frames, the file holds {num_present}" if is_cut else ""
        if last.is_corrupt:
            return "its last frame is not whole"
        promised = (self._container.duration or 0) / 1e6
        allowance = min(1, promised / 10)
        if name not in GUESSED_DURATION and promised - allowance > seconds:
            with _open(self.path)[0] as again:  # another stream may last longer
                ends = sorted({float(_end(packet) * packet.time_base) for packet in again.demux() if packet.size})
            if not last.duration:  # as long as the frame before, or a second if it is the only one
                allowance += ends[-1] - ends[-2] if len(ends) > 1 else 1
            if promised - allowance > ends[-1]:
                return f"it should last {promised:.2f} s and lasts {ends[-1]:.2f} s"
        with open(self.path, "rb") as file:
            file.seek(max(size - TAIL_BYTES, 0))
            tail = file.read()
            if not any(tail[-size // 8 :]):
                file.seek(-size // 8, os.SEEK_END)
                if not any(file.read()):
                    return "the last eighth of it is nothing but zeros"
            if name == "gif" and last.pos is not None:
                file.seek(last.pos + last.size - 1)
                return "" if b";" in file.read() else "it has no end mark"
        page = tail.rfind(b"OggS")
        return "it has no last page" if name == "ogg" and page >= 0 and not tail[page + 5] & 4 else ""


def _open(path: str) -> tuple[InputContainer, VideoStream]:
    import av

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:  # absolute, because FFmpeg takes "a:b.mp4" for a protocol; tags need not be UTF-8
        container = av.open(os.path.abspath(path), container_options=options, metadata_errors="replace")
    except av.error.FFmpegError as error:
        if error.errno in OUT_OF_MEMORY:
            raise MemoryError from error
        with open(path, "rb") as file:
            head = file.read(1024)
        is_mp4 = head[4:8] == b"ftyp"
        problem = f"not a video that can be read ({error.strerror})"
        if is_mp4:
            problem = (
                "an MP4 whose index cannot be read: the end of the file is probably missing (incomplete download?)"
            )
        elif _is_text(head):
            problem = "not a video but text (a list of files, or the page of a failed download?)"
        elif error.errno == errno.EINVAL:  # FFmpeg knows a format that is not among `FORMATS`
            problem = "not a video but a picture, or of a format that is not supported"
        raise VideoError(path, problem) from error
    stream = container.streams.best("video")
    if container.metadata.get("major_brand") in PICTURE_BRANDS:
        problem = "a single picture, not a video"
    elif not isinstance(stream, av.VideoStream) or _is_cover(stream):
        problem = "has no video stream, only sound" if container.streams.audio else "has no video stream"
    elif stream.codec_context is None:
        problem = "its video codec is not one that can be decoded here"
    else:
        return container, stream
    container.close()
    raise VideoError(path, problem)


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text without control characters other than white space and escape."""
    return not set(head) & ({*range(32)} - {9, 10, 13, 27})


def _is_cover(stream: VideoStream) -> bool:
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _cropping(path: str, container: InputContainer, stream: VideoStream) -> Cropping:
    if "mp4" in container.format.name:
        return mp4_cropping(path, stream.id)
    if "matroska" in container.format.name:
        return matroska_cropping(path, container.streams.video.index(stream))
    return NONE


def _open_decoder(stream: VideoStream) -> VideoCodecContext:
    """A decoder that reports damage: as an error, or by frames that are marked as corrupt."""
    import av

    decoder = stream.codec_context
    codec = decoder.codec.canonical_name
    has_8_bits = decoder.format is not None and decoder.format.components[0].bits == 8  # all that libvpx is built for
    if has_8_bits and (name := DECODERS.get(codec)) in av.codecs_available:
        decoder = cast("VideoCodecContext", av.CodecContext.create(av.Codec(name, "r")))
        decoder.extradata = stream.codec_context.extradata
    checks = "crccheck+bitstream+buffer" + ("+explode" if codec in EXPLODING else "")
    # Unaligned: otherwise FFmpeg crops less on the left than the bitstream says, to keep its memory aligned.
    decoder.options = {"err_detect": checks, "flags": "+unaligned"}
    if codec == "av1":
        decoder.options |= {"strict": "strict"}  # checks the padding after the symbols
    decoder.thread_type = av.codec.context.ThreadType.AUTO
    return decoder


def _prepend(headers: bytes, packet: Packet[VideoStream]) -> Packet[VideoStream]:
    import av

    longer = cast("Packet[VideoStream]", av.Packet(headers + bytes(packet)))
    longer.pts, longer.dts, longer.duration = packet.pts, packet.dts, packet.duration
    longer.time_base, longer.is_keyframe = packet.time_base, packet.is_keyframe
    for data in packet.iter_sidedata():
        longer.set_sidedata(data)
    return longer


def _end(packet: Packet[Any]) -> int:
    """When a packet ends, in its time base; 0 if it does not say."""
    return max((time for time in (packet.pts, packet.dts) if time is not None), default=0) + (packet.duration or 0)
