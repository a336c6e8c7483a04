"""Layouts of one table that the trainer opens itself: DiffSynth-Studio, LTX-2, musubi-tuner, diffusion-pipe and others.

JSON is written in ASCII, because some trainers open it in the locale encoding, and one row a line; it holds every
caption. CSV is read with pandas, which takes captions such as "12" and "None" for numbers and missing values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from capkit.export.layouts.base import Layout, Pair, toml_string, write_text
from capkit.export.layouts.beside_clips import Musubi, musubi_toml
from capkit.export.layouts.tables import LOOKS_LIKE_A_DATE, as_pandas_reads, csv_line
from capkit.runs import TrainerSettings


class Rows(Layout):
    """A row for each clip with its path and its caption; the first of `tables` says the format by its suffix.

    Attributes:
        path, caption: names of the columns.
        start: folder below the root from which paths count.
    """

    path = "path"
    caption = "caption"
    start = ""

    def row(self, pair: Pair) -> dict[str, Any]:
        """The row of a clip, by column."""
        return {self.path: f"{self.clip_folder}/{pair.name}", self.caption: pair.text}

    def as_read(self, text: str) -> list[str]:
        return as_pandas_reads(text) if self.tables[0].endswith(".csv") else [text]

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        file, rows = root / self.tables[0], map(self.row, pairs)
        if file.suffix == ".csv":
            first = next(rows)
            lines = (csv_line(row.values()) for row in chain([first], rows))
            write_text(file, chain([csv_line(first)], lines))
        elif file.suffix == ".jsonl":
            write_text(file, (f"{json.dumps(row)}\n" for row in rows))
        else:
            _write_one_a_line(file, map(json.dumps, rows), "[", "]")

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        file = root / self.tables[0]
        if file.suffix == ".csv":
            table = pd.read_csv(file)
            yield from ((root / path, text) for path, text in zip(table[self.path], table[self.caption], strict=True))
            return
        for row in map(json.loads, _read_one_a_line(file, "[", "]") if file.suffix == ".json" else _lines(file)):
            texts = row[self.caption] if self.holds_several else [row[self.caption]]
            yield from ((root / self.start / row[self.path], text) for text in texts)


def _lines(file: Path) -> Iterator[str]:
    with open(file, encoding="ascii") as opened:
        yield from opened


def _write_one_a_line(file: Path, values: Iterable[str], begin: str, end: str) -> None:
    """Write a JSON list or object, of what is between its brackets."""
    lines = (f"{',' * (number > 0)}\n{value}" for number, value in enumerate(values))
    write_text(file, chain([begin], lines, [f"\n{end}\n"]))


def _read_one_a_line(file: Path, begin: str, end: str) -> Iterator[str]:
    """What `_write_one_a_line` wrote, in little memory."""
    with open(file, encoding="ascii") as opened:
        if opened.readline() != f"{begin}\n":
            raise ValueError(f"{file.name} does not begin with {begin}")
        for line in opened:
            if line == f"{end}\n":
                return
            yield line.rstrip(",\n")
    raise ValueError(f"{file.name} ends too early")


class DiffSynth(Rows):
    """DiffSynth-Studio: `metadata.jsonl` with `video` and `prompt`, paths relative to `--dataset_base_path`.

    It is opened in the locale encoding. Of a clip the first `--num_frames` frames are taken, 4 N + 1 (fewer of a short
    clip), read with imageio. Facts: modelscope/DiffSynth-Studio fed7b18, diffsynth/core/data/unified_dataset.py and
    operators.py, diffsynth/diffusion/parsers.py and examples/wanvideo/model_training/lora/Wan2.1-T2V-1.3B.sh.
    """

    name = "diffsynth"
    trainer = "DiffSynth-Studio"
    tables = ("metadata.jsonl",)
    path, caption = "video", "prompt"
    window_rule = "diffsynth"
    clip_suffixes = frozenset((".mp4", ".avi", ".mov", ".wmv", ".mkv", ".flv", ".webm"))
    launch = (
        "accelerate launch examples/wanvideo/model_training/train.py --dataset_base_path {root} "
        "--dataset_metadata_path {root}/{table} --height 480 --width 832 --num_frames {num_frames} "
        '--model_id_with_origin_paths "Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*.safetensors,'
        'Wan-AI/Wan2.1-T2V-1.3B:models_t5_umt5-xxl-enc-bf16.pth,Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth" '
        "--learning_rate 1e-4 --num_epochs 5 --remove_prefix_in_ckpt pipe.dit. --output_path OUTPUT_DIR "
        "--lora_base_model dit --lora_target_modules q,k,v,o,ffn.0,ffn.2 --lora_rank 32  # in DiffSynth-Studio"
    )


class DiffSynthJSON(DiffSynth):
    """DiffSynth-Studio, as `diffsynth`, with `metadata.json`: a list of rows."""

    name = "diffsynth-json"
    tables = ("metadata.json",)


class DiffSynthCSV(DiffSynth):
    """DiffSynth-Studio, as `diffsynth`, with `metadata.csv`, read with pandas."""

    name = "diffsynth-csv"
    tables = ("metadata.csv",)


class LTX2(Rows):
    """LTX-2's trainer: `dataset.jsonl` with `video` and `caption`, paths relative to the table.

    Clips with fewer frames than the smallest bucket are left out; the first 8 N + 1 are read, with PyAV. Embeddings and
    latents go to `.precomputed/` by the clip's path, and stay for another caption unless `--overwrite` is given.
    `--lora-trigger` goes before every caption, with a space. Facts: Lightricks/LTX-2 400fd31, packages/ltx-trainer,
    scripts/process_dataset.py, process_captions.py and process_videos.py, docs/dataset-preparation.md.
    """

    name = "ltx-2"
    trainer = "LTX-2's trainer"
    tables = ("dataset.jsonl",)
    path = "video"
    window_rule = "ltx-2"
    takes_short = False
    latents = (".precomputed",)
    adds_trigger = True
    trigger_flag = "--lora-trigger"
    launch = (
        "uv run python scripts/process_dataset.py {root}/{table} --resolution-buckets 960x544x{num_frames} "
        "--model-path MODEL_FILE --text-encoder-path GEMMA_FOLDER {trigger}&& "
        "uv run python scripts/train.py configs/t2v_lora.yaml"
        '  # in LTX-2/packages/ltx-trainer, with preprocessed_data_root: "{path}/.precomputed" in the file'
    )


class LTX2CSV(LTX2):
    """LTX-2's trainer, as `ltx-2`, with `dataset.csv`, read with pandas."""

    name = "ltx-2-csv"
    tables = ("dataset.csv",)


