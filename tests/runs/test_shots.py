"""Films cut where their shots change."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ffmpeg_truth import ffmpeg
from shot_films import make_film
from video_factory import cut, encode_clip

from capkit.runs import Item, cut_into
from capkit.runs.shots import into_shots
from capkit.video import WorkerProcess, load_clip
from capkit.video.reading import read_timestamps


def count_cuts(folder, seeds):
    """How many cuts films have, how many of them were found within a frame, and how many other cuts."""
    num_true = num_found = num_false = 0
    films = {str(folder / f"{seed}.mkv"): make_film(folder / f"{seed}.mkv", seed) for seed in seeds}
    shots = into_shots(map(Item, films))
    for film, truth in films.items():
        times, _ = read_timestamps(film)
        own = [shot for shot in shots if shot.video == film]
        found = [int(np.flatnonzero(times == shot.start).item()) for shot in own[1:]]  # exactly the times of frames
        assert [shot.end for shot in own] == [*(shot.start for shot in own[1:]), None]
        right = [cut for cut in truth if any(abs(cut - index) <= 1 for index in found)]
        num_true, num_found = num_true + len(truth), num_found + len(right)
        num_false += sum(all(abs(cut - index) > 1 for cut in truth) for index in found)
    return num_true, num_found, num_false


def assert_cuts_are_found(folder, seeds):
    num_true, num_found, num_false = count_cuts(folder, seeds)
    print(f"\n{num_found} of {num_true} cuts found within a frame, {num_false} others")
    assert num_true > 2 * len(seeds)
    assert num_found >= 0.95 * num_true and num_false <= 0.02 * num_found


def test_cuts_of_films_are_found_within_a_frame(tmp_path):
    assert_cuts_are_found(tmp_path, range(10))


@pytest.mark.soak
def test_cuts_of_a_hundred_films_are_found_within_a_frame(tmp_path):
    assert_cuts_are_found(tmp_path, range(100, 200))


def draw_grey(level, height, width):
    return np.full((height, width, 3), level, np.uint8)


# Films of flat colours, one a shot.
COLOURS = [(200, 40, 40), (40, 40, 200), (40, 200, 40), (220, 220, 220), (20, 20, 20)]


def flat_film(path, *lengths, **settings):
    """A film of shots that are so many frames long, at 10 frames a second."""
    shown = [COLOURS[shot % len(COLOURS)] for shot, length in enumerate(lengths) for _ in range(length)]

    def draw(index, height, width):
        return np.full((height, width, 3), shown[index], np.uint8)

    return str(encode_clip(path, range(len(shown)), fps=10, draw=draw, **settings))


def spans(items):
    return [(item.start, item.end) for item in items]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Shots of 2, 1 and 3 seconds."""
    return flat_film(tmp_path_factory.mktemp("shots") / "film.mp4", 20, 10, 30)


