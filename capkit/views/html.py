"""Static HTML without scripts, so that untrusted notebooks and exported pages show it."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from capkit.cogvlm2 import Prompt
from capkit.runs import (
    MARK_FIELDS,
    CaptionStore,
    CaptionStoreLike,
    mark_text,
    record_text,
    seen_part,
    window_name,
)
from capkit.text import escape
from capkit.video import STRIP_COLUMNS, STRIP_FRAME_PIXELS, STRIP_GAP_PIXELS
from capkit.views.player import video_players

# In an untrusted notebook JupyterLab removes <style> and <svg>, and currentColor and aspect-ratio from inline CSS.
CARD = "border:1px solid #8886;border-radius:6px;padding:10px;margin:10px 0;max-width:1000px"
MUTED = "opacity:.7;font-size:85%"
# Okabe and Ito's palette, which colour-blind people can tell apart; colour is never the only signal.
BLUE, SKY, ORANGE, RED, GREEN, PURPLE = "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#009e73", "#cc79a7"
GREY = "#888888"
FRAME_LEGEND = "On a frame: the number that the model reads beside it, and its time; ≠: not the same second."
MARK_SIGNS = {"right": "✓", "wrong": "✗", "unsure": "?", "outdated": "↻"}


class HTML:
    """A piece of HTML that a notebook shows."""

    def __init__(self, html: str):
        self.html = html

    def _repr_html_(self) -> str:
        return self.html


def show_captions(store: CaptionStoreLike, records: Sequence[dict[str, Any]], limit: int = 20) -> HTML:
    """Show each caption below the frames that the model saw, and each error with its reason; clips can be played.

    Args:
        store: a `CaptionStore` or its path; its picture strips are shown.
        records: as `store.current()` returns them.
        limit: show only the first so many, and say how many are left.
    """
    store = CaptionStore.of(store)
    players = video_players(record["video"] for record in records[:limit] if record["status"] == "ok")
    cards = []
    for record in records[:limit]:  # a player with the first caption of each clip
        player = players.pop(record["video"], "")
        played = player and f"<details><summary>the clip, playing</summary>{player}</details>"
        cards.append(card(record, frames_strip(store, record) + played))
    if len(records) > limit:
        cards.append(f"<p>{len(records) - limit} more in <code>{escape(str(store.path))}</code></p>")
    return HTML("".join(cards))


def captions_table(records: Sequence[dict[str, Any]], limit: int = 60) -> HTML:
    """A table of captions in full, errors in their place: a row for each of the first `limit` records.

    A hand-edited text replaces the model's, and is marked. Marks have columns where one of these records has a mark.
    """
    shown_records = list(records[:limit])
    marks = MARK_FIELDS if any("mark" in record for record in shown_records) else ()
    names = ("clip", "caption", "tokens", "ended by", "log probability a token, nats", "seconds")
    rows = [[f"<b>{name}</b>" for name in (*names, *(name.replace("_", " ") for name in marks))]]
    for record in shown_records:
        numbers = [record.get(name) for name in ("num_tokens", "finish_reason", "mean_logprob", "seconds")]
        shown = ["" if n is None else f"{n:.3g}" if isinstance(n, float) else escape(n) for n in numbers]
        cells = (record.get(name) or "" for name in marks)
        shown += [escape(", ".join(cell) if isinstance(cell, list) else cell) for cell in cells]
        is_edited = "edited_text" in record
        text = escape(record_text(record)) if is_edited else error_text(record) or escape(record_text(record))
        by_hand = "<b>✎ edited by hand</b>; the numbers are of the model's own caption" if is_edited else ""
        caption = f'<div dir="auto" style="white-space:pre-wrap;min-width:22em">{text}</div>{by_hand}'
        rows.append([file_name(record), caption, *shown])
    cell = '<td style="text-align:left;vertical-align:top;overflow-wrap:anywhere;min-width:4em">'
    body = "".join(f"<tr>{''.join(f'{cell}{html}</td>' for html in row)}</tr>" for row in rows)
    more = f"<p>{len(records) - limit} more in the store</p>" if len(records) > limit else ""
    return HTML(f'<div style="overflow:auto"><table>{body}</table></div>{more}')


def card(record: dict[str, Any], strip: str, extra_field: str | None = None) -> str:
    """A record as HTML: its frames, the caption or the error, and how it was made.

    Args:
        record: as `CaptionStore.current()` returns them. A hand-edited text replaces the model's.
        strip: from `frames_strip`.
        extra_field: a further field of the record to print.
    """
    name = file_name(record)
    value = record.get(extra_field or "")
    extra = "" if value is None else escape(f"{extra_field} {value}")
    if record["status"] == "error" and "edited_text" not in record:
        content = f"{name}<br>{strip}{error_text(record)}"
        return f'<div style="{CARD};border-left:4px solid {RED}">{content}<div style="{MUTED}">{extra}</div></div>'
    facts = [caption_facts(record), *([extra] if extra else [])]
    original = ""
    if "edited_text" in record:
        text = error_text(record) or escape(record["text"].strip())
        text = f'<div dir="auto" style="white-space:pre-wrap">{text}</div>'
        original = f'<details style="{MUTED}"><summary>the model\'s caption</summary>{text}</details>'
    return (
        f'<div style="{CARD}">{name} <span dir="auto" style="{MUTED}">{escape(record.get("prompt", ""))}</span><br>'
        f'{strip}<div dir="auto" style="margin:6px 0;white-space:pre-wrap">{escape(record_text(record))}</div>'
        f'{original}{steps_html(record)}<span style="{MUTED}">{"; ".join(facts)}</span></div>'
    )


def error_text(record: dict[str, Any]) -> str:
    """Why a record holds no caption, as HTML, without the video's path; "" if it holds one."""
    if record.get("status") != "error":
        return ""
    return "not captioned: " + escape(record["error"].removeprefix(f"{record.get('video')}: "))


