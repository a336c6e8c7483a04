"""Draw and encode tiny clips whose frame i shows the number i, so that a test can tell which frame came back."""

import os
import struct
import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest

from capkit.video import VideoError

BITS = 16  # a frame is 4 rows of 4 blocks, black for 0 and white for 1, the highest bit first
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:b-adapt=0"}
QUIET_X265 = {"x265-params": "log-level=none"}
# Settings of `encode_clip` by file name.
KINDS = {
    "plain.mp4": {},
    "b-frames.mp4": {"options": {"bf": "3", "b-pyramid": "normal"}, "keyframe_interval": 20},
    "open-groups.mp4": {"options": OPEN_GROUPS, "keyframe_interval": 12},
    "open-groups.mkv": {"options": OPEN_GROUPS, "keyframe_interval": 12},
    "open-groups.ts": {"options": OPEN_GROUPS, "keyframe_interval": 12},
    "hevc.mp4": {"codec": "libx265", "options": QUIET_X265, "keyframe_interval": 12},  # open groups by default
    "ten-bits.mp4": {"codec": "libx265", "options": QUIET_X265, "pix_fmt": "yuv420p10le", "keyframe_interval": 12},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "keyframe_interval": 20},
    "index-first.mp4": {"container_options": {"movflags": "faststart"}, "keyframe_interval": 20, "audio": True},
    "starts-late.mp4": {"milliseconds": [2000 + 40 * i for i in range(60)], "keyframe_interval": 20},
    "uneven.mp4": {
        "milliseconds": [i * i + 10 * i for i in range(60)],
        "keyframe_interval": 20,
        "options": {"bf": "2"},
    },
    "uneven.mkv": {
        "milliseconds": [i * i + 10 * i for i in range(60)],
        "keyframe_interval": 20,
        "options": {"bf": "2"},
    },
    "sound.mkv": {"audio": True, "keyframe_interval": 20},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}, "keyframe_interval": 20},
    "vp9.webm": {"codec": "libvpx-vp9", "keyframe_interval": 20},
    "av1.mp4": {"codec": "libsvtav1", "keyframe_interval": 20},
    "odd-size.mp4": {"size": (95, 127), "pix_fmt": "yuv444p"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}, "keyframe_interval": 12},
    "h264.avi": {"options": {"bf": "2"}, "keyframe_interval": 12},  # no times for showing in the file
    "motion-jpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "b-frames.ts": {"options": {"bf": "3"}, "keyframe_interval": 12},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}, "keyframe_interval": 12},
    "b-frames.flv": {"options": {"bf": "2"}, "keyframe_interval": 20},
    "stream.h264": {"options": {"bf": "2"}, "keyframe_interval": 20},  # no times at all
    "turned.mp4": {"quarter_turns": 1, "size": (64, 96)},
    "upside-down.mp4": {"quarter_turns": 2},
    "turned-left.mp4": {"quarter_turns": 3},
    "one-frame.mp4": {"numbers": range(1)},
}


def draw_number(number, height=96, width=128):
    """uint8 (height, width, 3): `number` in blocks too big for lossy coding to hide."""
    bits = np.array([(number >> (BITS - 1 - i)) & 1 for i in range(BITS)], dtype=np.uint8).reshape(4, 4)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return np.repeat((bits[rows][:, columns] * 220 + 16)[:, :, None], 3, axis=2)


def read_number(frame):
    """The number that a frame (height, width, 3) shows; ValueError where a block is neither black nor white."""
    height, width = frame.shape[:2]
    number = 0
    for row in range(4):
        for column in range(4):
            level = frame[int((row + 0.5) * height / 4), int((column + 0.5) * width / 4)].mean()
            if 80 < level < 175:
                raise ValueError(f"grey block ({level:.0f}) at row {row}, column {column}")
            number = number * 2 + int(level > 128)
    return number


def read_numbers(frames):
    return [read_number(frame) for frame in frames]


