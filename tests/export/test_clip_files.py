"""Which clips a trainer can take, what it sees of them, and windows that are cut out as clips of their own."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
from store_records import make_record
from trainer_truth import LOADERS, frames_taken
from video_factory import encode_clip, read_numbers, trim_by_edit_list

from capkit import CaptionStore
from capkit.export import LAYOUTS, ExportError, clip_files, export_dataset
from capkit.export.clip_files import ClipFiles
from capkit.runs import caption_shard, cut_into, find_clips, unseen_by_trainer
from capkit.video.reading import read_frames

DECORD = [name for name, kind in LAYOUTS.items() if kind.decoder == "decord"]
SMALL = {"size": (32, 32)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """make(name, numbers, **settings): a clip that is encoded once; good.mp4 is one that every trainer takes."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name, numbers=range(60), edit=None, **settings):
        path = folder / name
        if not path.exists():
            encode_clip(path, numbers, **SMALL | settings)
            if edit:
                trim_by_edit_list(path, *edit)
        return path

    return make


def store_of(path, videos, **fields):
    store = CaptionStore(path)
    for number, video in enumerate(videos):
        own = {} if isinstance(video, Path) else video[1]
        store.append(make_record(number, video if isinstance(video, Path) else video[0], **fields | own))
    return store