class TestIntoShots:
    def test_a_shot_begins_with_its_first_frame(self, film):
        first, second, third = items = into_shots([Item(film, "Why?", "because")])
        assert spans(items) == [(0, 2.0), (2.0, 3.0), (3.0, None)]
        assert all((item.prompt, item.reference) == ("Why?", None) for item in items)
        seen = [load_clip(film, {"strategy": "uniform", "num_frames": 99}, *span) for span in spans(items)]
        assert [len(clip) for clip in seen] == [20, 10, 30]
        assert [clip.frame_indices[0] for clip in seen] == [0, 20, 30]

    def test_frames_of_uneven_length(self, tmp_path):
        steps = [40, 40, 100, 333, 17] * 12
        times = [0, *np.cumsum(steps).tolist()]
        path = flat_film(tmp_path / "uneven.mkv", 11, 29, 21, milliseconds=times)
        starts = [item.start for item in into_shots([Item(path)])]
        assert starts == [0, pytest.approx(times[11] / 1000), pytest.approx(times[40] / 1000)]
        clips = [
            load_clip(path, {"strategy": "uniform", "num_frames": 99}, *span)
            for span in spans(into_shots([Item(path)]))
        ]
        assert [clip.frame_indices[0] for clip in clips] == [0, 11, 40]

    def test_a_film_without_cuts_stays_as_it_is(self, tmp_path):
        items = [Item(flat_film(tmp_path / "one.mp4", 40), "Why?", "because"), Item(str(tmp_path / "gone.mp4"))]
        assert into_shots(items) == items

    def test_within_an_items_own_start_and_end(self, film):
        assert spans(into_shots([Item(film, start=1.0, end=2.8)])) == [(1.0, 2.0), (2.0, 2.8)]
        assert spans(into_shots([Item(film, start=1.8, end=5.0)])) == [(1.8, 3.0), (3.0, 5.0)]  # 0.2 s are too short
        inner = Item(film, "Why?", "because", 3.5, 4.5)
        assert into_shots([inner]) == [inner]

    def test_no_shot_is_shorter_than_half_a_second(self, tmp_path):
        path = flat_film(tmp_path / "quick.mp4", 20, 3, 3, 20, 5, 5, 4)
        starts = [item.start for item in into_shots([Item(path)])]
        assert starts == pytest.approx([0, 2.0, 2.6, 4.6, 5.1])

    def test_a_flash_is_no_cut(self, tmp_path):
        greys = [150] * 20 + [250] * 2 + [150] * 20
        path = str(encode_clip(tmp_path / "flash.mp4", greys, fps=10, draw=draw_grey))
        assert into_shots([Item(path)]) == [Item(path)]

    def test_a_film_that_changes_its_size(self, tmp_path):
        first, second = flat_film(tmp_path / "1.mkv", 20), flat_film(tmp_path / "2.mkv", 0, 20, size=(64, 160))
        (tmp_path / "list").write_text(f"file '{first}'\nfile '{second}'\n")
        path = tmp_path / "both.mkv"
        assert ffmpeg("-f", "concat", "-safe", "0", "-i", tmp_path / "list", "-c", "copy", path)[0] == 0
        assert spans(into_shots([Item(str(path))])) == [(0, 2.0), (2.0, None)]

    def test_a_film_that_cannot_be_searched_has_an_error_and_the_others_are_cut(self, film, tmp_path):
        short = cut(film, tmp_path / "short.mp4", 0.5)
        (tmp_path / "text.mp4").write_text("not a video")
        items = [Item(str(short)), Item(str(tmp_path / "text.mp4")), Item(film), Item("bad.mp4", error="a bad row")]
        first, second, *shots, last = into_shots(items)
        assert re.search("short.mp4: its cuts cannot be found: .*(incomplete download?)", first.error)
        assert re.search("text.mp4: its cuts cannot be found: not a video but text", second.error)
        assert len(shots) == 3 and last == items[-1]
        (late,) = into_shots([Item(film)], timeout_seconds=0.001)
        assert "film.mp4: its cuts cannot be found: took more than 0.001 seconds" in late.error

    def test_without_the_extra(self, film, monkeypatch):
        monkeypatch.setitem(sys.modules, "scenedetect", None)
        with pytest.raises(ImportError, match=r"needs PySceneDetect: pip install -e '.\[shots\]'"):
            cut_into([], shots=True)

    def test_long_shots_are_cut_again_into_windows(self, film):
        items = cut_into([Item(film)], window_seconds=1.8, shots=True)
        assert spans(items) == [(0, 2.0), (2.0, 3.0), (3.0, 4.8), (4.8, None)]


class TestKeptCuts:
    def test_a_film_is_searched_once_whatever_its_name(self, film, tmp_path, monkeypatch):
        kept = tmp_path / "out" / "cuts.jsonl"
        items = cut_into([Item(film)], shots=True, kept_cuts=kept)
        assert len(kept.read_text().splitlines()) == 1
        monkeypatch.setattr(WorkerProcess, "call", None)  # nothing may be searched
        assert cut_into([Item(film)], shots=True, kept_cuts=str(kept)) == items
        copy = str(shutil.copy(film, tmp_path / "copy.mp4"))
        assert spans(into_shots([Item(copy), Item(film)], kept)) == 2 * spans(items)

    def test_one_that_has_changed_is_searched_again(self, tmp_path):
        kept = tmp_path / "cuts.jsonl"
        path = flat_film(tmp_path / "film.mp4", 20, 10)
        assert len(into_shots([Item(path)], kept)) == 2
        flat_film(tmp_path / "film.mp4", 10, 10, 10)
        assert len(into_shots([Item(path)], kept)) == 3

    def test_damaged_lines_are_named_and_searched_again(self, film, tmp_path):
        kept = tmp_path / "cuts.jsonl"
        items = into_shots([Item(film)], kept)
        line = kept.read_text()
        kept.write_text(line.replace('"cuts_seconds": [', '"cuts_seconds": ["x", ') + line[:40])
        with pytest.warns(UserWarning, match="cuts.jsonl") as warned:
            assert into_shots([Item(film)], kept) == items
        assert len(warned) == 2 and len(kept.read_text().splitlines()) == 3

    def test_progress_is_told_in_lines(self, film, capsys):
        into_shots([Item(film), Item(film, start=1.0)])
        printed = capsys.readouterr()
        assert "films searched for cuts: 1 of 1" in printed.out + printed.err


@pytest.mark.soak
def test_a_film_of_two_hours_needs_little_memory(tmp_path):
    """172,800 frames: of the peak of memory, hardly any grows with the film."""
    peaks = []
    for minutes in (2, 120):
        path = flat_film(tmp_path / f"{minutes}.mp4", *[100 * 24] * (minutes * 60 // 100), size=(36, 64))
        code = (
            "import resource, sys; from capkit.video.shots import find_cuts\n"
            "while isinstance(found := find_cuts(sys.argv[1]), float): pass\n"
            "print(len(found[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        num_cuts, peak = map(int, run.stdout.split())
        assert num_cuts == minutes * 60 // 100 - 1
        peaks.append(peak)
    print(f"\npeaks of memory: {peaks} MiB")
    assert peaks[1] < peaks[0] + 100
