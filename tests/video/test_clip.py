"""Which frame came back? The clips of these tests show in frame i the number i."""

import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import av
import numpy as np
import pytest
from paths import DATA, ROOT
from video_factory import cut, damage, encode_clip, encode_sound, packets, read_numbers, trim_by_edit_list

import capkit.video.clip
from capkit.video import Clip, ClipReader, FrameSampling, ReaderLost, VideoError, VideoInfo, load_clip
from capkit.video.sampling import base_indices, chat_indices, fps_indices, uniform_indices

GOLDEN = json.loads((DATA / "sampling.json").read_text())
EVERY_FRAME = FrameSampling("uniform", num_frames=100_000)
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:b-adapt=0"}
QUIET_X265 = {"x265-params": "log-level=none"}


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """name -> path, encoded when first asked for."""
    folder, made = tmp_path_factory.mktemp("clips"), {}

    def make(name, **settings):
        if name not in made:
            made[name] = encode_clip(folder / name, **settings)
        return made[name]

    return make


@pytest.fixture(params=["decord", "PyAV"])
def reader(request, monkeypatch):
    """Reads with decord first, as where it has a wheel, or with PyAV alone, in this process."""
    if request.param == "decord" and importlib.util.find_spec("decord") is None:
        pytest.skip("decord has no wheel here")
    if request.param == "PyAV":
        monkeypatch.setattr(capkit.video.reading, "_import_decord", lambda path: None)
    return lambda path, *args, **kwargs: load_clip(path, *args, timeout_seconds=None, **kwargs)


# ---- which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_chat_and_base_choose_what_the_original_chooses(case):
    times, fps = case["timestamps"], case["average_fps"]
    assert chat_indices(times) == case["chat"]
    assert base_indices(len(times), fps) == case["base"]
    assert FrameSampling("chat").frame_indices(times, fps) == case["chat"]
    assert FrameSampling("base").frame_indices(times, fps) == case["base"]


def test_chat_takes_the_first_of_equally_near_frames():
    assert chat_indices([0.0, 0.5, 1.5]) == [0, 1, 2]  # round(1.5) = 2; 0.5 and 1.5 are as far from 1
    assert chat_indices([0.0, 0.5]) == [0]  # round(0.5) = 0
    assert chat_indices([0, 1, 2, 3], num_frames=2) == [0, 1]


def test_base_never_counts_below_the_first_frame():
    assert base_indices(10, 1 / 120, num_frames=3) == [0, 0, 0]  # int(60 / 120) = 0 frames in the first minute
    assert base_indices(600, 5, num_frames=3) == [0, 149, 299]


def test_uniform_spreads_over_time_and_repeats_nothing():
    assert uniform_indices([0, 1, 2, 3, 4, 5, 6, 7, 8], num_frames=3) == [0, 4, 8]
    assert uniform_indices([0, 0.1, 0.2, 0.3, 10], num_frames=3) == [0, 3, 4]  # by time, not by count
    assert uniform_indices([0, 0.1, 0.2, 0.3, 100], num_frames=4) == [0, 3, 4]  # two times fall on one frame
    assert uniform_indices([5.0, 6.0], num_frames=24) == [0, 1]
    assert uniform_indices([5.0, 6.0], num_frames=1) == [0]


def test_fps_takes_one_frame_a_tick():
    times = np.arange(100) / 10
    assert fps_indices(times, 2, num_frames=5) == [0, 5, 10, 15, 20]
    assert fps_indices(times, 1) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert fps_indices(times, 0.25) == [0, 40, 80]
    assert fps_indices(times, 1e12, num_frames=4) == [0, 1, 2, 3]  # faster than the video: each frame once, and soon
    assert fps_indices([0.0, 3.0, 3.5], 1) == [0, 1]  # ticks 0, 1 and 2, 3: no repeats
    assert fps_indices([7.0], 1) == [0]


