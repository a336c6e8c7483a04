"""Layouts of a table with one row a clip: CogKit, finetrainers, metadata.jsonl, metadata.csv, VideoX-Fun.

All but VideoX-Fun read with `load_dataset("videofolder")`, which finds `metadata.jsonl` or `.csv` (never `.json`) and
has four traps. It takes words in file names for splits: beside a clip called `test_1.mp4` there is no split "train"
any more; so clips are renamed (see `capkit.export.clip_names`). It converts captions that all look like dates to times
(JSON), and captions such as "12" and "None" to numbers and missing values (CSV). It ignores rows without a clip and
clips without a row. And it takes `[`, `*`, `?`, `::` and `$HOME` in the path of the folder for patterns, for a chain of
file systems and for a variable (huggingface/datasets 3.4.1 and 5.2.0, data_files.py and utils/file_utils.py).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from capkit.export.clip_names import SPLIT_WORD
from capkit.export.layouts.base import Layout, Pair, write_text, write_yaml
from capkit.runs import TrainerSettings

LOOKS_LIKE_A_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d.*)?")


class VideoFolder(Layout):
    """`metadata.jsonl` among the clips, the caption in each of `columns`; `load_dataset("videofolder")` reads it."""

    name = "metadata-jsonl"
    trainer = 'load_dataset("videofolder")'
    clip_folder = ""
    clip_suffixes = frozenset((".mkv", ".mp4", ".avi", ".mpeg", ".mov"))
    tables: tuple[str, ...] = ("metadata.jsonl",)
    columns: tuple[str, ...] = ("caption", "prompt", "text")
    uses_datasets = True
    launch = 'load_dataset("videofolder", data_dir={path!r}, split="train")  # Python, from datasets'

    def unfit(self, text: str) -> str:
        if LOOKS_LIKE_A_DATE.fullmatch(text):
            return f"{self.trainer} could read {text!r} as a time instead of text"
        return super().unfit(text)

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        rows = ({"file_name": pair.name} | dict.fromkeys(self.columns, pair.text) for pair in pairs)
        _write_json_lines(root / self.tables[0], rows)

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        for clip, row in _read_video_folder(root / self.clip_folder):
            if any(row[name] != row[self.columns[0]] for name in self.columns):
                raise ValueError(f"metadata.jsonl: {self.columns} differ")
            yield clip, row[self.columns[0]]


class VideoFolderCSV(VideoFolder):
    """`metadata.csv` among the clips, every value in quotes; pandas reads it, alone and in load_dataset."""

    name = "metadata-csv"
    trainer = "pandas.read_csv"
    tables = ("metadata.csv",)
    unfit = Layout.unfit  # pandas converts no dates

    def as_read(self, text: str) -> list[str]:
        return as_pandas_reads(text)

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        rows = ((pair.name, *[pair.text] * len(self.columns)) for pair in pairs)
        write_text(root / "metadata.csv", map(csv_line, chain([("file_name", *self.columns)], rows)))

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        table = pd.read_csv(root / "metadata.csv")
        check_split_names(root)
        yield from ((root / name, text) for name, text in zip(table["file_name"], table["caption"], strict=True))


class Finetrainers(VideoFolder):
    """finetrainers: `metadata.jsonl` in the root, which it prefers to all other layouts.

    A second metadata file is an error, and a .tar or .parquet anywhere below the root makes it a web dataset in some
    versions. `b'...'` is taken for bytes and unwrapped. Facts: a-r-r-o-w/finetrainers f476c37,
    finetrainers/data/dataset.py and finetrainers/args.py. Its flags here: --parallel_backend --model_name
    --pretrained_model_name_or_path --dataset_config --training_type --train_steps --batch_size --output_dir. Clips are
    read with torchvision.io.VideoReader, which 0.26 no longer has, and which `datasets` from 3.4 to 3.5 returns.
    """

    name = "finetrainers"
    trainer = "finetrainers"
    columns = ("caption",)
    adds_trigger = True
    window_rule = "finetrainers"
    needs = "torchvision 0.25 or older and datasets 3.4.1"
    config_suffix = ".finetrainers.json"
    launch = (
        "torchrun --standalone --nproc_per_node=1 train.py --parallel_backend ptd --model_name cogvideox "
        "--pretrained_model_name_or_path THUDM/CogVideoX-5b --dataset_config {config} --training_type lora "
        "--train_steps 1000 --batch_size 1 --output_dir OUTPUT_DIR  # in finetrainers"
    )

    def as_read(self, text: str) -> list[str]:
        return [text[2:-1] if text.startswith("b'") and text.endswith("'") else text]

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        tables = [kind for kind in ("json", "jsonl", "csv") if (root / f"metadata.{kind}").exists()]
        if tables != ["jsonl"]:
            raise ValueError("must have metadata.jsonl, and neither metadata.json nor metadata.csv")
        if archives := [path for path in root.rglob("*") if path.suffix in (".tar", ".parquet")]:
            raise ValueError(f"{archives[0]} would be taken for the data set")
        yield from ((clip, self.as_read(text)[0]) for clip, text in super().read(root))

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        data: dict[str, Any] = {"data_root": str(root), "dataset_type": "video"}
        data["video_resolution_buckets"] = [[settings.num_frames, 480, 720]]
        data |= {"id_token": trigger_word} if trigger_word else {}
        return json.dumps({"written_by": "capkit's export", "datasets": [data]}) + "\n"

    def command(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        return super().command(root, "", settings)  # the trigger word is in the file


class CogKit(VideoFolder):
    """CogKit, text to video: a videofolder in `train/`. Latents are cached in `train/.cache` by the clip's stem.

    Facts: THUDM/CogKit 1633285, quickstart/scripts/train.py, which takes --yaml and no other flag, and the fields that
    src/cogkit/finetune/base/base_args.py and diffusion/schemas/args.py need. Of `train_resolution`, which is frames,
    height, width, the frames must be 8 N + 1. Clips are read with torchvision.io.VideoReader, which 0.26 no longer has,
    and which `datasets` from 3.4 to 3.5 returns; pyproject.toml asks for 3.4.
    """

    name = "cogkit"
    window_rule = "cogkit"
    needs = "torchvision 0.25 or older and datasets 3.4.1"
    config_suffix = ".cogkit.yaml"
    model = ("cogvideox1.5-t2v", "THUDM/CogVideoX1.5-5B")
    trainer = "CogKit"
    clip_folder = "train"
    tables: tuple[str, ...] = ("train/metadata.jsonl",)
    columns = ("prompt",)
    latents = ("train/.cache", ".cache", "cache")
    launch = (
        "torchrun --standalone --nproc_per_node=1 train.py --yaml {config}"
        "  # in CogKit/quickstart/scripts, with your OUTPUT_DIR in that file"
    )

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        name, path = self.model
        model = {"name4train": root.name, "model_name": name, "model_path": path}
        paths = {"data_root": str(root), "output_dir": "OUTPUT_DIR", "report_to": None}
        training = {"training_type": "lora", "strategy": "DDP", "enable_packing": False, "mixed_precision": "bf16"}
        training |= {"train_resolution": [settings.num_frames, 768, 1360], "train_epochs": 1, "batch_size": 1}
        training |= {
            "checkpointing_steps": 10,
            "checkpointing_limit": 2,
            "do_validation": False,
            "validation_steps": None,
        }
        return write_yaml(model | paths | training)


class CogKitImageToVideo(CogKit):
    """CogKit, image to video, with the first frame as the image.

    Captions and clips are two tables, sorted by `id` and joined by position, not by key: the ids must be the same.
    """

    name = "cogkit-i2v"
    trainer = "CogKit (image to video)"
    clip_folder = "train/videos"
    tables = ("train/metadata.jsonl", "train/videos/metadata.jsonl")
    model = ("cogvideox1.5-i2v", "THUDM/CogVideoX1.5-5B-I2V")

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        _write_json_lines(root / self.tables[0], ({"id": pair.stem, "prompt": pair.text} for pair in pairs))
        _write_json_lines(root / self.tables[1], ({"file_name": pair.name, "id": pair.stem} for pair in pairs))

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        captions = sorted(_read_json_lines(root / self.tables[0]), key=lambda row: row["id"])
        clips = sorted(_read_video_folder(root / self.clip_folder), key=lambda pair: pair[1]["id"])
        if len(captions) != len(clips):
            raise ValueError(f"{len(captions)} captions and {len(clips)} clips")
        yield from ((clip, row["prompt"]) for (clip, _), row in zip(clips, captions, strict=True))


class VideoXFun(Layout):
    """VideoX-Fun: `metadata.json`, a list of rows with paths relative to the root.

    It is opened in the locale encoding, so everything is written in ASCII. Clips are read with decord. Facts:
    aigc-apps/VideoX-Fun 804a425, videox_fun/data/dataset_image_video.py and scripts/cogvideox_fun/train_lora.py, .sh.
    Its flags here: --pretrained_model_name_or_path --train_data_dir --train_data_meta --train_mode --enable_bucket
    --random_hw_adapt --training_with_video_token_length --video_sample_n_frames --video_sample_stride --use_peft_lora
    --low_vram --vae_mini_batch --train_batch_size --num_train_epochs --mixed_precision --output_dir. The published
    models, called InP, need the train mode "inpaint"; "normal" is the default.
    """

    name = "videox-fun"
    trainer = "VideoX-Fun"
    decoder = "decord"
    window_rule = "videox-fun"
    tables = ("metadata.json",)
    launch = (
        "accelerate launch --mixed_precision bf16 scripts/cogvideox_fun/train_lora.py "
        "--pretrained_model_name_or_path MODEL_FOLDER --train_data_dir {root} --train_data_meta {root}/metadata.json "
        "--train_mode inpaint --enable_bucket --random_hw_adapt --training_with_video_token_length "
        "--video_sample_n_frames {num_frames} --video_sample_stride {stride} --use_peft_lora --low_vram "
        "--vae_mini_batch 1 --train_batch_size 1 --num_train_epochs 100 --mixed_precision bf16 "
        "--output_dir OUTPUT_DIR  # in VideoX-Fun"
    )

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        rows = [{"file_path": f"{self.clip_folder}/{pair.name}", "text": pair.text, "type": "video"} for pair in pairs]
        write_text(root / "metadata.json", [json.dumps(rows, indent=2), "\n"])

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        rows = json.loads((root / "metadata.json").read_text(encoding="ascii"))
        yield from ((root / row["file_path"], row["text"]) for row in rows if row.get("type", "image") == "video")


def _write_json_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write JSON Lines; line breaks within captions are escaped."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_json_lines(path: Path) -> Iterator[dict[str, str]]:
    """Read JSON Lines, which end with "\\n" only."""
    with open(path, "rb") as file:
        yield from (json.loads(line) for line in file if line != b"\n")


def _read_video_folder(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Clips and rows of a folder with a metadata.jsonl, as `load_dataset("videofolder", split="train")` has them."""
    tables = [path for path in folder.rglob("metadata.*") if path.suffix in (".csv", ".jsonl", ".parquet")]
    if tables != [folder / "metadata.jsonl"]:
        raise ValueError(f"must have one metadata.jsonl and no other table, but has {sorted(map(str, tables))}")
    check_split_names(folder)
    yield from ((folder / row["file_name"], row) for row in _read_json_lines(tables[0]))


def check_split_names(folder: Path) -> None:
    """Raise ValueError if load_dataset would take a word in a file's name for a split."""
    for path in folder.rglob("*"):
        if any(SPLIT_WORD.search(part) for part in path.relative_to(folder).parts):
            raise ValueError(f"{path}: load_dataset takes the name for a split's")


def as_pandas_reads(text: str) -> list[Any]:
    """What pandas reads for a caption in a CSV file of its own."""
    if text.count(" ") > 1:
        return [text]  # neither a number nor one of pandas' words for a missing value: saves parsing most captions
    content = "".join(map(csv_line, [("file_name", "caption"), ("a.mp4", text)]))
    return pd.read_csv(io.StringIO(content, newline=""))["caption"].to_list()


def csv_line(row: Iterable[Any]) -> str:
    """A line of CSV, with every value in quotes."""
    line = io.StringIO(newline="")
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(row)
    return line.getvalue()
