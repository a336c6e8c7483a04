"""Exports: what trainers read is what was captioned, or it is refused with the reason."""

import itertools
import json
import os
import unicodedata
from pathlib import Path

import pytest

from capkit import CaptionStore
from capkit.export import CLEANING, LAYOUTS, export_dataset
from capkit.export.base import LINE_SEPARATORS
from capkit.records import _sha256 as sha256_of

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
NAMES = [
    *("dog.mp4", " a dog .mp4", "dog.v1.mp4.mp4", 'it\'s "a", dog.mp4', "собака\t🐕.mp4", "DOG.MP4", "test_1.mp4"),
    *("b-train-2.mp4", "videos.mp4", "__labels.mp4", "..mp4", "x" * 200 + ".mp4", "metadata.mp4"),
]


def write_store(path, folder, captions):
    """A store with records of files that hold something each; captions: {clip name: text or fields}."""
    records = []
    for number, (clip, fields) in enumerate(captions.items()):
        file = folder / clip
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"not a video: {clip}".encode())
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
assert READERS.keys() | HUGGING_FACE.keys() == LAYOUTS.keys()


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
    "metadata-csv": {"like a number", "like a truth", "like nothing"},
    "videox-fun": set(),
}


@pytest.fixture(scope="module")
def cross_product(tmp_path_factory):
    """A store with every text for a clip of every name, in folders of their own, so that many stems are equal."""
    folder = tmp_path_factory.mktemp("cross product")
    pairs = itertools.product(enumerate(TEXTS.values()), NAMES)
    captions = {f"my videos/{number}/{name}": text for (number, text), name in pairs}
    return write_store(folder / "captions.jsonl", folder, captions)


@pytest.mark.parametrize("layout", LAYOUTS)
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
            "like nothing"
        }
        assert report.exported["num_t5_tokens"].max() <= report.threshold < 224
        written = [row.text for row in report.exported.itertuples()]
        assert all(text.startswith("ZORP ") != LAYOUTS[layout].adds_trigger for text in written)
        assert not any(letter in text for text in written for letter in LINE_SEPARATORS + "\t")
        assert ("ZORP" in report.command) == LAYOUTS[layout].adds_trigger
        clips = [path for path in (tmp_path / "out").rglob("*.mp4")]
        assert len(clips) == len(report.exported) and not any(clip.is_symlink() for clip in clips)
        by_content = {sha256_of(str(clip)): clip for clip in clips}
        for row in report.exported.itertuples():
            assert by_content[sha256_of(row.video)] == tmp_path / "out" / row.file