def caption_facts(record: dict[str, Any], with_probability: bool = False) -> str:
    """A caption's length, finish reason and duration, and the notes on its video, as far as there are any, as HTML.

    Args:
        record: a caption record.
        with_probability: add the mean probability of a token.
    """
    count, mean, seconds = (record.get(name) for name in ("num_tokens", "mean_logprob", "seconds"))
    facts = [] if count is None else [f"{count} tokens"]
    facts += [f"ended by {record['finish_reason']}"] if record.get("finish_reason") is not None else []
    cut = [
        str(number) for number, reason in enumerate(record.get("step_finish_reasons") or (), 1) if reason == "length"
    ]
    facts += [f"answers cut off at max_new_tokens: of step {', '.join(cut)}"] if cut else []
    if with_probability and mean is not None:
        facts.append(f"{math.exp(mean):.0%} a token (mean, {mean:.2f} nats)")
    facts += [] if seconds is None else [f"{seconds:.3g} s"]
    edited = "<b>✎ edited by hand</b>; the model's own: " if "edited_text" in record else ""
    edited = mark_note(record) + edited
    notes = "".join(f"<br>The video is {escape(note)}." for note in record.get("video_notes") or [])
    return edited + escape(", ".join(facts)) + notes


def steps_html(record: dict[str, Any]) -> str:
    """The questions that were asked before and their answers, folded, as HTML; "" if there are none."""
    turns = zip(record.get("steps") or (), record.get("step_answers") or (), strict=False)
    rows = "".join(f'<div dir="auto">{escape(question)} <i>{escape(answer)}</i></div>' for question, answer in turns)
    return rows and f'<details style="{MUTED}"><summary>asked before</summary>{rows}</details>'


def mark_note(record: dict[str, Any]) -> str:
    """A record's mark as a line of HTML; "" if it has none."""
    sign = MARK_SIGNS.get(record.get("mark", ""), "")
    return f"<b>{sign} {escape(mark_text(record))}</b><br>" if "mark" in record else ""


def file_name(record: dict[str, Any]) -> str:
    """The name of a record's video as HTML, isolated from the writing direction of the text around it.

    With its window, and with how much of it was seen unless that is all.
    """
    window, seen = window_name(record), seen_part(record)
    name = f"<b><bdi>{escape(Path(record['video']).name)}</bdi></b>" + (window and f", {window}")
    return name + (seen and f', <span style="color:{RED}">saw only {seen}</span>')


def note(html: str, color: str = RED) -> str:
    """A warning, with a red bar at its left, or with another colour something else."""
    return f'<div style="border-left:4px solid {color};padding:3px 8px;margin:4px 0">{html}</div>'


def frames_strip(store: CaptionStore, record: dict[str, Any], max_bytes: float = math.inf) -> str:
    """The picture strip of the frames that the model saw and `store.notice`, as HTML, or why there is no strip.

    "" for a clip that was never read.

    Args:
        store: where the picture strips are.
        record: a caption record.
        max_bytes: a larger file is scaled down to this size, in bytes.
    """
    try:
        data = store.read_strip(record)
        image = Image.open(io.BytesIO(data), formats=["WEBP"])
        (width, height), scale = image.size, 1.0
        while len(data) > max_bytes and scale > 0.2:
            scale *= 0.95 * (max_bytes / len(data)) ** 0.5
            data = to_webp(image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS))
    except (OSError, ValueError) as error:
        if record.get("status") == "error" and isinstance(error.__cause__, FileNotFoundError):
            return ""
        return f'<div style="{MUTED}">no picture: {escape(str(error))}</div>'
    notice = store.notice(record)
    times = record.get("timestamps_seconds") or []
    alt = f"frames that the model saw, at {', '.join(f'{time:.3g}' for time in times)} s"
    shown = picture(data, alt, "display:block;width:100%;height:auto", (width, height))
    labels = _frame_labels(record, times)
    style = f"position:relative;width:{width}px;max-width:100%;font-size:10px;line-height:1.3;color:#fff"
    places = _label_places(len(labels), width, height)
    spans = "".join(f'<span style="{place}">{label}</span>' for label, place in zip(labels, places, strict=False))
    needs_legend = spans and (record.get("start_seconds") or "≠" in spans)
    legend = f'<div style="{MUTED}">{FRAME_LEGEND}</div>' if needs_legend else ""
    return f'<div class="frames" style="{style}">{shown}{spans}</div>{legend}{notice and note(notice)}'


