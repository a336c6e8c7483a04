"""The same frames as decord 0.6.0 decodes them, for experiments that must equal the original tool's to the last bit."""

from __future__ import annotations

import os
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from capkit.video.container import VideoError
from capkit.video.pictures import VideoInfo

DECORD_VERSION = "0.6.0"
BLOCK_PIXELS = 16
MAX_DIFFERENCE = 6  # mean over a block, of 255. Colours of 10 bits differ by less than 1; what has moved, by more
MAX_TIME_DIFFERENCE_SECONDS = 0.001


def decode_with_decord(
    path: str, indices: list[int], timestamps_seconds: NDArray[np.float64], frames: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The frames with these indices, uint8 RGB (T, H, W, 3), decoded by decord.

    Args:
        path: video file.
        timestamps_seconds, frames: PyAV's, to check decord's: it silently returns wrong frames from files with open
            groups of pictures, hidden frames, wrong keyframe flags and the like.

    Raises:
        VideoError: decord cannot read the file, or gives other frames.
        ImportError: decord is missing, or has another version.
    """
    decord = _import_decord()
    try:
        reader = decord.VideoReader(os.path.abspath(path))
        times = reader.get_frame_timestamp(indices)[:, 0] if max(indices) < len(reader) else np.inf
        decoded = reader.get_batch(indices)
    except (decord.DECORDError, RuntimeError, AssertionError, UnicodeError, IndexError) as error:
        message = str(error).strip().splitlines()[-1:] or [repr(error)]
        raise VideoError(path, f'decord cannot read it ({message[0]}); decoder="pyav" can') from None
    pixels: NDArray[np.uint8] = decoded.asnumpy() if hasattr(decoded, "asnumpy") else np.asarray(decoded)  # set_bridge
    difference = ""
    if pixels.shape != frames.shape:
        (height, width), (their_height, their_width) = frames.shape[1:3], pixels.shape[1:3]
        difference = f"pictures of {their_width} x {their_height} instead of {width} x {height} pixels"
    elif np.any(abs(times - timestamps_seconds) > MAX_TIME_DIFFERENCE_SECONDS):
        difference = "frames of other times"
    else:
        for index, ours, theirs in zip(indices, frames, pixels, strict=True):
            if _largest_difference(ours, theirs) > MAX_DIFFERENCE:
                difference = f"another picture for frame {index}"
                break
    if difference:
        raise VideoError(path, f'decord gives {difference}; decoder="pyav" reads it right')
    return pixels


def decord_problem(path: str, info: VideoInfo) -> str:
    """Why a trainer that reads with decord would not get the frames that a player shows, or "".

    decord counts packets, and with them frames that an edit list or the codec hides. Where it is not installed, only
    AV1 is known to be a problem: decord 0.6.0 was built without a decoder of it.
    """
    try:
        decord = _import_decord()
    except ImportError:
        return "decord has no decoder of AV1; encode it anew, as H.264" if info.codec == "av1" else ""
    try:
        num_frames = len(decord.VideoReader(os.path.abspath(path)))
    except (decord.DECORDError, RuntimeError, UnicodeError):
        return f"decord cannot open it (codec {info.codec}); encode it anew, as H.264"
    if num_frames != info.num_frames:
        counts = f"decord counts {num_frames} frames where a player shows {info.num_frames}"
        return f"{counts}, because it is cut by an edit list or hides frames; encode it anew"
    return ""


def _largest_difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Between two pictures, (H, W, 3): the largest mean difference of a block of `BLOCK_PIXELS` squared."""
    differences = np.abs(one.astype(np.int16) - other).mean(axis=2)
    for axis in (0, 1):
        starts = np.arange(0, differences.shape[axis], BLOCK_PIXELS)
        sizes = np.diff([*starts, differences.shape[axis]])
        differences = np.add.reduceat(differences, starts, axis=axis) / np.expand_dims(sizes, 1 - axis)
    return float(differences.max())


def _import_decord() -> ModuleType:
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:  # no wheel for this machine, or one that does not load
        raise ImportError(f'decoder="decord" needs decord {DECORD_VERSION}: {error}') from error
    if decord.__version__ != DECORD_VERSION:
        remedy = f"pip uninstall decord2, then pip install --force-reinstall decord=={DECORD_VERSION}"
        raise ImportError(f'decoder="decord" needs decord {DECORD_VERSION}, not {decord.__version__}: {remedy}')
    module: ModuleType = decord
    return module
