"""Which frame came back? The clips of these tests show in frame i the number i."""

import random

import av
import numpy as np
import pytest
from PIL import Image
from video_factory import (
    KINDS,
    cut,
    draw_number,
    encode_clip,
    encode_sound,
    packets,
    read_numbers,
    reason,
    trim_by_edit_list,
)

import capkit.video.reading
from capkit.video import FrameSampling, VideoError, load_clip

EVERY_FRAME = FrameSampling("uniform", num_frames=100_000)


@pytest.fixture(params=["from packets", "by decoding"])
def reader(request, monkeypatch):
    """Reads in this process, and learns the frames' times from packets where they tell them, or only by decoding."""
    if request.param == "by decoding":
        monkeypatch.setattr(capkit.video.reading, "_list_packets", lambda path: None)
    return lambda path, *args, **kwargs: load_clip(path, *args, timeout_seconds=None, **kwargs)


def pick(monkeypatch, indices):
    """Let load_clip read just these frames."""
    monkeypatch.setattr(FrameSampling, "frame_indices", lambda *args: list(indices))


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_shows_its_own_number(clips, reader, monkeypatch, name):
    path = clips(name)
    clip = reader(path, EVERY_FRAME)
    count = len(KINDS[name].get("numbers", range(60)))
    assert clip.frame_indices == read_numbers(clip.frames) == list(range(count))
    milliseconds = np.array(KINDS[name].get("milliseconds", [40 * i for i in range(count)]))
    assert np.allclose(clip.timestamps_seconds, (milliseconds - milliseconds[0]) / 1000, atol=1e-3)
    size = KINDS[name].get("size", (96, 128))
    assert (clip.info.height, clip.info.width) == clip.frames.shape[1:3] == size
    assert clip.info.path == str(path) and clip.info.num_frames == count
    for seed in range(8):  # a few frames far apart, in any order and with repeats: now seeking matters
        wanted = random.Random(seed).choices(range(count), k=5)
        pick(monkeypatch, wanted)
        assert read_numbers(reader(path).frames) == wanted


def test_the_same_as_decord_on_ordinary_files(clips):
    """Frames, times and rate are to the last bit those of the original tool, which reads with decord."""
    decord = pytest.importorskip("decord")
    for name in ("plain.mp4", "b-frames.mp4", "sound.mkv", "vp9.webm", "turned.mp4", "odd-size.mp4", "uneven.mkv"):
        clip = load_clip(clips(name), "uniform", timeout_seconds=None)
        theirs = decord.VideoReader(str(clips(name)))
        assert np.array_equal(theirs.get_batch(clip.frame_indices).asnumpy(), clip.frames), name
        assert np.array_equal(theirs.get_frame_timestamp(clip.frame_indices)[:, 0], clip.timestamps_seconds), name
        assert (theirs.get_avg_fps(), len(theirs)) == (clip.info.average_fps, clip.info.num_frames)


def test_decord_that_is_late_by_a_few_frames_in_a_still_scene(tmp_path):
    """Most of the picture is the same then; decord is 12 frames late in this recording."""
    pytest.importorskip("decord")

    def draw(number, height, width):
        picture = np.full((height, width, 3), 120, np.uint8)
        picture[40:60, 2 * number : 2 * number + 20] = 255
        return picture

    settings = {"codec": "mpeg2video", "options": {"bf": "2"}, "keyframe_interval": 12, "size": (240, 320)}
    path = encode_clip(tmp_path / "late.ts", numbers=range(120), draw=draw, **settings)
    clip = load_clip(path, "chat", timeout_seconds=None)
    places = [int(np.flatnonzero(frame[50, :, 0] > 200).min()) for frame in clip.frames]
    assert np.allclose(places, [2 * index for index in clip.frame_indices], atol=1)
    words = reason(load_clip, path, FrameSampling("chat", decoder="decord"), timeout_seconds=None)
    assert words.startswith("decord gives another picture for frame")


