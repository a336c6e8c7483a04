"""The commands over a store of captions: show, replace, page and compare."""

from __future__ import annotations

import glob
import mmap
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit.text import plain_text, plural

if TYPE_CHECKING:
    from capkit.runs import CaptionStore

SEARCHED_LEVELS = 3  # below a folder without captions, for the stores to name
POLL_SECONDS = 1.0  # between looks at a store that is followed
LAST = 10  # captions that are there already, which `follow` prints first


def show(path: Path, conditions: Iterable[str] = ()) -> int:
    """Print the captions in a store, or in the stores of a folder, that agree with `column=value` conditions.

    Raises:
        ValueError: no store, no captions in it, or no such column.
    """
    from capkit.runs import CaptionStore, parse_where, select, unmerged

    where = parse_where(conditions)
    found = [(store, store.current()) for store in map(CaptionStore, _stores(path))]
    new = unmerged(path) if found[0][0].path == path / "captions.jsonl" else []
    if not any(records for _, records in [*found, *new]):
        raise ValueError(f"{path}: there are no captions in it")
    found, new = ([(store, select(records, where)) for store, records in some] for some in (found, new))
    if where and not any(records for _, records in [*found, *new]):
        print(plain_text(f"{path}: no captions where {where}"))
        return 0
    for store, records in found:
        _print_store(store, records)
    for store, records in new:
        if not records:
            continue
        command = f"python -m capkit merge {shlex.quote(str(path))}"
        print("\n" + plain_text(f"captions.jsonl lacks these; `{command}` takes over those of the run started last:"))
        _print_store(store, records)
    return 0


def follow(path: Path, conditions: Iterable[str] = ()) -> int:
    """Print the last captions of a store, or of the stores of a folder, and then each that is made or changed.

    Returns only by KeyboardInterrupt. Of a folder with stores of shards these are followed, not the merged one.

    Raises:
        ValueError: no such folder, something else than a store, or no such column.
    """
    from capkit.runs import CaptionStore, parse_where, select

    where = parse_where(conditions)
    if not (path.is_dir() or path.suffix == ".jsonl" and path.absolute().parent.is_dir()):
        _stores(path)  # says what is wrong with it
    stores: dict[Path, CaptionStore] = {}
    num_read: dict[Path, int] = {}  # bytes of each store that were printed
    is_first, title = True, ""
    while True:
        for file in _followed(path):
            store = stores.setdefault(file, CaptionStore(file))
            records, before = store.current(), num_read.get(file, 0)
            num_read[file] = store.index.end
            if num_read[file] < before:  # it was replaced
                before = 0
            if num_read[file] > before and (new := select(records.since(before), where)):
                title = print_captions(store, new[-LAST:] if is_first else new, title)
        if is_first and not stores:
            print(plain_text(f"{path}: no captions yet; waiting for them"), file=sys.stderr)
        sys.stdout.flush()
        is_first = False
        time.sleep(POLL_SECONDS)


def replace(path: Path, pattern: str, replacement: str, conditions: Iterable[str], write: bool) -> int:
    """Print what finding and replacing would change in a store, and if `write`, do it.

    Raises:
        ValueError: as `capkit.replace` does.
        StoreBusy: a run is captioning into the store.
    """
    from capkit.runs import parse_where
    from capkit.runs import replace as preview

    found = preview(_store(path), pattern, replacement, parse_where(conditions))
    print(found)
    if not found.num_changed:
        return 0
    if not write:
        print("\nNothing is written yet; with --write these are kept as hand edits, in a batch that --undo takes back.")
        return 0
    batch = found.write()
    print(f"\n{plural(batch.num_captions, 'caption')} replaced, in batch {batch.id}. To take them back:")
    print(f"  python -m capkit replace {shlex.quote(str(path))} --undo {batch.id}")
    if batch.num_edited_since:
        print(f"{plural(batch.num_edited_since, 'caption')} edited by someone meanwhile, which stay as they are.")
    return 0


