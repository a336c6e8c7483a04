"""Pictures upright, in square pixels, and told where they look other than in a player. Frame i shows the number i."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from ffmpeg_truth import ffmpeg
from PIL import Image
from video_factory import encode_clip, read_numbers

from capkit.video import FrameSampling, load_clip

ONE = 0x10000
# Display matrix (a, b, c, d), how numpy makes the upright picture from the stored one, and what is told.
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), lambda x: x),
    "rotated by 90 degrees clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "rotated by 180 degrees": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "rotated by 90 degrees counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "rotated by 90 degrees clockwise, then mirrored": ((0, 1, 1, 0), lambda x: np.fliplr(np.rot90(x, -1))),
    "rotated by 180 degrees, then mirrored": ((1, 0, 0, -1), np.flipud),
    "rotated by 90 degrees counterclockwise, then mirrored": ((0, -1, -1, 0), lambda x: np.fliplr(np.rot90(x, 1))),
}


def corners(height=96, width=128):
    """A picture with another colour in each quarter."""
    picture = np.zeros((height, width, 3), np.uint8)
    colours = ((230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 20))
    for i, colour in enumerate(colours):
        rows = slice(0, height // 2) if i < 2 else slice(height // 2, None)
        columns = slice(0, width // 2) if i % 2 == 0 else slice(width // 2, None)
        picture[rows, columns] = colour
    return picture


def write(path, picture, num_frames=5, aspect=None, **colours):
    """A clip of one picture; `colours`: attributes of the codec context; returns its path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        if aspect:
            stream.sample_aspect_ratio = Fraction(aspect)
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_matrix(path, a, b, c, d):
    """Rewrite the display matrix of an MP4's track; parts are multiples of 1, as 16.16 numbers."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    struct.pack_into(
        ">9i", data, at, *(round(x * ONE) for x in (a, b)), 0, round(c * ONE), round(d * ONE), *[0] * 3, 1 << 30
    )
    path.write_bytes(data)


def crop_in_headers(path, width, height, right, down):
    """Let an MP4 or MOV show a part of its pictures, whose centre lies `right` and `down` of theirs."""
    data = bytearray(path.read_bytes())
    clean_aperture = struct.pack(">I4s4IiIiI", 40, b"clap", width, 1, height, 1, right, 1, down, 1)
    at = data.index(b"pasp") - 4  # among the boxes of the sample description
    for box in ("moov", "trak", "mdia", "minf", "stbl", "stsd", "avc1"):
        start = data.index(box.encode(), data.index(b"moov")) - 4
        struct.pack_into(">I", data, start, struct.unpack_from(">I", data, start)[0] + len(clean_aperture))
    data[at:at] = clean_aperture
    path.write_bytes(data)


def one_frame(path):
    clip = load_clip(path, FrameSampling("uniform", 1), timeout_seconds=None)
    return clip.frames[0], clip.info


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_eight_orientations(tmp_path, orientation):
    matrix, turn = ORIENTATIONS[orientation]
    path = write(tmp_path / "turned.mp4", corners())
    set_matrix(path, *matrix)
    frame, info = one_frame(path)
    expected = turn(corners())
    assert frame.shape == expected.shape == (info.height, info.width, 3)
    assert np.abs(frame.astype(int) - expected).mean() < 20
    assert (info.orientation, info.notes) == (orientation, [])


@pytest.mark.parametrize("matrix", [(0.8, 0.6, -0.6, 0.8), (1, 0.3, 0.3, 1), (1, 1, 1, 1)])
def test_a_matrix_that_is_no_quarter_turn(tmp_path, matrix):
    path = write(tmp_path / "askew.mp4", corners())
    set_matrix(path, *matrix)
    frame, info = one_frame(path)
    assert np.abs(frame.astype(int) - corners()).mean() < 20
    assert info.orientation == "unknown, shown as stored" and "no multiple of 90 degrees" in info.notes[0]


def test_the_turn_is_the_same_from_whichever_frame_is_read(tmp_path):
    """Of H.264, only keyframes may tell it."""
    path = encode_clip(tmp_path / "turned.h264.mp4", quarter_turns=1, size=(64, 96), keyframe_interval=20)
    for start in (0, 0.2, 1.0, 1.4):
        clip = load_clip(path, FrameSampling("uniform", 3), start, timeout_seconds=None)
        assert read_numbers(clip.frames) == clip.frame_indices


@pytest.mark.parametrize("codec, suffix", [("rawvideo", "avi"), ("rawvideo", "mov"), ("msrle", "avi"), ("png", "mkv")])
def test_palettes(tmp_path, codec, suffix):
    """AVI tells the palette with its first packet, and no more after a seek."""
    source, path = write(tmp_path / "colours.mp4", corners(), 50), tmp_path / f"palette.{suffix}"
    palette = "split[a][b];[a]palettegen[p];[b][p]paletteuse"
    assert ffmpeg("-i", source, "-vf", palette, "-c:v", codec, "-pix_fmt", "pal8", path)[0] == 0
    for window in ((0, None), (1.2, 1.9)):
        frame = load_clip(path, FrameSampling("uniform", 1), *window, timeout_seconds=None).frames[0]
        assert np.abs(frame.astype(int) - corners()).mean() < 20


def join(path, *parts):
    """One after the other, without encoding again; returns the path."""
    listing = path.with_suffix(".list")
    listing.write_text("".join(f"file '{part}'\n" for part in parts))
    assert ffmpeg("-f", "concat", "-safe", "0", "-i", listing, "-c", "copy", path)[0] == 0
    return path


@pytest.mark.parametrize("change", ["size", "aspect ratio", "orientation"])
def test_a_change_within_the_file_is_told(tmp_path, change):
    suffix = "ts" if change == "aspect ratio" else "mkv"
    aspect = {"aspect ratio": "2/1"}.get(change)
    first = write(tmp_path / f"first.{suffix}", corners(), 50)
    second = write(tmp_path / f"second.{suffix}", corners(*((64, 160) if change == "size" else (96, 128))), 50, aspect)
    if change == "orientation":
        upright, second = second, tmp_path / "turned.mkv"
        turn = ("-bsf:v", "h264_metadata=display_orientation=insert:rotate=180")
        assert ffmpeg("-i", upright, "-c", "copy", *turn, second)[0] == 0
    path = join(tmp_path / f"both.{suffix}", first, second)
    clip = load_clip(path, "chat", timeout_seconds=None)
    assert (
        clip.frames.shape == (5, 96, 128, 3) and clip.info.changes_shape and "changing its size" in clip.info.notes[0]
    )
    assert not load_clip(path, "chat", 0, 1.9, timeout_seconds=None).info.notes
    later = load_clip(path, "chat", 3, timeout_seconds=None)
    assert not later.info.notes
    expected = {"size": corners(64, 160), "orientation": np.rot90(corners(), 2)}
    wanted = expected.get(change, np.repeat(corners(), 2, axis=1))
    assert later.frames[0].shape == wanted.shape and np.abs(later.frames[0].astype(int) - wanted).mean() < 20


def test_vp8_of_another_size_than_its_container_says(tmp_path):
    """As browsers record it."""
    path = encode_clip(tmp_path / "lies.webm", codec="libvpx")
    data = bytearray(path.read_bytes())
    at = data.index(b"\xb0\x81\x80", data.index(bytes.fromhex("1654AE6B")))  # PixelWidth 128
    data[at + 2] = 64
    path.write_bytes(data)
    clip = load_clip(path, "uniform", timeout_seconds=None)
    assert clip.frames.shape[1:] == (96, 128, 3) and read_numbers(clip.frames) == clip.frame_indices


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_turned_vp8_and_vp9(tmp_path, codec):
    """Of these, only FFmpeg's own decoders tell it."""
    path = encode_clip(tmp_path / "turned.mkv", codec=codec, quarter_turns=1, size=(64, 96), keyframe_interval=20)
    clip = load_clip(path, "uniform", timeout_seconds=None)
    assert read_numbers(clip.frames) == clip.frame_indices and clip.frames.shape[1:3] == (64, 96)
    assert clip.info.orientation == "rotated by 90 degrees counterclockwise"


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_what_the_headers_crop_away_is_not_shown(tmp_path, suffix):
    """As the "clean aperture" of QuickTime: here 64 x 60 of 128 x 96 pixels, from column 48 and row 12 on."""
    source = path = write(tmp_path / "cropped.mp4", corners(), aspect="2/1")
    crop_in_headers(path, 64, 60, right=16, down=-6)
    set_matrix(path, 0, 1, -1, 0)
    if suffix != "mp4":
        path = tmp_path / f"cropped.{suffix}"
        assert ffmpeg("-i", source, "-c", "copy", path)[0] == 0
    frame, info = one_frame(path)
    expected = np.rot90(np.repeat(corners()[12:72, 48:112], 2, axis=1), -1)
    assert frame.shape == expected.shape == (128, 60, 3) == (info.height, info.width, 3)
    assert np.abs(frame.astype(int) - expected).mean() < 20


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("aspect, width", [("2/1", 256), ("1/2", 64), ("16/11", 186), ("1/1", 128)])
def test_pixels_are_made_square(tmp_path, suffix, aspect, width):
    path = write(tmp_path / f"wide.{suffix}", corners(), aspect=aspect)
    frame, info = one_frame(path)
    assert frame.shape == (96, width, 3) == (info.height, info.width, 3)
    assert info.sample_aspect_ratio == pytest.approx(float(Fraction(aspect))) and info.notes == []
    columns = np.arange(width) * 128 // width
    assert np.abs(frame.astype(int) - corners()[:, columns]).mean() < 20


