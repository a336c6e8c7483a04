"""Exports: what trainers read is what was captioned, or it is refused with the reason."""

import csv
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from video_factory import encode_clip, tiny_clip

import capkit
from capkit import CaptionStore
from capkit.export import CLEANING, LAYOUTS, ExportBusy, ExportError, export_dataset
from capkit.export.layouts import LINE_SEPARATORS
from capkit.files import file_sha256 as sha256_of
from capkit.runs import TrainerSettings

TEXTS = {
    "plain": " A dog runs.",
    "quotes": '"A" \'dog\', """says""" “woof” `now`; it\'s "',
    "commas": "a, b,, c,",
    "starts like a comment": "# not a comment, %s {format} \\n \\u0041 $HOME",
    "emoji": "🐕‍🦺 runs 👩‍👩‍👧 🇸🇪 fast 🏃🏽‍♀️",
    "right to left": "שלום a dog \u202eback مرحبا",
    "accents": unicodedata.normalize("NFD", "Café à la crème"),
    "byte order mark": "\ufeffA dog runs.",
    "no-break spaces": "A\xa0dog\u2003runs\u3000now",
    "long": "The small dog runs over the green lawn and back again now. " * 91,
    "empty": "",
    "blank": " \n\t\u2028 ",
    "like a number": "007",
    "like a truth": "True",
    "like nothing": "None",
    "like a date": "2024-05-17",
    "like bytes": "b'A dog'",
    "like JSON": '{"caption": ["A dog", null]}',
    "zero": "A\0dog",
    "tab": "A\tdog",
    **{f"separator {ord(letter):#x}": f"A dog runs.{letter}It barks." for letter in LINE_SEPARATORS},
    "both line ends": "one\r\n\r\ntwo\n\nthree",
}
NOT_REGULAR = "the clip is not a regular file"
NAMES = [
    *("dog.mp4", " a dog .mp4", "dog.v1.mp4.mp4", 'it\'s "a", dog.mp4', "собака\t🐕.mp4", "DOG.MP4"),
    *("test_1.mp4", "b-train-2 videos.mp4"),
]


def write_store(path, folder, captions):
    """A store with records of clips, each of its own content; captions: {clip name: text or fields}."""
    records = []
    for number, (clip, fields) in enumerate(captions.items()):
        file = folder / clip
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tiny_clip(clip))
        records.append(a_record(f"{path.stem} {number}", file, fields))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return CaptionStore(path)


@pytest.fixture
def make_store(tmp_path):
    """make_store({clip name: text or fields}, name): a store, its clips in clips/."""
    return lambda captions, name="captions.jsonl": write_store(tmp_path / name, tmp_path / "clips", captions)


def a_record(request, path, fields):
    record = {"request": request, "video": str(path), "status": "ok", "error": None, "finish_reason": "eos"}
    record |= {"prompt": "Describe.", "template": "chat", "decoding": {"temperature": 0.0}, "sample": 0}
    record |= {"start_seconds": 0.0, "end_seconds": None, "video_sha256": sha256_of(str(path))}
    return (
        record
        | {"created": f"2026-01-01T00:00:{int(request.split()[-1]) % 60:02}+00:00"}
        | ({"text": fields} if isinstance(fields, str) else fields)
    )


# ---- the trainers' own ways of reading, written down a second time from their sources ------------------------------


def read_lists(root):
    with open(root / "prompts.txt", encoding="utf-8") as file:
        prompts = [line.strip() for line in file.readlines() if len(line.strip()) > 0]
    with open(root / "videos.txt", encoding="utf-8") as file:
        videos = [root / line.strip() for line in file.readlines() if len(line.strip()) > 0]
    assert len(prompts) == len(videos) and all(video.is_file() for video in videos)
    return zip(videos, prompts, strict=True)


def read_sat(root):
    for folder, _, files in os.walk(root):
        for name in files:
            if name.endswith(".mp4"):
                video = os.path.join(folder, name)
                caption = video.replace(".mp4", ".txt").replace("videos", "labels")
                yield Path(video), open(caption).read().splitlines()[0] if os.path.exists(caption) else ""


def read_sidecars(root):
    for caption in sorted(root.glob("*.txt")):
        (video,) = [file for kind in ("mp4", "mov") if (file := caption.with_suffix(f".{kind}")).exists()]
        yield video, open(caption).read().strip()


def read_videox_fun(root):
    with open(root / "metadata.json") as file:
        return [(root / row["file_path"], row["text"]) for row in json.load(file) if row.get("type") == "video"]


