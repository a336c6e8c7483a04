"""From caption stores to one record for each clip, or the reason why a clip has none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capkit.runs import CaptionStore

SETTINGS = (
    *("prompt", "template", "history", "frame_numbers", "decoding", "frame_sampling", "sample"),
    *("model", "model_fingerprint", "dtype", "quantization"),
)
"""Fields of a record in which captions of one clip can differ, and which `choose` may name."""

Choice = Mapping[str, Any] | str


@dataclass(frozen=True)
class Chosen:
    """A clip, with its record or the reason why it has none.

    Attributes:
        clip: the video file, its links followed.
        record: as `CaptionStore.current` returns them; None where there is none to export.
        store: where the record is.
        reason: why there is none, or "".
    """

    clip: Path
    record: dict[str, Any] | None
    store: Path | None
    reason: str = ""


def choose_records(stores: Any, choose: Choice | Sequence[Choice] = ()) -> list[Chosen]:
    """One current, successful record of the whole file for each clip, in the order of the stores.

    Of captions with the same settings the one edited by hand counts, else the latest. Captions of parts of a clip are
    never chosen: a trainer would see the whole file.

    Args:
        stores: a caption store or its file, or several.
        choose: which of several captions of a clip; a choice, or several in order of preference. A choice is "edited"
            (by hand), "latest", or fields with their values, such as {"prompt": "...", "decoding": {"temperature": 0}};
            of a field that is a dictionary, only what is named must agree. A clip without a match is left out, with the
            reason.

    Raises:
        ValueError: no such file, an unknown choice, or a clip with several captions and no choice between them.
    """
    choices = [choose] if isinstance(choose, (Mapping, str)) else list(choose)
    for choice in choices:
        _check(choice)
    attempts: dict[Path, list] = {}
    for store in map(_store, [stores] if isinstance(stores, (str, os.PathLike, CaptionStore)) else stores):
        for record in store.current():
            clip = Path(os.path.realpath(record["video"]))
            attempts.setdefault(clip, []).append((record, store.path))
    found = [_of_clip(clip, records, choices) for clip, records in attempts.items()]
    if ambiguous := [several for several in found if not isinstance(several, Chosen)]:
        raise ValueError(_told(ambiguous))
    return found


def _store(store):
    store = store if isinstance(store, CaptionStore) else CaptionStore(store)
    if not store.path.is_file():
        raise ValueError(f"stores: {store.path}: no such file")
    return store


def _check(choice):
    if isinstance(choice, str) and choice not in ("edited", "latest"):
        raise ValueError(f"choose={choice!r}: must be 'edited', 'latest' or fields with values")
    if unknown := [name for name in choice if isinstance(choice, Mapping) and name not in SETTINGS]:
        raise ValueError(f"choose: unknown field {unknown[0]!r}; there are {', '.join(SETTINGS)}")


def _of_clip(clip: Path, attempts: list, choices: list[Choice]) -> Chosen | list[dict]:
    """The record to export; several, where nothing chooses between them."""
    fine = [(record, store) for record, store in attempts if record["status"] == "ok"]
    if not fine:
        return Chosen(clip, None, attempts[-1][1], f"not captioned: {attempts[-1][0]['error']}")
    whole = [(one, store) for one, store in fine if not one["start_seconds"] and one["end_seconds"] is None]
    if not whole:
        windows = ", ".join(f"{one['start_seconds']:g} to {_end(one)} s" for one, _ in fine[:3])
        reason = f"has captions of parts only ({windows}); a trainer would see the whole file"
        return Chosen(clip, None, fine[0][1], reason)
    newest: dict[str, tuple] = {}  # of each way of captioning
    for record, store in sorted(whole, key=lambda one: ("edited_text" in one[0], one[0].get("created") or "")):
        newest[json.dumps([record.get(name) for name in SETTINGS], sort_keys=True)] = record, store
    left = list(newest.values())
    for choice in choices:
        if matching := [one for one in left if _matches(one[0], choice)]:
            left = [max(matching, key=lambda one: one[0].get("created") or "")] if choice == "latest" else matching
            break
    else:
        if choices:
            return Chosen(clip, None, left[0][1], f"none of its {len(left)} captions is as chosen")
    return Chosen(clip, *left[0]) if len(left) == 1 else [record for record, _ in left]


def _end(record):
    return "the end" if record["end_seconds"] is None else f"{record['end_seconds']:g}"


def _matches(record: dict[str, Any], choice: Choice) -> bool:
    if choice == "latest":
        return True
    if choice == "edited":
        return "edited_text" in record
    return all(_agrees(record.get(name), wanted) for name, wanted in choice.items())


def _agrees(value, wanted):
    if isinstance(value, Mapping) and isinstance(wanted, Mapping):
        return all(name in value and value[name] == part for name, part in wanted.items())
    return value == wanted


def _told(ambiguous: list[list[dict]]) -> str:
    """What the captions of the first such clip differ in, as choices to copy."""
    first = ambiguous[0]
    choices = [
        f"\n  {name}: " + " | ".join(values)
        for name in SETTINGS
        if len(values := _distinct(json.dumps(one.get(name), ensure_ascii=False) for one in first)) > 1
    ]
    return (
        f"{len(ambiguous)} clips have several captions, the first {first[0]['video']}; say which by choose=, for "
        f"instance 'latest', 'edited', or a value of what they differ in:{''.join(choices)}"
    )


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