def undo(path: Path, batch: str) -> int:
    """Take a batch of replacements back. Raises ValueError if there is none of this name."""
    from capkit.runs import undo as take_back

    counts = take_back(_store(path), batch)
    print(f"{plural(counts.num_captions, 'caption')} as before batch {counts.id}", end="")
    print(f"; {counts.num_edited_since:,} edited since stay as they are" if counts.num_edited_since else "")
    return 0


def write_page(paths: Sequence[Path], out: Path, baseline: str | None = None) -> int:
    """Write a page of a store's captions, or of what changed from one store to another.

    Raises:
        ValueError: no store, or a name that is no page's.
    """
    from capkit.views import captions_page, compare_runs, page_path

    page_path(out)  # before a large store is read
    old, new = _store(paths[0]), _store(paths[-1])
    page = compare_runs(old, new) if len(paths) > 1 else captions_page(old, baseline=baseline)
    print(plain_text(f"{page.summary}: {page.save(out).absolute()}"))
    return 0


def _followed(path: Path) -> list[Path]:
    """The stores to follow, as far as they are there by now."""
    from capkit.runs import shard_stores

    if not path.is_dir():
        return _stores(path) if path.exists() and path.stat().st_size else []
    stores = shard_stores(path)
    return [store for store in stores if store.name != "captions.jsonl"] or stores


def _store(path: Path) -> Path:
    """The one caption store that a path stands for; ValueError if it is or holds none, or several."""
    first, *others = _stores(path)
    if others:
        raise ValueError(
            f"{path}: holds {1 + len(others)} stores; merge them first (python -m capkit merge), or give one"
        )
    return first


def _stores(path: Path) -> list[Path]:
    """The caption stores that a path stands for; ValueError if it is or holds none."""
    from capkit.runs import shard_stores

    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        stores = shard_stores(path)
        if (merged := path / "captions.jsonl") in stores:
            return [merged]
        if not stores:
            patterns = ("*/" * level + "captions.jsonl" for level in range(1, SEARCHED_LEVELS + 1))
            found = chain.from_iterable(glob.iglob(pattern, root_dir=path) for pattern in patterns)
            below = [str(path / store) for store in islice(found, 5)]
            hint = f"; give one of {', '.join(below)}" if below else "; notebook 01 and caption-shard write some"
            raise ValueError(f"{path}: there are no captions in this folder{hint}")
        return stores
    if path.is_file() and path.stat().st_size:  # a pipe may never end
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b'"request"') >= 0:
                return [path]
    raise ValueError(f"{path}: is no caption store, such as captions.jsonl")


def _print_store(store: CaptionStore, records: Iterable[dict[str, Any]]) -> None:
    print_captions(store, records)
    print(f"\nCaptions:           {store.path.absolute()}\nFrames as seen:     {store.strips.absolute()}/")


def print_captions(store: CaptionStore, records: Iterable[dict[str, Any]], title: str = "") -> str:
    """Print captions, hand-edited or the model's, or errors, each with its clip; a prompt before those of it.

    Args:
        title: of the prompt that was printed last.

    Returns:
        The same, afterwards.
    """
    from capkit.runs import mark_text, prompt_title, record_text, seen_part, window_name

    for record in records:
        if record.get("prompt") and title != (title := prompt_title(record)):
            print("\n" + plain_text(f"Prompt: {title}"))
        window, seen, is_edited = window_name(record), seen_part(record), "edited_text" in record
        name = record["video"] + (window and f" ({window})") + (seen and f" [saw only {seen}]")
        text = record_text(record) if is_edited or record["status"] == "ok" else f"error: {record['error']}"
        print("\n" + plain_text(name))
        print(plain_text(f"  {' '.join(text.split())}"))
        if is_edited:
            print("  edited by hand")
        if "mark" in record:
            print(plain_text(f"  {mark_text(record)}"))
        if notice := store.notice(record):
            print(f"  note: {notice}")
    return title
