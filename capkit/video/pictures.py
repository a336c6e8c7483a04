"""From a decoded frame to RGB pixels: upright, and with square pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capkit.video.container import VideoError, VideoFile
from capkit.video.headers import Cropping
from capkit.video.seen import SEEN_BYTES, Frames, SeenFrames

if TYPE_CHECKING:
    from av import VideoFrame

Matrix = tuple[int, int, int, int]
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # transfer characteristics in ITU-T H.273
WIDEST_PIXEL = 10  # a pixel more than this many times as wide as high, or as high as wide, is taken for an error
# How a display matrix ((a, b), (c, d)) turns a stored picture, by the signs of (a, b, c, d) (ISO/IEC 14496-12, 6.2.2).
ORIENTATIONS = {
    (1, 0, 0, 1): "upright",
    (0, 1, -1, 0): "rotated by 90 degrees clockwise",
    (-1, 0, 0, -1): "rotated by 180 degrees",
    (0, -1, 1, 0): "rotated by 90 degrees counterclockwise",
    (-1, 0, 0, 1): "mirrored",
    (0, 1, 1, 0): "rotated by 90 degrees clockwise, then mirrored",
    (1, 0, 0, -1): "rotated by 180 degrees, then mirrored",
    (0, -1, -1, 0): "rotated by 90 degrees counterclockwise, then mirrored",
}
UNKNOWN_ORIENTATION = "unknown, shown as stored"


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video file, or about frames in memory.

    Attributes:
        path: None for frames in memory.
        num_frames: number of frames that a player shows.
        average_fps: frames per second, as the file says; uneven frame times may have another average.
        duration_seconds: from the first frame's start to the last frame's end.
        height, width: of full frames as in `Clip.frames`, in pixels.
        codec: FFmpeg's name, such as "h264".
        orientation: how the stored frames were turned to be upright.
        sample_aspect_ratio: width of a stored pixel divided by its height; frames are scaled to square pixels.
        hdr: "PQ" or "HLG" for high dynamic range; frames are not tone-mapped.
        interlaced: whether frames are woven from two fields; they are not deinterlaced.
        changes_shape: whether stored frames differ in size, aspect ratio or orientation; they are all stretched and
            turned as the first one.
        num_video_streams: the one that FFmpeg takes for the main one is read.
    """

    path: str | None
    num_frames: int
    average_fps: float
    duration_seconds: float
    height: int
    width: int
    codec: str | None
    orientation: str = "upright"
    sample_aspect_ratio: float = 1.0
    hdr: str | None = None
    interlaced: bool = False
    changes_shape: bool = False
    num_video_streams: int = 1

    def __repr__(self) -> str:
        """Without the fields that are as usual."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return f"VideoInfo({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def notes(self) -> list[str]:
        """Why frames may look different from what a player shows; empty for most videos."""
        notes = []
        if self.hdr:
            notes.append(f"HDR ({self.hdr}): frames are not tone-mapped and look pale")
        if self.interlaced:
            notes.append("interlaced: frames are not deinterlaced and show combs where things move")
        if self.changes_shape:
            notes.append("changing its size, aspect ratio or orientation: some frames are stretched or turned wrongly")
        if self.orientation == UNKNOWN_ORIENTATION:
            notes.append("rotated by an angle that is no multiple of 90 degrees: frames are as stored")
        if not has_possible_pixels(self.sample_aspect_ratio):
            notes.append(
                f"given an impossible sample aspect ratio ({self.sample_aspect_ratio:g}): frames are as stored"
            )
        if self.num_video_streams > 1:
            notes.append(f"one of {self.num_video_streams} video streams in its file: the others are not seen")
        return notes


def has_possible_pixels(sample_aspect_ratio: float | Fraction) -> bool:
    """Whether a video can have this sample aspect ratio."""
    return 1 / WIDEST_PIXEL <= sample_aspect_ratio <= WIDEST_PIXEL


@dataclass(frozen=True)
class PictureFormat:
    """How the decoded frames of a video become pictures.

    Attributes:
        stored_height, stored_width: of the decoded frames, in pixels.
        sample_aspect_ratio: width of a stored pixel divided by its height, 1 where the file does not say.
        cropping: pixels at the (top, bottom, left, right) of a stored picture that are not shown.
        matrix: signs of the display matrix, a key of `ORIENTATIONS`; None for a matrix that is none of them.
        hdr: "PQ", "HLG" or None.
    """

    stored_height: int
    stored_width: int
    sample_aspect_ratio: Fraction
    cropping: Cropping
    matrix: Matrix | None
    hdr: str | None

    @classmethod
    def of(cls, video: VideoFile, frame: VideoFrame) -> PictureFormat:
        """The format of a file, of which `frame` is the first one decoded."""
        hdr = HDR_TRANSFERS.get(frame.color_trc) or HDR_TRANSFERS.get(video.stream.codec_context.color_trc)
        ratio = video.sample_aspect_ratio
        return cls(frame.height, frame.width, ratio, video.cropping, _display_matrix(video.with_side_data(frame)), hdr)

    def is_of(self, video: VideoFile, frame: VideoFrame) -> bool:
        """Whether a later frame of the file has the same size, aspect ratio and, if it tells it, orientation."""
        shape = (frame.height, frame.width, video.sample_aspect_ratio)
        is_alike = shape == (self.stored_height, self.stored_width, self.sample_aspect_ratio)
        return is_alike and _display_matrix(frame, self.matrix) == self.matrix

    @property
    def orientation(self) -> str:
        """How the stored picture was turned to be upright."""
        return ORIENTATIONS[self.matrix] if self.matrix else UNKNOWN_ORIENTATION

    @property
    def square_width(self) -> int:
        """Width in square pixels, before cropping and turning; the height stays."""
        ratio = self.sample_aspect_ratio
        return max(round(self.stored_width * (ratio if has_possible_pixels(ratio) else 1)), 1)

    @property
    def shown(self) -> tuple[slice, slice]:
        """The rows and columns that are shown, before turning."""
        top, bottom, left, right = self.cropping
        scale = self.square_width / self.stored_width
        columns = slice(round(left * scale), self.square_width - round(right * scale))
        return slice(top, self.stored_height - bottom), columns

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of the pictures."""
        is_turned = self.matrix is not None and self.matrix[0] == 0
        rows, columns = self.shown
        size = (rows.stop - rows.start, columns.stop - columns.start)
        return (*(size[::-1] if is_turned else size), 3)

    def to_rgb(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """uint8, of `shape`."""
        width, height = self.square_width, self.stored_height  # as decord, also if the size changes within the file
        if frame.interlaced_frame:
            frame = _as_progressive(frame)
        is_scaled = (frame.width, frame.height) != (width, height)
        # Without scaling, POINT is nearest to decord's 10-bit colours.
        method = "BICUBIC" if is_scaled else "POINT"
        pixels: NDArray[Any] = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=method)
        pixels = pixels[self.shown]
        if self.matrix:
            a, b, c, d = self.matrix
            pixels = pixels if a else pixels.transpose(1, 0, 2)
            pixels = pixels[:: b + d, :: a + c]
        return pixels


