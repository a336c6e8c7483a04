"""A table with a row for each clip: CogKit, finetrainers, metadata.jsonl, metadata.csv, VideoX-Fun.

All but VideoX-Fun read with `load_dataset("videofolder")`, which finds `metadata.jsonl` or `.csv` (never `.json`) and
has three traps. It takes words in file names for splits: beside a clip called `test_1.mp4` there is no split "train"
left; so clips get other names (see `capkit.export.naming`). From JSON it makes times of captions that all look like
dates, from CSV numbers and missing values of captions such as "12" and "None". And it says nothing of rows without a
clip or clips without a row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from shlex import quote

import pandas as pd

from capkit.export.base import Layout, Pair, write_text
from capkit.export.naming import NAMES_A_SPLIT

_LOOKS_LIKE_A_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d.*)?")
VIDEO_FOLDER_SUFFIXES = frozenset((".mkv", ".mp4", ".avi", ".mpeg", ".mov"))


class VideoFolder(Layout):
    """`metadata.jsonl` among the clips, the caption in each of `columns`; `load_dataset("videofolder")` reads it."""

    name = "metadata-jsonl"
    trainer = 'load_dataset("videofolder")'
    clip_folder = ""
    clip_suffixes = VIDEO_FOLDER_SUFFIXES
    columns = ("caption", "prompt", "text")

    def unfit(self, text: str) -> str:
        if _LOOKS_LIKE_A_DATE.fullmatch(text):
            return f"{self.trainer} could read {text!r} as a time, not as a text"
        return super().unfit(text)

    def write(self, root: Path, pairs: list[Pair]) -> None:
        rows = [{"file_name": pair.name} | dict.fromkeys(self.columns, pair.text) for pair in pairs]
        write_text(root / self.clip_folder / "metadata.jsonl", to_json_lines(rows))

    def read(self, root: Path) -> list[tuple[Path, str]]:
        found = read_video_folder(root / self.clip_folder)
        if any(row[name] != row[self.columns[0]] for _, row in found for name in self.columns):
            raise ValueError(f"metadata.jsonl: {self.columns} differ")
        return [(clip, row[self.columns[0]]) for clip, row in found]

    def caption_files(self, names: list[str]) -> set[str]:
        return {str(Path(self.clip_folder) / "metadata.jsonl")}

    def command(self, root: Path, trigger_word: str) -> str:
        return f'load_dataset("videofolder", data_dir={str(root)!r}, split="train")  # Python, from datasets'


class VideoFolderCSV(VideoFolder):
    """`metadata.csv` among the clips, every value in quotes; pandas reads it, alone and in load_dataset."""

    name = "metadata-csv"
    trainer = "pandas.read_csv"
    unfit = Layout.unfit  # no dates are made here

    def as_read(self, text: str) -> list[str]:
        if text.count(" ") > 1 and "\0" not in text:
            return [text]  # neither a number nor one of pandas' words for nothing: spares parsing most captions
        table = pd.read_csv(io.StringIO(_to_csv([("file_name", "caption"), ("a.mp4", text)]), newline=""))
        return table["caption"].to_list()

    def write(self, root: Path, pairs: list[Pair]) -> None:
        rows = [("file_name", *self.columns)]
        write_text(root / "metadata.csv", _to_csv(rows + [(pair.name, *[pair.text] * 3) for pair in pairs]))

    def read(self, root: Path) -> list[tuple[Path, str]]:
        table = pd.read_csv(root / "metadata.csv")
        check_split_names(root)
        return [(root / name, text) for name, text in zip(table["file_name"], table["caption"], strict=True)]

    def caption_files(self, names: list[str]) -> set[str]:
        return {"metadata.csv"}


class Finetrainers(VideoFolder):
    """finetrainers: of several layouts that one root could hold, it takes the first of its own order.

    One `metadata.jsonl` in the root goes before all others; a second metadata file is an error, and a .tar or .parquet
    anywhere below would make it a web dataset in some versions. `b'...'` is taken for bytes and unwrapped.
    """

    name = "finetrainers"
    trainer = "finetrainers"
    columns = ("caption",)
    adds_trigger = True

    def as_read(self, text: str) -> list[str]:
        return [text[2:-1] if text.startswith("b'") and text.endswith("'") else text]

    def read(self, root: Path) -> list[tuple[Path, str]]:
        tables = [root / f"metadata.{kind}" for kind in ("json", "jsonl", "csv")]
        if [table for table in tables if table.exists()] != tables[1:2]:
            raise ValueError("must have metadata.jsonl, and neither metadata.json nor metadata.csv")
        if strays := [path for path in root.rglob("*") if path.suffix in (".tar", ".parquet")]:
            raise ValueError(f"{strays[0]} would be taken for the data set")
        return [(clip, self.as_read(text)[0]) for clip, text in super().read(root)]

    def command(self, root: Path, trigger_word: str) -> str:
        data = {"data_root": str(root), "dataset_type": "video", "video_resolution_buckets": [[49, 480, 720]]}
        if trigger_word:
            data["id_token"] = trigger_word
        config = json.dumps({"datasets": [data]}, ensure_ascii=False)
        return (
            f"printf %s {quote(config)} > training.json && torchrun --standalone --nproc_per_node=1 train.py "
            "--parallel_backend ptd --model_name cogvideox --pretrained_model_name_or_path THUDM/CogVideoX-5b "
            "--dataset_config training.json --training_type lora --train_steps 1000 --batch_size 1 "
            "--output_dir OUTPUT_DIR  # in finetrainers"
        )


class CogKit(VideoFolder):
    """CogKit, text to video: a videofolder in `train/`. Latents are kept in `train/.cache` by the clip's stem."""

    name = "cogkit"
    trainer = "CogKit"
    clip_folder = "train"
    columns = ("prompt",)
    latents = ("train/.cache", ".cache", "cache")
    model = "--model_path THUDM/CogVideoX1.5-5B --model_name cogvideox1.5-t2v --model_type t2v"

    def command(self, root: Path, trigger_word: str) -> str:
        return (
            f"accelerate launch train.py {self.model} --training_type lora --train_resolution 81x768x1360 "
            f"--train_epochs 1 --mixed_precision bf16 --do_validation false --data_root {quote(str(root))} "
            "--output_dir OUTPUT_DIR  # in CogKit/quickstart/scripts"
        )


