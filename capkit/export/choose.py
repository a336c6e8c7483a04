"""Choose one caption record for each clip of caption stores, or give the reason why a clip has none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capkit.runs import CaptionStore, window_name
from capkit.text import plain_text

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


def choose_records(stores: Any, choose: Choice | Sequence[Choice] = ()) -> list[Chosen]:
    """Choose a current, successful record of the entire file for each clip, in the order of the stores.

    Of captions with the same settings the one edited by hand is preferred, else the latest. Captions of parts of a clip
    are never chosen, because a trainer would see the entire file.

    Args:
        stores: a caption store or its file, or several.
        choose: which of several captions of a clip; a choice, or several in order of preference. A choice is "edited"
            (by hand), "latest", or fields with their values, such as {"prompt": "...", "decoding": {"temperature": 0}};
            of a field that is a dictionary, only the named items must be equal. A clip without a match is left out,
            with the reason.

    Raises:
        ValueError: no such file, an unknown choice, or a clip with several captions and no choice between them.
    """
    choices = check_choices(choose)
    by_clip: dict[Path, list[Chosen]] = {}
    for source in [stores] if isinstance(stores, (str, os.PathLike, CaptionStore)) else stores:
        store = source if isinstance(source, CaptionStore) else CaptionStore(source)
        if not store.path.is_file():
            raise ValueError(f"stores: {store.path}: no such file")
        for record in store.current():
            clip = _resolved(record["video"])
            by_clip.setdefault(clip, []).append(Chosen(clip, store.path, record))
    candidates = [_candidates(attempts, choices) for attempts in by_clip.values()]
    if ambiguous := [[one.record for one in several] for several in candidates if len(several) > 1]:
        raise ValueError(_describe_ambiguous(ambiguous))
    return [chosen for (chosen,) in candidates]


def _resolved(video: str) -> Path:
    try:
        return Path(os.path.realpath(video))
    except ValueError:  # with a character that no file name has; refused when it is opened
        return Path(video)


def check_choices(choose: Choice | Sequence[Choice]) -> list[Choice]:
    """The argument of `choose_records` as a list. Raises ValueError for an unknown choice."""
    choices = [choose] if isinstance(choose, (Mapping, str)) else list(choose)
    for choice in choices:
        if not isinstance(choice, Mapping):
            if choice not in ("edited", "latest"):
                raise ValueError(f"choose={choice!r}: must be 'edited', 'latest' or fields with values")
        elif unknown := [name for name in choice if name not in SETTINGS]:
            raise ValueError(f"choose: unknown field {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    return choices


def _candidates(attempts: list[Chosen], choices: list[Choice]) -> list[Chosen]:
    """The records of a clip between which nothing chooses; or one without a record, with the reason."""
    clip, store = attempts[-1].clip, attempts[-1].store
    captions = [one for one in attempts if one.record["status"] == "ok"]
    if not captions:
        return [Chosen(clip, store, {}, f"not captioned: {attempts[-1].record['error']}")]
    entire = [one for one in captions if not window_name(one.record)]
    if not entire:
        windows = list(dict.fromkeys(window_name(one.record) for one in captions))
        reason = f"has captions of parts only ({', '.join(windows[:3])}); a trainer would see the entire file"
        return [Chosen(clip, store, {}, reason)]
    newest: dict[str, Chosen] = {}  # for each combination of settings
    for one in sorted(entire, key=lambda one: ("edited_text" in one.record, _created(one))):
        newest[json.dumps([one.record.get(name) for name in SETTINGS], sort_keys=True)] = one
    if not choices:
        return list(newest.values())
    for choice in choices:
        if choice == "latest":
            return [max(newest.values(), key=_created)]
        if matching := [one for one in newest.values() if _matches(one.record, choice)]:
            return matching
    return [Chosen(clip, store, {}, f"none of its {len(newest)} captions matches choose=")]


def _created(chosen: Chosen) -> str:
    return chosen.record.get("created") or ""


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


def _describe_ambiguous(ambiguous: list[list[dict[str, Any]]]) -> str:
    """Error message with what the captions of the first such clip differ in, as choices to copy."""
    first = ambiguous[0]
    choices = ""
    for name in SETTINGS:
        values = dict.fromkeys(json.dumps(record.get(name), ensure_ascii=False) for record in first)
        if len(values) > 1:
            choices += "\n" + plain_text(f"  {name}: {' | '.join(values)}")
    return (
        f"{len(ambiguous)} clips have several captions, the first {plain_text(first[0]['video'])}; choose one with "
        f"choose=, for instance 'latest', 'edited', or a value of what they differ in:{choices}"
    )
