"""Files whose keyframes are none, or whose packets are fields. Frame i shows the number i.

Hidden frames in packets of their own are among the files of `test_frames_soak.py`.
"""

from fractions import Fraction

import av
import numpy as np
import pytest
from video_factory import OPEN_GROUPS, draw_number, encode_clip, read_numbers

from capkit.video import FrameSampling, VideoError, load_clip

EVERY_FRAME = FrameSampling("uniform", num_frames=1000)


def shown(path, *window):
    """Indices and numbers of all frames; they must be equal."""
    clip = load_clip(path, EVERY_FRAME, *window, timeout_seconds=None)
    return clip.frame_indices, read_numbers(clip.frames)


def flag_keyframes(source, target, is_key):
    """A copy in which packet i is flagged as a keyframe where is_key(i)."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            packet.is_keyframe, packet.stream = is_key(number), stream
            new.mux(packet)


@pytest.mark.parametrize("flag", ["all", "none", "every second"])
@pytest.mark.parametrize(
    "codec, options",
    [
        ("libx264", {"bf": "2"}),
        ("libx264", OPEN_GROUPS),
        ("libx265", {"x265-params": "log-level=none"}),
        ("libvpx", {}),
    ],
)
def test_keyframe_flags_that_are_wrong(tmp_path, codec, options, flag):
    source = encode_clip(tmp_path / "right.mkv", codec=codec, options=options, keyframe_interval=30)
    flags = {"all": lambda number: True, "none": lambda number: False, "every second": lambda number: number % 2 == 0}
    flag_keyframes(source, tmp_path / "wrong.mkv", flags[flag])
    assert shown(tmp_path / "wrong.mkv") == (list(range(60)), list(range(60)))
    clip = load_clip(tmp_path / "wrong.mkv", "chat", timeout_seconds=None)
    assert read_numbers(clip.frames) == clip.frame_indices == [0, 25, 50]


HEADERS = {
    "a message": b"\6\5\x11" + bytes(range(16)) + b"\1\x80",
    "a delimiter": b"\x09\xf0",
    "an end of sequence": b"\x0a",
    "filler": b"\x0c\xff\xff\x80",
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_packets_of_headers_alone_are_no_frames_and_no_damage(tmp_path, kind, suffix):
    """Cameras write them, each with a time of its own, here in the place of frames 33 and 35."""
    source = encode_clip(tmp_path / "right.mp4", options={"bf": "0", "x264-params": "scenecut=0"}, keyframe_interval=20)
    path, tick = tmp_path / f"headers.{suffix}", 512
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream, late = new.add_stream_from_template(old.streams.video[0]), 0
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if number in (33, 34):
                headers = av.Packet(len(HEADERS[kind]).to_bytes(4, "big") + HEADERS[kind])
                headers.pts = headers.dts = packet.pts + late
                headers.stream, headers.time_base, headers.duration = stream, packet.time_base, tick
                new.mux(headers)
                late += tick
            packet.pts, packet.dts, packet.stream = packet.pts + late, packet.dts + late, stream
            new.mux(packet)
    assert shown(path) == (list(range(60)), list(range(60)))
    clip = load_clip(path, FrameSampling("uniform", 2), 2.0, timeout_seconds=None)  # read from the last keyframe
    assert read_numbers(clip.frames) == clip.frame_indices == [48, 59] and clip.info.num_frames == 60


@pytest.mark.parametrize("interval", [1, 12])
def test_recovery_points_that_recover_gradually(tmp_path, interval):
    """With intra refresh, packets flagged as keyframes only begin to replace the picture."""
    params = {"x264-params": f"intra-refresh=1:keyint={interval * 10}:bframes=0:scenecut=0"}
    path = encode_clip(tmp_path / "refresh.mp4", options=params, keyframe_interval=interval * 10)
    assert shown(path) == (list(range(60)), list(range(60)))
    assert shown(path, 1.3, 1.6)[1] == list(range(33, 40))


# ---- fields of H.264: no encoder at hand writes them, so the test writes macroblocks of raw samples (I_PCM) ----------


class Bits:
    """A raw byte sequence payload of H.264."""

    def __init__(self, *fields):
        self.text = ""
        for field in fields:
            self.put(*field) if isinstance(field, tuple) else self.golomb(field)

    def put(self, value, width=1):
        self.text += f"{value:0{width}b}"

    def golomb(self, number):
        digits = f"{number + 1:b}"
        self.text += "0" * (len(digits) - 1) + digits

    def unit(self, header):
        """A network abstraction layer unit with its start code."""
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        data = int(text, 2).to_bytes(len(text) // 8, "big")
        escaped, zeros = bytearray([header]), 0
        for byte in data:
            if zeros == 2 and byte <= 3:
                escaped.append(3)
                zeros = 0
            escaped.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes(escaped)


def picture(luma, frame_number, field=None, is_first=False):
    """A picture of raw samples, uint8 (rows, columns): a frame, or the top (0) or bottom (1) field of one."""
    is_idr = is_first and field != 1
    bits = Bits(0, 7, 0, (frame_number % 16, 4))  # first macroblock, type I, parameter set, frame_num
    bits.put(field is not None)
    if field is not None:
        bits.put(field)
    if is_idr:
        bits.golomb(0)
        bits.put(0, 2)
    else:
        bits.put(0)
    bits.golomb(0)  # quantisation as it is
    bits.golomb(1)  # no deblocking
    for row in range(0, luma.shape[0], 16):
        for column in range(0, luma.shape[1], 16):
            bits.golomb(25)  # I_PCM
            bits.put(0, -(len(bits.text)) % 8) if len(bits.text) % 8 else None
            samples = luma[row : row + 16, column : column + 16].tobytes() + bytes([128]) * 128
            bits.put(int.from_bytes(samples, "big"), 8 * len(samples))
    return bits.unit(0x65 if is_idr else 0x21)


def write_fields(folder, in_fields, size=(64, 64), num_frames=60):
    """A Matroska file in which the frames `in_fields` are two packets, a field each."""
    height, width = size
    parameters = Bits((77, 8), (0, 8), (30, 8), 0, 0, 2, 1, (0,), width // 16 - 1, height // 32 - 1)
    for value in (0, 0, 1, 0, 0):  # not frames alone, not adaptive, direct 8 x 8, no cropping, no more
        parameters.put(value)
    pictures = Bits(0, 0, (0,), (0,), 0, 0, 0, (0,), (0, 2), 0, 0, 0, (1,), (0,), (0,))
    head = parameters.unit(0x67) + pictures.unit(0x68)
    packets = []
    for number in range(num_frames):
        luma = draw_number(number, *size)[:, :, 0]
        for field in (0, 1) if number in in_fields else (None,):
            rows = luma if field is None else luma[field::2]
            data = picture(np.ascontiguousarray(rows), number, field, number == 0)
            packets.append((data, number * 40 + 20 * (field or 0)))
    (folder / "raw.h264").write_bytes(head + b"".join(data for data, _ in packets))
    path = folder / "fields.mkv"
    with av.open(str(folder / "raw.h264")) as raw, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(raw.streams.video[0])
        for i, (data, milliseconds) in enumerate(packets):
            packet = av.Packet(head + data if i == 0 else data)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = milliseconds
            packet.is_keyframe = i == 0
            new.mux(packet)
    return path, len(packets)


@pytest.mark.parametrize("in_fields", [range(60), range(0, 60, 2), range(1, 60, 2), range(0)])
def test_fields_of_one_frame_in_packets_of_their_own(tmp_path, in_fields):
    path, num_packets = write_fields(tmp_path, in_fields)
    assert num_packets == 60 + len(in_fields)
    assert shown(path) == (list(range(60)), list(range(60)))
    clip = load_clip(path, FrameSampling("chat", 1), timeout_seconds=None)
    assert (clip.info.num_frames, clip.frame_indices) == (60, [0])


def test_fields_that_begin_in_the_middle(tmp_path):
    """With threads, FFmpeg marks the first such frame as corrupt, so that it may be an error, but no other frame."""
    path, _ = write_fields(tmp_path, range(30, 60))
    try:
        assert shown(path)[1] == list(range(60))
    except VideoError as error:
        assert "frame 30 of 60" in error.reason
    assert shown(path, 0, 1) == (list(range(25)), list(range(25)))
