"""Choose one caption record for each clip of caption stores, or give the reason why a clip has none."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from capkit.runs import MARKS, CaptionStore, Records, clip_id, mark_text, setting, window_name
from capkit.text import plain_text, plural, unknown_name

SETTINGS = (
    *("prompt", "answer_prefix", "steps", "template", "history", "frame_numbers", "decoding", "frame_sampling"),
    "sample",
    *("model", "model_fingerprint", "dtype", "quantization"),
)
"""Fields of a record in which captions of one clip can differ, and which `choose` may name."""

Choice = Mapping[str, Any] | str
ENTIRE, SEEN, CUT = range(3)
"""What a caption is of: the entire file; the window of it that the trainer sees; a window to be cut out as a clip."""


@dataclass(frozen=True)
class Chosen:
    """A clip with its record, or with the reason why it has none.

    Attributes:
        clip: the video file, symbolic links resolved.
        store: file of the record.
        record: as `CaptionStore.current` returns them; {} if there is none to export.
        reason: why there is none, or "".
        part: ENTIRE, SEEN or CUT.
        not_taken: another part of the clip that has a caption too, which is not exported; "" if there is none.
    """

    clip: Path
    store: Path
    record: dict[str, Any]
    reason: str = ""
    part: int = ENTIRE
    not_taken: str = ""


class ChosenRecords(Sequence[Chosen]):
    """What `choose_records` chose, in order; each record is read from its store when it is asked for."""

    def __init__(self, stores: list[tuple[Path, Records]]):
        self._stores = stores
        self._first = [0]  # number of each store's first record
        for _, records in stores:
            self._first.append(self._first[-1] + len(records))
        self._numbers, self._reasons = array("q"), dict[int, str]()
        self.num_left_out = 0  # captions, because of their marks
        self._parts, self._others = array("b"), array("q")

    @property
    def num_records(self) -> int:
        """How many have a record; the others have a reason instead."""
        return len(self) - len(self._reasons)

    def append(self, number: int, reason: str = "", part: int = ENTIRE, other: int = -1) -> None:
        """Add the record of a number, counted through all stores, or its clip with the reason why it has none.

        Args:
            part: what the caption is of.
            other: number of a record of another part that is not taken; -1 if there is none.
        """
        if reason:
            self._reasons[len(self._numbers)] = reason
        self._numbers.append(number)
        self._parts.append(part)
        self._others.append(other)

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
        reason, other, not_taken = self._reasons.get(place % len(self), ""), self._others[place], ""
        if other >= 0:
            not_taken = window_name(self.record(other)[1]) or "the entire file"
        clip = Path(_resolved(record["video"]))
        return Chosen(clip, store, {} if reason else record, reason, self._parts[place], not_taken)


def choose_records(
    stores: Any,
    choose: Choice | Sequence[Choice] = (),
    leave_out: Sequence[str] = ("wrong",),
    *,
    is_seen: Callable[[dict[str, Any]], bool] = lambda record: False,
    cut: bool = False,
    several: bool = False,
) -> ChosenRecords:
    """Choose a current, successful record for each clip, in the order of the stores.

    Captions edited by hand are preferred to all others, whatever `choose` says; then those of the window that the
    trainer sees, then those of the entire file. Of captions with the same settings the latest is taken. Captions of
    other windows are those of clips of their own if these are cut out, and else never chosen, because the trainer would
    see other frames.

    Args:
        stores: a caption store or its file, or several.
        choose: which of several captions of a clip; a choice, or several in order of preference. A choice is "edited"
            (by hand), "latest", or fields with their values, such as {"prompt": "...", "decoding": {"temperature": 0}};
            of a field that is a dictionary, only the named items must be equal. A clip without a match is left out,
            with the reason.
        leave_out: marks; captions with one of them are not chosen, as if they were not there.
        is_seen: tells of a record whether its window is what the trainer sees of the clip.
        cut: whether other windows are cut out, as clips of their own.
        several: choose all captions of a clip that match, in the order of `choose`, or all without it.

    Raises:
        ValueError: no such file, an unknown choice or mark, or a clip with several captions and no choice between them.
    """
    choices = check_choices(choose, leave_out)
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
    if not clips:
        return ChosenRecords(sources)
    del clip_numbers  # a million names take 0.2 GB
    order = np.argsort(clips, kind="stable")
    starts = np.flatnonzero(np.diff(np.array(clips, np.int64)[order], prepend=-1)).tolist()
    chosen, ambiguous = ChosenRecords(sources), []
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        attempts = {number: chosen.record(number)[1] for number in order[start:end].tolist()}
        left_out = [number for number, record in attempts.items() if record.get("mark") in leave_out]
        chosen.num_left_out += len(left_out)
        kept = {number: record for number, record in attempts.items() if number not in left_out}
        if not kept:
            chosen.append(left_out[-1], f"left out: {mark_text(attempts[left_out[-1]])}", ENTIRE, -1)
        for numbers, reason, part, other in _clips_of(kept, choices, is_seen, cut, several) if kept else ():
            for number in numbers if several else numbers[:1]:
                chosen.append(number, reason, part, other)
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


def as_list(values: Any) -> list[Any]:
    """The values of an argument that may also be a single one: a text, a dictionary, or what a check then refuses."""
    return [values] if isinstance(values, (Mapping, str)) or not isinstance(values, Iterable) else list(values)


def check_choices(choose: Choice | Sequence[Choice], leave_out: Sequence[str] = ()) -> list[Choice]:
    """The choices of `choose_records` as a list. Raises ValueError for an unknown choice or mark."""
    if isinstance(leave_out, str) or not all(mark in MARKS for mark in as_list(leave_out)):
        raise ValueError(f"leave_out={leave_out!r}: must be a list of {', '.join(map(repr, MARKS))}")
    choices = as_list(choose)
    for choice in choices:
        if not isinstance(choice, Mapping):
            if choice not in ("edited", "latest"):
                raise ValueError(f"choose={choice!r}: must be 'edited', 'latest' or fields with values")
        elif unknown := [name for name in choice if name not in SETTINGS]:
            raise ValueError("choose: " + unknown_name("field", unknown[0], SETTINGS, "there are"))
    return choices


def _clips_of(
    attempts: dict[int, dict[str, Any]],
    choices: list[Choice],
    is_seen: Callable[[dict[str, Any]], bool],
    cut: bool,
    several: bool,
) -> Iterator[tuple[list[int], str, int, int]]:
    """What a file's records, by number, give: candidates, or one and why none is chosen; and the rest of `append`."""
    captions = {number: record for number, record in attempts.items() if record["status"] == "ok"}
    if not captions:
        last = max(attempts)
        yield [last], f"not captioned: {attempts[last]['error']}", ENTIRE, -1
        return
    windows: dict[str, dict[int, dict[str, Any]]] = {}
    for number, record in captions.items():
        windows.setdefault(clip_id(record | {"video": ""}), {})[number] = record
    entire = windows.pop("", {})
    seen = {
        number: record
        for of_one in windows.values()
        if is_seen(next(iter(of_one.values())))
        for number, record in of_one.items()
    }
    if entire or seen:
        numbers, reason = _candidates([seen, entire], choices, several)
        taken = window_name(captions[numbers[0]])
        others = [number for number in (*entire, *seen) if window_name(captions[number]) != taken]
        others += [number for of_one in windows.values() for number in of_one if number not in seen and not cut]
        yield numbers, reason, SEEN if numbers[0] in seen else ENTIRE, others[0] if others else -1
    elif not cut:
        names = [window_name(next(iter(of_one.values()))) for of_one in windows.values()]
        reason = f"has captions of parts only ({', '.join(names[:3])}), and the trainer would see other frames"
        yield [max(captions)], f"{reason}; cut='encode' makes clips of them", ENTIRE, -1
    for of_one in windows.values() if cut else ():
        if not seen.keys() & of_one.keys():
            yield *_candidates([of_one], choices, several), CUT, -1