def test_a_rate_that_is_a_unit_of_time_is_not_believed(tmp_path):
    """FFmpeg says 60000 frames a second of raw DV."""
    path = encode_clip(tmp_path / "camcorder.dv", numbers=range(30), codec="dvvideo", size=(576, 720))
    clip = load_clip(path, "base", timeout_seconds=None)
    assert clip.info.average_fps == pytest.approx(25) and read_numbers(clip.frames) == clip.frame_indices


def test_decord_where_it_gives_the_same_frames_and_nowhere_else(clips):
    """decord counts frames, which silently fails on open groups, hidden frames, transport streams and AVI B-frames."""
    pytest.importorskip("decord")
    for name in ("plain.mp4", "b-frames.mp4", "fragments.mp4", "uneven.mp4", "vp9.webm", "turned.mp4"):
        sampling = FrameSampling("uniform", decoder="decord")
        clip = load_clip(clips(name), sampling)
        assert read_numbers(clip.frames) == clip.frame_indices and clip.frame_sampling == sampling
    for name in ("open-groups.mp4", "open-groups.mkv", "open-groups.ts", "h264.avi", "mpeg2.mpg"):
        words = reason(load_clip, clips(name), FrameSampling("uniform", decoder="decord"))
        assert "decord gives" in words or "decord cannot read it" in words


def test_what_an_edit_list_cuts_away_is_not_shown_and_not_missing(tmp_path, reader, monkeypatch):
    path = encode_clip(tmp_path / "edited.mp4", options={"bf": "2"}, keyframe_interval=20)
    trim_by_edit_list(path, first=30, count=25)
    clip = reader(path, EVERY_FRAME)
    assert read_numbers(clip.frames) == list(range(30, 55))
    assert clip.frame_indices == list(range(25)) and clip.timestamps_seconds[0] == 0
    assert clip.info.num_frames == 25 and clip.info.duration_seconds == pytest.approx(1.0)
    pick(monkeypatch, [3, 20])
    assert read_numbers(reader(path).frames) == [33, 50]


def test_headers_that_change_within_an_flv(tmp_path, reader, monkeypatch):
    """As where a streaming encoder starts again: the new ones come once, in a tag that seeking passes over."""
    parts = [
        encode_clip(tmp_path / "1.flv", range(50), options={"bf": "0"}, keyframe_interval=12),
        encode_clip(tmp_path / "2.flv", range(50, 100), options={"profile": "baseline"}, keyframe_interval=12),
    ]
    data = bytearray(parts[0].read_bytes()[:13])
    for number, part in enumerate(parts):
        tags, at = part.read_bytes(), 13
        while at < len(tags):
            size = int.from_bytes(tags[at + 1 : at + 4], "big") + 15
            tag = bytearray(tags[at : at + size])
            tag[4:7] = (int.from_bytes(tag[4:7], "big") + 2000 * number).to_bytes(3, "big")
            is_end = tag[0] == 9 and tag[11] & 15 == 7 and tag[12] == 2
            data += b"" if tag[0] == 18 or is_end else tag  # without metadata: they are of one part
            at += size
    path = tmp_path / "both.flv"
    path.write_bytes(data)
    assert read_numbers(reader(path, EVERY_FRAME).frames) == list(range(100))
    pick(monkeypatch, [3, 70, 95])
    assert read_numbers(reader(path).frames) == [3, 70, 95]


def test_pictures_that_are_never_shown_are_not_counted(clips, tmp_path, reader, monkeypatch):
    source = clips("vp8.webm")
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packet = list(container.demux(video=0))[31]
    at = data.index(bytes(packet), packet.pos)
    data[at] &= ~0x10  # VP8's flag "show this frame", which alternate references lack
    path = tmp_path / "hidden.webm"
    path.write_bytes(data)
    clip = reader(path, EVERY_FRAME)
    assert read_numbers(clip.frames) == [*range(31), *range(32, 60)] and clip.info.num_frames == 59
    pick(monkeypatch, [30, 31, 50])
    assert read_numbers(reader(path).frames) == [30, 32, 51]


