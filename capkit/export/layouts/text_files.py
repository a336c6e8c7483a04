"""Layouts of one text file a clip: beside it, as many tools and most trainers read it, or in `labels/` for SAT."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from capkit.export.layouts.base import Layout, Pair, write_text, write_yaml
from capkit.runs import TrainerSettings


class TextFiles(Layout):
    """A text file for each clip, named like it, in `caption_folder` below the root."""

    caption_folder = ""

    def content(self, texts: Sequence[str]) -> str:
        """A file with the captions of a clip."""
        return "\n".join(texts) + "\n"

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            write_text(root / self.caption_folder / f"{pair.stem}.txt", [self.content(pair.texts)])

    def caption_files(self, names: Iterable[str]) -> set[str]:
        return {(Path(self.caption_folder) / f"{Path(name).stem}.txt").as_posix() for name in names}


class Sidecars(TextFiles):
    """`dog.txt` beside `dog.mp4`, in the root.

    The caption is the entire file without surrounding white space; "\\r" is read as "\\n". Many tools open it in the
    locale encoding, which must then be UTF-8. Suffixes as of finetrainers, which passes over clips with others
    (a-r-r-o-w/finetrainers f476c37, finetrainers/constants.py); tools that take more have layouts of their own.
    """

    name = "sidecar"
    trainer = "a reader of sidecar files"
    clip_folder = ""
    clip_suffixes = frozenset((".mp4", ".mov"))
    launch = "PYTHONUTF8=1 TRAINER --data_root {root}  # any that reads a .txt beside each clip"

    def as_read(self, text: str) -> list[str]:
        return [io.StringIO(text, newline=None).read().strip()]

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        for name in sorted(name for name in os.listdir(root) if name.endswith(".txt")):
            file = root / name
            clips = [clip for suffix in sorted(self.clip_suffixes) if (clip := file.with_suffix(suffix)).exists()]
            if len(clips) > 1:
                raise ValueError(f"{file} is beside {len(clips)} clips of its name")
            yield from ((clip, file.read_text(encoding="utf-8").strip()) for clip in clips)


class SAT(TextFiles):
    """CogVideo's `sat/`: `videos/dog.mp4` and `labels/dog.txt`.

    It walks the folder for ".mp4", and takes as the caption's path the clip's path with every ".mp4" replaced by
    ".txt" and every "videos" by "labels", in parent folders too. It uses the first line of the file, by
    `splitlines()`; a clip without a file gets an empty caption. Files are opened in the locale encoding. Clips are read
    with decord. Facts: zai-org/CogVideo 7a1af71, sat/data_video.py, sat/arguments.py, sat/finetune_single_gpu.sh:
    `train_video.py --base` takes several YAML files, of which later ones replace values of earlier ones; without
    `valid_data` its loaders stop. It imports private parts of torchvision.io, which 0.26 no longer has.
    """

    name = "sat"
    trainer = "SAT"
    decoder = "decord"
    window_rule = "sat"
    needs = "torchvision 0.25 or older"
    config_suffix = ".sat.yaml"
    clip_suffixes = frozenset((".mp4",))
    caption_folder = "labels"
    launch = (
        "PYTHONUTF8=1 WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 python train_video.py --base "
        "configs/cogvideox_2b_lora.yaml configs/sft.yaml {config} --seed 42"
        "  # in CogVideo/sat, with the folders of your model in its two files"
    )

    def as_read(self, text: str) -> list[str]:
        return io.StringIO(self.content([text]), newline=None).read().splitlines()[:1]

    def unfit_root(self, root: Path) -> str:
        words = [word for word in ("videos", ".mp4", "${") if word in str(root)]
        reason = "which SAT replaces in paths, so that SAT would look for the captions elsewhere; choose another folder"
        return f"{root} has {words[0]!r} in it, {reason}" if words else ""

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        rate = TrainerSettings.of(self.window_rule, settings).frames_per_second or 8.0
        data = {"fps": int(rate) if rate.is_integer() else rate, "max_num_frames": settings.num_frames}
        paths = {"train_data": [str(root)], "valid_data": [str(root)]}
        return write_yaml({"args": paths, "data": {"params": data}})

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        for folder, _, files in os.walk(root):
            for clip in [os.path.join(folder, name) for name in files if name.endswith(".mp4")]:
                path = Path(clip.replace(".mp4", ".txt").replace("videos", "labels"))
                yield Path(clip), path.read_text(encoding="utf-8").splitlines()[0] if path.exists() else ""
