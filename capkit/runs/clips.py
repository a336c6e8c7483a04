"""Find the clips to caption: globs, folders, manifests and lists become items."""

from __future__ import annotations

import csv
import glob
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split())
MANIFEST_SUFFIXES = frozenset((".csv", ".jsonl"))
COLUMNS = ("video", "prompt", "reference", "start", "end")
DEMO_CLIPS = Path(__file__).parents[1] / "demo" / "clips"


@dataclass(frozen=True)
class Item:
    """A clip to caption: a video file, and its entries in a manifest.

    Attributes:
        video: file name.
        prompt: this clip's own question; None for the one that all clips share.
        reference: a caption to compare with; kept in the record, not shown to the model.
        start, end: window in seconds; end None for the end of the video.
    """

    video: str
    prompt: str | None = None
    reference: str | None = None
    start: float = 0.0
    end: float | None = None


def find_clips(videos: str | Path | Sequence[Any], limit: int | None = None) -> list[Item]:
    """Find the clips that a glob, a folder, a file, a manifest or a list of these names.

    Args:
        videos: "demo" for the clips that come with capkit; a pattern such as "clips/**/*.mp4"; a folder, searched with
            its subfolders; a video; a manifest (.csv or .jsonl) with a column `video` and optionally `prompt`,
            `reference`, `start`, `end`, its paths relative to itself; or a list of these, or of dictionaries with
            those keys.
        limit: only the first so many.

    Returns:
        Items, sorted for globs and folders, in the given order for lists and manifests.

    Raises:
        ValueError: no clips, a manifest that cannot be read or has no column `video`, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: must be at least 1, or None for all")
    entries = [videos] if isinstance(videos, (str, Path)) else videos
    items = [item for entry in entries for item in _items(entry)]
    if not items:
        raise ValueError(f"no videos found in {str(videos)!r}")
    return items[:limit]


def _items(entry: str | Path | dict[str, Any]) -> list[Item]:
    if isinstance(entry, dict):
        return [_item(entry, Path(), repr(entry))]
    path = DEMO_CLIPS if entry == "demo" else Path(entry).expanduser()
    if path.is_dir():
        return [Item(str(file)) for file in sorted(path.rglob("*")) if file.suffix.lower() in VIDEO_SUFFIXES]
    if path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file():
        return _read_manifest(path)
    if not path.exists() and glob.has_magic(str(path)):
        return [Item(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
    return [Item(str(path))]  # a missing file gets a record with an error


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """Read a CSV file, or a file of JSON lines, as dictionaries. A ValueError calls it `kind`, such as "a manifest"."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            is_csv = path.suffix.lower() == ".csv"
            rows = list(csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file)))
        if any(not isinstance(row, dict) for row in rows):
            raise ValueError("a line is not a JSON object")
    except (ValueError, csv.Error, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {error}") from error
    return rows


def _read_manifest(path: Path) -> list[Item]:
    rows = read_rows(path, "a manifest")
    columns = dict.fromkeys(name for row in rows for name in row)
    if rows and "video" not in columns:
        raise ValueError(f"{path}: has no column 'video', but {list(columns)}; columns are {', '.join(COLUMNS)}")
    if ignored := [name for name in columns if name not in COLUMNS]:
        warnings.warn(f"{path}: ignored columns {ignored}; columns are {', '.join(COLUMNS)}", stacklevel=4)
        rows = [{name: value for name, value in row.items() if name in COLUMNS} for row in rows]
    return [_item(row, path.parent, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _item(row: dict[str, Any], folder: Path, where: str) -> Item:
    fields = {name: value for name, value in row.items() if value not in (None, "")}
    if "video" not in fields or set(fields) - set(COLUMNS):
        raise ValueError(f"{where}: must have 'video', and may have {', '.join(COLUMNS[1:])}, nothing else")
    try:
        fields |= {name: float(fields[name]) for name in ("start", "end") if name in fields}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: start and end must be seconds") from error
    return Item(**fields | {"video": str(folder / Path(fields["video"]).expanduser())})
