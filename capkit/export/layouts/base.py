"""Base class of layouts: write pairs of clip and caption, and read them back with the trainer's rules."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from capkit.runs import TrainerSettings, trainer_problem

# What str.splitlines breaks at. Some trainers break a caption at all of these, some only at "\n" and "\r".
LINE_SEPARATORS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# In the path of a folder, what `load_dataset` takes for a wildcard, for a chain of file systems or for a variable.
DATASETS_MISREADS = re.compile(r"[*?\[]|::|\$")


@dataclass(frozen=True)
class Pair:
    """A clip and its caption, as exported.

    Attributes:
        clip: the video file, symbolic links resolved.
        name: of the clip in the export, such as "dog.mp4"; unique, of letters, digits, "-" and "_".
        texts: the captions, with the trigger word unless the trainer adds it; several only where the layout has room.
        place: the clip in the finished export.
        facts: of layouts with `needs_facts`: num_frames, height, width, fps and duration (seconds) of the clip.
        strip: of layouts with `with_strips`: the file of the picture strip, or "".
    """

    clip: Path
    name: str
    texts: tuple[str, ...]
    place: Path
    facts: dict[str, Any] = field(default_factory=dict)
    strip: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    @property
    def text(self) -> str:
        """The caption, or the first of several."""
        return self.texts[0]


class Layout(ABC):
    """The files that one trainer reads: writes them, and reads a folder as the trainer does.

    Attributes:
        name: in `LAYOUTS`.
        trainer: its name in messages.
        clip_folder: folder of the clips below the trainer's root; "" for the root itself.
        clip_suffixes: suffixes that the trainer accepts; empty for any.
        tables: files that hold the captions of all clips, relative to the root.
        latents: folders in which the trainer caches what it computes from clips, by the clips' names.
        adds_trigger: the trainer can put the trigger word before each caption itself.
        trigger_flag, trigger_end: the option for it in `launch`, and what the word has to end with.
        holds_several: a clip may have several captions; the trainer takes one at a time.
        needs_facts: `Pair.facts` are written.
        with_strips: `Pair.strip` is written.
        needs_package: a Python package that is not installed with capkit.
        packs_clips: clips are copied into archives by `write`, not placed in `clip_folder`.
        launch: template of `command`, with the fields root and config (quoted for a shell), path (not quoted), table
            (the first), trigger, and those of `TrainerSettings`.
        needs: versions of packages that the trainer needs, in words; added to `command`.
        config_suffix: of the file beside the root that `config` fills and `command` names; "" for none.
        decoder: "decord" if the trainer reads clips with decord 0.6.0: clips that it cannot open, or counts otherwise,
            are refused then. "" for a decoder that reads what capkit reads.
        fewest_frames: that a clip must have.
        takes_short: whether it takes clips of fewer frames than it is set to.
        window_rule: the one of `capkit.runs.TRAINERS` whose rule tells which frames of a clip the trainer sees, and
            which clips it cannot take; "" if it sees the entire clip.
        uses_datasets: the trainer gives the root to `load_dataset`.
    """

    name = ""
    trainer = ""
    clip_folder = "videos"
    clip_suffixes: frozenset[str] = frozenset()
    tables: tuple[str, ...] = ()
    latents: tuple[str, ...] = ("cache", ".cache")
    adds_trigger = False
    trigger_flag = "--id_token"
    trigger_end = ""
    holds_several = False
    needs_facts = False
    with_strips = False
    packs_clips = False
    needs_package = ""
    launch = ""
    needs = ""
    config_suffix = ""
    decoder = ""
    fewest_frames = 1
    takes_short = True
    window_rule = ""
    uses_datasets = False

    def as_read(self, text: str) -> list[str]:
        """The captions that the trainer reads from a single caption; `[text]` if it fits the layout."""
        return [text]

    def unfit(self, text: str) -> str:
        """Why a caption does not fit this layout, or ""."""
        if self.has_csv and "\0" in text:
            return "has NULs: pandas before 3 reads only what is before them, and Python's csv before 3.11 stops"
        captions = self.as_read(text)
        if captions == [text]:
            return ""
        has_breaks = any(letter in text for letter in LINE_SEPARATORS)
        hint = '; the cleaning rule "lines" replaces line breaks by spaces' if has_breaks else ""
        if len(captions) != 1:
            return f"has line breaks: {self.trainer} would read {len(captions)} captions here{hint}"
        return f"{self.trainer} would read {shorten(str(captions[0]))} here{hint}"

    def unfit_root(self, root: Path) -> str:
        """Why this folder cannot hold an export, or ""."""
        path = os.path.realpath(root)
        if self.uses_datasets and (misread := DATASETS_MISREADS.search(path)):
            return f"{path} has {misread[0]!r} in it, which `datasets` takes for a pattern; choose another folder"
        return ""

    @property
    def has_csv(self) -> bool:
        """Whether captions are cells of a CSV."""
        return any(table.endswith(".csv") for table in self.tables)

    @property
    def is_choosy(self) -> bool:
        """Whether a clip must be opened: `unfit_clip` or the decoder can refuse it, or its facts are needed."""
        return bool(self.decoder) or self.fewest_frames > 1 or not self.takes_short or self.needs_facts

    def unfit_clip(self, num_frames: int, average_fps: float, settings: TrainerSettings) -> str:
        """Why the trainer cannot take a clip of so many frames, or "": it would stop, or pass over it."""
        fewest = self.fewest_frames if self.takes_short else settings.num_frames
        if num_frames < fewest:
            return f"{num_frames} frames are too few: {self.trainer} takes {fewest} or more"
        problem = trainer_problem(self.window_rule, num_frames, average_fps, settings) if self.window_rule else ""
        return f"{self.trainer} cannot take it: {problem}" if problem else ""

    @abstractmethod
    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        """Write all files that hold captions; the clips exist already. The pairs may be gone through several times."""

    @abstractmethod
    def read(self, root: Path) -> Iterable[tuple[Path, str] | tuple[Path, str, str]]:
        """Clips and captions, paired as the trainer pairs them; several captions of a clip follow each other.

        A third value is the SHA-256 of a clip in an archive.

        Raises:
            ValueError, OSError: where the trainer would stop.
        """

    def caption_files(self, names: Iterable[str]) -> set[str]:
        """The files that `write` makes for clips of these names, relative to the root."""
        return set(self.tables)

    def config_path(self, root: Path) -> Path:
        """The file that holds `config`: beside the root, like the report."""
        return root.with_name(root.name + self.config_suffix)

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        """What the trainer reads as its settings, if `config_suffix` is set; its first line must name capkit."""
        return ""

    def command(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        """How to start the trainer on the folder; words in capitals are for the user to replace."""
        trigger = f"{self.trigger_flag} {quote(trigger_word + self.trigger_end)} " if trigger_word else ""
        paths = {"root": quote(str(root)), "path": str(root), "config": quote(str(self.config_path(root)))}
        paths["table"] = "".join(self.tables[:1])
        settings = TrainerSettings.of(self.window_rule, settings)
        command = self.launch.format(**paths, trigger=trigger, **asdict(settings))
        return f"{command}; needs {self.needs}" if self.needs else command


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Write the parts of a text to a file in UTF-8, one after the other, without changing line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(parts)


def write_yaml(settings: dict[str, Any]) -> str:
    """Settings for a trainer as YAML, as `Layout.config` returns them."""
    return "# Written by capkit's export.\n" + yaml.safe_dump(settings, sort_keys=False)


def shorten(text: str, limit: int = 60) -> str:
    """The text in quotes, cut off where it is long."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def toml_string(text: str) -> str:
    """The text as a TOML string in ASCII, because some trainers open TOML in the locale encoding."""
    plain = (letter if " " <= letter <= "~" and letter not in '"\\' else f"\\U{ord(letter):08x}" for letter in text)
    return f'"{"".join(plain)}"'