class CogKitImageToVideo(CogKit):
    """CogKit, image to video, the first frame for image. Captions and clips are two tables, sorted by `id` and joined
    by position, not by key: the ids must be the same."""

    name = "cogkit-i2v"
    trainer = "CogKit (image to video)"
    clip_folder = "train/videos"
    model = "--model_path THUDM/CogVideoX1.5-5B-I2V --model_name cogvideox1.5-i2v --model_type i2v"

    def write(self, root: Path, pairs: list[Pair]) -> None:
        captions = [{"id": pair.stem, "prompt": pair.text} for pair in pairs]
        clips = [{"file_name": pair.name, "id": pair.stem} for pair in pairs]
        write_text(root / "train" / "metadata.jsonl", to_json_lines(captions))
        write_text(root / "train" / "videos" / "metadata.jsonl", to_json_lines(clips))

    def read(self, root: Path) -> list[tuple[Path, str]]:
        captions = sorted(read_json_lines(root / "train" / "metadata.jsonl"), key=lambda row: row["id"])
        clips = sorted(read_video_folder(root / "train" / "videos"), key=lambda found: found[1]["id"])
        if len(captions) != len(clips):
            raise ValueError(f"{len(captions)} captions and {len(clips)} clips")
        return [(clip, row["prompt"]) for (clip, _), row in zip(clips, captions, strict=True)]

    def caption_files(self, names: list[str]) -> set[str]:
        return {"train/metadata.jsonl", "train/videos/metadata.jsonl"}


class VideoXFun(Layout):
    """VideoX-Fun: `metadata.json`, a list of rows with paths relative to the root. It opens the file in the machine's
    own encoding, so that all is written in ASCII."""

    name = "videox-fun"
    trainer = "VideoX-Fun"

    def write(self, root: Path, pairs: list[Pair]) -> None:
        rows = [{"file_path": f"{self.clip_folder}/{pair.name}", "text": pair.text, "type": "video"} for pair in pairs]
        write_text(root / "metadata.json", json.dumps(rows, indent=2) + "\n")

    def read(self, root: Path) -> list[tuple[Path, str]]:
        rows = json.loads((root / "metadata.json").read_text(encoding="ascii"))
        return [(root / row["file_path"], row["text"]) for row in rows if row.get("type", "image") == "video"]

    def caption_files(self, names: list[str]) -> set[str]:
        return {"metadata.json"}

    def command(self, root: Path, trigger_word: str) -> str:
        return (
            "accelerate launch --mixed_precision bf16 scripts/cogvideox_fun/train_lora.py "
            f"--pretrained_model_name_or_path MODEL_FOLDER --train_data_dir {quote(str(root))} "
            f"--train_data_meta {quote(str(root / 'metadata.json'))} --video_sample_n_frames 49 "
            "--video_sample_stride 3 --train_batch_size 1 --num_train_epochs 100 --output_dir OUTPUT_DIR"
            "  # in VideoX-Fun"
        )


def to_json_lines(rows: list[dict[str, str]]) -> str:
    """JSON Lines; no caption breaks a line, JSON escapes what would."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json_lines(path: Path) -> list[dict[str, str]]:
    """Rows of a file of JSON Lines, whose lines end with "\\n" alone."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def read_video_folder(folder: Path) -> list[tuple[Path, dict[str, str]]]:
    """Clips and rows of a folder with a metadata.jsonl, as `load_dataset("videofolder", split="train")` has them."""
    tables = [path for path in folder.rglob("metadata.*") if path.suffix in (".csv", ".jsonl", ".parquet")]
    if tables != [folder / "metadata.jsonl"]:
        raise ValueError(f"must have one metadata.jsonl and no other table, but has {sorted(map(str, tables))}")
    check_split_names(folder)
    return [(folder / row["file_name"], row) for row in read_json_lines(tables[0])]


def check_split_names(folder: Path) -> None:
    """Raise ValueError where a file's name makes load_dataset see another split than "train"."""
    for path in folder.rglob("*"):
        if any(NAMES_A_SPLIT.search(part) for part in path.relative_to(folder).parts):
            raise ValueError(f"{path}: load_dataset takes the name for a split's")


def _to_csv(rows: list[tuple[str, ...]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return file.getvalue()