def _frame_labels(record: dict[str, Any], times: Sequence[float]) -> list[str]:
    """The time in the file of each frame; before it the number that the model reads there, if that is another."""
    start = record.get("start_seconds") or 0.0
    try:
        prompt = Prompt.from_record({name: record[name] for name in ("template", "frame_numbers") if name in record})
        numbers = prompt.numbers_at(times, start)
    except ValueError:  # a record of others
        numbers = [None] * len(times)
    labels = []
    for number, time in zip(numbers, times, strict=True):
        is_time = number is None or number == round(time, 1)
        sign = "·" if number == round(time - start) else "≠"
        labels.append(f"{'' if is_time else f'{number} {sign} '}{round(time, 1):.9g} s")
    return labels


def _label_places(num_frames: int, width: int, height: int) -> list[str]:
    """Where labels stand in a picture strip of this size, as CSS; [] if it is no strip of so many frames in rows."""
    pitch = STRIP_FRAME_PIXELS + STRIP_GAP_PIXELS
    columns, rows = ((side + STRIP_GAP_PIXELS) // pitch for side in (width, height))
    if columns > STRIP_COLUMNS or not (rows - 1) * columns < num_frames <= rows * columns:
        return []
    style = f"position:absolute;background:#000a;padding:0 2px;max-width:{100 * (STRIP_FRAME_PIXELS - 6) / width:.1f}%"
    corners = [divmod(place, columns) for place in range(num_frames)]
    return [
        f"{style};left:{100 * column * pitch / width:.1f}%;"
        f"bottom:{100 * (height - row * pitch - STRIP_FRAME_PIXELS) / height:.1f}%"
        for row, column in corners
    ]


def picture(webp: bytes, alt: str, style: str = "max-width:100%", size: tuple[int, int] | None = None) -> str:
    """An inline picture as HTML; with its width and height in pixels, a page has room for it before it is decoded."""
    data = base64.b64encode(webp).decode()
    sides = f' width="{size[0]}" height="{size[1]}"' if size else ""
    return f'<img src="data:image/webp;base64,{data}" style="{style}" alt="{escape(alt)}"{sides}>'


def to_webp(image: Image.Image, quality: int = 60) -> bytes:
    """Encode a picture as WebP."""
    file = io.BytesIO()
    image.save(file, "webp", quality=quality)
    return file.getvalue()


def mark_differences(*texts: str, has_styles: bool = True) -> tuple[str, ...]:
    """Mark word by word where texts differ from the first; returns each as HTML.

    Underlined and tinted are words that the first text does not have in that place; in the first, words that no other
    text has. Case and punctuation do not count. Without `has_styles` the page has to style the `<u>` elements.
    """
    words = [re.findall(r"(\S+)(\s*)", text) for text in texts]
    normalized = [[re.sub(r"^\W+|\W+$", "", word).lower() for word, _ in row] for row in words]
    shared = [{place for place, word in enumerate(row) if not word} for row in normalized]
    for other in range(1, len(texts)):
        for place, place_in_other in _aligned(normalized[0], normalized[other]):
            shared[0].add(place)
            shared[other].add(place_in_other)
    if len(texts) == 1:
        return (escape(texts[0]),)
    tints = [ORANGE] + [SKY] * (len(texts) - 1)
    starts = [
        f'<u style="background:{tint}55;text-decoration-thickness:2px">' if has_styles else "<u>" for tint in tints
    ]
    return tuple(map(_mark, words, shared, starts))


def _mark(words: Sequence[tuple[str, str]], shared: set[int], start: str) -> str:
    """Words, each with the space after it, as HTML; those that are not shared begin with `start`, run by run."""
    html = []
    for is_shared, places in groupby(range(len(words)), shared.__contains__):
        text = "".join("".join(words[place]) for place in places)
        marked = text.rstrip()
        html.append(escape(text) if is_shared else f"{start}{escape(marked)}</u>{escape(text[len(marked) :])}")
    return "".join(html)


def _aligned(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The places of a longest common subsequence in two lists of words, the last pair first.

    Bit-parallel, after Hyyrö (2004): a bit of a row is 0 where one more word of `first` makes it longer. difflib takes
    a minute for captions of a model that repeats itself, this some milliseconds.
    """
    occurrences: dict[str, int] = {}  # a bit for each place in `first`
    for place, word in enumerate(first):
        occurrences[word] = occurrences.get(word, 0) | 1 << place
    mask = (1 << len(first)) - 1
    rows = [mask]
    for word in second:
        same = rows[-1] & occurrences.get(word, 0)
        rows.append((rows[-1] + same | rows[-1] - same) & mask)
    row, column = len(second), len(first)
    while row and column:
        if rows[row] >> column - 1 & 1:
            column -= 1
        elif rows[row - 1] >> column - 1 & 1:
            row, column = row - 1, column - 1
            yield column, row
        else:
            row -= 1