def test_fps_equals_the_rule_spelt_out():
    rng = np.random.default_rng(0)
    for _ in range(200):
        times = np.sort(rng.uniform(0, 5, rng.integers(1, 30)))
        rate = float(rng.choice([0.3, 1, 2.5, 10, 30]))
        expected = []
        for tick in np.arange(0, times[-1] + 1e-6, 1 / rate):
            nearest = int(np.abs(times - tick).argmin())
            if nearest not in expected:
                expected.append(nearest)
        assert fps_indices(times, rate, num_frames=1000) == expected


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: chat_indices([]), "timestamps_seconds"),
        (lambda: chat_indices([0.0, float("nan")]), "timestamps_seconds"),
        (lambda: chat_indices([0.0], num_frames=0), "num_frames must be a whole number"),
        (lambda: uniform_indices([0.0], num_frames=2.0), "num_frames must be a whole number"),
        (lambda: base_indices(0, 25.0), "num_video_frames"),
        (lambda: base_indices(10, 0.0), "average_fps"),
        (lambda: base_indices(10, float("nan")), "average_fps"),
        (lambda: fps_indices([0.0], -1), "frames_per_second must be a positive number"),
        (lambda: FrameSampling("chatty"), "'chatty'; choose one of chat, base, uniform, fps"),
        (lambda: FrameSampling("chat", num_frames=True), "num_frames"),
        (lambda: FrameSampling("fps"), "frames_per_second must be a positive number; got None"),
        (lambda: FrameSampling("chat", frames_per_second=2), "frames_per_second has no effect"),
        (lambda: FrameSampling.of({"strategy": "fps", "rate": 2}), "strategy"),
        (lambda: FrameSampling.of({"num_frames": 2}), "strategy"),
        (lambda: FrameSampling.of(24), "24; choose one of"),
        (lambda: FrameSampling("chat").frame_indices([0.0], 25, start_seconds=-1), "start_seconds"),
        (lambda: FrameSampling("chat").frame_indices([0.0], 25, start_seconds=2, end_seconds=2), "end_seconds"),
    ],
)
def test_nonsense_is_an_error_that_names_it(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


def test_frame_sampling_from_name_dict_and_itself():
    sampling = FrameSampling("fps", num_frames=8, frames_per_second=2)
    assert FrameSampling.of(sampling) is sampling
    assert FrameSampling.of({"strategy": "fps", "num_frames": 8, "frames_per_second": 2}) == sampling
    assert FrameSampling.of("base") == FrameSampling("base", 24, None)
    assert json.dumps(FrameSampling("base", np.int64(3)).num_frames) == "3"


def test_a_window_is_half_open_and_counts_from_its_start():
    times = np.arange(100) / 10
    assert FrameSampling("chat").frame_indices(times, 10, 2.5, 5.5) == [25, 35, 45, 54]  # 5.5 itself is outside
    assert FrameSampling("base", 3).frame_indices(times, 10, 2.5, 5.6) == [25, 40, 55]
    assert FrameSampling("uniform", 3).frame_indices(times, 10, 2.5, 5.6) == [25, 40, 55]
    assert FrameSampling("fps", 24, 1).frame_indices(times, 10, start_seconds=7.5) == [75, 85, 95]
    assert FrameSampling("chat").frame_indices(times, 10, 50, 60) == []


# ---- the clip --------------------------------------------------------------------------------------------------------


def test_frames_in_memory_become_a_clip():
    frames = np.zeros((3, 4, 6, 3), np.uint8)
    clip = Clip.from_frames(frames)
    assert len(clip) == 3 and clip.frame_indices == [0, 1, 2] and clip.timestamps_seconds.tolist() == [0, 1, 2]
    assert clip.timestamps_seconds.dtype == np.float64
    assert clip.info == VideoInfo(None, 3, 1.0, 3.0, 4, 6, None)
    assert clip.one_frame_a_second
    clip = Clip.from_frames(list(frames), [0.0, 0.5, 2.0])
    assert clip.frames.shape == (3, 4, 6, 3) and not clip.one_frame_a_second
    assert Clip.from_frames(frames[:1]).info.duration_seconds == 1


def test_tensors_become_a_clip():
    torch = pytest.importorskip("torch")
    frames = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3)
    for given in (frames, list(frames)):
        assert np.array_equal(Clip.from_frames(given).frames, frames.numpy())


