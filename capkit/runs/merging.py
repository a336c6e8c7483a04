"""Combine the stores of shards into one, record by record, and check that every clip is accounted for."""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from capkit.files import atomic_writer, unused_name
from capkit.runs.index import Records, is_complete, is_row_error
from capkit.runs.lines import MARK_FIELDS, OUTDATED, is_by_hand, read_store
from capkit.runs.shards import MERGED, plan_differences, plan_files, read_plan, shard_stores
from capkit.runs.store import CaptionStore
from capkit.text import plain_text, plural, warn

MOST_OPEN_FILES = 500
NOWHERE = -1
FIELDS_BY_HAND = {"edited_text", *MARK_FIELDS}


@dataclass(frozen=True)
class Merged:
    """Result of `merge`.

    Attributes:
        store: all captions, in the order of the manifest, its rows that cannot be used last.
        num_ok, num_errors: clips with a caption, and with an error.
        num_other: records of other requests, from before, that the store holds beside them.
        problems: sentences about missing records and mismatched shards; empty when every clip is accounted for.
    """

    store: CaptionStore
    num_ok: int
    num_errors: int
    problems: list[str]
    num_other: int = 0

    def __str__(self) -> str:
        counts = f"{plural(self.num_ok, 'caption')} and {plural(self.num_errors, 'error')} in {self.store.path}"
        if self.num_other:
            counts += f", beside {plural(self.num_other, 'record')} of other requests that it held before"
        return "\n".join(map(plain_text, [counts, *(f"problem: {problem}" for problem in self.problems)]))


def merge(output_dir: str | os.PathLike[str]) -> Merged:
    """Combine the shards' stores into `captions.jsonl`, and check that every clip has one current record.

    Of several runs in the folder the one started last counts, by the number in its plans. Of several records of a
    request complete captions go before errors; then, in one file, the last one counts, and of several files the one
    made last by its `created`. Idempotent; can run while shards are at work. Hand edits, marks and lines of other
    requests in `captions.jsonl` are kept; of a clip that was replaced since, `CaptionStore.current` shows the new
    caption only.

    Lines of `captions.jsonl` that are no records go to `captions.jsonl.damaged`, or a file with the next free number.

    Raises:
        StoreBusy: a run is captioning into `captions.jsonl`.
        ValueError: no such folder, it holds no shards, or a damaged plan.
        OSError: a file cannot be read or written; `captions.jsonl` is as before.
    """
    folder = Path(output_dir).expanduser()
    if not os.path.isdir(folder):
        reason = "is a file; give the folder of the shards" if os.path.exists(folder) else "no such folder"
        raise ValueError(f"{folder}: {reason}")
    plans, problems = _last_run(folder)
    merged = CaptionStore(folder / MERGED)
    with merged.hold():
        return _merge_into(merged, plans, problems)


def unmerged(folder: Path) -> list[tuple[CaptionStore, Records]]:
    """What the shards in a folder hold that its merged store lacks: newer captions, hand edits and marks, by store."""
    merged, found = CaptionStore(folder / MERGED), []
    for store in map(CaptionStore, shard_stores(folder)):
        if store.path == merged.path:
            continue
        records = store.current()
        there = {  # with None for the many to which only what is done by hand can be news
            record["request"]: record if FIELDS_BY_HAND & record.keys() or not is_complete(record) else None
            for record in merged.latest(record["request"] for record in records)
        }
        if places := [place for place, record in enumerate(records) if _is_news(record, there)]:
            found.append((store, records.at(places)))
    return found


def _is_news(record: dict[str, Any], there: dict[str, dict[str, Any] | None]) -> bool:
    if record["request"] not in there:
        return True
    before = there[record["request"]]
    if before is not None and not is_complete(before) and record != before:
        return True
    news = ((record.get(name), (before or {}).get(name)) for name in FIELDS_BY_HAND)
    return any(own not in (None, old) and old != OUTDATED for own, old in news)