def test_wide_pixels_of_a_turned_video(tmp_path):
    """They are wide as stored, so that the upright picture is high."""
    path = write(tmp_path / "turned.mp4", corners(), aspect="2/1")
    set_matrix(path, 0, 1, -1, 0)
    frame, info = one_frame(path)
    assert frame.shape == (256, 96, 3) and (info.height, info.width) == (256, 96)
    assert frame[10, 10].argmax() == 2 and frame[10, -10].argmax() == 0  # blue was below, red above


def test_pixels_that_cannot_be(tmp_path):
    frame, info = one_frame(write(tmp_path / "mad.mp4", corners(), aspect="30/1"))
    assert frame.shape == (96, 128, 3) and "impossible sample aspect ratio" in info.notes[0]


@pytest.mark.parametrize("transfer, hdr", [(16, "PQ"), (18, "HLG"), (1, None)])
def test_hdr_is_told(tmp_path, transfer, hdr):
    path = write(tmp_path / "hdr.mp4", corners(), color_trc=transfer, color_primaries=9 if hdr else 1, colorspace=1)
    _, info = one_frame(path)
    assert info.hdr == hdr and [note[:8] for note in info.notes] == ([f"HDR ({hdr})"[:8]] if hdr else [])
    assert ("hdr='" in repr(info)) == bool(hdr)


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("libx264", "ts"), ("mpeg2video", "mpg")])
def test_interlaced_video_is_told(tmp_path, codec, suffix):
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1"} if codec == "libx264" else {"flags": "+ildct+ilme"}
    path = encode_clip(tmp_path / f"fields.{suffix}", codec=codec, options=options, keyframe_interval=12)
    clip = load_clip(path, "uniform", timeout_seconds=None)
    assert read_numbers(clip.frames) == clip.frame_indices
    assert clip.info.interlaced and "interlaced" in clip.info.notes[0]
    plain = encode_clip(tmp_path / f"plain.{suffix}", codec=codec, keyframe_interval=12)
    assert not load_clip(plain, "uniform", timeout_seconds=None).info.interlaced


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("mpeg2video", "mpg")])
def test_interlaced_pixels_are_those_of_the_ffmpeg_program(tmp_path, codec, suffix):
    """Not with colours converted field by field."""
    path, rng = tmp_path / f"fields.{suffix}", np.random.default_rng(0)
    colours = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    options = {"flags": "+ildct+ilme", **({"x264-params": "tff=1"} if codec == "libx264" else {})}
    encode_clip(
        path, numbers=range(10), codec=codec, options=options, draw=lambda number, *size: np.roll(colours, number, 1)
    )
    clip = load_clip(path, "uniform", timeout_seconds=None)
    _, pixels, _ = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    theirs = np.frombuffer(pixels, np.uint8).reshape(clip.frames.shape)
    assert clip.info.interlaced and np.abs(clip.frames.astype(int) - theirs).mean() < 0.5


