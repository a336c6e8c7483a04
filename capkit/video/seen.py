"""What a model sees of frames: the centre square of each, resized and normalised; in NumPy, for reading processes."""

from __future__ import annotations

import functools
import io
import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Pixels = NDArray[np.float32]

# CLIP's mean and standard deviation, as in the original's preprocessing.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32).reshape(3, 1, 1)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32).reshape(3, 1, 1)

SEEN_BYTES = 3 * 4 + 3  # for each pixel of a square: float32 and uint8
STRIP_FRAME_PIXELS = 112  # half of what the published model sees: a strip of 24 frames is about 25 KB
STRIP_COLUMNS = 12
STRIP_MAX_ROWS = 140  # WebP takes 16383 pixels; more frames go into more columns
STRIP_GAP_PIXELS = 2


def model_pixels(frames: Frames, image_size: int) -> Pixels:
    """Resize the short side of each frame to `image_size`, crop the centre square, normalise.

    As in the original: bilinear without antialiasing, the long side rounded down.

    Args:
        frames: uint8 RGB (T, H, W, 3).
        image_size: side of the square, in pixels.

    Returns:
        float32 (T, 3, image_size, image_size).
    """
    squares = np.empty((len(frames), 3, image_size, image_size), np.float32)
    for frame, square in zip(frames, squares, strict=True):
        square[:] = _centre_square(frame, image_size)
    return _normalise(squares)


def resized_and_cut(height: int, width: int, image_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width that a frame is resized to, and the top and left edge of the square crop in it."""
    if height < width:
        resized = (image_size, math.floor(width / height * image_size))
    else:
        resized = (math.floor(height / width * image_size), image_size)
    top, left = (round((side - image_size) / 2) for side in resized)
    return resized, (top, left)


def grid_checksum(frames: Frames) -> int:
    """Checksum of every 16th pixel of frames (T, H, W, 3)."""
    return zlib.crc32(frames[:, ::16, ::16].tobytes())


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model sees of a clip, made where its frames were read.

    Attributes:
        pixels: float32 (T, 3, S, S), as from `model_pixels`.
        checksum: `grid_checksum` of the full frames.
        strip: as from `draw_strip`; None if it was not asked for.
    """

    pixels: Pixels
    checksum: int
    strip: bytes | None = None


class SeenFrames:
    """Collects what a model sees of frames as they are decoded, so that full frames need not be kept."""

    def __init__(self, num_frames: int, image_size: int) -> None:
        self._squares = np.empty((num_frames, 3, image_size, image_size), np.float32)
        self._grids = [b""] * num_frames

    @classmethod
    def of(cls, frames: Frames, image_size: int) -> SeenFrames:
        """What a model sees of frames (T, H, W, 3) that are already decoded."""
        seen = cls(len(frames), image_size)
        for place, frame in enumerate(frames):
            seen[[place]] = frame
        return seen

    def __setitem__(self, places: list[int], frame: Frames) -> None:
        self._squares[places] = _centre_square(frame, self._squares.shape[-1])
        for place in places:
            self._grids[place] = frame[::16, ::16].tobytes()

    def finish(self, with_strip: bool) -> tuple[Frames, Seen]:
        """The squares as pictures, uint8 (T, S, S, 3), and as the model takes them."""
        frames = np.ascontiguousarray(self._squares.round().astype(np.uint8).transpose(0, 2, 3, 1))
        strip = draw_strip(frames) if with_strip else None
        return frames, Seen(_normalise(self._squares), zlib.crc32(b"".join(self._grids)), strip)


def draw_strip(frames: Frames) -> bytes:
    """A small picture of square frames (T, S, S, 3), WebP: in reading order, 12 to a row."""
    from PIL import Image

    side, columns = STRIP_FRAME_PIXELS, min(len(frames), max(STRIP_COLUMNS, -(-len(frames) // STRIP_MAX_ROWS)))
    pitch, rows = side + STRIP_GAP_PIXELS, -(-len(frames) // columns)
    strip = Image.new("RGB", (columns * pitch - STRIP_GAP_PIXELS, rows * pitch - STRIP_GAP_PIXELS), "white")
    for index, frame in enumerate(frames):
        small = Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS)
        strip.paste(small, (index % columns * pitch, index // columns * pitch))
    picture = io.BytesIO()
    strip.save(picture, "webp", quality=60)
    return picture.getvalue()


def strip_frames(strip: bytes, num_frames: int) -> Frames:
    """The first frames of a picture of `draw_strip`, uint8 (num_frames, S, S, 3), or as many as it has."""
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(strip), formats=["WEBP"]).convert("RGB"))
    side, pitch = STRIP_FRAME_PIXELS, STRIP_FRAME_PIXELS + STRIP_GAP_PIXELS
    rows, columns = ((length + STRIP_GAP_PIXELS) // pitch for length in picture.shape[:2])
    corners = [(pitch * row, pitch * column) for row in range(rows) for column in range(columns)][:num_frames]
    return np.stack([picture[top : top + side, left : left + side] for top, left in corners])


def _normalise(squares: Pixels) -> Pixels:
    """In place, from 0 to 255."""
    for square in squares:  # one after the other stays in the processor's cache
        square /= 255
        square -= MEAN
        square /= STD
    return squares


def _centre_square(frame: Frames, image_size: int) -> Pixels:
    """float32 (3, S, S), from 0 to 255. Reads only the pixels that count, however large the frame."""
    height, width, _ = frame.shape
    size, (top, left) = resized_and_cut(height, width, image_size)
    if size == (height, width):
        return frame[top : top + image_size, left : left + image_size].transpose(2, 0, 1).astype(np.float32)
    (above, below, down), (before, after, across) = _neighbours(height, width, image_size)

    def resized(rows: NDArray[np.intp]) -> Pixels:
        pixels = frame[rows].reshape(image_size, -1)
        return pixels.take(before, 1) * (1 - across) + pixels.take(after, 1) * across

    square: Pixels = resized(above) * (1 - down) + resized(below) * down
    return square.reshape(image_size, 3, image_size).transpose(1, 0, 2)


Neighbours = tuple[NDArray[np.intp], NDArray[np.intp], Pixels]


@functools.lru_cache(maxsize=16)
def _neighbours(height: int, width: int, image_size: int) -> tuple[Neighbours, Neighbours]:
    """Of each row and of each column and colour of the square: its two neighbours in the frame, the second's weight."""
    sizes, starts = resized_and_cut(height, width, image_size)

    def along(size: int, resized: int, start: int) -> Neighbours:
        # In float32 and rounded once, as torch's interpolate() does.
        step = float(np.float32(size) / np.float32(resized))
        places = (step * (np.arange(start, start + image_size) + 0.5) - 0.5).astype(np.float32).clip(0)
        first = places.astype(np.intp)
        return first, np.minimum(first + 1, size - 1), places - first.astype(np.float32)

    above, below, down = along(height, sizes[0], starts[0])
    columns, colours = along(width, sizes[1], starts[1]), np.arange(3)[:, None]
    before, after = ((3 * column + colours).ravel() for column in columns[:2])
    return (above, below, down[:, None]), (before, after, np.tile(columns[2], 3))