def load(kind, **settings):
    """Rows as `load_dataset` makes them, clips as paths; the hub is not asked."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(kind, split="train", **settings)
    if "video" in rows.column_names:
        rows = rows.cast_column("video", datasets.Video(decode=False))
    return rows


def read_video_folder(root, column, **cache):
    return [(Path(row["video"]["path"]), row[column]) for row in load("videofolder", data_dir=str(root), **cache)]


def read_cogkit_i2v(root, **cache):
    captions = load("json", data_files=str(root / "train" / "metadata.jsonl"), **cache).sort("id")
    videos = load("videofolder", data_dir=str(root / "train" / "videos"), **cache).sort("id")
    assert len(captions) == len(videos)
    return [(Path(row["video"]["path"]), captions[number]["prompt"]) for number, row in enumerate(videos)]


READERS = {
    **dict.fromkeys(("cogvideo", "diffusers", "cogvideox-factory"), read_lists),
    **{"sat": read_sat, "sidecar": read_sidecars, "videox-fun": read_videox_fun},
}
HUGGING_FACE = {
    "cogkit": lambda root, **cache: read_video_folder(root / "train", "prompt", **cache),
    "cogkit-i2v": read_cogkit_i2v,
    "finetrainers": lambda root, **cache: read_video_folder(root, "caption", **cache),
    "metadata-jsonl": lambda root, **cache: read_video_folder(root, "text", **cache),
    "metadata-csv": lambda root, **cache: read_video_folder(root, "prompt", **cache),
}
assert READERS.keys() | HUGGING_FACE.keys() < LAYOUTS.keys()  # the others: test_trainer_layouts.py


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def assert_pairs_are_right(root, layout, report, tmp_path):
    if layout in READERS:
        found = list(READERS[layout](root))
    else:
        found = HUGGING_FACE[layout](root, cache_dir=str(tmp_path / "cache of datasets"))
    wanted = {(row.video, row.text) for row in report.exported.itertuples()}
    assert {(os.path.realpath(clip), text) for clip, text in found} == wanted
    assert len(found) == len(report.exported) == len({clip for clip, _ in found})


BREAKS = {name for name in TEXTS if name.startswith("separator") or name == "both line ends"}
NOT_IN = {
    **dict.fromkeys(
        ("cogvideo", "diffusers", "cogvideox-factory"), {"separator 0xa", "separator 0xd", "both line ends"}
    ),
    "sat": BREAKS,
    "sidecar": {"separator 0xd", "both line ends"},
    **dict.fromkeys(("cogkit", "cogkit-i2v", "metadata-jsonl"), {"like a date"}),
    "finetrainers": {"like a date", "like bytes"},
    "metadata-csv": {"like a number", "like a truth", "like nothing", "zero"},
    "videox-fun": set(),
}


@pytest.fixture(scope="module")
def cross_product(tmp_path_factory):
    """A store with every text for a clip of every name, in folders of their own, so that many stems are equal.

    All clips have the same content, so that only one is looked into.
    """
    folder = tmp_path_factory.mktemp("cross product")
    pairs = itertools.product(enumerate(TEXTS.values()), NAMES)
    captions = {f"my videos/{number}/{name}": text for (number, text), name in pairs}
    for clip in captions:
        (folder / clip).parent.mkdir(parents=True, exist_ok=True)
        (folder / clip).write_bytes(tiny_clip())
    return write_store(folder / "captions.jsonl", folder, captions)


@pytest.mark.parametrize("layout", READERS | HUGGING_FACE)
class TestEveryCaptionAndEveryName:
    """The cross product of nasty texts and nasty names: read back right, or refused for a reason, never mispaired."""

    def of(self, row):
        return list(TEXTS)[int(Path(row.video).parent.name)]

    def test_without_cleaning(self, cross_product, tmp_path, layout):
        report = export_dataset(cross_product, layout, tmp_path / "out", token_limit=10_000)
        refused = {self.of(row) for row in report.refused.itertuples()}
        assert refused == NOT_IN[layout] | {"empty", "blank"}
        assert all(report.refused["reason"]) and not any(report.exported["reason"])
        assert len(report.exported) == (len(TEXTS) - len(refused)) * len(NAMES)
        for row in report.exported.itertuples():
            assert row.text == TEXTS[self.of(row)].strip() and row.original == TEXTS[self.of(row)]
        assert_pairs_are_right(tmp_path / "out", layout, report, tmp_path)

    def test_with_every_rule_and_a_trigger_word(self, cross_product, tmp_path, layout):
        settings = {"cleaning": list(CLEANING), "trigger_word": "ZORP", "on_too_long": "trim", "clips": "hardlink"}
        report = export_dataset(cross_product, layout, tmp_path / "out", **settings)
        refused = {self.of(row) for row in report.refused.itertuples()}
        assert refused - {"empty", "blank"} <= {"like a date", "like bytes", "like a number", "like a truth"} | {
            *("like nothing", "zero")
        }
        assert report.exported["num_t5_tokens"].max() <= report.token_limit == 224
        written = [row.text for row in report.exported.itertuples()]
        assert all(text.startswith("ZORP ") != LAYOUTS[layout].adds_trigger for text in written)
        assert not any(letter in text for text in written for letter in LINE_SEPARATORS + "\t")
        config = LAYOUTS[layout].config(tmp_path / "out", "ZORP", TrainerSettings())
        assert ("ZORP" in report.command + config) == LAYOUTS[layout].adds_trigger
        clips = [path for path in (tmp_path / "out").rglob("*.mp4")]
        assert len(clips) == len(report.exported) and not any(clip.is_symlink() for clip in clips)
        for row in report.exported.itertuples():
            assert (tmp_path / "out" / row.file).samefile(row.video)


# ---- one caption a clip --------------------------------------------------------------------------------------------


class TestWhichCaption:
    def test_several_captions_of_a_clip_need_a_choice(self, make_store, tmp_path):
        store = make_store({"a.mp4": "A dog.", "b.mp4": "A cat."})
        more = {"text": "A small dog.", "prompt": "Briefly.", "decoding": {"temperature": 0.5, "seed": 1}}
        store.append(a_record("more 30", tmp_path / "clips" / "a.mp4", more))
        with pytest.raises(ValueError) as error:
            export_dataset(store, "cogvideo", tmp_path / "out")
        message = str(error.value)
        assert "several captions of 1 clip, the first" in message and "a.mp4" in message and "template" not in message
        assert '\n  prompt: "Describe." | "Briefly."' in message and '"seed": 1' in message
        assert not (tmp_path / "out").exists()
        for number, (choose, text, num_refused) in enumerate(
            [
                ("latest", "A small dog.", 0),
                ({"prompt": "Briefly."}, "A small dog.", 1),
                ([{"prompt": "Briefly."}, {"prompt": "Describe."}], "A small dog.", 0),
                ([{"prompt": "Describe."}, {"prompt": "Briefly."}], "A dog.", 0),
                ({"decoding": {"seed": 1}}, "A small dog.", 1),
                ({"decoding": {"temperature": 0.0}, "template": "chat"}, "A dog.", 0),
            ]
        ):
            report = export_dataset(store, "cogvideo", tmp_path / str(number), choose=choose)
            assert report.exported["text"].iloc[0] == text and len(report.refused) == num_refused
            assert all(report.refused["reason"] == "none of its 1 captions matches choose=")
        store.edit("captions 0", "Our dog.")
        report = export_dataset(store, "cogvideo", tmp_path / "edited", choose=["edited", "latest"])
        assert list(report.exported["text"]) == ["Our dog.", "A cat."]
        for choose, message in (("newest", "'newest'"), ({"promt": "x"}, "unknown field 'promt'")):
            with pytest.raises(ValueError, match=message):
                export_dataset(store, "cogvideo", tmp_path / "wrong", choose=choose)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"layout": ["cogvideo"]}, r"layout=\['cogvideo'\]: must be one of"),
            ({"choose": 5}, "choose=5: must be 'edited'"),
            ({"leave_out": 5}, "leave_out=5: must be a list of"),
            ({"cleaning": 5}, r"cleaning=\[5\]: must be of"),
            ({"token_limit": "224"}, "token_limit must be a whole number, .*; got '224'"),
            ({"trigger_word": 5}, "trigger_word=5: must be a text"),
            ({"several": "no"}, "several='no': must be true or false"),
            ({"overwrite": "no"}, "overwrite='no': must be true or false"),
            ({"empty_share": "0.1"}, "empty_share='0.1': must be at least 0"),
            ({"trainer": "cogvideo"}, "trainer='cogvideo': must be a dictionary"),
        ],
    )
    def test_arguments_of_another_type_are_named(self, make_store, tmp_path, arguments, message):
        store = make_store({"a.mp4": "A dog."})
        with pytest.raises(ValueError, match=message):
            export_dataset(store, **{"layout": "cogvideo", "output_dir": tmp_path / "out", **arguments})
        assert not (tmp_path / "out").exists()

    def test_no_captions_at_all(self, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        for stores in ([], [tmp_path / "empty.jsonl"]):
            with pytest.raises(ValueError, match="nothing to export: there are no captions in the stores"):
                export_dataset(stores, "sidecar", tmp_path / "out")

    def test_hand_edits_win_and_no_rule_changes_their_words(self, make_store, tmp_path):
        store = make_store({"a.mp4": {"text": "The video shows a dog. It", "finish_reason": "length"}})
        store.edit("captions 0", " The video shows\nOUR dog, and ")
        report = export_dataset(store, "cogvideo", tmp_path / "out", cleaning=list(CLEANING))
        row = report.table.iloc[0]
        assert row["text"] == "The video shows OUR dog, and" and row["edited"] and row["changed_by"] == "lines"
        assert row["original"] == " The video shows\nOUR dog, and " and row["boilerplate_opening"] == "the video shows"
        store.edit("captions 0", "")
        with pytest.raises(ValueError, match="nothing to export.*\n.*the caption is empty"):
            export_dataset(store, "cogvideo", tmp_path / "empty")

    def test_what_is_marked_wrong_is_left_out_and_counted(self, make_store, tmp_path):
        store = make_store({"a.mp4": "A dog.", "b.mp4": "A cat.", "c.mp4": "A cow.", "d.mp4": "A pig."})
        more = {"text": "A small dog.", "prompt": "Briefly."}
        store.append(a_record("more 30", tmp_path / "clips" / "a.mp4", more))
        store.mark("captions 0", "wrong", "dog", "it is a fox")  # then its other caption is chosen without a choice
        store.mark("captions 1", "wrong", remark="it is a lynx")
        store.mark("captions 2", "unsure")
        store.mark("captions 3", "wrong")
        store.edit("captions 3", "A boar.")  # so the mark is of another text
        report = export_dataset(store, "cogvideo", tmp_path / "out")
        assert dict(zip(report.exported["text"], report.exported["mark"], strict=True)) == {
            "A small dog.": "",
            "A cow.": "unsure",
            "A boar.": "outdated",
        }
        assert list(report.refused["reason"]) == ["left out: marked wrong: it is a lynx"]
        assert "2 captions left out, marked wrong; leave_out=[] exports them, too" in str(report)
        kept = json.loads(report.path.read_text())
        assert kept["num_left_out"] == 2 and kept["options"]["leave_out"] == ["wrong"]
        report = export_dataset(store, "cogvideo", tmp_path / "less", leave_out=["wrong", "unsure"])
        assert list(report.exported["text"]) == ["A small dog.", "A boar."] and "marked wrong or unsure" in str(report)
        report = export_dataset(store, "cogvideo", tmp_path / "all", leave_out=(), choose="latest")
        assert len(report.exported) == 4 and "left out" not in str(report)
        for leave_out in ("wrong", ["wrnog"]):
            with pytest.raises(ValueError, match="leave_out=.*: must be a list of 'right', 'wrong', 'unsure'"):
                export_dataset(store, "cogvideo", tmp_path / "none", leave_out=leave_out)

    def test_a_later_attempt_and_a_second_store(self, make_store, tmp_path):
        """The same settings again: the later one counts, and the one edited by hand before it."""
        first = make_store({"a.mp4": "Old.", "b.mp4": "A cat."})
        later = {"text": "New.", "created": "2027-01-01T00:00:00+00:00"}
        second = make_store({"a.mp4": later, "c.mp4": "A cow."}, "second.jsonl")
        (tmp_path / "link.mp4").symlink_to(tmp_path / "clips" / "b.mp4")
        second.append(a_record("link 1", tmp_path / "link.mp4", {"text": "A cat."}))  # the same clip by another name
        report = export_dataset([first, second.path], "cogvideo", tmp_path / "out")
        assert list(report.exported["text"]) == ["New.", "A cat.", "A cow."]
        assert list(report.table["store"].map(os.path.basename)) == ["second.jsonl", "second.jsonl", "second.jsonl"]
        first.edit("captions 0", "By hand.")
        report = export_dataset([first, second], "cogvideo", tmp_path / "edited")
        assert report.exported["text"].iloc[0] == "By hand."

    def test_what_cannot_be_exported_is_refused_clip_by_clip(self, make_store, tmp_path):
        names = ("good", "part", "late", "error", "gone", "changed", "half", "mkv")
        captions = {f"{name}.mp4": "A dog." for name in names} | {"film.mkv": "A film.", "good copy.mp4": "A dog."}
        captions["part.mp4"] = {"text": "A dog.", "start_seconds": 2.0, "end_seconds": 5.5}
        captions["late.mp4"] = {"text": "A dog.", "end_seconds": 5.0}
        captions["error.mp4"] = {"text": None, "status": "error", "error": "the file is empty"}
        captions["half.mp4"] = "A \ud800 dog."
        store = make_store(captions)
        whole = {"text": "The whole dog."}  # of a clip that has a caption of a part as well
        store.append(a_record("whole 20", tmp_path / "clips" / "late.mp4", whole))
        (tmp_path / "clips" / "gone.mp4").unlink()
        (tmp_path / "clips" / "changed.mp4").write_text("another film")
        (tmp_path / "clips" / "good copy.mp4").write_bytes((tmp_path / "clips" / "good.mp4").read_bytes())
        store.append(a_record("captions 9", tmp_path / "clips" / "good copy.mp4", "A dog."))
        with pytest.warns(match=f"{store.path}, line 7 is skipped: the text has half a character in it"):
            report = export_dataset(store, "sat", tmp_path / "out")
        reasons = {Path(row.video).name: row.reason for row in report.refused.itertuples()}
        assert "captions of parts only (2 to 5.5 s)" in reasons.pop("part.mp4")
        assert reasons.pop("error.mp4") == "not captioned: the file is empty"
        assert "cannot be read: No such file" in reasons.pop("gone.mp4")
        assert "changed since it was captioned" in reasons.pop("changed.mp4")
        assert reasons.pop("film.mkv") == "SAT takes only .mp4, not .mkv" and not reasons
        done = {Path(row.video).name: row for row in report.exported.itertuples()}
        assert done.keys() == {"good.mp4", "late.mp4", "mkv.mp4", "good copy.mp4"}
        assert (
            done["late.mp4"].text == "The whole dog." and done["good copy.mp4"].same_file_as == done["good.mp4"].video
        )
        saved = json.loads(report.path.read_text())
        assert len(saved["clips"]) == 9 and [row["video"] for row in saved["clips"]] == list(report.table["video"])
        assert "1 clip with the content of another" in str(report) and "good" not in report._repr_html_()

    def test_a_store_of_someone_else_may_name_any_file(self, make_store, tmp_path):
        """Without the digest of what was captioned, only videos are taken; pipes and devices never."""
        unknown = {"text": "A dog.", "video_sha256": None}
        secret, pipe = tmp_path / "secret", tmp_path / "clips" / "pipe.mov"
        secret.write_text("root:x:0:0\n" * 100)
        store = make_store({"good.mp4": "A dog.", "text.mp4": unknown, "true.mp4": unknown})
        (tmp_path / "clips" / "text.mp4").write_text("not a video")
        encode_clip(tmp_path / "clips" / "true.mp4", range(3))
        os.mkfifo(pipe)
        for number, video in enumerate((pipe, "/dev/zero", secret, tmp_path, "\ud800.mp4")):
            record = a_record(f"other {number}", __file__, unknown) | {"video": str(video)}
            store.append(record | {"video_sha256": sha256_of(secret) if video == pipe else None})
        failed = {"status": "error", "error": "\udcff.mp4: no such file", "text": None}
        store.append(a_record("failed 9", __file__, failed) | {"video": "/clips/\udcff.mp4"})
        report = export_dataset(store, "cogvideo", tmp_path / "out", clips="copy")
        exported = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert exported == {"good.mp4", "true.mp4", "prompts.txt", "videos.txt"}
        reasons = {Path(row.video).name: row.reason for row in report.refused.itertuples()}
        assert reasons.pop("pipe.mov") == reasons.pop("zero") == reasons.pop(tmp_path.name) == NOT_REGULAR
        assert "as a video: not a video but text" in reasons.pop("text.mp4")
        assert "as a video: not a video but text" in reasons.pop("secret")
        assert "surrogates not allowed" in reasons.pop(r"\ud800.mp4")
        assert reasons.pop(r"\udcff.mp4") == r"not captioned: \udcff.mp4: no such file"
        assert not reasons and report.path.is_file()

    def test_wrong_arguments_are_named(self, make_store, tmp_path):
        store = make_store({"a.mp4": "A dog."})
        wrong = {"layout": "cogvide", "on_too_long": "cut", "clips": "move", "cleaning": ["line"], "token_limit": 1}
        for name, value in wrong.items():
            settings = {"layout": "sidecar", name: value}
            with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))}: must be"):
                export_dataset(store, settings.pop("layout"), tmp_path / "out", **settings)
        with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
            export_dataset([store, tmp_path / "nowhere.jsonl"], "sidecar", tmp_path / "out")
        with pytest.raises(ValueError, match="no folder with a T5 tokenizer"):
            export_dataset(store, "sidecar", tmp_path / "out", tokenizer=tmp_path)
        with pytest.raises(ValueError, match="checkpoint is no T5 tokenizer: it does not end a text with </s>"):
            checkpoint = Path(capkit.__file__).parent / "demo" / "checkpoint"
            export_dataset(store, "sidecar", tmp_path / "out", tokenizer=checkpoint)
        assert not (tmp_path / "out").exists()


# ---- names ---------------------------------------------------------------------------------------------------------


def test_names_are_harmless_unique_and_do_not_depend_on_the_others(make_store, tmp_path):
    store = make_store({f"{folder}/{name}": "A dog." for folder in ("one", "two") for name in NAMES})
    report = export_dataset(store, "cogvideo", tmp_path / "all")
    stems = [Path(row.file).stem for row in report.exported.itertuples()]
    assert len({stem.lower() for stem in stems}) == len(stems) == 2 * len(NAMES)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", stem) and stem[0] not in "-_" and "videos" not in stem for stem in stems)
    alone = make_store({"one/dog.mp4": "A dog.", "one/test_1.mp4": "A test."}, "alone.jsonl")
    report = export_dataset(alone, "cogvideo", tmp_path / "alone")
    assert list(report.exported["file"]) == ["videos/dog.mp4", "videos/testclip_1.mp4"]
    backwards = make_store({f"{folder}/dog.mp4": "A dog." for folder in ("two", "one")}, "backwards.jsonl")
    names = dict(export_dataset(backwards, "cogvideo", tmp_path / "backwards").exported[["video", "file"]].to_numpy())
    forwards = make_store({f"{folder}/dog.mp4": "A dog." for folder in ("one", "two")}, "forwards.jsonl")
    assert names == dict(export_dataset(forwards, "cogvideo", tmp_path / "f").exported[["video", "file"]].to_numpy())


# ---- tokens --------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer with one token a word, and </s>."""

    def __call__(self, text, verbose=True):
        return type("Encoding", (), {"input_ids": [0] * (len(text.split()) + 1)})


