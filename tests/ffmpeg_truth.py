"""Decode a video with an ffmpeg program: the outside truth about its frames, their order and their times."""

import itertools
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def ffmpeg(*args, stdin=None, log_level="info"):
    """Run the ffmpeg program; its exit status, stdout and log."""
    import imageio_ffmpeg

    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-hide_banner",
        "-loglevel",
        f"level+{log_level}",
        "-y",
        *map(str, args),
    ]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120)
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


@dataclass
class Truth:
    """What the ffmpeg program decodes, in order."""

    levels: np.ndarray
    """(n, 4, 4): the mean brightness of the blocks of `draw_number`."""
    seconds: np.ndarray
    """(n,): when each frame is shown, the first one at 0."""
    aspect: float
    """Width over height of the picture as shown."""
    complaints: list[str]
    """The errors that ffmpeg logged; with some, this may be no truth."""


def block_levels(frames):
    """(n, 4, 4): the mean brightness of the blocks of `draw_number`, of frames (n, height, width, 3)."""
    height, width = frames.shape[1:3]
    levels = np.empty((len(frames), 4, 4))
    for row, column in itertools.product(range(4), range(4)):
        top, left = int((row + 0.3) * height / 4), int((column + 0.3) * width / 4)
        bottom, right = max(top + 1, int((row + 0.7) * height / 4)), max(left + 1, int((column + 0.7) * width / 4))
        levels[:, row, column] = frames[:, top:bottom, left:right].mean(axis=(1, 2, 3))
    return levels


def decode_all(path, upright=True):
    """The `Truth` about a file: every frame that ffmpeg puts out, upright, in order, at its own time; None: none."""
    stream = "0:V:1" if path.suffix == ".avif" else "0:V:0"  # the first one of an animation is a still picture
    source = ["-threads", "1", "-copyts", *([] if upright else ["-noautorotate"]), "-i", path, "-map", stream]
    raw = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    _, pixels, log = ffmpeg(*source, "-vf", "showinfo=checksum=0", *raw)
    # Errors of its own: showinfo writes a line in parts, and a line between them loses its level.
    _, _, errors = ffmpeg(*source, *raw, log_level="error")
    shown = re.findall(
        r"config in time_base: (\d+)/(\d+)|\] n: *\d+ pts: *(\S+) .* sar:(\d+)/(\d+) s:(\d+)x(\d+) .*", log
    )
    bases, frames = [item for item in shown if item[0]], [item for item in shown if not item[0]]
    complaints = [line for line in re.findall(r"\[(?:error|fatal)\] (.*)", errors) if "to muxer" not in line]
    if not frames or not pixels:
        return None
    assert len(set(bases)) == 1, bases
    tick = Fraction(int(bases[0][0]), int(bases[0][1]))
    ticks = [0 if item[2] == "NOPTS" else int(item[2]) for item in frames]
    complaints += ["a frame without a time"] * any(item[2] == "NOPTS" for item in frames)
    horizontal, vertical, width, height = map(int, frames[0][3:7])
    pictures = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)
    assert len(pictures) == len(frames), (path, len(pictures), len(frames))
    seconds = np.array([float((at - ticks[0]) * tick) for at in ticks])
    square = horizontal / vertical if horizontal and vertical else 1
    return Truth(block_levels(pictures), seconds, width * square / height, complaints)


def shown_numbers(truth, first):
    """The numbers of the frames, counted from `first`; None for an unreadable frame."""
    bits = 1 << np.arange(15, -1, -1)
    clear = (np.abs(truth.levels - 128) > 40).all(axis=(1, 2))
    numbers = ((truth.levels > 128).reshape(-1, 16) * bits).sum(axis=1) - first
    return [int(number) if known else None for number, known in zip(numbers, clear, strict=True)]