@pytest.mark.parametrize(
    "tag, orientation, turn",
    [
        (1, "upright", lambda picture: picture),
        (3, "rotated by 180 degrees", lambda picture: np.rot90(picture, 2)),
        (6, "rotated by 90 degrees clockwise", lambda picture: np.rot90(picture)),
    ],
)
def test_motion_jpeg_with_exif_tags(tmp_path, reader, tag, orientation, turn):
    """FFmpeg gives the tags as data of a kind that PyAV does not know, and turns the picture by them."""
    path, exif = tmp_path / "tagged.mjpeg", Image.Exif()
    exif[0x112] = tag
    with path.open("wb") as file:
        for number in range(10):
            Image.fromarray(np.ascontiguousarray(turn(draw_number(number)))).save(file, "JPEG", exif=exif)
    clip = reader(path, EVERY_FRAME)
    assert clip.info.orientation == orientation
    assert read_numbers(clip.frames) == list(range(10))


def test_windows_keep_the_files_numbers_and_times(clips, reader):
    path = clips("window.mp4", numbers=range(250), fps=10, keyframe_interval=100)
    clip = reader(path, "chat", start_seconds=12.5, end_seconds=16.5)
    assert clip.frame_indices == read_numbers(clip.frames) == [125, 135, 145, 155, 164]
    assert np.allclose(clip.timestamps_seconds, [12.5, 13.5, 14.5, 15.5, 16.4])
    assert (clip.start_seconds, clip.end_seconds, clip.frame_sampling) == (12.5, 16.5, FrameSampling("chat"))
    clip = reader(path, "chat", start_seconds=12.5, end_seconds=16.0)
    assert clip.one_frame_a_second  # counted from the window's start
    assert not reader(path, "uniform").one_frame_a_second
    with pytest.raises(VideoError) as caught:
        reader(path, start_seconds=100, end_seconds=101)
    assert "no frame starts between 100 s and 101 s; the video lasts 25 s" in str(caught.value)


LONG = {"numbers": range(9000), "fps": 15, "size": (64, 64), "keyframe_interval": 250}
LONG["options"] = {"preset": "ultrafast", "x264-params": "scenecut=0:keyint=250:min-keyint=250:bframes=2"}


def test_ten_minutes_under_load_give_the_right_24_frames(clips, reader, cpu_load):
    path = clips("ten-minutes.mp4", **LONG)
    assert [i for i, packet in enumerate(packets(path)) if packet[3]] == list(range(0, 9000, 250))
    clip = reader(path, "uniform")
    assert len(clip) == 24 and clip.info.duration_seconds == pytest.approx(600)
    assert read_numbers(clip.frames) == clip.frame_indices
    clip = reader(path, FrameSampling("fps", 24, 1), start_seconds=400)
    assert read_numbers(clip.frames) == clip.frame_indices == list(range(6000, 6360, 15))


@pytest.mark.soak
def test_soak_the_right_frames_under_load(clips, cpu_load, monkeypatch):
    path, rounds, wrong = clips("ten-minutes.mp4", **LONG), 40, 0
    for seed in range(rounds):
        wanted = sorted(random.Random(seed).sample(range(9000), 24))
        pick(monkeypatch, wanted)
        shown = read_numbers(load_clip(path, timeout_seconds=None).frames)
        wrong += sum(a != b for a, b in zip(shown, wanted, strict=True))
    print(f"{rounds} rounds of 24 frames under load: {wrong} wrong")
    assert wrong == 0


# ---- bad files -------------------------------------------------------------------------------------------------------


