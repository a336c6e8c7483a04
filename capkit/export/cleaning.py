"""Rules that change captions before they are exported. Each is off unless chosen; the report keeps the originals."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from capkit.export.layouts import LINE_SEPARATORS
from capkit.sweep import OPENING, SENTENCE_END

_AFTER_OPENING = re.compile(r"(?:[\s,:;!–—-]+|that\s+)*", re.IGNORECASE)
# "The viewer is taken to a beach" without its opening would lack a subject.
_LACKS_A_SUBJECT = re.compile(r"(?:is|are|was|were|be|has|have|had|can|may|will|would|sees?|gets?)\b", re.IGNORECASE)
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|No|[A-Z])\.\s*$")


def to_nfc(text: str, record: dict[str, Any]) -> str:
    """Compose letters and accents (Unicode NFC), so that equal captions have equal tokens."""
    return unicodedata.normalize("NFC", text)


def join_lines(text: str, record: dict[str, Any]) -> str:
    """Replace line breaks of every kind and tabs by spaces, and several spaces by one."""
    return re.sub(rf"[{LINE_SEPARATORS}\t ]+", " ", text).strip()


def drop_fragment(text: str, record: dict[str, Any]) -> str:
    """Drop the unfinished last sentence of a caption that was cut off by length, unless it is the only one."""
    if record.get("finish_reason") not in ("length", "stopped"):
        return text
    ends = sentence_ends(text)
    return text[: ends[-1]].rstrip() if ends else text


def drop_opening(text: str, record: dict[str, Any]) -> str:
    """Drop stock openings ("The video shows a dog", "In this clip, a dog"), and capitalise what follows.

    The list is `capkit.sweep.diagnostics.OPENINGS`. An opening that is the subject of what follows stays.
    """
    while opening := OPENING.match(text):
        rest = _AFTER_OPENING.sub("", text[opening.end() :], count=1)
        if not rest or _LACKS_A_SUBJECT.match(rest):
            break
        text = rest[0].upper() + rest[1:]
    return text


CLEANING: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "nfc": to_nfc,
    "lines": join_lines,
    "fragments": drop_fragment,
    "openings": drop_opening,
}
"""The rules by name, in the order in which they are applied; a rule takes a text and its record."""

FOR_HAND_EDITS = ("nfc", "lines")
"""Rules that apply to texts edited by hand too, because they change no word."""


def clean(text: str, record: dict[str, Any], rules: Sequence[str]) -> tuple[str, list[str]]:
    """Apply rules of CLEANING, by name, to the caption of a record.

    Returns:
        The text, and the names of the rules that changed it.
    """
    changed_by = []
    for name, rule in CLEANING.items():
        if name in rules and (name in FOR_HAND_EDITS or "edited_text" not in record):
            before, text = text, rule(text, record)
            changed_by += [name] if text != before else []
    return text, changed_by


def sentence_ends(text: str) -> list[int]:
    """Positions where sentences end, after closing quotes and before spaces; the dot of an abbreviation ends none."""
    ends = [match.start() + len(match[0].rstrip()) for match in SENTENCE_END.finditer(text)]
    return [end for end in ends if end and not _ABBREVIATION.search(text, max(end - 8, 0), end)]


def trim_to_sentence(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The longest beginning of complete sentences with at most `limit` tokens; "" if the first has more."""
    ends = sentence_ends(text)
    num_fitting = bisect_right(ends, limit, key=lambda end: count(text[:end]))
    return text[: ends[num_fitting - 1]] if num_fitting else ""
