"""Choose records of a store by their columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from capkit.runs.index import Records
from capkit.runs.lines import MARK_FIELDS
from capkit.runs.store import RECORD_FIELDS
from capkit.text import unknown_name

Where = Mapping[str, Any]
"""Columns with the values that they must have. A text is compared with the column's value as text, where `*` stands for
any characters, as in names of files, and an empty one for nothing; of a dictionary only the named items must agree."""


def select(records: Records, where: Where | None) -> Records:
    """The records whose columns agree with `where`; all of them if it is empty or None.

    Columns are the fields of records, `edited_text`, and those of marks: {"mark": "wrong"}, {"mark": ""} for captions
    without one, {"video": "*/a.mp4"}, {"decoding": {"temperature": 0}}.

    Raises:
        ValueError: a column that no record has.
    """
    return records.at(matching(records, where)) if where else records


def matching(records: Sequence[Mapping[str, Any]], where: Where) -> list[int]:
    """The places of the records that `select` would choose."""
    names = dict.fromkeys([*RECORD_FIELDS, "edited_text", *MARK_FIELDS])
    places = []
    for place, record in enumerate(records):
        names |= dict.fromkeys(record)
        if all(_agrees(record.get(name), wanted) for name, wanted in where.items()):
            places.append(place)
    for name in where:
        if name not in names:
            raise ValueError("where: " + unknown_name("column", name, names, "there are"))
    return places


def parse_where(conditions: Iterable[str]) -> dict[str, Any]:
    """`column=value` texts, as of a command line, as `Where`; `decoding.temperature=0` is of an item of a column.

    Raises:
        ValueError: a text without "=" in it.
    """
    where: dict[str, Any] = {}
    for condition in conditions:
        path, equals, value = condition.partition("=")
        if not equals or not path:
            raise ValueError(f"{condition!r} is not of the form column=value")
        *columns, name = path.split(".")
        inner: Any = where
        for column in columns:
            inner = inner.setdefault(column, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or name in inner:
            raise ValueError(f"{condition!r}: {path} has a value already")
        inner[name] = value
    return where


def column_text(value: Any) -> str:
    """The value of a column as text; "" for None."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(value, Mapping) and all(_agrees(value.get(name), item) for name, item in wanted.items())
    if not isinstance(wanted, str):
        return bool(value == wanted)
    if isinstance(value, (int, float)):
        with suppress(ValueError):  # a text that is no number is compared as text
            return float(wanted) == value
    text = column_text(value)
    return text == wanted or bool(wanted) and fnmatchcase(text, wanted)