def _candidates(pools: list[dict[int, dict[str, Any]]], choices: list[Choice], several: bool) -> tuple[list[int], str]:
    """Those of a clip's captions, by number, between which nothing chooses; or the last one and why none is chosen.

    Args:
        pools: the better ones first.
    """
    edited = {number: record for pool in pools for number, record in pool.items() if "edited_text" in record}
    edited = {} if several else edited
    num_captions = 0
    for pool in [edited] if edited else [pool for pool in pools if pool]:
        newest: dict[str, int] = {}  # for each combination of settings
        for number in sorted(pool, key=lambda number: _created(pool[number])):
            newest[json.dumps([pool[number].get(name) for name in SETTINGS], sort_keys=True)] = number
        num_captions += len(newest)
        if not choices or edited and len(newest) == 1:
            return [*newest.values()], ""
        matching: dict[int, None] = {}
        for choice in choices:
            if choice == "latest":
                found = [max(newest.values(), key=lambda number: _created(pool[number]))]
            else:
                found = [number for number in newest.values() if _matches(pool[number], choice)]
            if found and not several:
                return found, ""
            matching |= dict.fromkeys(found)
        if matching:
            return [*matching], ""
    if edited:
        return [max(edited, key=lambda number: _created(edited[number]))], ""
    return [max(number for pool in pools for number in pool)], f"none of its {num_captions} captions matches choose="


def _created(record: dict[str, Any]) -> str:
    return record.get("created") or ""


def _matches(record: dict[str, Any], choice: Choice) -> bool:
    if isinstance(choice, str):
        return "edited_text" in record
    for name, wanted in choice.items():
        value = record.get(name)
        if wanted == setting(record, name):  # a prompt with its fields
            continue
        if isinstance(value, Mapping) and isinstance(wanted, Mapping):
            value = {key: value[key] for key in wanted if key in value}
        if value != wanted:
            return False
    return True


def _describe_ambiguous(num_clips: int, first: list[dict[str, Any]]) -> str:
    """Error message with what the captions of the first such clip differ in, as choices to copy."""
    choices, example = "", ""
    for name in SETTINGS:
        values = dict.fromkeys(json.dumps(record.get(name), ensure_ascii=False) for record in first)
        if len(values) > 1:
            choices += "\n" + plain_text(f"  {name}: {' | '.join(values)}")
            example = example or plain_text(f"[{{{json.dumps(name)}: {list(values)[-1]}}}]")
    flow = quote(f"choose: {example}")
    return (
        f"several captions of {plural(num_clips, 'clip')}, the first {plain_text(first[0]['video'])}; choose='latest' "
        "takes the latest of each, but what was edited by hand wins (papermill: -p choose latest). Or name a value of "
        f"what they differ in, such as choose={example} (papermill: -y {flow}):{choices}"
    )