class MusubiRows(Rows):
    """musubi-tuner, as `musubi`, with `metadata.jsonl` (`video_path`, `caption`) in place of text files.

    Paths are absolute, because others count from the folder in which musubi-tuner is started.
    """

    name = "musubi-jsonl"
    trainer = "musubi-tuner"
    tables = ("metadata.jsonl",)
    path = "video_path"
    config_suffix, launch = Musubi.config_suffix, Musubi.launch
    window_rule = "musubi"

    def row(self, pair: Pair) -> dict[str, Any]:
        return {self.path: str(pair.place), self.caption: pair.text}

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        return musubi_toml("video_jsonl_file", root / self.tables[0], root, settings)


class DiffusionPipe(Layout):
    """diffusion-pipe: `captions.json` among the clips, a list of captions for each file name, and a data set in
    TOML beside the root.

    All captions of a clip are trained on, in turn, and not changed. Files are opened in the locale encoding. Clips
    shorter than the smallest of `frame_buckets` at the model's rate (Wan: 16 a second) are left out; the first frames
    are taken, read with PyAV by ComfyUI. Facts: tdrussell/diffusion-pipe 8f83dbf, utils/dataset.py, utils/common.py,
    models/base.py, examples/dataset.toml and README.md.
    """

    name = "diffusion-pipe"
    trainer = "diffusion-pipe"
    window_rule = "diffusion-pipe"
    fewest_frames = 2
    holds_several = True
    config_suffix = ".toml"
    tables = ("videos/captions.json",)
    latents = ("videos/cache",)
    clip_suffixes = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".m4v", ".mpg", ".mpeg", ".flv"))
    launch = (
        "NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 deepspeed --num_gpus=1 train.py --deepspeed --config CONFIG_FILE"
        "  # in diffusion-pipe, with {config} as dataset in the file, as in examples/wan_14b_min_vram.toml"
    )

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        entries = (f"{json.dumps(pair.name)}: {json.dumps(pair.texts)}" for pair in pairs)
        _write_one_a_line(root / self.tables[0], entries, "{", "}")

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        for line in _read_one_a_line(root / self.tables[0], "{", "}"):
            for name, texts in json.loads(f"{{{line}}}").items():
                yield from ((root / self.clip_folder / name, text) for text in texts)

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        return (
            "# Written by capkit's export.\n"
            "resolutions = [512]\nenable_ar_bucket = true\nmin_ar = 0.5\nmax_ar = 2.0\nnum_ar_buckets = 7\n"
            f"frame_buckets = [1, {settings.num_frames}]\n\n[[directory]]\n"
            f"path = {toml_string(str(root / self.clip_folder))}\nnum_repeats = 1\n"
        )


