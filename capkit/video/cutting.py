"""Cut frames out of a video file into a file of their own."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np

from capkit.video.container import VideoError
from capkit.video.reading import read_frames, read_timestamps
from capkit.video.seen import Frames
from capkit.video.worker import WriteError

READ_BYTES = 2**28  # of frames that are in memory at a time
TICKS_PER_SECOND = 90_000  # of uneven times
BT601 = 6  # how RGB becomes YUV here


def cut_clip(source: str, first: int, last: int, target: str, crf: int) -> None:
    """Encode the frames `first` to `last` of a video as an MP4 of their own: these and no others, without sound.

    They are what capkit reads: upright, with square pixels, 8 bits; with their own times, the first at 0. A picture of
    odd height or width loses its last row or column. The file gets its name when it is complete.

    Args:
        source: video file.
        first, last: indices of frames, in the order of showing.
        target: name of the new file; one that is there is replaced.
        crf: constant rate factor of libx264, 0 (lossless) to 51; 18 is hard to tell from the source.

    Raises:
        VideoError: not all frames can be read, or not encoded.
        WriteError: the file cannot be written.
    """
    import av

    times, info = read_timestamps(source)
    seconds = times[first : last + 1] - times[first]
    rate = Fraction(info.average_fps).limit_denominator(1001)
    ticks, time_base = np.arange(len(seconds)), 1 / rate
    if np.abs(seconds - ticks / float(rate)).max() > 0.25 / rate:
        ticks, time_base = np.round(seconds * TICKS_PER_SECOND).astype(int), Fraction(1, TICKS_PER_SECOND)
    at_once = max(READ_BYTES // (3 * info.height * info.width), 1)
    part = f"{target}.part"
    try:
        with av.open(part, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
            stream.pix_fmt, stream.time_base = "yuv420p", time_base
            stream.codec_context.time_base, stream.codec_context.colorspace = time_base, BT601
            for start in range(0, len(ticks), at_once):
                wanted = [*range(first + start, min(first + start + at_once, last + 1))]
                frames = _read(source, wanted)
                height, width = (side - side % 2 for side in frames.shape[1:3])
                if start == 0:
                    stream.height, stream.width = height, width
                for tick, pixels in zip(ticks[start:].tolist(), frames, strict=False):
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
                    frame.pts, frame.time_base = tick, time_base
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())
        num_frames = read_timestamps(part)[1].num_frames
        if num_frames != len(ticks):
            raise VideoError(source, f"frames {first} to {last} were encoded as {num_frames} frames")
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except av.error.FFmpegError as error:
        if error.errno is not None and error.errno > 0:
            raise WriteError(error.errno, error.strerror, target) from None
        raise VideoError(source, f"frames {first} to {last} cannot be encoded: {error.strerror}") from error
    except OSError as error:
        raise WriteError(error.errno, error.strerror, target) from error
    finally:
        Path(part).unlink(missing_ok=True)


def _read(source: str, indices: list[int]) -> Frames:
    return cast(np.ndarray, read_frames(source, lambda times, info: indices)[0])  # full frames
