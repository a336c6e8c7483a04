"""Clips from frames in memory, and the arguments of `load_clip`."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT
from video_factory import read_numbers, reason

from capkit.video import Clip, FrameSampling, VideoError, VideoInfo, load_clip


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


def test_a_file_that_vanishes_is_an_error_of_that_file(tmp_path, monkeypatch):
    monkeypatch.setattr("capkit.video.clip._check_file", lambda path: None)  # it was there when this was checked
    for limit in (60, None):
        words = reason(load_clip, tmp_path / "gone.mp4", timeout_seconds=limit)
        assert words == "cannot be read: No such file or directory"


def test_no_file_a_folder_an_empty_file(tmp_path):
    assert reason(load_clip, tmp_path / "gone.mp4") == "no such file"
    assert "folder" in reason(load_clip, tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "empty" in reason(load_clip, tmp_path / "empty.mp4")


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


@pytest.mark.parametrize("path", [None, 3, ["a.mp4"]])
def test_what_is_no_file_name_is_a_type_error(path):
    with pytest.raises(TypeError, match="path=.*: must be the name of a video file"):
        load_clip(path)


def test_a_very_long_name_is_not_repeated_in_full():
    with pytest.raises(VideoError, match="xxx: no such file") as error:
        load_clip("x" * 5000)
    assert len(str(error.value)) < 1100 and error.value.path == "x" * 5000


def test_importing_the_module_imports_no_reader_and_no_torch():
    code = "import sys, capkit.video.clip; print(sorted({'torch', 'av', 'decord'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
