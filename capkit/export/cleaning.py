"""Rules that change captions before they are exported. Each is off unless chosen; the report keeps what was there."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from capkit.export.base import LINE_SEPARATORS
from capkit.sweep import OPENING, SENTENCE_END

_LEFT_BY_OPENINGS = re.compile(r"[\s,:;!–—-]+|that\s+", re.IGNORECASE)
# "The viewer is taken to a beach" without its opening would lack a subject.
_LACKS_A_SUBJECT = re.compile(r"(?:is|are|was|were|be|has|have|had|can|may|will|would|sees?|gets?)\b", re.IGNORECASE)
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|No|[A-Z])\.\s*$")


def in_composed_form(text: str, record: dict[str, Any]) -> str:
    """Letters with their accents as one character (Unicode NFC): the same caption always has the same tokens."""
    return unicodedata.normalize("NFC", text)


def on_one_line(text: str, record: dict[str, Any]) -> str:
    """Line breaks of every kind and tabs become spaces, several spaces one."""
    return re.sub(rf"[{LINE_SEPARATORS}\t ]+", " ", text).strip()


def without_fragment(text: str, record: dict[str, Any]) -> str:
    """Of a caption that was cut off by length, what follows the last whole sentence goes; a single one stays."""
    if record.get("finish_reason") not in ("length", "stopped"):
        return text
    ends = sentence_ends(text)
    return text[: ends[-1]].rstrip() if ends else text


def without_opening(text: str, record: dict[str, Any]) -> str:
    """Stock openings ("The video shows a dog", "In this clip, a dog") go, and what follows begins with a capital.

    The list is `capkit.sweep.diagnostics.OPENINGS`. An opening that what follows needs as its subject stays.
    """
    while found := OPENING.match(text):
        rest = text[found.end() :]
        while left := _LEFT_BY_OPENINGS.match(rest):
            rest = rest[left.end() :]
        if not rest or _LACKS_A_SUBJECT.match(rest):
            break
        text = rest[0].upper() + rest[1:]
    return text


CLEANING: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "nfc": in_composed_form,
    "lines": on_one_line,
    "fragments": without_fragment,
    "openings": without_opening,
}
"""The rules by name, in the order in which they are applied; a rule takes a text and its record."""

OF_HAND_EDITS = ("nfc", "lines")
"""Rules that are applied to texts edited by hand too: they change no word."""


def clean(text: str, record: dict[str, Any], rules: Sequence[str]) -> tuple[str, list[str]]:
    """Apply rules to the caption of a record.

    Args:
        text: the caption.
        record: where it comes from; a hand edit is known by its `edited_text`.
        rules: names of CLEANING.

    Returns:
        The text, and the names of the rules that changed it.
    """
    changed_by = []
    for name, rule in CLEANING.items():
        if name in rules and (name in OF_HAND_EDITS or "edited_text" not in record):
            before, text = text, rule(text, record)
            changed_by += [name] if text != before else []
    return text, changed_by


def sentence_ends(text: str) -> list[int]:
    """Where each whole sentence ends, trailing quotes included and spaces not; an abbreviation's dot ends none."""
    ends = [found.start() + len(found[0].rstrip()) for found in SENTENCE_END.finditer(text)]
    return [end for end in ends if end and not _ABBREVIATION.search(text[:end])]


def trim_to_sentence(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The longest beginning of whole sentences with at most `limit` tokens; "" if not even the first has so few."""
    ends = sentence_ends(text)
    num_fitting = bisect_right(ends, limit, key=lambda end: count(text[:end]))
    return text[: ends[num_fitting - 1]] if num_fitting else ""
