"""Choose one caption record for each clip of caption stores, or give the reason why a clip has none."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capkit.runs import CaptionStore, Records, window_name
from capkit.text import plain_text, plural, unknown_name

SETTINGS = (
    *("prompt", "template", "history", "frame_numbers", "decoding", "frame_sampling", "sample"),
    *("model", "model_fingerprint", "dtype", "quantization"),
)
"""Fields of a record in which captions of one clip can differ, and which `choose` may name."""

Choice = Mapping[str, Any] | str


@dataclass(frozen=True)
class Chosen:
    """A clip with its record, or with the reason why it has none.

    Attributes:
        clip: the video file, symbolic links resolved.
        store: file of the record.
        record: as `CaptionStore.current` returns them; {} if there is none to export.
        reason: why there is none, or "".
    """

    clip: Path
    store: Path
    record: dict[str, Any]
    reason: str = ""


class ChosenRecords(Sequence[Chosen]):
    """What `choose_records` chose, in order; each record is read from its store when it is asked for."""

    def __init__(self, stores: list[tuple[Path, Records]]):
        self._stores = stores
        self._first = [0]  # number of each store's first record
        for _, records in stores:
            self._first.append(self._first[-1] + len(records))
        self._numbers, self._reasons = array("q"), dict[int, str]()

    @property
    def num_records(self) -> int:
        """How many have a record; the others have a reason instead."""
        return len(self) - len(self._reasons)

    def append(self, number: int, reason: str) -> None:
        """Add the record of a number, counted through all stores, or its clip with the reason why it has none."""
        if reason:
            self._reasons[len(self._numbers)] = reason
        self._numbers.append(number)

    def record(self, number: int) -> tuple[Path, dict[str, Any]]:
        """The store and the record of a number."""
        place = bisect_right(self._first, number) - 1
        store, records = self._stores[place]
        return store, records[number - self._first[place]]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        store, record = self.record(self._numbers[place])
        reason = self._reasons.get(place % len(self), "")
        return Chosen(Path(_resolved(record["video"])), store, {} if reason else record, reason)


def choose_records(stores: Any, choose: Choice | Sequence[Choice] = (), *, several: bool = False) -> ChosenRecords:
    """Choose a current, successful record of the entire file for each clip, in the order of the stores.

    Of captions with the same settings the one edited by hand is preferred, else the latest. Captions of parts of a clip
    are never chosen, because a trainer would see the entire file.

    Args:
        stores: a caption store or its file, or several.
        choose: which of several captions of a clip; a choice, or several in order of preference. A choice is "edited"
            (by hand), "latest", or fields with their values, such as {"prompt": "...", "decoding": {"temperature": 0}};
            of a field that is a dictionary, only the named items must be equal. A clip without a match is left out,
            with the reason.
        several: choose all captions of a clip that match, in the order of `choose`, or all without it.

    Raises:
        ValueError: no such file, an unknown choice, or a clip with several captions and no choice between them.
    """
    choices = check_choices(choose)
    sources = []
    for source in [stores] if isinstance(stores, (str, os.PathLike, CaptionStore)) else stores:
        store = CaptionStore.of(source)
        if not store.path.exists():
            raise ValueError(f"stores: {store.path}: no such file")
        sources.append((store.path, store.current()))
    clip_numbers: dict[str, int] = {}
    clips = array("q")  # the number of each record's clip
    for _, records in sources:
        clips.extend(clip_numbers.setdefault(_resolved(record["video"]), len(clip_numbers)) for record in records)
    del clip_numbers  # a million names take 0.2 GB
    order = np.argsort(clips, kind="stable")
    starts = np.flatnonzero(np.diff(np.array(clips, np.int64)[order], prepend=-1)).tolist()
    chosen, ambiguous = ChosenRecords(sources), []
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        attempts = {number: chosen.record(number)[1] for number in order[start:end].tolist()}
        numbers, reason = _candidates(attempts, choices, several)
        for number in numbers if several else numbers[:1]:
            chosen.append(number, reason)
        if len(numbers) > 1 and not several:
            ambiguous.append(numbers)
    if ambiguous:
        records_of_first = [chosen.record(number)[1] for number in ambiguous[0]]
        raise ValueError(_describe_ambiguous(len(ambiguous), records_of_first))
    return chosen


def _resolved(video: str) -> str:
    try:
        return os.path.realpath(video)
    except ValueError:  # with a character that no file name has; refused when it is opened
        return video


def check_choices(choose: Choice | Sequence[Choice]) -> list[Choice]:
    """The argument of `choose_records` as a list. Raises ValueError for an unknown choice."""
    choices = [choose] if isinstance(choose, (Mapping, str)) else list(choose)
    for choice in choices:
        if not isinstance(choice, Mapping):
            if choice not in ("edited", "latest"):
                raise ValueError(f"choose={choice!r}: must be 'edited', 'latest' or fields with values")
        elif unknown := [name for name in choice if name not in SETTINGS]:
            raise ValueError("choose: " + unknown_name("field", unknown[0], SETTINGS, "there are"))
    return choices


def _candidates(attempts: dict[int, dict[str, Any]], choices: list[Choice], several: bool) -> tuple[list[int], str]:
    """Those of a clip's records, by number, between which nothing chooses; or the last one and why none is chosen."""
    last = max(attempts)
    captions = {number: record for number, record in attempts.items() if record["status"] == "ok"}
    if not captions:
        return [last], f"not captioned: {attempts[last]['error']}"
    entire = {number: record for number, record in captions.items() if not window_name(record)}
    if not entire:
        windows = list(dict.fromkeys(window_name(record) for record in captions.values()))
        return [last], f"has captions of parts only ({', '.join(windows[:3])}); a trainer would see the entire file"
    newest: dict[str, int] = {}  # for each combination of settings
    for number in sorted(entire, key=lambda number: ("edited_text" in entire[number], _created(entire[number]))):
        newest[json.dumps([entire[number].get(name) for name in SETTINGS], sort_keys=True)] = number
    if not choices:
        return list(newest.values()), ""
    matching: dict[int, None] = {}
    for choice in choices:
        latest = [max(newest.values(), key=lambda number: _created(entire[number]))] if choice == "latest" else []
        found = latest or [number for number in newest.values() if _matches(entire[number], choice)]
        if found and not several:
            return found, ""
        matching |= dict.fromkeys(found)
    if matching:
        return [*matching], ""
    return [last], f"none of its {len(newest)} captions matches choose="


def _created(record: dict[str, Any]) -> str:
    return record.get("created") or ""


def _matches(record: dict[str, Any], choice: Choice) -> bool:
    if isinstance(choice, str):
        return "edited_text" in record
    for name, wanted in choice.items():
        value = record.get(name)
        if isinstance(value, Mapping) and isinstance(wanted, Mapping):
            value = {key: value[key] for key in wanted if key in value}
        if value != wanted:
            return False
    return True


def _describe_ambiguous(num_clips: int, first: list[dict[str, Any]]) -> str:
    """Error message with what the captions of the first such clip differ in, as choices to copy."""
    choices = ""
    for name in SETTINGS:
        values = dict.fromkeys(json.dumps(record.get(name), ensure_ascii=False) for record in first)
        if len(values) > 1:
            choices += "\n" + plain_text(f"  {name}: {' | '.join(values)}")
    return (
        f"several captions of {plural(num_clips, 'clip')}, the first {plain_text(first[0]['video'])}; choose one with "
        "choose=, for instance 'latest', 'edited', or a value of what they differ in (papermill: -p choose latest, or "
        f"-y 'choose: [{{prompt: \"...\"}}]'):{choices}"
    )
