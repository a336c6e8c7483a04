"""Parts of videos: consecutive windows, subtitles, and where trainers look."""

import re

import pytest
from video_factory import cut, encode_clip

from capkit.runs import TrainerSettings, cut_into, find_clips, write_webvtt
from capkit.runs.clips import Item
from capkit.runs.windows import into_windows, trainer_windows, unseen_by_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """long.mp4 of 100 frames in 10 s; one cut short."""
    folder = tmp_path_factory.mktemp("windows")
    encode_clip(folder / "long.mp4", range(100), fps=10)
    cut(folder / "long.mp4", folder / "short.mp4", 0.5)
    return folder


def spans(items):
    return [(item.start, item.end) for item in items]


class TestIntoWindows:
    @pytest.mark.parametrize(
        "window_seconds, expected",
        [
            (5, [(0, 5), (5, None)]),
            (4, [(0, 4), (4, 8), (8, None)]),
            (4.6, [(0, 4.6), (4.6, None)]),  # what is left is less than a quarter of a window
            (10, [(0, None)]),
            (60, [(0, None)]),
        ],
    )
    def test_consecutive_and_complete(self, folder, window_seconds, expected):
        assert spans(into_windows(find_clips(folder / "long.mp4"), window_seconds)) == expected

    def test_an_items_own_window_prompt_and_reference(self, folder):
        item = Item(str(folder / "long.mp4"), "Why?", "because", 2.0, 9.0)
        windows = into_windows([item], 3.0)
        assert spans(windows) == [(2, 5), (5, 8), (8, 9)]
        assert all((window.prompt, window.reference) == ("Why?", None) for window in windows)
        assert into_windows([item], 7.0) == [item]

    def test_what_cannot_be_read_stays_to_be_reported(self, folder):
        items = [*find_clips(folder / "short.mp4"), Item("gone.mp4")]
        assert into_windows(items, 2.0) == items == trainer_windows(items, "cogvideo")

    def test_a_video_of_too_many_windows_has_an_error_and_the_others_are_cut(self, folder):
        encode_clip(folder / "days.mp4", range(3), milliseconds=[0, 1000, 12_000_000])
        good, days = Item(str(folder / "long.mp4")), Item(str(folder / "days.mp4"))
        first, *others = into_windows([days, good], 0.1)
        assert (first.video, first.end) == (days.video, None)
        assert re.search(r"days.mp4: would be [12]..,... windows of 0.1 s; 100,000 are the most of", first.error)
        assert spans(others) == spans(into_windows([good], 0.1)) and len(others) == 100
        short = into_windows([Item(days.video, start=2.0, end=3.0)], 0.1)
        assert len(short) == 10 and not any(window.error for window in short)

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e-9, 0.05])
    def test_nonsense_is_refused(self, seconds):
        with pytest.raises(ValueError, match="window_seconds"):
            into_windows([], seconds)