def test_a_clip_prints_shapes_not_pixels():
    text = repr(Clip.from_frames(np.zeros((30, 40, 60, 3), np.uint8)))
    assert "(30, 40, 60, 3)" in text and "0.00 to 29.00 s" in text and len(text) < 300


@pytest.mark.parametrize(
    "frames, times, words",
    [
        (np.zeros((2, 4, 6, 3)), None, "must be uint8"),
        (np.zeros((2, 3, 4, 6), np.uint8), None, "channels first"),
        (np.zeros((4, 6, 3), np.uint8), None, "frames[None]"),
        (np.zeros((2, 4, 6, 1), np.uint8), None, "(2, 4, 6, 1)"),
        (np.zeros((0, 4, 6, 3), np.uint8), None, "none of them 0"),
        ([], None, "no frames"),
        ([np.zeros((4, 6, 3), np.uint8), np.zeros((4, 8, 3), np.uint8)], None, "one shape"),
        (np.zeros((2, 4, 6, 3), np.uint8), [0.0], "2 frames need 2 timestamps"),
        (np.zeros((2, 4, 6, 3), np.uint8), [1.0, 0.5], "never decrease"),
        (np.zeros((2, 4, 6, 3), np.uint8), [-1.0, 0.5], "not negative"),
        (np.zeros((2, 4, 6, 3), np.uint8), [0.0, float("inf")], "finite"),
    ],
)
def test_frames_of_the_wrong_kind_are_an_error(frames, times, words):
    with pytest.raises(ValueError) as caught:
        Clip.from_frames(frames, times)
    assert words in str(caught.value)


def test_a_clip_checks_that_its_parts_fit():
    frames, info = np.zeros((2, 4, 6, 3), np.uint8), VideoInfo(None, 2, 1.0, 2.0, 4, 6, None)
    with pytest.raises(ValueError, match="frame indices"):
        Clip(frames, [0], np.zeros(2), info)
    with pytest.raises(ValueError, match="timestamps"):
        Clip(frames, [0, 1], np.zeros(3), info)


def test_a_video_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "no such file")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "no such file", "a.mp4: no such file")


# ---- the right frames ------------------------------------------------------------------------------------------------

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


def pick(monkeypatch, indices):
    """Let load_clip read just these frames."""
    monkeypatch.setattr(FrameSampling, "frame_indices", lambda *args: list(indices))


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_shows_its_own_number(clips, reader, monkeypatch, name):
    path = clips(name, **KINDS[name])
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


def test_both_readers_give_the_same_clip(clips, monkeypatch):
    decord = pytest.importorskip("decord")
    for name in ("plain.mp4", "b-frames.mp4", "sound.mkv", "vp9.webm", "turned.mp4", "odd-size.mp4", "uneven.mkv"):
        path = clips(name, **KINDS[name])
        by_decord = load_clip(path, "uniform", timeout_seconds=None)
        with monkeypatch.context() as patch:
            patch.setattr(capkit.video.reading, "_import_decord", lambda path: None)
            by_av = load_clip(path, "uniform", timeout_seconds=None)
        assert np.array_equal(by_decord.frames, by_av.frames), name
        assert by_decord.info == by_av.info and by_decord.frame_indices == by_av.frame_indices
        reported = decord.VideoReader(str(path))
        times = reported.get_frame_timestamp(by_av.frame_indices)[:, 0]
        assert np.array_equal(times, by_av.timestamps_seconds), name  # to the last bit
        assert reported.get_avg_fps() == by_av.info.average_fps