class FastVideo(Rows):
    """FastVideo: `videos2caption.json`, a list of rows with `path`, below `videos/`, and `cap`, a list of captions.

    One of them is drawn for each pass. `fps`, `num_frames` and `resolution` must be there too, whatever its guide
    shows, or reading stops. It is read with `load_dataset("json")`, so captions must not look like dates. Clips are
    left out that are shorter than the window that is trained on, or longer than `video_length_tolerance_range` of them.
    Facts: hao-ai-lab/FastVideo 2f3d407, fastvideo/workflow/preprocess/components.py, fastvideo/configs/configs.py,
    fastvideo/pipelines/preprocess/preprocess_stages.py and docs/training/data_preprocess.md; captions can be dropped
    with its own `training_cfg_rate`.
    """

    name = "fastvideo"
    trainer = "FastVideo"
    window_rule = "fastvideo"
    uses_datasets = True
    holds_several = True
    needs_facts = True
    tables = ("videos2caption.json",)
    caption, start = "cap", "videos"
    clip_suffixes = frozenset((".mp4",))
    launch = (
        "torchrun --nproc_per_node=1 -m fastvideo.pipelines.preprocess.v1_preprocessing_new "
        "--model_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --mode preprocess --workload_type t2v "
        "--preprocess.video_loader_type torchvision --preprocess.dataset_type merged --preprocess.dataset_path {root} "
        "--preprocess.dataset_output_dir LATENTS_DIR --preprocess.preprocess_video_batch_size 2 "
        "--preprocess.dataloader_num_workers 0 --preprocess.max_height 480 --preprocess.max_width 832 "
        "--preprocess.num_frames {num_frames} --preprocess.train_fps 16 --preprocess.samples_per_file 8 "
        "--preprocess.flush_frequency 8 --preprocess.video_length_tolerance_range 5"
        "  # in FastVideo; then its examples/training/finetune/wan_t2v_1.3B/crush_smol/finetune_t2v.sh"
    )

    def unfit(self, text: str) -> str:
        return f"{self.trainer} could read {text!r} as a time" if LOOKS_LIKE_A_DATE.fullmatch(text) else ""

    def row(self, pair: Pair) -> dict[str, Any]:
        facts = dict(pair.facts)
        size = {"height": facts.pop("height"), "width": facts.pop("width")}
        return {self.path: pair.name, self.caption: pair.texts, "resolution": size} | facts


class VideoTuna(Rows):
    """VideoTuna: `metadata.csv` with `path` and `caption`, read with pandas; paths count from `data_root`.

    Clips are read with decord; one that it cannot read is replaced by another at random. The data set does not read the
    `video_length` of the configurations of CogVideoX: the command sets `num_frames`. Facts: VideoVerses/VideoTuna
    0d49a54, videotuna/data/datasets.py and datasets_utils.py, docs/datasets.md, shscripts/train_cogvideox_t2v_lora.sh.
    """

    name = "videotuna"
    trainer = "VideoTuna"
    window_rule = "videotuna"
    decoder = "decord"
    takes_short = False
    tables = ("metadata.csv",)
    clip_suffixes = frozenset((".mp4", ".avi", ".mov", ".flv", ".mkv", ".webm", ".wmv"))
    launch = (
        "python scripts/train.py -t --base configs/004_cogvideox/cogvideo5b.yaml --logdir OUTPUT_DIR --name NAME "
        "--devices 0, lightning.trainer.num_nodes=1 data.params.train.params.csv_path={root}/{table} "
        "data.params.train.params.data_root={root} data.params.validation.params.csv_path={root}/{table} "
        "data.params.validation.params.data_root={root} data.params.train.params.num_frames={num_frames} "
        "data.params.train.params.frame_interval={stride} data.params.validation.params.num_frames={num_frames} "
        "data.params.validation.params.frame_interval={stride} --auto_resume  # in VideoTuna"
    )

    def unfit_root(self, root: Path) -> str:
        return f"{root} has '${{' in it, which VideoTuna replaces; choose another folder" if "${" in str(root) else ""


class OpenSora(Rows):
    """Open-Sora 2: `metadata.csv` with `path`, `text` and facts of the clip, read with pandas.

    Paths are absolute, because others count from the folder in which it is started. `aspect_ratio` is height by width,
    `resolution` height times width. A random stretch of the frames is taken; " 16 FPS." or the like goes behind every
    caption. Clips with fewer frames than every bucket are left out. Facts: hpcaitech/Open-Sora 7ad6a96, docs/train.md,
    opensora/datasets/datasets.py, bucket.py, utils.py and read_video.py, scripts/cnv/meta.py.
    """

    name = "open-sora"
    trainer = "Open-Sora 2"
    window_rule = "open-sora"
    needs_facts = True
    tables = ("metadata.csv",)
    caption = "text"
    clip_suffixes = frozenset((".mp4", ".avi", ".mov", ".mkv"))
    launch = (
        "torchrun --nproc_per_node 1 scripts/diffusion/train.py configs/diffusion/train/stage1.py "
        "--dataset.data-path {root}/{table} --model.from_pretrained CHECKPOINT_FILE  # in Open-Sora"
    )

    def row(self, pair: Pair) -> dict[str, Any]:
        height, width = pair.facts["height"], pair.facts["width"]
        return {
            **{self.path: str(pair.place), self.caption: pair.text, "num_frames": pair.facts["num_frames"]},
            **{"height": height, "width": width, "aspect_ratio": height / width, "resolution": height * width},
            "fps": round(pair.facts["fps"], 3),
        }