def test_one_way_of_cutting_is_chosen(folder):
    items = find_clips(folder / "long.mp4")
    assert cut_into(items) == items
    assert cut_into(items, 4.0) == into_windows(items, 4.0) != items
    assert (
        cut_into(items, trainer="cogkit", num_frames=9) == trainer_windows(items, "cogkit", TrainerSettings(9)) != items
    )
    for wrong, message in (
        ({"window_seconds": 4.0, "trainer": "cogkit"}, "choose one"),
        ({"trainer": "cogkit", "num_frames": 50}, "num_frames=50: 'cogkit' takes only 8 N . 1"),
        ({"window_seconds": 0}, "window_seconds=0"),
        ({"trainer": "sora"}, "unknown trainer"),
        ({"shots": True, "trainer": "cogkit"}, "choose one"),
        ({"shots": 1}, "shots=1: must be true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            cut_into([], **wrong)


def record(video, start, duration, text, **more):
    times = {"start_seconds": start, "duration_seconds": duration}
    return {"video": video, "status": "ok", "text": text, "request": f"{video} {start}"} | times | more


class TestWebVTT:
    @pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
    def test_no_video_takes_the_file_of_another(self, tmp_path, order):
        videos = ["/a/dog.mp4", "/b/Dog.mkv", "/c/dog (2).mp4"]
        records = [record(videos[number], 0.0, 1.0, f"caption {number}") for number in order]
        paths = write_webvtt(records, tmp_path)
        assert len({path.name.lower() for path in paths}) == 3 == len(list(tmp_path.iterdir()))
        for number, path in zip(order, paths, strict=True):
            assert f"caption {number}\n" in path.read_text()
        assert paths[order.index(2)].name == "dog (2).vtt"  # as its video is called

    def test_names_that_a_mac_takes_for_one(self, tmp_path):
        composed, decomposed = "/a/caf\u00e9.mp4", "/b/cafe\u0301.mp4"
        paths = write_webvtt([record(video, 0.0, 1.0, "A dog") for video in (composed, decomposed)], tmp_path)
        assert [path.name for path in paths] == ["caf\u00e9.vtt", "cafe\u0301 (2).vtt"]

    def test_long_names_controls_and_a_full_disk(self, tmp_path, monkeypatch):
        (path,) = write_webvtt([record(f"/a/{'x' * 251}.mp4", 0.0, 1.0, "A \x1b[31m\u202edog \u2028runs")], tmp_path)
        assert path.name == f"{'x' * 251}.vtt" and path.read_text().endswith("\nA \\x1b[31m\\u202edog runs\n")

        def full(*_):
            raise OSError(28, "No space left on device")

        before = path.read_text()
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_webvtt([record(f"/a/{'x' * 251}.mp4", 0.0, 1.0, "Another")], tmp_path)
        assert path.read_text() == before and list(tmp_path.iterdir()) == [path]

    def test_cues_in_order_escaped_and_on_a_line(self, tmp_path):
        records = [
            record("/a/film.mp4", 3599.5, 1.25, " A --> B\n\n& <b>C</b>"),
            record("/a/film.mp4", 0.0, 2.0, "First", edited_text="By hand."),
            record("/b/film.mkv", 0.0, 1.0, "Another of that name"),
            {"video": "/c/bad.mp4", "status": "error", "text": None},
        ]
        paths = write_webvtt(records, tmp_path / "subtitles")
        assert [path.name for path in paths] == ["film.vtt", "film (2).vtt"]
        assert paths[0].read_text(encoding="utf-8") == (
            "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\nBy hand.\n\n"
            "00:59:59.500 --> 01:00:00.750\nA --&gt; B &amp; &lt;b&gt;C&lt;/b&gt;\n"
        )

    def test_a_player_reads_them(self, tmp_path):
        """FFmpeg's parser finds the times and the texts again."""
        import av

        (path,) = write_webvtt([record("a.mp4", 1.5, 2.0, "Tom & Jerry"), record("a.mp4", 3.5, 1.0, "End")], tmp_path)
        with av.open(str(path)) as container:
            cues = [packet for packet in container.demux(subtitles=0) if packet.size]
            assert [(float(cue.pts * cue.time_base), float(cue.duration * cue.time_base)) for cue in cues] == [
                (1.5, 2.0),
                (3.5, 1.0),
            ]
            assert bytes(cues[0]) == b"Tom &amp; Jerry"


class TestTrainers:
    def test_windows_hold_just_the_frames_that_are_seen(self, folder):
        """Of 100 frames at 10 a second: 49 with every second, the last is frame 96; 17 with every fifth, frame 80."""
        items = find_clips(folder / "long.mp4")
        assert spans(trainer_windows(items, "cogvideo", TrainerSettings(49))) == [(0.0, pytest.approx(9.7, abs=1e-4))]
        assert spans(trainer_windows(items, "cogkit", TrainerSettings(17))) == [(0.0, pytest.approx(8.1, abs=1e-4))]
        assert spans(trainer_windows(items, "cogvideox-factory", TrainerSettings(100))) == [(0.0, None)]
        assert spans(trainer_windows(items, "cogvideo", TrainerSettings(105))) == [(0.0, None)]
        assert spans(trainer_windows(items, "sat", TrainerSettings(9)))[0][0] == pytest.approx(0.3, abs=1e-4)

    def test_captions_of_what_is_never_seen_are_flagged(self, folder):
        video = str(folder / "long.mp4")
        records = [
            record(video, 0.0, 10.0, "All", frame_indices=[0, 30, 60, 90]),
            record(video, 0.0, 3.0, "The beginning", frame_indices=[0, 10, 20]),
            record("gone.mp4", 0.0, 3.0, "Gone", frame_indices=[0]),
            {"video": video, "status": "error"},
        ]
        (flagged,) = unseen_by_trainer(records, "cogvideo", TrainerSettings(57))
        assert (flagged["request"], flagged["num_unseen"], flagged["num_captioned"]) == (f"{video} 0.0", 2, 4)
        assert (flagged["seen_from_seconds"], flagged["seen_to_seconds"]) == (0.0, pytest.approx(5.6, abs=1e-4))

    def test_nonsense_is_refused(self, folder):
        with pytest.raises(ValueError, match="unknown trainer 'sora'; did you mean 'open-sora'. there are: cogvideo"):
            trainer_windows([], "sora")
        with pytest.raises(ValueError, match="num_frames must be"):
            cut_into([], trainer="sat", num_frames=0)
        with pytest.raises(ValueError, match="stride=3: has no effect on .sat."):
            cut_into([], trainer="sat", stride=3)
        with pytest.raises(ValueError, match="cut it first"):
            trainer_windows([Item(str(folder / "long.mp4"), end=3.0)], "sat")