def test_decord_is_the_reader_where_it_is_exact_and_nowhere_else(clips, monkeypatch):
    """It counts frames, which fails in silence on open groups, hidden frames, transport streams and B-frames in AVI."""
    decord = pytest.importorskip("decord")
    read = []

    class Reader(decord.VideoReader):
        def __init__(self, path):
            self.path = path
            super().__init__(path)

        def get_batch(self, indices):
            read.append(Path(self.path).name)
            return super().get_batch(indices)

    monkeypatch.setattr(decord, "VideoReader", Reader)
    for name in KINDS:
        load_clip(clips(name, **KINDS[name]), timeout_seconds=None)
    exact = {"plain.mp4", "b-frames.mp4", "fragments.mp4", "index-first.mp4", "uneven.mp4", "vp9.webm", "turned.mp4"}
    inexact = {
        "open-groups.mp4",
        "open-groups.mkv",
        "open-groups.ts",
        "hevc.mp4",
        "b-frames.ts",
        "h264.avi",
        "mpeg2.mpg",
    }
    assert exact <= set(read) and not inexact & set(read)


def test_what_an_edit_list_cuts_away_is_not_shown_and_not_missing(tmp_path, reader, monkeypatch):
    path = encode_clip(tmp_path / "edited.mp4", options={"bf": "2"}, keyframe_interval=20)
    trim_by_edit_list(path, first=30, count=25)
    clip = reader(path, EVERY_FRAME)
    assert read_numbers(clip.frames) == list(range(30, 55))
    assert clip.frame_indices == list(range(25)) and clip.timestamps_seconds[0] == 0
    assert clip.info.num_frames == 25 and clip.info.duration_seconds == pytest.approx(1.0)
    pick(monkeypatch, [3, 20])
    assert read_numbers(reader(path).frames) == [33, 50]


def test_pictures_that_are_never_shown_are_not_counted(clips, tmp_path, reader, monkeypatch):
    source = clips("vp8.webm", **KINDS["vp8.webm"])
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