def test_not_a_video(tmp_path, reader):
    (tmp_path / "text.mp4").write_text("a film about nothing\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(50_000))
    for name in ("text.mp4", "noise.mp4"):
        assert "not a video" in reason(reader, tmp_path / name)
    assert "no video stream, only sound" in reason(reader, encode_sound(tmp_path / "sound.m4a"))
    assert "no video stream, only sound" in reason(reader, encode_sound(tmp_path / "sound.mp4"))


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_cut_short_with_the_index_at_the_end(clips, tmp_path, reader, fraction):
    path = cut(clips("b-frames.mp4"), tmp_path / "cut.mp4", fraction)
    words = reason(reader, path)
    assert "the end of the file is probably missing" in words or "cut short: it should have" in words
    assert "incomplete download?" in words


def test_cut_short_within_the_index_at_the_end(clips, tmp_path, reader):
    """FFmpeg alone would use the rest of the index, or another stream if the file has several."""
    data = clips("sound.mp4", audio=True).read_bytes()
    path = tmp_path / "cut.mp4"
    for end in range(data.index(b"moov") + 4, len(data), 150):
        path.write_bytes(data[:end])
        assert "cut short: it should have" in reason(reader, path)


@pytest.mark.parametrize("lost", [1, 100, 1500])
def test_cut_short_with_the_index_in_front(clips, tmp_path, reader, lost):
    data = clips("front.mp4", container_options={"movflags": "faststart"}, keyframe_interval=20).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[:-lost])
    words = reason(reader, path, EVERY_FRAME)
    assert "cut short: its index promises 60 frames, the file holds" in words
    assert 0 <= int(words.split("holds ")[1].split()[0]) < 60
    assert "cut short" in reason(reader, path, FrameSampling("chat", 1))  # even if the wanted frame is there


@pytest.mark.parametrize("name", ["sound.mkv", "vp9.webm", "h264.avi", "motion-jpeg.avi"])
def test_cut_short_in_other_containers(clips, tmp_path, reader, name):
    path = cut(clips(name), tmp_path / name, 0.7)
    assert "cut short: it should have" in reason(reader, path)


def test_cut_short_in_the_middle_of_fragments(clips, tmp_path, reader):
    path = cut(clips("fragments.mp4"), tmp_path / "cut.mp4", 0.97)
    assert "cut short" in reason(reader, path, EVERY_FRAME) or "missing" in reason(reader, path, EVERY_FRAME)


def test_a_live_stream_of_unknown_length_is_not_cut_short(tmp_path, clips, reader):
    data = bytearray(clips("sound.mkv").read_bytes())
    at = data.index(b"\x18S\x80g") + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7  # as written when the end is not known
    (tmp_path / "live.mkv").write_bytes(data)
    assert read_numbers(reader(tmp_path / "live.mkv", EVERY_FRAME).frames) == list(range(60))


def test_junk_after_the_end_does_no_harm(tmp_path, clips, reader):
    for name in ("plain.mp4", "vp9.webm", "motion-jpeg.avi"):
        path = tmp_path / name
        path.write_bytes(clips(name).read_bytes() + b"junk" * 500)
        assert read_numbers(reader(path, FrameSampling("uniform", 3)).frames) == [0, 29, 59]


def test_frames_that_do_not_decode_are_an_error(clips, tmp_path, monkeypatch):
    source = clips("damage.mp4", options={"bf": "0", "x264-params": "scenecut=0"}, keyframe_interval=20)
    data = bytearray(source.read_bytes())
    _, position, size, _ = packets(source)[25]
    data[position : position + size] = bytes(size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    for index in (25, 30):  # the frame itself, and one that refers to it
        pick(monkeypatch, [3, index])
        assert f"frame {index} of 60" in reason(load_clip, path, timeout_seconds=None)
    pick(monkeypatch, [3, 19, 24, 40, 59])
    # Before the damage, and from the next keyframe on.
    assert read_numbers(load_clip(path, timeout_seconds=None).frames) == [3, 19, 24, 40, 59]
    with monkeypatch.context() as patch:  # without the packets' times, later frames cannot be counted
        patch.setattr(capkit.video.reading, "_list_packets", lambda path: None)
        assert "after frame 24, decoding ends in" in reason(load_clip, path, timeout_seconds=None)


def test_a_stream_without_frames(tmp_path, clips, reader):
    source = clips("fragments.mp4").read_bytes()
    path = tmp_path / "header.mp4"
    path.write_bytes(source[: source.index(b"moof") - 4])
    assert "holds no frames" in reason(reader, path) or "not a video" in reason(reader, path)
