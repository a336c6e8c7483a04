"""The same frames as decord 0.6.0 decodes them, for experiments that must equal the original tool's to the last bit."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from capkit.video.container import VideoError

DECORD_VERSION = "0.6.0"
MAX_DIFFERENCE = 2  # mean over a frame, of 255: colours of 10 bits differ by less than 0.1, another frame by more
MAX_TIME_DIFFERENCE_SECONDS = 0.001


def decode_with_decord(
    path: str, indices: list[int], timestamps_seconds: NDArray[np.float64], frames: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The frames with these indices, uint8 RGB (T, H, W, 3), decoded by decord.

    Args:
        path: video file.
        timestamps_seconds, frames: what PyAV gives, which decord has to agree with: it silently returns other frames
            from files with open groups of pictures, hidden frames, wrong keyframe flags and the like.

    Raises:
        VideoError: decord cannot read the file, or gives other frames or times.
        ImportError: decord is missing, or has another version.
    """
    decord = _import_decord()
    try:
        reader = decord.VideoReader(os.path.abspath(path))
        times = reader.get_frame_timestamp(indices)[:, 0] if max(indices) < len(reader) else np.inf
        decoded = reader.get_batch(indices)
    except (decord.DECORDError, RuntimeError, AssertionError, UnicodeError, IndexError) as error:
        raise VideoError(path, f"decord cannot read it ({error}); leave decoder at its default") from None
    pixels: NDArray[np.uint8] = decoded.asnumpy() if hasattr(decoded, "asnumpy") else np.asarray(decoded)  # set_bridge
    same = pixels.shape == frames.shape and bool(np.all(abs(times - timestamps_seconds) <= MAX_TIME_DIFFERENCE_SECONDS))
    if not same or any(
        np.abs(ours.astype(np.int16) - theirs).mean() > MAX_DIFFERENCE
        for ours, theirs in zip(frames, pixels, strict=True)
    ):
        raise VideoError(path, "decord gives other frames than the file shows; leave decoder at its default")
    return pixels


def _import_decord():  # type: ignore[no-untyped-def]
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:  # no wheel for this machine, or one that does not load
        raise ImportError(f'decoder="decord" needs decord {DECORD_VERSION}: {error}') from error
    if decord.__version__ != DECORD_VERSION:
        remedy = f"pip uninstall decord2, then pip install --force-reinstall decord=={DECORD_VERSION}"
        raise ImportError(f'decoder="decord" needs decord {DECORD_VERSION}, not {decord.__version__}: {remedy}')
    return decord