def test_the_notes_come_through_the_worker_process(tmp_path):
    path = write(tmp_path / "hdr.mp4", corners(), color_trc=16, color_primaries=9, colorspace=1)
    apart, here = (load_clip(path, timeout_seconds=limit).info for limit in (60, None))
    assert apart == here and apart.hdr == "PQ"


def test_other_video_streams_are_told(clips, tmp_path):
    two, covered, cover = tmp_path / "two.mkv", tmp_path / "cover.mp4", tmp_path / "cover.png"
    Image.new("RGB", (64, 64)).save(cover)
    both, plain = ("-map", "0:v", "-map", "1:v", "-c", "copy"), clips("plain.mp4")
    ffmpeg("-i", plain, "-i", clips("odd-size.mp4"), *both, two)
    ffmpeg("-i", plain, "-i", cover, *both, "-disposition:v:1", "attached_pic", covered)
    info = load_clip(two).info
    assert info.notes == ["one of 2 video streams in its file: the others are not seen"]
    assert (info.height, info.width) == (96, 128)
    assert load_clip(covered).info.notes == load_clip(plain).info.notes == []


@pytest.mark.parametrize("name, filter", [("b-frames.mp4", "h264_metadata"), ("hevc.mp4", "hevc_metadata")])
@pytest.mark.parametrize("left, right, top, bottom", [(16, 0, 8, 0), (2, 6, 0, 0), (34, 10, 2, 4)])
def test_what_the_bitstream_crops(clips, tmp_path, name, filter, left, right, top, bottom):
    """FFmpeg itself rounds the left edge to what its memory is aligned to, unless it is told not to."""
    crop = f"{filter}=crop_left={left}:crop_right={right}:crop_top={top}:crop_bottom={bottom}"
    code, _, log = ffmpeg("-i", clips(name), "-c", "copy", "-bsf:v", crop, tmp_path / "cropped.mp4")
    assert code == 0, log
    full = load_clip(clips(name), "uniform").frames
    height, width = full.shape[1:3]
    cropped = load_clip(tmp_path / "cropped.mp4", "uniform").frames
    assert np.array_equal(cropped, full[:, top : height - bottom, left : width - right])
