"""Many clips into a caption store: which clips, what is already there, reading ahead, going on past bad ones."""

from __future__ import annotations

import csv
import glob
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capkit.captioner import GREEDY, Captioner
from capkit.cogvlm2 import DEFAULT_PROMPT
from capkit.cogvlm2.loading import is_out_of_memory
from capkit.cogvlm2.processing import check_settings
from capkit.decoding import Decoding
from capkit.frames import Clip, FrameSampling
from capkit.records import CaptionStore, new_record, request_settings
from capkit.runs import Progress, read_ahead

VIDEO_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split())
MANIFEST_SUFFIXES = frozenset((".csv", ".jsonl"))
COLUMNS = ("video", "prompt", "reference", "start", "end")
DEMO_CLIPS = Path(__file__).parent / "demo" / "clips"


@dataclass(frozen=True)
class Item:
    """A clip to caption: the file, and what a manifest says of it.

    Attributes:
        video: file name.
        prompt: of its own, or None for everybody's.
        reference: a caption to compare with; kept, not shown to the model.
        start, end: window in seconds.
    """

    video: str
    prompt: str | None = None
    reference: str | None = None
    start: float = 0.0
    end: float | None = None


def find_clips(videos: str | Path | Sequence, limit: int | None = None) -> list[Item]:
    """The clips that a glob, a folder, a file, a manifest or a list of these names.

    Args:
        videos: "demo" for the clips that come with capkit; a pattern such as "clips/**/*.mp4"; a folder, searched with
            its subfolders for video files; a video; a manifest (.csv or .jsonl) with a column `video` and, if wanted,
            `prompt`, `reference`, `start`, `end`, its relative paths relative to itself; or a list of such, or of
            dictionaries with those keys.
        limit: only the first so many.

    Returns:
        Items in order: sorted for globs and folders, as they stand for lists and manifests.

    Raises:
        ValueError: nothing found, a manifest that cannot be read or has no column `video`, or a limit below 1.
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
    return [Item(str(path))]  # a file that is not there gets a record that says so


def _read_manifest(path: Path) -> list[Item]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file) if path.suffix.lower() == ".csv" else map(json.loads, file))
        columns = dict.fromkeys(name for row in rows for name in row.keys())
    except (ValueError, AttributeError, csv.Error, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a manifest: {error}") from error
    if rows and "video" not in columns:
        raise ValueError(f"{path}: has no column 'video', but {list(columns)}; known columns: {', '.join(COLUMNS)}")
    if ignored := [name for name in columns if name not in COLUMNS]:
        warnings.warn(f"{path}: ignored columns {ignored}; known: {', '.join(COLUMNS)}", stacklevel=4)
    known = [{name: value for name, value in row.items() if name in COLUMNS} for row in rows]
    return [_item(row, path.parent, f"{path}, row {number}") for number, row in enumerate(known, 1)]


def _item(row: dict[str, Any], folder: Path, where: str) -> Item:
    given = {name: value for name, value in row.items() if value not in (None, "")}
    if "video" not in given or set(given) - set(COLUMNS):
        raise ValueError(f"{where}: must have 'video', and may have {', '.join(COLUMNS[1:])}, nothing else")
    try:
        window = {name: float(given.pop(name)) for name in ("start", "end") if name in given}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: start and end must be seconds") from error
    return Item(str(folder / Path(given.pop("video")).expanduser()), **given, **window)


def caption_clips(
    captioner: Captioner,
    items: Iterable[Item],
    store: CaptionStore,
    prompt: str = DEFAULT_PROMPT,
    template: str = "chat",
    history: Sequence[tuple[str, str]] = (),
    frame_numbers: str = "index",
    decoding: Decoding = GREEDY,
    frame_sampling: FrameSampling | str = "chat",
    batch_size: int = 1,
    retry_errors: bool = False,
    timeout_seconds: float | None = 60.0,
) -> list[dict[str, Any]]:
    """Caption every clip that the store has no caption of yet; each result is on disk before the next batch begins.

    Clips are read ahead of the model. One that cannot be read, or does not fit into memory, gets a record that says
    why, and the others go on.

    Args:
        captioner: from `load_captioner`.
        items: from `find_clips`; a prompt of an item's own goes before `prompt`.
        store: where records and picture strips go, and where what is done is known from.
        prompt, template, history, frame_numbers, decoding: as in `Captioner.caption`.
        frame_sampling: as in `load_clip`.
        batch_size: clips that go through the model together.
        retry_errors: try again what failed before.
        timeout_seconds: longest time to read one clip; None for no limit.

    Returns:
        The current record of every item, in order, also of those that were there before.

    Raises:
        ValueError: settings that no clip could be captioned with.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be at least 1")
    check_settings(prompt, template, history, frame_numbers)
    frame_sampling = FrameSampling.of(frame_sampling)
    shared = (template, history, frame_numbers, decoding)
    todo, order, done = [], [], store.done(retry_errors)
    for item in items:
        own = item.prompt if item.prompt is not None else prompt
        settings = request_settings(captioner, item.video, own, *shared, frame_sampling, item.start, item.end)
        if item.reference is not None:
            settings["reference"] = item.reference
        order.append(settings["request"])
        if settings["request"] not in done:
            done.add(settings["request"])
            todo.append(settings)
    progress = Progress("clips", len(todo), num_done_before=len(order) - len(todo))
    for batch in _batches(read_ahead(todo, timeout_seconds, 2 * batch_size), batch_size):
        readable = [(settings, clip) for settings, clip in batch if isinstance(clip, Clip)]
        outcomes = _caption_batch(captioner, readable, shared)
        for settings, clip in batch:
            if isinstance(clip, Clip):
                store.save_strip(settings, clip, captioner.processor.image_size)
                record = new_record(settings, next(outcomes), clip)
            else:
                record = new_record(settings, clip)
            store.append(record)
            progress.update(record)
    progress.close()
    current = {record["request"]: record for record in store.current()}
    return [current[request] for request in order]


def _batches(pairs: Iterator, batch_size: int) -> Iterator[list]:
    """Lists of pairs with `batch_size` clips in each; errors on the way do not count."""
    batch, num_clips = [], 0
    for settings, clip in pairs:
        batch.append((settings, clip))
        num_clips += isinstance(clip, Clip)
        if num_clips == batch_size:
            yield batch
            batch, num_clips = [], 0
    if batch:
        yield batch


def _caption_batch(captioner, readable, shared) -> Iterator:
    """A caption for each clip; where one alone has a prompt or a size that the model cannot take, its error."""
    try:
        prompts = [settings["prompt"] for settings, _ in readable]
        return iter(captioner.caption_batch([clip for _, clip in readable], prompts, *shared))
    except (ValueError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        if len(readable) == 1:
            return iter([ValueError(f"{readable[0][0]['video']}: {error}")])
    return (outcome for pair in readable for outcome in _caption_batch(captioner, [pair], shared))