class TestLimit:
    @pytest.fixture
    def store(self, make_store):
        long = 'One two "three four." Mr. Five e.g. six! Seven eight nine, ten. Eleven'
        return make_store({"long.mp4": long, "short.mp4": "One two.", "endless.mp4": "word " * 50})

    def test_report_trim_and_refuse(self, store, tmp_path):
        settings = {"token_limit": 9, "tokenizer": Words(), "trigger_word": "ZORP"}
        report = export_dataset(store, "cogvideo", tmp_path / "report", **settings)
        assert list(report.table["num_t5_tokens"]) == [15, 4, 52] and list(report.table["over_limit"]) == [1, 0, 1]
        assert "2 captions of more than 9 T5 tokens" in str(report)
        report = export_dataset(store, "cogvideo", tmp_path / "trim", **settings, on_too_long="trim")
        assert list(report.exported["text"]) == ['ZORP One two "three four."', "ZORP One two."]
        assert list(report.exported["changed_by"]) == ["trimmed", ""] and report.exported["num_t5_tokens"].max() == 6
        assert "has 52 T5 tokens, more than 9; not even its first" in report.refused["reason"].iloc[0]
        report = export_dataset(store, "diffusers", tmp_path / "refuse", **settings, on_too_long="refuse")
        assert list(report.refused["reason"]) == [f"has {n} T5 tokens, more than 9" for n in (15, 52)]
        assert report.exported["text"].item() == "One two." and "--id_token 'ZORP '" in report.command

    def test_an_abbreviation_ends_no_sentence(self, store, tmp_path):
        report = export_dataset(store, "sat", tmp_path / "out", token_limit=10, tokenizer=Words(), on_too_long="trim")
        assert report.exported["text"].iloc[0] == 'One two "three four." Mr. Five e.g. six!'

    def test_without_a_tokenizer_cogvideoxs_tokens_are_counted(self, make_store, tmp_path):
        store = make_store({"a.mp4": "dog " * 223, "b.mp4": "dog " * 224})
        report = export_dataset(store, "cogvideo", tmp_path / "out")
        assert list(report.table["num_t5_tokens"]) == [224, 225] and list(report.table["over_limit"]) == [0, 1]
        assert "1 caption of more than 224 T5 tokens" in str(report)