def _merge_into(merged: CaptionStore, plans: dict[int, Path], problems: list[str]) -> Merged:
    places = _planned(plans)
    best = _Best(len(places))
    kept, bad, others, by_hand = array("q"), array("q"), set[str](), dict[str, str]()
    stores = sorted(shard_stores(merged.path.parent), key=lambda path: path == merged.path)  # the merged one last
    for number, path in enumerate(stores):
        is_merged = path == merged.path
        for line in read_store(path):
            if line.record is None:
                if is_merged:
                    bad.append(line.start)
            elif is_by_hand(line.record):
                by_hand[json.dumps(line.record, ensure_ascii=False)] = line.record.get("created", "")
            elif (place := places.get(line.record["request"])) is not None:
                best.offer(place, line.record, number, line.start, may_be_older=is_merged)
            elif is_merged:
                kept.append(line.start)
                others.add(line.record["request"])
    if bad:
        aside = unused_name(merged.path.with_name(f"{MERGED}.damaged"))
        with atomic_writer(aside) as target:
            target.writelines(_lines([merged.path], ((0, start) for start in bad)))
        message = f"{merged.path}: the lines that are skipped are no longer in it, but in {aside}"
        warn(message, stacklevel=3)
    with atomic_writer(merged.path) as target:
        target.writelines(_lines([merged.path], ((0, start) for start in kept)))
        target.writelines(
            line.encode(errors="backslashreplace") + b"\n" for line in sorted(by_hand, key=by_hand.__getitem__)
        )
        order = chain((place for place in places.values() if place not in best.row_errors), sorted(best.row_errors))
        target.writelines(_lines(stores, ((best.files[place], best.starts[place]) for place in order)))
    if NOWHERE in best.files:
        gone = {request for request, place in places.items() if best.files[place] == NOWHERE}
        videos = {places[request]: video for request, video in _clips(plans) if request in gone}
        problems += [f"no record of {videos[place]}" for place in sorted(videos)]
    num_ok = sum(best.is_ok)
    return Merged(merged, num_ok, len(places) - best.files.count(NOWHERE) - num_ok, problems, len(others))


def _last_run(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """The plan files, by shard, of the run that was started last; and its problems, in words."""
    plans = {path: read_plan(path) | {"clips": []} for path in plan_files(folder)}
    if not plans:
        raise ValueError(f"{folder}: holds no shards; `python -m capkit caption-shard` makes them")
    last = max(plans.values(), key=lambda plan: (plan["run"], plan["written"]))
    count = last["num_shards"]
    of_run = {plan["shard"]: path for path, plan in plans.items() if plan["num_shards"] == count}
    of_others = len(plans) > len(of_run)
    advice = f"; if this run was given up, delete shard-*-of-{count:05}.plan.json" if of_others else ""
    problems = []
    for index in range(count):
        shard = f"shard {index}/{count}"
        if index not in of_run:
            problems.append(f"{shard} was never started{advice}")
        elif differences := plan_differences(last, plans[of_run[index]]):
            if "items" in differences:
                problems.append(f"{shard} was made from another list of clips")
            else:
                names = ", ".join(differences)
                problems.append(f"settings of {shard} differ in {names} from those of shard {last['shard']}")
    return of_run, problems


def _clips(plans: dict[int, Path]) -> Iterator[tuple[str, str]]:
    for path in plans.values():
        yield from read_plan(path)["clips"]


def _planned(plans: dict[int, Path]) -> dict[str, int]:
    """The place of each request in the order of the manifest."""
    rows: dict[str, int] = {}
    count = max(plans) + 1
    # Shards took every count-th clip: row by row over the shards is the manifest's order.
    for index, path in plans.items():
        for row, (request, _) in enumerate(read_plan(path)["clips"]):
            place = row * count + index
            rows[request] = min(place, rows.get(request, place))
    return {request: place for place, request in enumerate(sorted(rows, key=rows.__getitem__))}


class _Best:
    """For each place the record that counts: the number of its file, and where it begins there."""

    def __init__(self, num_places: int):
        self.files, self.starts = array("i", [NOWHERE]) * num_places, array("q", [0]) * num_places
        self.is_ok, self._is_complete, self._created = bytearray(num_places), bytearray(num_places), [""] * num_places
        self.row_errors = set[int]()

    def offer(self, place: int, record: dict[str, Any], file: int, start: int, may_be_older: bool) -> None:
        """Take a record for a place if it is better than the one there, or if none is; files come one after another.

        Args:
            may_be_older: it may be a copy, made by an earlier merge, of an older record in another file.
        """
        complete, created = is_complete(record), record.get("created", "")
        if self.files[place] != NOWHERE:
            before = (bool(self._is_complete[place]), "" if self.files[place] == file else self._created[place])
            now = (complete, created if self.files[place] != file and not may_be_older else "")
            if now < before:
                return
        self.files[place], self.starts[place] = file, start
        self.is_ok[place], self._is_complete[place] = record["status"] == "ok", complete
        if is_row_error(record):
            self.row_errors.add(place)
        self._created[place] = sys.intern(created)  # few differ, and only in their seconds


def _lines(paths: list[Path], places: Iterator[tuple[int, int]]) -> Iterator[bytes]:
    """The lines at some places in files, each with its newline."""
    with ExitStack() as stack:
        files: dict[int, Any] = {}
        for number, start in places:
            if number == NOWHERE:
                continue
            if number not in files:
                if len(files) >= MOST_OPEN_FILES:
                    stack.close()
                    files.clear()
                files[number] = stack.enter_context(open(paths[number], "rb"))
            files[number].seek(start)
            yield files[number].readline().removesuffix(b"\n") + b"\n"
