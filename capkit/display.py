"""What people look at: static HTML without scripts, so that it shows in untrusted notebooks and in exported pages."""

from __future__ import annotations

import base64
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
    path = store.strip_path(record)
    picture = ""
    if path.exists():
        data = base64.b64encode(path.read_bytes()).decode()
        picture = (
            f'<img src="data:image/webp;base64,{data}" style="max-width:100%" alt="frames that the model saw"><br>'
        )
    return (
        f'<div style="{_CARD}"><b>{name}</b> <span style="{_MUTED}">{escape(record["prompt"])}</span><br>{picture}'
        f'<div style="margin:6px 0;white-space:pre-wrap">{text}</div>'
        f'<span style="{_MUTED}">frames at {seconds} s; {facts}</span></div>'
    )
