"""What people look at: static HTML without scripts, so that it shows in untrusted notebooks and in exported pages."""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from capkit.records import CaptionStore

_CARD = "border:1px solid #8886;border-radius:6px;padding:10px;margin:10px 0;max-width:1000px"
_MUTED = "opacity:.7;font-size:85%"


class HTML:
    """A piece of HTML that a notebook shows."""

    def __init__(self, html: str):
        self.html = html

    def _repr_html_(self) -> str:
        return self.html


def show_captions(store: CaptionStore, records: Sequence[dict[str, Any]], limit: int = 20) -> HTML:
    """Each caption below the very frames that the model saw, errors among them, in words.

    Args:
        store: where the picture strips are.
        records: as `store.current()` returns them.
        limit: show the first so many, and say how many there are.
    """
    cards = [_card(store, record) for record in records[:limit]]
    if len(records) > limit:
        cards.append(f"<p>{len(records) - limit} more in <code>{escape(str(store.path))}</code></p>")
    return HTML("".join(cards))


def _card(store: CaptionStore, record: dict[str, Any]) -> str:
    name = escape(Path(record["video"]).name)
    if record["status"] == "error":
        told = f"<b>{name}</b><br>not captioned: {escape(record['error'])}"
        return f'<div style="{_CARD};border-left:4px solid #d55e00">{told}</div>'
    text = escape((record.get("edited_text") or record["text"]).strip())
    seconds = ", ".join(f"{second:.3g}" for second in record["timestamps_seconds"])
    facts = f"{record['num_tokens']} tokens, ended by {record['finish_reason']}, {record['seconds']:.3g} s"
    return (
        f'<div style="{_CARD}"><b>{name}</b> <span style="{_MUTED}">{escape(record["prompt"])}</span><br>'
        f'{_strip(store, record)}<div style="margin:6px 0;white-space:pre-wrap">{text}</div>'
        f'<span style="{_MUTED}">frames at {seconds} s; {facts}</span></div>'
    )


def _strip(store: CaptionStore, record: dict[str, Any]) -> str:
    """The frames that the model saw, if their picture is there."""
    path = store.strip_path(record)
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/webp;base64,{data}" style="max-width:100%" alt="frames that the model saw"><br>'


def show_differences(
    store: CaptionStore, record: dict[str, Any], text: str, names: tuple[str, str] = ("one", "other")
) -> HTML:
    """Two captions of one clip below its frames, word by word: what only one of them says is marked.

    Args:
        store: where the picture strips are.
        record: of the first caption.
        text: the second caption.
        names: what the two are called.
    """
    first, second = mark_differences((record.get("edited_text") or record["text"]).strip(), text.strip())
    rows = "".join(
        f'<div style="margin:6px 0"><span style="{_MUTED}">{escape(name)}</span><br>{marked}</div>'
        for name, marked in zip(names, (first, second), strict=True)
    )
    title = f"<b>{escape(Path(record['video']).name)}</b><br>"
    return HTML(f'<div style="{_CARD}">{title}{_strip(store, record)}{rows}</div>')


def mark_differences(first: str, second: str) -> tuple[str, str]:
    """Both texts as HTML; words that the other one does not have in that place are underlined and tinted."""
    words = [re.findall(r"\S+\s*", text) for text in (first, second)]
    plain = [[word.strip(" .,;:!?\n").lower() for word in some] for some in words]
    shared = [set(), set()]
    for block in difflib.SequenceMatcher(None, *plain, autojunk=False).get_matching_blocks():
        shared[0] |= set(range(block.a, block.a + block.size))
        shared[1] |= set(range(block.b, block.b + block.size))
    tints = ("#e69f0055", "#56b4e955")
    return tuple(
        "".join(
            escape(word)
            if place in same
            else f'<u style="background:{tint};text-decoration-thickness:2px">{escape(word.rstrip())}</u> '
            for place, word in enumerate(some)
        )
        for some, same, tint in zip(words, shared, tints, strict=True)
    )