def encode_clip(
    path,
    numbers=range(60),
    *,
    fps=25,
    codec="libx264",
    size=(96, 128),
    keyframe_interval=250,
    options=None,
    milliseconds=None,
    quarter_turns=0,
    audio=False,
    sound_seconds=None,
    pix_fmt="yuv420p",
    container_options=None,
    draw=draw_number,
):
    """Write a clip with one frame for each of `numbers`; returns its path.

    `milliseconds`: when each frame is shown (variable frame rate); otherwise `fps` frames a second from 0.
    `quarter_turns`: store the frames turned this often clockwise, with a display matrix that turns them back.
    `sound_seconds`: None for as long as the pictures.
    `size`: (height, width) as shown. `draw(number, height, width)`: the picture, uint8 (height, width, 3).
    """
    path = Path(path)
    time_base = Fraction(1, 1000) if milliseconds else 1 / Fraction(fps)
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.height, stream.width = size[::-1] if quarter_turns % 2 else size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = keyframe_interval
        stream.time_base = stream.codec_context.time_base = time_base
        if quarter_turns:
            stream.set_display_rotation(90 * quarter_turns)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for position, number in enumerate(numbers):
            pixels = np.ascontiguousarray(np.rot90(draw(number, *size), -quarter_turns))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (milliseconds[position] if milliseconds else position), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _mux_silence(container, sound, sound_seconds or len(numbers) / fps)
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # As root, its encoder makes the calling thread a real-time one; busy children of it stop the machine.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


@cache
def _sixty_frames():
    with tempfile.TemporaryDirectory() as folder:
        return encode_clip(Path(folder) / "a.mp4", range(60), fps=16, size=(32, 32)).read_bytes()


def tiny_clip(own=""):
    """The bytes of an MP4 of 60 frames that every trainer takes; its own text is in a box that players pass over."""
    text = own.encode()
    return _sixty_frames() + struct.pack(">I4s", 8 + len(text), b"free") + text


def encode_sound(path, seconds=2):
    """Write a file with sound and no video; returns its path."""
    with av.open(str(path), "w") as container:
        _mux_silence(container, container.add_stream("aac", rate=8000, layout="mono"), seconds)
    return Path(path)


def _mux_silence(container, stream, seconds):
    silence = np.zeros((1, int(8000 * seconds)), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
    frame.rate, frame.pts = 8000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def packets(path):
    """(pts, position in the file, size, is a keyframe) of every video packet, in decoding order."""
    with av.open(str(path)) as container:
        found = container.demux(container.streams.best("video"))
        return [(packet.pts, packet.pos, packet.size, packet.is_keyframe) for packet in found if packet.size]


def trim_by_edit_list(path, first, count, fps=25):
    """Rewrite an MP4's edit list so that players show `count` frames from frame `first` on; the data stays as it is."""
    data = bytearray(path.read_bytes())
    at = data.index(b"mvhd") + 4 + 12
    movie_ticks = struct.unpack_from(">I", data, at)[0]  # a second
    media_ticks = struct.unpack_from(">I", data, data.index(b"mdhd") + 4 + 12)[0]
    at = data.index(b"elst") + 4 + 8  # version and flags, number of entries; then duration and start of the first
    start = struct.unpack_from(">i", data, at + 4)[0]
    struct.pack_into(">Ii", data, at, count * movie_ticks // fps, start + first * media_ticks // fps)
    path.write_bytes(data)


def cut(path, target, fraction):
    """A copy that lacks its end: a `fraction` of the bytes remains; returns its path."""
    data = Path(path).read_bytes()
    Path(target).write_bytes(data[: int(len(data) * fraction)])
    return Path(target)


def damage(data, rng):
    """A copy of `data` that was cut, or has flipped bits, or a stretch of zeros or noise."""
    data, kind = bytearray(data), rng.choice(["cut", "bits", "zeros", "noise"])
    at = rng.randrange(len(data))
    length = rng.choice([1, 16, 200, 2000])
    if kind == "cut":
        del data[at:]
    elif kind == "bits":
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data[at : at + length] = rng.randbytes(length) if kind == "noise" else bytes(length)
    return bytes(data)


def reason(call, *args, **kwargs):
    """The reason of the `VideoError` that a call raises."""
    with pytest.raises(VideoError) as caught:
        call(*args, **kwargs)
    return caught.value.reason
