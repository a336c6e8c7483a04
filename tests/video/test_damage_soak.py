"""Thousands of damaged files: what is refused, what is read all the same, and what comes back wrong in silence."""

import collections
import random

import numpy as np
import pytest
from video_factory import encode_clip, packets

from capkit.video import ClipReader, FrameSampling, ReaderHung, ReaderLost, VideoError, load_clip

pytestmark = pytest.mark.soak

NUM_COPIES = 2000
WRONG = 10  # mean difference of a frame from the undamaged one, of 255
EVERY_FRAME = FrameSampling("uniform", num_frames=100_000)


def draw_scene(number, height, width):
    """uint8 (height, width, 3): a moving camera over a rough ground, moving squares and noise; a cut at frame 36."""
    rng = np.random.default_rng(number // 36)
    ground = np.kron(rng.normal(size=(24, 32)), np.ones((12, 12))) * 40 + rng.normal(size=(288, 384)) * 10
    y, x = int(40 + 30 * np.sin(number / 9)), 20 + 2 * (number % 36)
    view = 128 + ground[y : y + height, x : x + width]
    picture = np.stack([view, 0.8 * view + 20, 255 - 0.9 * view], axis=-1)
    for square in range(4):
        top = int(height * (0.4 + 0.35 * np.sin(number / (7 + square) + square)))
        left = int(width * (0.4 + 0.35 * np.cos(number / (6 + 2 * square) + square)))
        picture[top : top + 20, left : left + 20] = np.roll([220, 60, 30], square)
    picture += np.random.default_rng(1000 + number).normal(size=picture.shape) * 2.5
    return picture.clip(0, 255).astype(np.uint8)


X264 = {"bf": "3", "b-pyramid": "normal", "threads": "1"}
SETTINGS = {
    "draw": draw_scene,
    "size": (144, 176),
    "keyframe_interval": 20,
    "container_options": {"fflags": "+bitexact"},  # no random numbers in the file
}
# Settings of `encode_clip`, and the share of damaged copies that may come back wrong in silence.
FORMATS = {
    "h264.mp4": ({"options": X264}, 0.05),
    "h264-cavlc.mkv": ({"options": {"bf": "2", "coder": "0", "threads": "1"}}, 0.05),
    "h264.ts": ({"options": X264}, 0.05),
    "h264.flv": ({"options": {"bf": "2", "threads": "1"}}, 0.05),
    "hevc.mp4": ({"codec": "libx265", "options": {"x265-params": "log-level=none"}}, 0.33),
    "vp9.webm": ({"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "5"}}, 0.05),
    "vp8.webm": ({"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}, 0.33),
    "av1.mkv": ({"codec": "libsvtav1", "options": {"preset": "10"}}, 0.05),
    "mpeg4.avi": ({"codec": "mpeg4", "options": {"bf": "2"}}, 0.06),
    "mpeg2.mpg": ({"codec": "mpeg2video", "options": {"bf": "2"}}, 0.05),
    "motion-jpeg.avi": ({"codec": "mjpeg", "pix_fmt": "yuvj420p"}, 0.12),
    "palette.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, 0.55),
}


def bytes_of_frames(path):
    """bool (file size,): which bytes hold encoded frames; in transport streams also the headers among them."""
    inside = np.zeros(path.stat().st_size, bool)
    for _, position, size, _ in packets(path):
        if position is not None:  # FFmpeg does not know where some frames of a program stream begin
            inside[position : position + size] = True
    return inside


def change_bytes(data, places, rng):
    for place in places:
        data[place] ^= rng.randrange(1, 256)


def one_byte(data, inside, rng):
    """One byte of a frame."""
    change_bytes(data, [rng.choice(np.flatnonzero(inside))], rng)


def some_bits(data, inside, rng):
    """2 to 50 bits anywhere."""
    for _ in range(rng.choice([2, 10, 50])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def a_range(data, rng):
    start = rng.randrange(len(data))
    return slice(start, min(start + rng.choice([16, 200, 2000]), len(data)))


def zeros(data, inside, rng):
    """A range of zeros, as where a part was never downloaded."""
    place = a_range(data, rng)
    data[place] = bytes(place.stop - place.start)


def noise(data, inside, rng):
    """A range of noise."""
    place = a_range(data, rng)
    data[place] = rng.randbytes(place.stop - place.start)


def cut_short(data, inside, rng):
    """The end is missing."""
    del data[int(len(data) * rng.uniform(0.1, 0.95)) :]


def second_half_zeros(data, inside, rng):
    """Zeros from about the middle on."""
    start = int(len(data) * rng.uniform(0.3, 0.7))
    data[start:] = bytes(len(data) - start)


def header(data, inside, rng):
    """1 to 8 bytes that are not of a frame: headers, indexes, times."""
    places = np.flatnonzero(~inside)
    if not len(places):  # FFmpeg counts a GIF's header to its frames
        places = range(1000)
    change_bytes(data, rng.choices(places, k=rng.randint(1, 8)), rng)


DAMAGES = [one_byte, some_bits, zeros, noise, cut_short, second_half_zeros, header]


def outcome(path, whole, reader):
    """What reading the damaged copy of the clip `whole` comes to, and the error or the size of the difference."""
    try:
        clip = load_clip(path, EVERY_FRAME, timeout_seconds=30, reader=reader)
    except ReaderHung as error:
        return "hung", error
    except ReaderLost as error:
        return "crashed", error
    except VideoError as error:
        return "refused", error
    if clip.frames.shape[1:] != whole.frames.shape[1:]:
        return "wrong in silence", clip.frames.shape
    times, wanted = whole.timestamps_seconds, clip.timestamps_seconds
    nearest = np.abs(times[None] - wanted[:, None]).argmin(axis=1)
    differences = [
        np.abs(a.astype(np.int16) - whole.frames[i]).mean() for a, i in zip(clip.frames, nearest, strict=True)
    ]
    if max(differences) > WRONG:
        return "wrong in silence", max(differences)
    if len(clip) < 0.9 * len(whole):  # right as far as it goes
        return "shorter in silence", len(clip)
    return "equal", max(differences)


def print_table(title, counts, columns):
    print(f"\n{title:20s}" + "".join(f"{column:>20s}" for column in columns))
    for name, row in counts.items():
        print(f"{name:20s}" + "".join(f"{row[column]:20d}" for column in columns))


def test_soak_damage_is_an_error_and_never_a_hang(tmp_path):
    by_format, by_byte, by_damage, reasons, bad = ({} for _ in range(5))
    with ClipReader(memory_bytes=4 * 2**30) as reader:
        for name, (settings, _) in FORMATS.items():
            source = encode_clip(tmp_path / f"whole-{name}", **SETTINGS | settings)
            whole = load_clip(source, EVERY_FRAME, reader=reader)  # what is not damaged is not refused
            assert len(whole) == 60
            data, inside = source.read_bytes(), bytes_of_frames(source)
            for number in range(-(-NUM_COPIES // len(FORMATS))):
                damage, rng = DAMAGES[number % len(DAMAGES)], random.Random(f"{name} {number}")
                copy = bytearray(data)
                damage(copy, inside, rng)
                path = tmp_path / name
                path.write_bytes(copy)
                result, detail = outcome(path, whole, reader)
                if result == "refused":
                    kind = detail.reason.split(":")[0].split("(")[0].strip()
                    reasons[kind] = reasons.get(kind, 0) + 1
                elif result in ("hung", "crashed"):
                    bad[name, number] = detail
                elif "silence" in result:
                    print(f"{result}: {name}, copy {number}, {damage.__name__}: {detail}")
                by_format.setdefault(name, collections.Counter())[result] += 1
                by_damage.setdefault(damage.__name__, collections.Counter())[result] += 1
                if damage is one_byte:
                    by_byte.setdefault(name, collections.Counter())[result] += 1

    columns = ["refused", "equal", "wrong in silence", "shorter in silence", "hung", "crashed"]
    print_table("format", by_format, columns)
    print_table("one byte of a frame", by_byte, columns)
    print_table("damage", by_damage, columns)
    for kind, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"{count:6d} refused: {kind}")
    assert not bad
    for name, (_, most) in FORMATS.items():
        # H.264 is bounded as a whole: a container's share of it swings, as x264 does not write the same file each time.
        alike = [counts for other, counts in by_format.items() if other == name or (name[:4] == other[:4] == "h264")]
        assert sum(c["wrong in silence"] for c in alike) <= most * sum(c.total() for c in alike), name