class TestCleaning:
    @pytest.mark.parametrize(
        "rule, text, cleaned",
        [
            ("openings", "The video shows a dog.", "A dog."),
            ("openings", "In this video, we see  that a dog runs.", "A dog runs."),
            ("openings", "The video begins with: “a dog”.", "“a dog”."),
            ("openings", "The viewer is taken to a beach.", "The viewer is taken to a beach."),
            ("openings", "The video shows", "The video shows"),
            ("openings", "A video shop opens.", "A video shop opens."),
            ("lines", " a\r\n\u2028\t b\x1cc ", "a b c"),
            ("fragments", "A dog runs. It bar", "A dog runs."),
            ("fragments", "A dog runs and", "A dog runs and"),
            ("fragments", "A dog at 3.5 m. “It barks.” Then", "A dog at 3.5 m. “It barks.”"),
            ("nfc", "Cafe\u0301", "Caf\xe9"),
        ],
    )
    def test_rules(self, rule, text, cleaned):
        assert CLEANING[rule](text, {"finish_reason": "length"}) == cleaned

    def test_fragments_stay_where_the_caption_ended_by_itself(self):
        assert CLEANING["fragments"]("A dog runs. It bar", {"finish_reason": "eos"}) == "A dog runs. It bar"


# ---- the folder ----------------------------------------------------------------------------------------------------


