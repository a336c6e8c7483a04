"""A text file for each clip: beside it, as many tools and finetrainers read it, or in `labels/` as SAT does."""

from __future__ import annotations

import io
import os
from pathlib import Path
from shlex import quote

from capkit.export.base import Layout, Pair, write_text


class Sidecars(Layout):
    """`dog.txt` beside `dog.mp4`, in the root.

    The whole file is the caption, without white space around it; "\\r" is read as "\\n". Many tools open it in the
    machine's own encoding, which must be UTF-8 then.
    """

    name = "sidecar"
    trainer = "a reader of sidecar files"
    clip_folder = ""
    clip_suffixes = frozenset((".mp4", ".mov", ".mkv", ".avi", ".webm"))

    def as_read(self, text: str) -> list[str]:
        return [io.StringIO(text, newline=None).read().strip()]

    def write(self, root: Path, pairs: list[Pair]) -> None:
        for pair in pairs:
            write_text(root / f"{pair.stem}.txt", f"{pair.text}\n")

    def read(self, root: Path) -> list[tuple[Path, str]]:
        found = []
        for caption in sorted(root.glob("*.txt")):
            clips = [caption.with_suffix(suffix) for suffix in sorted(self.clip_suffixes)]
            clips = [clip for clip in clips if clip.exists()]
            if len(clips) > 1:
                raise ValueError(f"{caption}: stands beside {len(clips)} clips")
            found += [(clip, caption.read_text(encoding="utf-8").strip()) for clip in clips]
        return found

    def caption_files(self, names: list[str]) -> set[str]:
        return {f"{name.rsplit('.', 1)[0]}.txt" for name in names}

    def command(self, root: Path, trigger_word: str) -> str:
        return f"PYTHONUTF8=1 TRAINER --data_root {quote(str(root))}  # whichever reads a .txt beside each clip"


class SAT(Layout):
    """CogVideo's `sat/`: `videos/dog.mp4` and `labels/dog.txt`.

    It walks the folder for ".mp4" and looks for the caption where the clip's path leads with every ".mp4" replaced by
    ".txt" and every "videos" by "labels", in parent folders too. Of the file it takes the first line, by
    `splitlines()`; a clip without a file gets an empty caption. It opens files in the machine's own encoding.
    """

    name = "sat"
    trainer = "SAT"
    clip_suffixes = frozenset((".mp4",))

    def as_read(self, text: str) -> list[str]:
        return io.StringIO(text, newline=None).read().splitlines()[:1]

    def unfit_root(self, root: Path) -> str:
        found = [word for word in ("videos", ".mp4") if word in str(root.absolute())]
        reason = "SAT would look for the captions elsewhere, because it replaces that word in the whole path"
        return f"{root.absolute()} has {found[0]!r} in it: {reason}. Choose another folder" if found else ""

    def write(self, root: Path, pairs: list[Pair]) -> None:
        for pair in pairs:
            write_text(root / "labels" / f"{pair.stem}.txt", f"{pair.text}\n")

    def read(self, root: Path) -> list[tuple[Path, str]]:
        found = []
        for folder, _, files in os.walk(root):
            for clip in [os.path.join(folder, name) for name in files if name.endswith(".mp4")]:
                path = Path(clip.replace(".mp4", ".txt").replace("videos", "labels"))
                found.append((Path(clip), path.read_text(encoding="utf-8").splitlines()[0] if path.exists() else ""))
        return found

    def caption_files(self, names: list[str]) -> set[str]:
        return {f"labels/{name.rsplit('.', 1)[0]}.txt" for name in names}

    def command(self, root: Path, trigger_word: str) -> str:
        return (
            f"PYTHONUTF8=1 bash finetune_single_gpu.sh  # in CogVideo/sat, with train_data: [{str(root)!r}] "
            "in configs/sft.yaml"
        )