class Pictures:
    """The wanted frames, once all are there: `frames`, uint8 RGB (T, H, W, 3), or `SeenFrames` of `image_size`.

    Raises:
        VideoError: they take more than `memory_bytes`.
    """

    frames: Frames | SeenFrames

    def __init__(self, info: VideoInfo, indices: list[int], memory_bytes: int | None, image_size: int | None) -> None:
        self._info, self._memory_bytes, self._image_size = info, memory_bytes, image_size
        self._positions: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            self._positions.setdefault(index, []).append(position)
        self._num_frames = len(indices)
        self._format: PictureFormat | None = None
        self._is_interlaced = self._changes_shape = False

    def wants(self, index: int) -> bool:
        """Whether this frame is wanted and has not come yet."""
        return index in self._positions

    def set_format(self, frame: VideoFrame, video: VideoFile) -> None:
        """Learn the format from the first frame that is decoded, a keyframe: not all others may tell it."""
        if self._format is None:
            self._format = PictureFormat.of(video, frame)
            height, width, _ = shape = self._format.shape
            if min(shape) < 1:
                raise VideoError(video.path, f"its headers crop the whole picture away, by {video.cropping}")
            frame_bytes = height * width * 3 if self._image_size is None else SEEN_BYTES * self._image_size**2
            num_bytes = self._num_frames * frame_bytes
            if self._memory_bytes is not None and num_bytes > self._memory_bytes:
                sizes = (
                    f"{num_bytes / 2**30:.1f} GiB, memory_bytes leaves {self._memory_bytes / 2**30:.1f} GiB for them"
                )
                problem = f"{self._num_frames} frames of {width} x {height} pixels take {sizes}; sample fewer frames"
                raise VideoError(str(self._info.path), problem)
            if self._image_size is None:
                self.frames = np.empty((self._num_frames, *shape), np.uint8)
            else:
                self.frames = SeenFrames(self._num_frames, self._image_size)

    def take(self, index: int, frame: VideoFrame, video: VideoFile) -> None:
        """Keep a frame, if it is wanted."""
        if self._format and (positions := self._positions.pop(index, [])):
            self.frames[positions] = self._format.to_rgb(frame)
            self._is_interlaced |= frame.interlaced_frame
            self._changes_shape |= not self._format.is_of(video, frame)

    def describe(self) -> VideoInfo:
        """The video's facts, with what its frames told."""
        assert self._format
        height, width, _ = self._format.shape
        return replace(
            self._info,
            height=height,
            width=width,
            orientation=self._format.orientation,
            sample_aspect_ratio=float(self._format.sample_aspect_ratio),
            hdr=self._format.hdr,
            interlaced=self._is_interlaced,
            changes_shape=self._changes_shape,
        )


def _as_progressive(frame: VideoFrame) -> VideoFrame:
    """A copy that is not marked as interlaced: FFmpeg's programs and decord convert colours of full frames."""
    from av import VideoFrame

    try:
        copy = VideoFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name)
    except ValueError:  # a pixel format that NumPy arrays cannot hold
        return frame
    copy.colorspace, copy.color_range = frame.colorspace, frame.color_range
    return copy


def _display_matrix(frame: VideoFrame, default: Matrix | None = (1, 0, 0, 1)) -> Matrix | None:
    from av.sidedata.sidedata import Type

    # PyAV knows fewer kinds of data than FFmpeg, and fails at the others, such as EXIF tags in Motion JPEG.
    Type._missing_ = classmethod(_unknown_kind)  # type: ignore[assignment, method-assign]
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return default
    parts = np.frombuffer(side_data, np.int32)[[0, 1, 3, 4]].astype(float)
    largest = np.abs(parts).max()
    a, b, c, d = (np.sign(parts) * (np.abs(parts) > 0.02 * largest)).astype(int).tolist()  # a degree is rounding
    return (a, b, c, d) if (a, b, c, d) in ORIENTATIONS else None


def _unknown_kind(kinds: type[Any], value: object) -> Any:
    """A member for a value that the enumeration `kinds` does not know."""
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"UNKNOWN_{value}", value
    return kind
