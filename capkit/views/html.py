"""What people look at: static HTML without scripts, so that it shows in untrusted notebooks and in exported pages."""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from capkit.runs import CaptionStore

# Of an untrusted notebook JupyterLab keeps no <style>, no <svg>, and of inline CSS no currentColor or aspect-ratio.
CARD = "border:1px solid #8886;border-radius:6px;padding:10px;margin:10px 0;max-width:1000px"
MUTED = "opacity:.7;font-size:85%"
BLUE, SKY, ORANGE, RED = "#0072b2", "#56b4e9", "#e69f00", "#d55e00"  # Okabe and Ito's; never the only signal


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
    return card(record, frames_strip(store, record))


def card(record: dict[str, Any], strip: str, told: Sequence[str] = ()) -> str:
    """A record as HTML: its frames, what was said of them or why nothing was, and how.

    Args:
        record: as `CaptionStore.current()` returns them. A text written by hand goes before the model's.
        strip: the picture of its frames, as HTML.
        told: further fields to name.
    """
    name = file_name(record)
    asked = "".join(f"; {field} {escape(str(record[field]))}" for field in told if record.get(field) is not None)
    if record["status"] == "error":
        words = f"{name}<br>{strip}not captioned: {escape(record['error'])}"
        return f'<div style="{CARD};border-left:4px solid {RED}">{words}<div style="{MUTED}">{asked[2:]}</div></div>'
    seconds = ", ".join(f"{second:.3g}" for second in record["timestamps_seconds"] or [])
    facts = f"{record['num_tokens']} tokens, ended by {escape(record['finish_reason'])}, {record['seconds']:.3g} s"
    edited = ""
    if "edited_text" in record:
        facts = f"<b>✎ edited by hand</b>; the model's own: {facts}"
        own = f'<div dir="auto" style="white-space:pre-wrap">{escape(record["text"].strip())}</div>'
        edited = f'<details style="{MUTED}"><summary>what the model said</summary>{own}</details>'
    return (
        f'<div style="{CARD}">{name} <span dir="auto" style="{MUTED}">{escape(record["prompt"])}</span><br>'
        f'{strip}<div dir="auto" style="margin:6px 0;white-space:pre-wrap">{escape(record_text(record))}</div>'
        f'{edited}<span style="{MUTED}">frames at {seconds} s; {facts}{asked}</span></div>'
    )


def record_text(record: dict[str, Any]) -> str:
    """What a record says: the text written by hand if there is one, else the model's; "" after an error."""
    text = record["edited_text"] if "edited_text" in record else record["text"]
    return (text or "").strip()


def file_name(record: dict[str, Any]) -> str:
    """The name of a record's video as HTML, kept apart from the direction of the text around it."""
    return f"<b><bdi>{escape(Path(record['video']).name)}</bdi></b>"


def frames_strip(store: CaptionStore, record: dict[str, Any]) -> str:
    """The frames that the model saw, if their picture is there."""
    path = store.strip_path(record)
    return picture(path.read_bytes(), "frames that the model saw") + "<br>" if path.exists() else ""


def picture(webp: bytes, alt: str, style: str = "max-width:100%") -> str:
    """An inline picture as HTML."""
    data = base64.b64encode(webp).decode()
    return f'<img src="data:image/webp;base64,{data}" style="{style}" alt="{escape(alt)}">'


def to_webp(image: Image.Image, quality: int = 60) -> bytes:
    """A picture as the bytes of a WebP file."""
    file = io.BytesIO()
    image.save(file, "webp", quality=quality)
    return file.getvalue()


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
    first, second = mark_differences(record_text(record), text.strip())
    rows = "".join(
        f'<div dir="auto" style="margin:6px 0"><span style="{MUTED}">{escape(name)}</span><br>{marked}</div>'
        for name, marked in zip(names, (first, second), strict=True)
    )
    return HTML(f'<div style="{CARD}">{file_name(record)}<br>{frames_strip(store, record)}{rows}</div>')


def mark_differences(first: str, second: str) -> tuple[str, str]:
    """Both texts as HTML; words that the other one does not have in that place are underlined and tinted."""
    marked = mark_all_differences([first, second])
    return marked[0], marked[1]


def mark_all_differences(texts: Sequence[str]) -> list[str]:
    """Texts as HTML, each compared with the first: words that the first does not have in that place are underlined and
    tinted; in the first, words that no other has."""
    words = [re.findall(r"\S+\s*", text) for text in texts]
    plain = [[word.strip(" .,;:!?\n").lower() for word in some] for some in words]
    shared: list[set[int]] = [set() for _ in texts]
    for other in range(1, len(texts)):
        matcher = difflib.SequenceMatcher(None, plain[0], plain[other], autojunk=False)
        for block in matcher.get_matching_blocks():
            shared[0] |= set(range(block.a, block.a + block.size))
            shared[other] |= set(range(block.b, block.b + block.size))
    if len(texts) == 1:
        return [escape(texts[0])]
    tints = [f"{ORANGE}55"] + [f"{SKY}55"] * (len(texts) - 1)
    return [
        "".join(
            escape(word)
            if place in same
            else f'<u style="background:{tint};text-decoration-thickness:2px">{escape(word.rstrip())}</u> '
            for place, word in enumerate(some)
        )
        for some, same, tint in zip(words, shared, tints, strict=True)
    ]
