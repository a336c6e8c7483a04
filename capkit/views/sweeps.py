"""Captions of one clip side by side, and a sweep in short."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from capkit.captioning import Caption
from capkit.runs import CaptionStore
from capkit.video import Clip
from capkit.views.captions import (
    caption_facts,
    caption_frames,
    caption_heading,
    caption_text,
    field_of,
    not_captioned,
    paragraph,
    prompt_of,
)
from capkit.views.html import CARD, HTML, MUTED, mark_all_differences, picture

SETTINGS = ("model", "prompt", "template", "frame_numbers", "frame_sampling", "decoding", "history", "sample")


def compare_captions(
    captions: Sequence[Caption | dict[str, Any] | str],
    names: Sequence[str] | None = None,
    clip: Clip | None = None,
    store: CaptionStore | None = None,
) -> HTML:
    """Captions of one clip side by side; words that the first does not have in that place are underlined and tinted.

    Args:
        captions: `Caption`s, caption records or texts; the first is what the others are compared with. In it, words
            that no other has are marked.
        names: what they are called; None names the settings in which they differ.
        clip: whose frames to show above.
        store: where the first record's picture strip is, to show instead.

    Raises:
        ValueError: no captions, or names of another number.
    """
    names = _differing_settings(captions) if names is None else names
    if not captions or len(names) != len(captions):
        raise ValueError(
            f"{len(captions)} captions with {len(names)} names: there must be one or more, and as many names"
        )
    marked = mark_all_differences([caption_text(caption) for caption in captions])
    columns = [
        f'<div style="min-width:0"><b dir="auto">{escape(name)}</b>{" · the first" if not place else ""}'
        f"{not_captioned(caption) or paragraph(told)}{caption_facts(caption)}</div>"
        for place, (name, caption, told) in enumerate(zip(names, captions, marked, strict=True))
    ]
    frames = "" if clip is None else caption_frames(captions[0], clip)
    if store is not None and clip is None and (path := store.strip_path(captions[0])).exists():
        frames = picture(path.read_bytes(), "frames that the model saw")
    legend = "Underlined: words that the first caption does not have there; in the first, words that no other has."
    grid = "display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:14px;margin:8px 0"
    explained = f'<div style="{MUTED}">{legend}</div>' if len(captions) > 1 else ""
    shared = len({prompt_of(caption) for caption in captions}) == 1
    return HTML(
        f'<div style="{CARD}">{caption_heading(captions[0], shared)}{frames}'
        f'<div style="{grid}">{"".join(columns)}</div>{explained}</div>'
    )


def show_sweep(result: Any, num_clips: int = 2, num_cells: int = 6) -> HTML:
    """A sweep in short: a line for each cell, and the first clips' captions side by side.

    Args:
        result: a `SweepResult`.
        num_clips, num_cells: show captions of the first so many.
    """
    table = result.to_frame()
    if not len(table):
        return HTML(f'<div style="{CARD}">a sweep without captions</div>')
    ok = table["status"].eq("ok")
    numbers = table.assign(errors=~ok, cut_off=table["finish_reason"].eq("length"))
    means = numbers.groupby("cell", sort=False).agg(
        captions=("status", "size"),
        errors=("errors", "sum"),
        mean_tokens=("num_tokens", "mean"),
        stopped_by_length=("cut_off", "sum"),
        mean_logprob=("mean_logprob", "mean"),
        mean_seconds=("seconds", "mean"),
    )
    cards = []
    for _, rows in list(table.groupby("video", sort=False))[:num_clips]:
        rows = rows.drop_duplicates("cell").head(num_cells)
        cards.append(compare_captions([result.all_records[place] for place in rows.index], list(rows["cell"])).html)
    cells, clips = len(means), table["video"].nunique()
    rest = (
        f"{cells} cells, {clips} clips; below, the first {min(cells, num_cells)} cells of the first {len(cards)} clips."
    )
    shown = means.apply(pd.to_numeric).to_html(float_format="{:.3g}".format, na_rep="", border=0)
    return HTML(f'<div style="overflow:auto">{shown}</div><div style="{MUTED}">{rest}</div>{"".join(cards)}')


def _differing_settings(captions):
    """What sets captions apart in words, such as their prompts; by number where nothing does."""
    rows = []
    for caption in captions:
        prompt = prompt_of(caption)
        settings = {"model": field_of(caption, "model"), **(prompt.to_record() if prompt else {})}
        settings |= {name: field_of(caption, name) for name in ("frame_sampling", "decoding", "sample")}
        rows.append([str(settings.get(name)) for name in SETTINGS])
    differing = [column for column in range(len(SETTINGS)) if len({row[column] for row in rows}) > 1]
    names = [", ".join(row[column] for column in differing) for row in rows]
    if len(set(names)) < len(names) or not differing:
        return [f"{number}. {name}".rstrip(". ") for number, name in enumerate(names, 1)]
    return names
