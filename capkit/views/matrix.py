"""Which captions a page shows, and where: a row for each clip, a cell for each combination of settings."""

from __future__ import annotations

import json
import textwrap
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capkit.runs import LATER_SETTINGS, RECORD_FIELDS, SETTINGS, clip_id
from capkit.sweep import SweepResult
from capkit.text import plural

Record = dict[str, Any]
Places = npt.NDArray[np.int64]

STATUSES = ("ok", "error")
MODEL = ("model", "model_fingerprint", "dtype", "quantization")
OF_A_CLIP = ("video", "start_seconds", "end_seconds")
SAMPLING = ("strategy", "num_frames", "frames_per_second")
REPEATS = ("sample", "seed")
"""What tells repeats of one cell apart."""
MOST_CELLS = 64  # of a store; with more settings, as where each clip has a prompt of its own, each caption is a row
LEAST_FILLED = 0.5  # share of the matrix; with less, each caption is a row
NAME_CHARACTERS = 60  # of a prompt in the name of a cell
CHANGES = ("changed", "added", "removed", "same")


@dataclass(frozen=True)
class Matrix:
    """Where records stand.

    Attributes:
        rows, cells: int64 (N,), of each record.
        names: of the cells.
        varying: names of the settings in which the records of one cell differ; they name the rows.
    """

    rows: Places
    cells: Places
    names: tuple[str, ...]
    varying: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return int(self.rows.max(initial=-1)) + 1

    def at(self, places: Places) -> Matrix:
        """Of the records at some places, in this order; rows in the order of their first record."""
        rows, first, inverse = np.unique(self.rows[places], return_index=True, return_inverse=True)
        rank = np.empty(len(rows), np.int64)
        rank[np.argsort(first)] = np.arange(len(rows))
        return Matrix(rank[inverse], self.cells[places], self.names, self.varying)

    def places(self, rows: range) -> list[Places]:
        """The places of the records in each of these rows."""
        order = np.argsort(self.rows, kind="stable")
        ends = np.searchsorted(self.rows[order], [*rows, rows.stop])
        return [order[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


class Joined(Sequence[Record]):
    """Several sequences of records as one, each record read when it is used."""

    def __init__(self, *parts: Sequence[Record]):
        self.parts, self._ends = parts, [*accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: Any) -> Any:
        part = bisect_right(self._ends, place)
        return self.parts[part][place - self._ends[part] + len(self.parts[part])]


# ---- settings ------------------------------------------------------------------------------------------------------


def flatten(record: Record) -> Record:
    """A record with the fields of its decoding and frame sampling beside the others, in their place."""
    flat: Record = {}
    for name, value in record.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def settings_of(record: Record, without: Iterable[str] = ()) -> Record:
    """The settings of a caption, of its model too, apart from its clip; those of its decoding are among them."""
    names = [name for name in (*SETTINGS, *LATER_SETTINGS, "model") if name in record and name not in OF_A_CLIP]
    flat = flatten({name: record[name] for name in names})
    return {name: value for name, value in flat.items() if name not in without and value not in (None, [])}


def varying_names(settings: Iterable[Record]) -> tuple[str, ...]:
    """Names of the settings that not all have alike."""
    first: Record | None = None
    names: dict[str, bool] = {}  # in the order of a record, and whether they vary
    for one in settings:
        first = one if first is None else first
        for name in first | one:
            names[name] = names.get(name, False) or first.get(name) != one.get(name)
    for name, follows in (("model", "model_fingerprint"), ("sample", "seed")):
        if names.get(name):
            names[follows] = False
    return tuple(name for name, varies in names.items() if varies)


def name_settings(settings: Record, names: Iterable[str]) -> str:
    """Some settings as short text; one that is not set is left out."""
    parts = []
    for name in names:
        value = settings.get(name)
        if name == "prompt" and value:
            parts.append(textwrap.shorten(value, NAME_CHARACTERS, placeholder=" ..."))
        elif name in ("template", "strategy", "model") and value:
            parts.append(str(value))
        elif value is not None:
            parts.append(f"{name}={value}")
        elif name == "temperature":
            parts.append("greedy")
    return " · ".join(parts)


def names_of(settings: Sequence[Record]) -> tuple[str, ...]:
    """A name for each: the settings in which they differ, with its number where these do not tell them apart."""
    varying = varying_names(settings)
    names = [name_settings(one, varying) for one in settings]
    count = Counter(names)
    is_clear = [name and count[name] == 1 for name in names]
    return tuple(
        name if clear else f"{number}. {name}".rstrip(". ")
        for number, (name, clear) in enumerate(zip(names, is_clear, strict=True), 1)
    )


# ---- where captions stand ------------------------------------------------------------------------------------------


def of_sweep(result: SweepResult) -> Matrix:
    """The cells of a plan, and those of captions made elsewhere."""
    labels = [*result.plan.labels.values(), *result.elsewhere]
    numbers = {label: number for number, label in enumerate(labels)}
    cells = [numbers[result.plan.labels[cell]] for _, cell, _ in result.plan.requests()]
    for label, records in result.elsewhere.items():
        cells += [numbers[label]] * len(records)
    rows: dict[str, int] = {}
    places = [rows.setdefault(clip_id(record), len(rows)) for record in result.all_records]
    return Matrix(np.array(places, np.int64), np.array(cells, np.int64), tuple(labels))


def without_repeated_requests(records: Sequence[Record], places: Places) -> Places:
    """The places of records whose request has not come before, as that of a clip that a sweep names twice."""
    first: dict[Any, int] = {}
    for place in places.tolist():
        first.setdefault(records[place].get("request") or place, place)
    return np.array([*first.values()], np.int64)


def of_records(records: Sequence[Record]) -> Matrix:
    """Cells of the settings in which records differ; or, where these would be nearly empty, a row for each record.

    Captions that differ only in seed and number among repeats share a cell.
    """
    cells: dict[str, int] = {}
    settings: list[Record] = []
    rows: dict[str, int] = {}
    of_row, of_cell = [], []
    for record in records:
        own = settings_of(record, REPEATS)
        key = json.dumps(own, sort_keys=True)
        if key not in cells and len(cells) <= MOST_CELLS:
            cells[key] = len(cells)
            settings.append(own)
        of_cell.append(cells.get(key, MOST_CELLS))
        of_row.append(rows.setdefault(clip_id(record), len(rows)))
    filled = len(set(zip(of_row, of_cell, strict=True)))
    if len(cells) <= MOST_CELLS and filled >= LEAST_FILLED * len(cells) * len(rows):
        names = ("caption",) if len(cells) < 2 else names_of(settings)
        return Matrix(np.array(of_row, np.int64), np.array(of_cell, np.int64), names)
    varying = varying_names(settings_of(record) for record in records)
    return Matrix(np.arange(len(records)), np.zeros(len(records), np.int64), ("caption",), varying)


def choose(
    records: Sequence[Record],
    status: str | None,
    min_tokens: int | None,
    max_tokens: int | None,
    order_by: str | None,
    descending: bool,
    limit: int | None,
) -> tuple[Places, list[str]]:
    """The places of the chosen records, in order, and in words how they were chosen; see `captions_page`."""
    if status not in (None, *STATUSES):
        raise ValueError(f"status={status!r}: must be 'ok', 'error' or None for both")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: must be at least 1, or None for all")
    criteria = [f"status {status}"] if status else []
    criteria += [] if min_tokens is None else [f"at least {min_tokens} tokens"]
    criteria += [] if max_tokens is None else [f"at most {max_tokens} tokens"]
    chosen: list[tuple[Any, int]] = []  # what to order by, and the place
    lacking: list[int] = []  # places of records without it
    fields: dict[str, None] = {}
    for place, record in enumerate(records):
        fields |= dict.fromkeys(record)
        num_tokens = record.get("num_tokens")
        if status not in (None, record["status"]) or not _is_within(num_tokens, min_tokens, max_tokens):
            continue
        value = None if order_by is None else record.get(order_by)
        if order_by is not None and value is None:
            lacking.append(place)
        else:
            chosen.append((_sort_key(value), place))
    if order_by is not None:
        fields = dict.fromkeys([*RECORD_FIELDS, *fields])
        if order_by not in fields:
            raise ValueError(f"order_by={order_by!r}: no record has it; there are {', '.join(fields)}")
        chosen.sort(key=lambda pair: pair[0], reverse=descending)
        criteria.append(f"by {order_by}, {'largest' if descending else 'smallest'} first")
    return np.array([*(place for _, place in chosen), *lacking][:limit], np.int64), criteria


def _is_within(num_tokens: int | None, min_tokens: int | None, max_tokens: int | None) -> bool:
    if num_tokens is None:
        return min_tokens is None and max_tokens is None
    return (min_tokens is None or num_tokens >= min_tokens) and (max_tokens is None or num_tokens <= max_tokens)


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, texts alphabetically, everything else as JSON; texts by their first 100 characters."""
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, 0, (value.casefold() if isinstance(value, str) else json.dumps(value, sort_keys=True))[:100]


# ---- two runs ------------------------------------------------------------------------------------------------------


def of_two_runs(old: Sequence[Record], new: Sequence[Record]) -> tuple[Matrix, list[str], str]:
    """Pair the captions of two runs; see `compare_runs`.

    Returns:
        Where the old records and then the new ones stand, changed pairs in the first rows; of each record the change;
        and both in words.
    """
    shifted = _shifted(old, new) if old and new else {}
    by_name = not {record["video"] for record in old} & {record["video"] for record in new}
    without = {*MODEL, *shifted}
    waiting: defaultdict[str, deque[int]] = defaultdict(deque)  # new records by what they are of
    outcomes = []
    for place, record in enumerate(new):
        waiting[_subject(record, by_name, without)].append(place)
        outcomes.append(hash(_outcome(record)))
    pairs: list[tuple[str, int | None, int | None]] = []  # change, place in old and in new
    for place, record in enumerate(old):
        if partners := waiting[_subject(record, by_name, without)]:
            other = partners.popleft()
            pairs.append(("same" if hash(_outcome(record)) == outcomes[other] else "changed", place, other))
        else:
            pairs.append(("removed", place, None))
    pairs += [("added", None, place) for place in sorted(chain.from_iterable(waiting.values()))]
    pairs.sort(key=lambda pair: CHANGES.index(pair[0]))
    rows, changes = np.zeros(len(old) + len(new), np.int64), [""] * (len(old) + len(new))
    for row, (change, in_old, in_new) in enumerate(pairs):
        for start, one in ((0, in_old), (len(old), in_new)):
            if one is not None:
                rows[start + one], changes[start + one] = row, change
    count = Counter(change for change, *_ in pairs)
    facts = [f"{count[change]:,} {change}" for change in CHANGES]
    facts += [f"the runs differ in {name}: {values[0]} → {values[1]}" for name, values in shifted.items()]
    if by_name and count.keys() & {"changed", "same"}:
        facts.append("the folders differ: clips are matched by file name")
    varying = varying_names(settings_of(record, without) for record in chain(old, new))
    cells = np.repeat([0, 1], [len(old), len(new)])
    return Matrix(rows, cells, ("old", "new"), varying), changes, "; ".join(facts)


def _shifted(old: Iterable[Record], new: Iterable[Record]) -> dict[str, tuple[str, str]]:
    """Settings with one value in all of a run and another one in all of the other, with both values."""
    runs = []
    for records in (old, new):
        values: defaultdict[str, Counter[str]] = defaultdict(Counter)
        number = 0
        for record in records:
            number += 1
            for name, value in settings_of(record).items():
                if len(values[name]) < 2:
                    values[name][str(value)] += 1
        constant = {name: next(iter(seen)) for name, seen in values.items() if [*seen.values()] == [number]}
        runs.append((constant, values.keys()))
    (before, in_old), (after, in_new) = runs
    if "model" in before.keys() & after.keys() and before["model"] != after["model"]:
        before.pop("model_fingerprint", None), after.pop("model_fingerprint", None)  # goes without saying
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return {
        name: (before.get(name, "not set"), after.get(name, "not set"))
        for name in names
        if (name in before or name not in in_old) and (name in after or name not in in_new)
    }


def _subject(record: Record, by_name: bool, without: Iterable[str]) -> str:
    """What a caption is of, apart from the model."""
    clip = clip_id(record | {"video": Path(record["video"]).name} if by_name else record)
    return json.dumps([clip, settings_of(record, without)], sort_keys=True)


def _outcome(record: Record) -> tuple[str, str | None]:
    text = record.get("edited_text", record.get("text"))
    return ("ok", text.strip()) if text is not None else ("error", record.get("error"))


def count_of_rows(matrix: Matrix) -> str:
    """How many clips and cells, in words; "" where there is one cell."""
    if len(matrix.names) < 2:
        return ""
    return f"{plural(matrix.num_rows, 'clip')} × {plural(len(matrix.names), 'cell')}"