REFUSED = {
    "av1.mp4": (
        {"codec": "libsvtav1", "size": (64, 64)},
        DECORD,
        r"decord (?:cannot open it .codec|has no decoder of) (?:av1|AV1)",
    ),
    "hides frames.mp4": (
        {"edit": (10, 49), "numbers": range(99)},
        DECORD,
        "decord counts 99 frames where a player shows 49",
    ),
    "four.mp4": ({"numbers": range(4)}, ["diffusers"], "4 frames are too few: it keeps 4k . 1"),
    "forty-eight.mp4": (
        {"numbers": range(48)},
        ["cogvideox-factory"],
        "48 frames are too few: .* its frame bucket, 49",
    ),
    "six.mp4": ({"numbers": range(6)}, ["sat"], "6 frames are too few"),
    "fifty at 8.mp4": (
        {"numbers": range(50), "fps": 8},
        ["sat"],
        "50 frames at 8 a second: it stops, because it wants",
    ),
    "fifty-one at 8.mp4": ({"numbers": range(51), "fps": 8}, ["sat"], "51 frames at 8 a second: it stops, because"),
    "99 at 16.mp4": ({"numbers": range(99), "fps": 16}, ["sat"], "99 frames at 16 a second: it stops, because"),
    "147.mp4": ({"numbers": range(147), "fps": Fraction(24000, 1001)}, ["sat"], "147 frames at 23.976 a second: it st"),
    "at 4.mp4": ({"numbers": range(30), "fps": 4}, ["sat"], "it stops at fewer than the 8 a second"),
    "two.mp4": ({"numbers": range(2)}, ["videox-fun"], "2 frames are too few: it passes over .* its stride, 3"),
    "film.mkv": ({}, ["sidecar", "sat"], "takes only .*.mp4, not .mkv"),
    "film.avi": ({"codec": "mpeg4"}, ["sidecar", "sat"], "takes only .*, not .avi"),
    "film.webm": ({"codec": "libvpx"}, ["sidecar", "cogkit", "finetrainers"], "takes only .*, not .webm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_trainer_cannot_take_is_refused_and_the_good_clip_beside_it_exported(clips, tmp_path, name):
    settings, layouts, message = REFUSED[name]
    bad, good = clips(name, **settings), clips("good.mp4")
    for layout in layouts:
        store = store_of(tmp_path / f"{layout}.jsonl", [bad, good])
        report = export_dataset(store, layout, tmp_path / layout)
        assert list(report.exported["video"]) == [str(good)] and list(report.refused["video"]) == [str(bad)]
        assert report.refused["reason"].str.contains(message).all(), report.refused["reason"].item()
    others = ("cogkit", "finetrainers")  # what these cannot take is in test_trainer_layouts.py for the trainers of 2026
    taken = [rule for rule in others if rule not in layouts]
    for layout in taken if bad.suffix == ".mp4" else []:
        report = export_dataset(store_of(tmp_path / f"{layout}.jsonl", [bad, good]), layout, tmp_path / layout)
        assert len(report.exported) == 2, report.refused["reason"]


def test_what_depends_on_the_settings(clips, tmp_path):
    clip = clips("fifty-one at 8.mp4", range(51), fps=8)
    store = store_of(tmp_path / "a.jsonl", [clip, clips("good.mp4")])
    assert len(export_dataset(store, "sat", tmp_path / "a", trainer={"num_frames": 33}).exported) == 2
    assert (
        len(export_dataset(store, "sat", tmp_path / "b", trainer={"num_frames": 33, "frames_per_second": 16}).refused)
        == 1
    )
    assert len(export_dataset(store, "cogvideox-factory", tmp_path / "c", trainer={"num_frames": 53}).refused) == 1
    for layout, trainer, message in (
        ("cogvideo", {"num_frames": 50}, "num_frames=50: 'cogvideo' takes only 8 N . 1"),
        ("cogkit", {"frames_per_second": 16}, "has no effect on 'cogkit'"),
        ("sidecar", {"stride": 16}, "has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            export_dataset(store, layout, tmp_path / "d", trainer=trainer)


@pytest.mark.skipif(sys.platform != "linux", reason="decord's wheels")
def test_decord_itself_stops_or_counts_otherwise_where_clips_are_refused(clips):
    import decord

    with pytest.raises((decord.DECORDError, RuntimeError)):
        decord.VideoReader(str(clips("av1.mp4", codec="libsvtav1", size=(64, 64))))
    assert len(decord.VideoReader(str(clips("hides frames.mp4", range(99), edit=(10, 49))))) == 99


def test_without_decord_av1_is_known_to_be_a_problem(clips, tmp_path, monkeypatch):
    from capkit.video import decord_frames
    from capkit.video.facts import read_facts

    def missing():
        raise ImportError("no wheel")

    monkeypatch.setattr(decord_frames, "_import_decord", missing)
    assert "no decoder of AV1" in read_facts(str(clips("av1.mp4", codec="libsvtav1", size=(64, 64))), True)[2]
    assert not read_facts(str(clips("good.mp4")), True)[2]


# ---- captions of what the trainer sees -----------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", LOADERS)
def test_captions_of_what_a_trainer_sees_are_exported_for_it(captioner, clips, tmp_path, trainer):
    """As `caption-shard --trainer`: all clips are there, and each caption's frames lie among those of the trainer."""
    sizes = {"seventy.mp4": (70, 25), "hundred.mp4": (100, 25), "long.mp4": (160, 30), "sixty.mp4": (60, 60)}
    sizes = {name: size for name, size in sizes.items() if frames_taken(trainer, size[0], float(size[1]))}
    assert len(sizes) > 1
    videos = [clips(name, range(count), fps=fps) for name, (count, fps) in sizes.items()]
    items = find_clips([str(video) for video in videos])
    shown = {"decoding": {"max_new_tokens": 2}, "frame_sampling": "uniform", "batch_size": 8}
    cut = partial(cut_into, trainer=trainer)
    records = caption_shard(lambda: captioner, items, tmp_path / "run", cut=cut, **shown)
    store = next((tmp_path / "run").glob("*.jsonl"))
    report = export_dataset(store, trainer, tmp_path / "out")
    assert [Path(video).name for video in report.exported["video"]] == list(sizes) and not len(report.refused)
    assert not unseen_by_trainer(records, trainer)
    for record, (count, fps), row in zip(records, sizes.values(), report.exported.itertuples(), strict=True):
        truth = frames_taken(trainer, count, float(fps))
        assert record["frame_indices"][0] == truth[0] and record["frame_indices"][-1] == truth[-1]
        assert {*record["frame_indices"]} <= {*truth}
        is_all = (truth[0], truth[-1]) == (0, count - 1)
        assert (row.part == "") == is_all and ("what the trainer sees" in row.part) != is_all
    other = (
        export_dataset(store, "metadata-csv", tmp_path / "entire")
        if trainer in ("finetrainers", "videox-fun")
        else None
    )
    assert other is None or len(other.exported) == len(sizes)


class TestWhichCaption:
    def records(self, clips):
        """Of 100 frames at 10 a second, CogVideo takes 0 to 96 with 49 frames, 0 to 80 with 41."""
        video = clips("ten.mp4", range(100), fps=10)
        part = {"end_seconds": 9.7, "text": "What is seen.", "duration_seconds": 9.7}
        entire = {"text": "All of it.", "duration_seconds": 60.0}
        return [(video, part), (video, entire), (clips("good.mp4"), {})]

    def test_the_window_that_the_trainer_sees_is_preferred_and_the_report_says_so(self, clips, tmp_path):
        store = store_of(tmp_path / "a.jsonl", self.records(clips))
        report = export_dataset(store, "cogvideo", tmp_path / "a")
        row = report.exported.iloc[0]
        assert (row["text"], row["part"]) == ("What is seen.", "0 to 9.7 s: what the trainer sees")
        assert row["not_taken"] == "the entire file" and row["saw"] == ""
        assert "1 caption of a part of a file" in str(report) and "1 file of which another part has" in str(report)
        row = export_dataset(store, "cogvideo", tmp_path / "b", trainer={"num_frames": 41}).exported.iloc[0]
        assert (row["text"], row["part"], row["not_taken"]) == ("All of it.", "", "0 to 9.7 s")
        assert row["saw"] == "24 of 60 s"

    def test_alone_a_window_that_the_trainer_does_not_see_is_refused(self, clips, tmp_path):
        store = store_of(tmp_path / "a.jsonl", self.records(clips)[::2])
        report = export_dataset(store, "cogvideo", tmp_path / "a", trainer={"num_frames": 41})
        assert (
            "has captions of parts only (0 to 9.7 s), and the trainer would see other"
            in report.refused["reason"].item()
        )
        assert "cut='encode' makes clips of them" in report.refused["reason"].item() and len(report.exported) == 1

    def test_hand_edits_always_win(self, clips, tmp_path):
        video = clips("good.mp4")
        briefly = {"prompt": "Briefly.", "created": "2027-01-01T00:00:00+00:00", "text": "The model's newer one."}
        store = store_of(tmp_path / "a.jsonl", [video, (video, briefly)])
        with pytest.raises(
            ValueError, match="several captions of 1 clip, the first .*; choose='latest' takes the latest"
        ):
            export_dataset(store, "cogvideo", tmp_path / "none")
        store.edit(make_record(0, video)["request"], "By hand.")
        for number, choose in enumerate(([], "latest", {"prompt": "Briefly."}, "edited", [{"sample": 7}, "latest"])):
            report = export_dataset(store, "cogvideo", tmp_path / str(number), choose=choose)
            assert report.exported["text"].item() == "By hand.", choose
        windows = store_of(tmp_path / "b.jsonl", self.records(clips))
        windows.edit(make_record(1, video)["request"], "All of it, by hand.")
        row = export_dataset(windows, "cogvideo", tmp_path / "windows").exported.iloc[0]
        assert (row["text"], row["not_taken"]) == ("All of it, by hand.", "0 to 9.7 s")

    def test_the_first_suggestion_works_as_printed(self, clips, tmp_path):
        video = clips("good.mp4")
        store = store_of(tmp_path / "a.jsonl", [video, (video, {"prompt": 'It\'s "brief".', "text": "Brief."})])
        with pytest.raises(ValueError) as raised:
            export_dataset(store, "cogvideo", tmp_path / "a")
        message = str(raised.value)
        assert "choose='latest'" in message and message.index("'latest'") < message.index("such as choose=")
        export_dataset(store, "cogvideo", tmp_path / "a", choose="latest")
        example = eval(message.split("such as choose=")[1].split(" (papermill")[0])
        report = export_dataset(store, "cogvideo", tmp_path / "b", choose=example)
        assert report.exported["text"].item() == "Brief."


# ---- windows that are cut out --------------------------------------------------------------------------------------


def numbers_in(path):
    return read_numbers(read_frames(str(path), lambda times, info: [*range(len(times))])[0])


class TestCut:
    @pytest.fixture
    def store(self, clips, tmp_path):
        film = clips("film of 100.mp4", range(100), fps=10)
        windows = [
            (film, {"start_seconds": start, "end_seconds": start + 5.0, "text": f"From {start}."})
            for start in (0.0, 5.0)
        ]
        return store_of(tmp_path / "a.jsonl", [*windows, (film, {"text": "All of it."}), clips("good.mp4")])

    def test_each_window_becomes_a_clip_of_just_its_frames(self, store, tmp_path):
        report = export_dataset(store, "cogvideo", tmp_path / "out", cut="encode", clips="copy")
        found = {row.text: row for row in report.exported.itertuples()}
        assert len(found) == 4 and not len(report.refused)
        assert numbers_in(tmp_path / "out" / found["From 0.0."].file) == list(range(50))
        assert numbers_in(tmp_path / "out" / found["From 5.0."].file) == list(range(50, 100))
        assert found["All of it."].part == "" and found["From 5.0."].part == "5 to 10 s: cut out and encoded anew"
        assert json.loads(report.path.read_text())["options"]["cut"] == "encode"
        assert {path.suffix for path in (tmp_path / "out.cut").iterdir()} == {".mp4"}
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
        assert len(export_dataset(store, "cogvideo", tmp_path / "out", cut="encode", clips="copy").exported) == 4
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}

    def test_without_it_windows_beside_the_entire_file_are_not_taken(self, store, tmp_path):
        report = export_dataset(store, "cogvideo", tmp_path / "out")
        assert list(report.exported["not_taken"]) == ["0 to 5 s", ""] and len(report.exported) == 2

    def test_what_is_cut_out_is_checked_as_all_clips(self, store, clips, tmp_path):
        film = clips("film of 100.mp4")
        short = {"start_seconds": 1.0, "end_seconds": 1.35, "text": "Short."}
        empty = {"start_seconds": 99.0, "end_seconds": 100.0, "text": "Empty."}
        more = store_of(tmp_path / "b.jsonl", [(film, short), (film, empty)])
        report = export_dataset([store, more], "diffusers", tmp_path / "out", cut="encode")
        reasons = list(report.refused["reason"])
        assert len(reasons) == 2 and "4 frames are too few" in reasons[0] and "no frame of the clip is in" in reasons[1]
        assert len(report.exported) == 4

    def test_a_stopped_export_goes_on_where_it_was(self, store, tmp_path, monkeypatch):
        code = """
import os, signal, sys
from capkit.export import clip_files, export_dataset
done = clip_files._call
def call(worker, seconds, *arguments):
    result = done(worker, seconds, *arguments)
    if len(arguments) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
clip_files._call = call
export_dataset(sys.argv[1], "cogvideo", sys.argv[2], cut="encode")
"""
        killed = subprocess.run(
            [sys.executable, "-c", code, store.path, tmp_path / "out"], capture_output=True, text=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        (first,) = (tmp_path / "out.cut").iterdir()
        before = first.stat().st_mtime_ns
        assert len(export_dataset(store, "cogvideo", tmp_path / "out", cut="encode").exported) == 4
        assert first.stat().st_mtime_ns == before and len([*(tmp_path / "out.cut").iterdir()]) == 2

    def test_windows_of_a_clip_that_the_trainer_cannot_take_as_a_whole(self, clips, tmp_path):
        clip = clips("fifty-one at 8.mp4", range(51), fps=8)
        store = store_of(tmp_path / "a.jsonl", [(clip, {"end_seconds": 5.0}), clips("good.mp4")])
        report = export_dataset(store, "sat", tmp_path / "a")
        assert "it stops, because it wants frame 51 too" in report.refused["reason"].item()
        report = export_dataset(store, "sat", tmp_path / "b", cut="encode", clips="copy")
        row = next(report.exported.itertuples())
        assert numbers_in(tmp_path / "b" / row.file) == list(range(40)) and len(report.exported) == 2

    def test_a_full_disk_stops_the_export_and_what_is_cut_out_stays(self, store, tmp_path, monkeypatch):
        done = clip_files._call

        def full(worker, seconds, *arguments):
            if len(arguments) == 5 and arguments[1]:
                raise OSError(28, "No space left on device")
            return done(worker, seconds, *arguments)

        monkeypatch.setattr(clip_files, "_call", full)
        with pytest.raises(
            ExportError, match="out.cut: cannot be written: No space left on device; windows cut out so far"
        ):
            export_dataset(store, "cogvideo", tmp_path / "out", cut="encode")
        assert len([*(tmp_path / "out.cut").iterdir()]) == 1 and not (tmp_path / "out").exists()

    def test_what_was_damaged_since_is_cut_out_again(self, store, tmp_path):
        export_dataset(store, "sidecar", tmp_path / "out", cut="encode")
        first, second = sorted((tmp_path / "out.cut").iterdir())
        shown = numbers_in(first), numbers_in(second)
        first.write_bytes(first.read_bytes()[:1000])
        second.write_bytes(b"")
        export_dataset(store, "sidecar", tmp_path / "out", cut="encode")
        assert (numbers_in(first), numbers_in(second)) == shown

    def test_crf_and_a_changed_film_give_other_clips(self, store, tmp_path):
        export_dataset(store, "cogvideo", tmp_path / "out", cut="encode")
        export_dataset(store, "cogvideo", tmp_path / "out", cut="encode", crf=30, overwrite=True)
        assert len([*(tmp_path / "out.cut").iterdir()]) == 4
        for wrong in ({"cut": "copy"}, {"cut": "encode", "crf": 52}):
            with pytest.raises(ValueError, match="must be one of"):
                export_dataset(store, "cogvideo", tmp_path / "other", **wrong)


def test_a_clip_is_looked_into_once_for_all_with_its_content(clips, tmp_path, monkeypatch):
    copies = [tmp_path / f"{number}.mp4" for number in range(5)]
    for copy in copies:
        os.link(clips("good.mp4"), copy)
    looked = []
    done = ClipFiles._unfit
    monkeypatch.setattr(ClipFiles, "_unfit", lambda self, clip: looked.append(clip) or done(self, clip))
    report = export_dataset(store_of(tmp_path / "a.jsonl", copies), "cogvideo", tmp_path / "out")
    assert len(report.exported) == 5 and len(looked) == 1