@pytest.fixture
def cpu_load():
    """Twice as many busy processes as there are processors."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for process in busy:
        process.kill()
        process.wait()


def test_ten_minutes_under_load_give_the_right_24_frames(clips, reader, cpu_load):
    path = clips("ten-minutes.mp4", **LONG)
    assert [i for i, packet in enumerate(packets(path)) if packet[3]] == list(range(0, 9000, 250))
    clip = reader(path, "uniform")
    assert len(clip) == 24 and clip.info.duration_seconds == pytest.approx(600)
    assert read_numbers(clip.frames) == clip.frame_indices
    clip = reader(path, FrameSampling("fps", 24, 1), start_seconds=400)
    assert read_numbers(clip.frames) == clip.frame_indices == list(range(6000, 6360, 15))


@pytest.mark.soak
def test_soak_the_right_frames_under_load(clips, reader, cpu_load, monkeypatch):
    path, rounds, wrong = clips("ten-minutes.mp4", **LONG), 40, 0
    for seed in range(rounds):
        wanted = sorted(random.Random(seed).sample(range(9000), 24))
        pick(monkeypatch, wanted)
        wrong += sum(a != b for a, b in zip(read_numbers(reader(path).frames), wanted, strict=True))
    print(f"{rounds} rounds of 24 frames under load: {wrong} wrong")
    assert wrong == 0


# ---- bad files -------------------------------------------------------------------------------------------------------


def reason(call, *args, **kwargs):
    with pytest.raises(VideoError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def test_no_file_a_folder_an_empty_file(tmp_path):
    assert reason(load_clip, tmp_path / "gone.mp4") == "no such file"
    assert "folder" in reason(load_clip, tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "empty" in reason(load_clip, tmp_path / "empty.mp4")


def test_not_a_video(tmp_path, reader):
    (tmp_path / "text.mp4").write_text("a film about nothing\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(50_000))
    for name in ("text.mp4", "noise.mp4"):
        assert "not a video" in reason(reader, tmp_path / name)
    assert "no video stream, only sound" in reason(reader, encode_sound(tmp_path / "sound.m4a"))
    assert "no video stream, only sound" in reason(reader, encode_sound(tmp_path / "sound.mp4"))


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_cut_short_with_the_index_at_the_end(clips, tmp_path, reader, fraction):
    path = cut(clips("b-frames.mp4", **KINDS["b-frames.mp4"]), tmp_path / "cut.mp4", fraction)
    words = reason(reader, path)
    assert "the end of the file is probably missing" in words or "cut short: it should have" in words
    assert "incomplete download?" in words


def test_cut_short_within_the_index_at_the_end(clips, tmp_path, reader):
    """FFmpeg alone would make do with what is left of the index, and with another stream where it holds several."""
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
    path = cut(clips(name, **KINDS[name]), tmp_path / name, 0.7)
    assert "cut short: it should have" in reason(reader, path)


def test_cut_short_in_the_middle_of_fragments(clips, tmp_path, reader):
    path = cut(clips("fragments.mp4", **KINDS["fragments.mp4"]), tmp_path / "cut.mp4", 0.97)
    assert "cut short" in reason(reader, path, EVERY_FRAME) or "missing" in reason(reader, path, EVERY_FRAME)


def test_a_live_stream_of_unknown_length_is_not_cut_short(tmp_path, clips, reader):
    data = bytearray(clips("sound.mkv", **KINDS["sound.mkv"]).read_bytes())
    at = data.index(b"\x18S\x80g") + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7  # as written when the end is not known
    (tmp_path / "live.mkv").write_bytes(data)
    assert read_numbers(reader(tmp_path / "live.mkv", EVERY_FRAME).frames) == list(range(60))


def test_junk_after_the_end_does_no_harm(tmp_path, clips, reader):
    for name in ("plain.mp4", "vp9.webm", "motion-jpeg.avi"):
        path = tmp_path / name
        path.write_bytes(clips(name, **KINDS[name]).read_bytes() + b"junk" * 500)
        assert read_numbers(reader(path, FrameSampling("uniform", 3)).frames) == [0, 29, 59]


def test_frames_that_do_not_decode_are_an_error(clips, tmp_path, reader, monkeypatch):
    source = clips("damage.mp4", options={"bf": "0", "x264-params": "scenecut=0"}, keyframe_interval=20)
    data = bytearray(source.read_bytes())
    _, position, size, _ = packets(source)[25]
    data[position : position + size] = bytes(size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    for index in (25, 30):  # the frame itself, and one that refers to it
        pick(monkeypatch, [3, index])
        assert f"frame {index} of 60" in reason(reader, path) and "cannot be decoded" in reason(reader, path)
    pick(monkeypatch, [3, 19, 24, 40, 59])
    assert read_numbers(reader(path).frames) == [3, 19, 24, 40, 59]  # before the damage, and from the next keyframe on


def test_a_stream_without_frames(tmp_path, clips, reader):
    source = clips("fragments.mp4", **KINDS["fragments.mp4"]).read_bytes()
    path = tmp_path / "header.mp4"
    path.write_bytes(source[: source.index(b"moof") - 4])
    assert "holds no frames" in reason(reader, path) or "not a video" in reason(reader, path)


# ---- decord2 ---------------------------------------------------------------------------------------------------------


def fake_decord(folder, reading, version="0.6.0", importing="pass"):
    """A package `decord` in `folder` whose `VideoReader` does `reading`; for a child process, which imports it anew."""
    package = folder / "decord"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        textwrap.dedent(f"""
            import ctypes, os, signal, sys
            __version__ = {version!r}
            class DECORDError(Exception): pass
            {importing}
            class VideoReader:
                def __init__(self, path):
                    open({str(folder / "pid")!r}, "w").write(str(os.getpid()))
                    {reading}
        """)
    )
    return str(folder)


HANG = "ctypes.PyDLL(None).pause()"  # in C, and with the interpreter lock held, as decord does


def test_decord2_is_refused(clips, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "pass", version="3.4.0"))
    words = reason(load_clip, clips("plain.mp4"))
    assert "decord 3.4.0" in words and "wrong frames" in words
    assert "pip uninstall decord2" in words and "pip install --force-reinstall decord==0.6.0" in words


@pytest.mark.parametrize("importing", ["raise ImportError('no wheel')", "raise OSError('libdecord.so: cannot open')"])
def test_without_decord_pyav_reads(clips, tmp_path, monkeypatch, importing):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, HANG, importing=importing))
    clip = load_clip(clips("plain.mp4"), "uniform")
    assert read_numbers(clip.frames) == clip.frame_indices and len(clip) == 24


def test_where_decord_fails_pyav_reads(clips, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "raise DECORDError('what codec is this?')"))
    clip = load_clip(clips("plain.mp4"), "uniform")
    assert read_numbers(clip.frames) == clip.frame_indices
    assert (tmp_path / "pid").exists()  # it was asked


# ---- the child process -----------------------------------------------------------------------------------------------


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # a process that has ended but that nobody has asked for yet is no orphan
    return not (status.exists() and status.read_text().rsplit(")")[-1].split()[0] == "Z")


def wait_until(condition, seconds):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)
    return condition()


def test_the_child_gives_the_same_clip(clips):
    path = clips("plain.mp4")
    for sampling in ("chat", FrameSampling("fps", 5, 2.5), {"strategy": "base", "num_frames": 3}):
        apart, here = (load_clip(path, sampling, 0.5, 2.0, timeout_seconds=limit) for limit in (60, None))
        assert np.array_equal(apart.frames, here.frames) and apart.frame_indices == here.frame_indices
        assert np.array_equal(apart.timestamps_seconds, here.timestamps_seconds)
        assert (apart.info, apart.frame_sampling) == (here.info, here.frame_sampling)
        assert (apart.start_seconds, apart.end_seconds) == (0.5, 2.0)
    assert "not a video" in reason(load_clip, __file__)


def test_a_hang_is_ended(clips, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, HANG))
    assert "reading took more than 2 seconds" in reason(load_clip, clips("plain.mp4"), timeout_seconds=2)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_one_reader_reads_many_clips_and_outlives_bad_ones(clips, tmp_path, monkeypatch):
    path, text = clips("plain.mp4"), tmp_path / "text.mp4"
    text.write_text("not frames")
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "os.stat(path.replace('plain', 'other')); " + HANG))
    with ClipReader() as reader:
        assert "not a video" in reason(load_clip, text, reader=reader)
        pid = reader.pid
        with pytest.raises(ReaderLost, match="(?s)worker process died .*FileNotFoundError"):
            load_clip(path, reader=reader)
        assert not is_alive(pid)
        shutil.copy(path, path.with_name("other.mp4"))
        with pytest.raises(ReaderLost, match="reading took more than 2 seconds"):
            load_clip(path, timeout_seconds=2, reader=reader)
    monkeypatch.undo()
    with ClipReader() as reader:
        pids = set()
        for second in range(2):
            clip = load_clip(path, FrameSampling("uniform", 2), second, second + 1, reader=reader)
            assert read_numbers(clip.frames) == clip.frame_indices == [25 * second, 25 * second + 24]
            pids.add(reader.pid)
        os.kill(reader.pid, signal.SIGTERM)
        assert wait_until(lambda: not is_alive(reader.pid), 10)
        assert len(load_clip(path, reader=reader)) == 3 and reader.pid not in pids and len(pids) == 1
    assert reader.pid is None


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_a_clip_that_needs_more_memory_than_it_may_take(clips):
    path = clips("wide.mp4", numbers=range(24), size=(1080, 1920), fps=1)
    with ClipReader(memory_bytes=2**28) as reader:
        assert "takes more memory than 0.2 GiB" in reason(load_clip, path, reader=reader)
        assert len(load_clip(clips("plain.mp4"), reader=reader)) == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX only")
def test_a_hang_ends_even_if_the_parent_is_killed(clips, tmp_path, monkeypatch):
    folder = fake_decord(tmp_path, HANG)
    script = f"import sys; sys.path[:0] = {[folder, str(ROOT)]}; import capkit.video.clip as f; "
    script += f"f.load_clip({str(clips('plain.mp4'))!r}, timeout_seconds=2)"
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert wait_until((tmp_path / "pid").exists, 30)
        assert wait_until((tmp_path / "pid").read_text, 5)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())), 30)


@pytest.mark.parametrize(
    "reading, words",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "possibly out of memory"),
        ("sys.stderr.write('out of tape'); sys.stderr.flush(); os._exit(3)", "exit code 3): out of tape"),
        ("raise ZeroDivisionError('by decord')", "ZeroDivisionError: by decord"),
    ],
)
def test_a_child_that_dies_is_an_error(clips, tmp_path, monkeypatch, reading, words):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, reading))
    message = reason(load_clip, clips("plain.mp4"))
    assert "the worker process died" in message and words in message


def test_what_libraries_print_does_not_reach_the_result(clips, tmp_path, monkeypatch):
    noise = "os.write(1, b'noise' * 1000); print('noise'); raise ImportError"
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "pass", importing=noise))
    assert read_numbers(load_clip(clips("plain.mp4"), FrameSampling("uniform", 2)).frames) == [0, 59]


def test_a_plain_script_runs_once(clips, tmp_path):
    (tmp_path / "script.py").write_text(
        "from capkit import load_clip\nimport sys\nprint('ran')\nprint(load_clip(sys.argv[1]).frame_indices)\n"
    )
    run = subprocess.run(
        [sys.executable, "script.py", str(clips("plain.mp4"))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split("\n") == ["ran", "[0, 25, 50]", ""], run.stderr


def test_odd_file_names(clips, tmp_path, monkeypatch):
    data = clips("plain.mp4").read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [
        "a b.mp4",
        "-i.mp4",
        "file:c.mp4",
        "http:d.mp4",
        "line\nbreak.mp4",
        "видео 影.mp4",
        "100%d.mp4",
        "'\"$x.mp4",
    ]
    names.append(os.fsdecode(b"latin\xe9.mp4"))
    for name in names:
        (tmp_path / name).write_bytes(data)
        for path in (name, tmp_path / name, os.fsencode(name), f"~/{name}"):
            assert load_clip(path, FrameSampling("uniform", 2), timeout_seconds=None).frame_indices == [0, 59]
        clip = load_clip(name, FrameSampling("uniform", 2))
        assert read_numbers(clip.frames) == [0, 59] and clip.info.path == name


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"timeout_seconds": 0}, "timeout_seconds must be a positive number; got 0"),
        ({"timeout_seconds": "60"}, "timeout_seconds"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds"),
        ({"frame_sampling": "chats"}, "'chats'"),
        ({"start_seconds": -1}, "start_seconds"),
        ({"start_seconds": float("nan")}, "start_seconds"),
        ({"start_seconds": 3, "end_seconds": 3}, "above start_seconds, 3; got 3"),
        ({"end_seconds": "10"}, "end_seconds"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(arguments, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        load_clip(tmp_path / "does not even exist.mp4", **arguments)
    assert words in str(caught.value)


def test_importing_the_module_imports_no_reader_and_no_torch():
    code = "import sys, capkit.video.clip; print(sorted({'torch', 'av', 'decord'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_soak_damaged_files_give_a_clip_or_a_video_error(clips, tmp_path):
    rng, counts = random.Random(0), {}
    names = ["b-frames.mp4", "open-groups.mp4", "index-first.mp4", "hevc.mp4", "sound.mkv", "vp9.webm", "av1.mp4"]
    names += ["h264.avi", "mpeg4.avi", "open-groups.ts", "mpeg2.mpg", "fragments.mp4"]
    for name in names * 50:
        path = tmp_path / name
        path.write_bytes(damage(clips(name, **KINDS[name]).read_bytes(), rng))
        try:
            clip = load_clip(path, "uniform", timeout_seconds=30)
            outcome = "clip"
            assert clip.frames.shape == (len(clip), clip.info.height, clip.info.width, 3)
            assert len(set(clip.frame_indices)) == len(clip)
        except VideoError as error:
            outcome = error.reason.split(":")[0].split("(")[0].strip()
        counts[outcome] = counts.get(outcome, 0) + 1
    print(f"{sum(counts.values())} damaged files:", json.dumps(counts, indent=1))
    assert "reading took more than 30 seconds" not in counts