class TestFolder:
    @pytest.fixture
    def store(self, make_store):
        return make_store({"a.mp4": "A dog.", "b.mp4": "A cat."})

    @pytest.mark.parametrize("layout, latents", [(name, kind.latents[0]) for name, kind in LAYOUTS.items()])
    def test_again_changed_and_beside_latents(self, store, tmp_path, layout, latents):
        root = tmp_path / "deep" / "out"
        export_dataset(store, layout, root)
        before = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
        export_dataset(store, layout, root)  # the same again: nothing is written
        assert before == {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
        store.edit("captions 0", "Our dog.")
        with pytest.raises(ValueError, match=r"holds other captions; choose another folder, or overwrite=True"):
            export_dataset(store, layout, root)
        report = export_dataset(store, layout, root, overwrite=True)
        assert report.exported["text"].iloc[0] == "Our dog." and "all 2 pairs are right" in report.read_back
        suffix = LAYOUTS[layout].config_suffix
        assert {path.name for path in root.parent.iterdir()} == {"out", "out.export.json", f"out{suffix}"}
        (root / latents).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"holds {latents}/, which a trainer has computed from clips"):
            export_dataset(store, layout, root, overwrite=True)

    @pytest.mark.parametrize("before", ["link", "copy", "hardlink"])
    @pytest.mark.parametrize("after", ["link", "copy", "hardlink"])
    def test_links_become_copies_and_the_reverse(self, store, tmp_path, before, after):
        root, originals = tmp_path / "out", {path.name: path.stat().st_ino for path in tmp_path.glob("clips/*.mp4")}
        report = export_dataset(store, "cogkit", root, clips=before)
        if before != after:
            with pytest.raises(ValueError, match=f"with clips='{before}', not '{after}'; .*overwrite"):
                export_dataset(store, "cogkit", root, clips=after)
            assert json.loads(report.path.read_text())["options"]["clips"] == before
        report = export_dataset(store, "cogkit", root, clips=after, overwrite=before != after)
        made = [root / file for file in report.exported["file"]]
        assert len(made) == 2 and all(path.is_symlink() == (after == "link") for path in made)
        assert [path.stat().st_ino in originals.values() for path in made] == [after != "copy"] * 2
        assert json.loads(report.path.read_text())["options"]["clips"] == after

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_foreign_files_are_never_replaced(self, store, tmp_path, layout):
        root = tmp_path / "out"
        export_dataset(store, layout, root)
        (root / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds 'notes.txt', not part of such an export"):
            export_dataset(store, layout, root, overwrite=True)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file"):
            export_dataset(store, layout, tmp_path / "file", overwrite=True)
        assert (root / "notes.txt").read_text() == "mine"

    @pytest.mark.skipif(os.name != "posix", reason="links")
    def test_a_link_to_nowhere_and_the_root_are_named(self, store, tmp_path):
        (tmp_path / "out").symlink_to("gone")
        with pytest.raises(ValueError, match=r"output_dir: .*out is a link to 'gone', which is not there"):
            export_dataset(store, "cogvideo", tmp_path / "out", overwrite=True)
        with pytest.raises(ValueError, match="output_dir: / is the root of the file system; name a folder in it"):
            export_dataset(store, "cogvideo", "/")
        assert {path.name for path in tmp_path.iterdir() if "out" in path.name} == {"out"}

    def test_a_clip_added_by_hand_is_the_one_that_is_named(self, store, tmp_path):
        root = tmp_path / "out"
        export_dataset(store, "cogkit", root)
        (root / "train" / "mine.mp4").touch()
        with open(root / "train" / "metadata.jsonl", "a") as file:
            file.write('{"file_name": "mine.mp4"}\n')
        with pytest.raises(ValueError, match="holds 'train/mine.mp4', not part of such an export"):
            export_dataset(store, "cogkit", root, overwrite=True)

    def test_copies_are_advised_only_where_links_are_the_trouble(self, store, tmp_path, monkeypatch):
        for number, advises in ((errno.EPERM, True), (errno.ENOSPC, False)):

            def refuse(*_, number=number):
                raise OSError(number, "as was to be shown")

            monkeypatch.setattr(os, "symlink", refuse)
            with pytest.raises(ExportError, match="as was to be shown") as raised:
                export_dataset(store, "cogvideo", tmp_path / "out")
            assert ("clips='copy'" in str(raised.value)) == advises

    def test_a_file_where_the_report_goes_is_never_replaced(self, store, tmp_path):
        mine = tmp_path / "out.export.json"
        for content in ('{"mine": 1}', "", "text"):
            mine.write_text(content)
            with pytest.raises(ValueError, match="out.export.json, where the report goes, is something else"):
                export_dataset(store, "cogvideo", tmp_path / "out", overwrite=True)
            assert mine.read_text() == content and not (tmp_path / "out").exists()
        mine.unlink()
        mine.symlink_to("/dev/null")
        with pytest.raises(ValueError, match="is something else"):
            export_dataset(store, "cogvideo", tmp_path / "out")

    def test_another_layout_is_not_replaced(self, store, tmp_path):
        export_dataset(store, "cogvideo", tmp_path / "out")
        with pytest.raises(ValueError, match="not part of such an export"):
            export_dataset(store, "cogkit", tmp_path / "out", overwrite=True)

    def test_what_sat_would_look_for_elsewhere(self, store, tmp_path):
        for folder in ("my_videos_2024", "a.mp4.d"):
            with pytest.raises(ValueError, match="SAT would look for the captions elsewhere"):
                export_dataset(store, "sat", tmp_path / folder / "out")
            export_dataset(store, "cogvideo", tmp_path / folder / "out")

    def test_links_copies_and_hard_links(self, store, tmp_path):
        for clips in ("link", "copy", "hardlink"):
            export_dataset(store, "finetrainers", tmp_path / clips, clips=clips)
            clip = tmp_path / clips / "a.mp4"
            assert clip.read_bytes() == (tmp_path / "clips" / "a.mp4").read_bytes()
            assert clip.is_symlink() == (clips == "link")
            assert clip.samefile(tmp_path / "clips" / "a.mp4") == (clips != "copy")

    def test_what_reads_otherwise_never_gets_its_name(self, store, tmp_path, monkeypatch):
        """A layout that writes two captions in the wrong order."""
        kind = LAYOUTS["cogvideo"]
        write = type(kind).write
        monkeypatch.setattr(kind, "write", lambda root, pairs: (write(kind, root, pairs), swap(root)), raising=False)

        def swap(root):
            (root / "prompts.txt").write_text("A cat.\nA dog.\n")

        with pytest.raises(ExportError, match="a.mp4 has the caption 'A cat.', not 'A dog.'; nothing was exported"):
            export_dataset(store, "cogvideo", tmp_path / "out")
        monkeypatch.setattr(kind, "write", lambda root, pairs: None, raising=False)
        with pytest.raises(ExportError, match="it stops: .*prompts.txt"):
            export_dataset(store, "cogvideo", tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"clips", "captions.jsonl"}

    def test_a_disk_that_is_full_leaves_nothing(self, store, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("shutil.copyfile", full)
        with pytest.raises(ExportError, match="No space left on device; nothing was exported"):
            export_dataset(store, "cogvideo", tmp_path / "out", clips="copy")
        assert {path.name for path in tmp_path.iterdir()} == {"clips", "captions.jsonl"}

    @pytest.mark.parametrize("moment", ["write", "read"])
    def test_killed_on_the_way_no_export_is_there(self, store, tmp_path, moment):
        code = f"""
import os, signal, sys
from capkit.export import LAYOUTS, export_dataset
kind = LAYOUTS["sidecar"]
done = kind.{moment}
def {moment}(*arguments):
    done(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
kind.{moment} = {moment}
export_dataset(sys.argv[1], "sidecar", sys.argv[2])
"""
        root = tmp_path / "out"
        killed = subprocess.run([sys.executable, "-c", code, store.path, root], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not root.exists() and [path.name for path in tmp_path.glob(".out.part-*")]
        mine = tmp_path / ".out.part-of-mine"
        mine.mkdir()
        (tmp_path / ".out.export.json.0123abcd.part").touch()  # of a kill at the report
        assert len(export_dataset(store, "sidecar", root).exported) == 2
        assert [path.name for path in tmp_path.glob(".out*")] == [mine.name]

    def test_killed_between_two_renames_the_old_export_comes_back(self, store, tmp_path):
        root, aside = tmp_path / "out", tmp_path / ".out.old-1234abcd"
        before = export_dataset(store, "sidecar", root)
        aside.mkdir()
        root.rename(aside / "out")
        store.edit("captions 0", "Our dog.")
        with pytest.raises(ValueError, match="holds other captions"):
            export_dataset(store, "sidecar", root)
        assert (root / "a.txt").read_text() == before.exported["text"].iloc[0] + "\n" and not aside.exists()

    def test_a_second_export_to_the_same_folder_is_refused(self, store, tmp_path, monkeypatch):
        def export_again(*_, **settings):
            with pytest.raises(ExportBusy, match="another thread of this process .* is exporting to this folder"):
                export_dataset(store, "cogvideo", tmp_path / "out")
            return []

        monkeypatch.setattr("capkit.export.dataset.choose_records", export_again)
        with pytest.raises(ValueError, match="nothing to export"):
            export_dataset(store, "cogvideo", tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"clips", "captions.jsonl"}


def test_report_of_a_set_that_says_the_same_of_everything(make_store, tmp_path):
    words = [f"The video shows a small dog that runs over the lawn, number {n}." for n in range(5)]
    captions = {f"{n}.mp4": text for n, text in enumerate(words)} | {"other.mp4": "Rain falls."}
    report = export_dataset(make_store(captions), "metadata-csv", tmp_path / "out", trigger_word="ZORP")
    assert report.shared_openings.to_dict("records") == [{"opening": "the video shows a", "num_captions": 5}]
    assert list(report.table["boilerplate_opening"]) == ["the video shows"] * 5 + [""]
    saved = json.loads(report.path.read_text())
    assert saved["shared_openings"] == report.shared_openings.to_dict("records") and saved["layout"] == "metadata-csv"
    assert [row["original"] for row in saved["clips"]] == list(captions.values())
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[5] == {"file_name": "other.mp4"} | dict.fromkeys(("caption", "prompt", "text"), "ZORP Rain falls.")
    exact = export_dataset(make_store({f"{n}.mp4": "A dog runs." for n in range(3)}, "b.jsonl"), "sat", tmp_path / "b")
    assert exact.table["near_duplicate"].all() and "3 captions nearly like another clip's" in str(exact)
