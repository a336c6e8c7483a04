"""What every layout has: pairs go out, and come back as the trainer reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

# What str.splitlines breaks at. Some trainers break a caption at all of these, some only at "\n" and "\r".
LINE_SEPARATORS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@dataclass(frozen=True)
class Pair:
    """A clip and its caption as they are to stand in an export.

    Attributes:
        clip: the video file, its links followed.
        name: of the clip in the export, such as "dog.mp4"; unique, of letters, digits, "-" and "_".
        text: the caption, with the trigger word if no trainer adds it.
    """

    clip: Path
    name: str
    text: str

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.rsplit(".", 1)[0]


class Layout(ABC):
    """How one trainer wants its data. A layout writes caption files, and reads a folder as that trainer does.

    Attributes:
        name: as it is asked for.
        trainer: who reads it, in words.
        clip_folder: where clips stand below the trainer's root; "" for the root itself.
        clip_suffixes: files that the trainer takes for clips; empty for whatever its decoder opens.
        latents: folders in which the trainer keeps what it made of clips, by the clips' names.
        adds_trigger: the trainer puts the trigger word and a space before each caption, if told to.
    """

    name = ""
    trainer = ""
    clip_folder = "videos"
    clip_suffixes: frozenset[str] = frozenset()
    latents: tuple[str, ...] = ("cache", ".cache")
    adds_trigger = False

    def as_read(self, text: str) -> list[str]:
        """The captions that the trainer makes of one caption that stands alone: `[text]` where all is well."""
        return [text]

    def unfit(self, text: str) -> str:
        """Why a caption cannot stand in this layout, or ""."""
        found = self.as_read(text)
        if found == [text]:
            return ""
        breaks = any(letter in text for letter in LINE_SEPARATORS)
        hint = '; the cleaning rule "lines" would make them spaces' if breaks else ""
        if len(found) != 1:
            return f"has line breaks: {self.trainer} would read {len(found)} captions here{hint}"
        return f"{self.trainer} would read {shorten(str(found[0]))} here{hint}"

    def unfit_root(self, root: Path) -> str:
        """Why no export can stand in this folder, or ""."""
        return ""

    @abstractmethod
    def write(self, root: Path, pairs: list[Pair]) -> None:
        """Write all files that hold captions; the clips are there already."""

    @abstractmethod
    def read(self, root: Path) -> list[tuple[Path, str]]:
        """Clips and captions, paired as the trainer pairs them.

        Raises:
            ValueError, OSError: what the trainer would stop at.
        """

    @abstractmethod
    def caption_files(self, names: list[str]) -> set[str]:
        """The files that `write` makes for clips of these names, relative to the root."""

    @abstractmethod
    def command(self, root: Path, trigger_word: str) -> str:
        """How to start the trainer on the folder; what is in capitals is for the user to fill in."""


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, without changing line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def shorten(text: str, limit: int = 60) -> str:
    """The text in quotes, its end left out where it is long."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
