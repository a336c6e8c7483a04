"""Show captions of one clip side by side, and the summary of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from capkit.runs import CaptionStore, CaptionStoreLike
from capkit.sweep import SweepResult
from capkit.text import escape
from capkit.video import Clip
from capkit.views.captions import (
    CaptionLike,
    as_record,
    caption_frames,
    caption_paragraph,
    facts_line,
    heading,
    of_clip,
)
from capkit.views.html import CARD, HTML, MUTED, frames_strip, mark_differences, record_text
from capkit.views.matrix import names_of, settings_of
from capkit.views.tables import table_html


def compare_captions(
    captions: Sequence[CaptionLike],
    names: Sequence[str] | None = None,
    clip: Clip | None = None,
    store: CaptionStoreLike | None = None,
) -> HTML:
    """Show captions of one clip side by side, with the words marked in which they differ from the first.

    Args:
        captions: `Caption`s, caption records or texts; the others are compared with the first. In the first, words
            that no other has are marked.
        names: a name for each; None names the settings in which they differ.
        clip: whose frames to show above.
        store: where to find the picture strip of the first record, to show instead.

    Raises:
        ValueError: no captions, or names of another number.
    """
    records = [of_clip(clip) | as_record(caption) for caption in captions]
    names = names_of([*map(settings_of, records)]) if names is None else names
    if not records or len(names) != len(records):
        raise ValueError(f"{len(records)} captions with {len(names)} names: give at least one, and a name for each")
    marked = mark_differences(*map(record_text, records))
    first = " · the first" if len(records) > 2 else ""
    columns = [
        f'<div style="min-width:0"><b dir="auto">{escape(name)}</b>{"" if place else first}'
        f"{caption_paragraph(record, text)}{facts_line(record)}</div>"
        for place, (name, record, text) in enumerate(zip(names, records, marked, strict=True))
    ]
    frames = "" if clip is None else caption_frames(records[0], clip)
    if store is not None and clip is None:
        frames = frames_strip(CaptionStore.of(store), records[0])
    grid = "display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:14px;margin:8px 0"
    legend = "Underlined: words that the first caption does not have there; in the first, words that no other has."
    legend = f'<div style="{MUTED}">{legend}</div>' if len(records) > 1 else ""
    is_shared = len({record.get("prompt") for record in records}) == 1
    return HTML(
        f'<div style="{CARD}">{heading(records[0], is_shared)}{frames}'
        f'<div style="{grid}">{"".join(columns)}</div>{legend}</div>'
    )


def show_sweep(result: SweepResult, num_clips: int = 2, num_cells: int = 6) -> HTML:
    """Show a sweep's means for each cell, and the first clips' captions side by side.

    Args:
        result: from `run_sweep`.
        num_clips, num_cells: show captions of the first so many.
    """
    table = result.to_frame()
    if not len(table):
        return HTML(f'<div style="{CARD}">a sweep without captions</div>')
    counted = table.assign(errors=table["status"].ne("ok"), cut_off=table["finish_reason"].eq("length"))
    means = counted.groupby("cell", sort=False).agg(
        captions=("status", "size"),
        errors=("errors", "sum"),
        mean_tokens=("num_tokens", "mean"),
        stopped_by_length=("cut_off", "sum"),
        mean_logprob=("mean_logprob", "mean"),
        mean_seconds=("seconds", "mean"),
    )
    cards = []
    for _, rows in list(table.groupby("clip", sort=False))[:num_clips]:
        rows = rows.drop_duplicates("cell").head(num_cells)
        cards.append(compare_captions([result.all_records[place] for place in rows.index], list(rows["cell"])).html)
    cells, clips = len(means), table["clip"].nunique()
    summary = f"{cells} cells, {clips} clips; below, the first {min(cells, num_cells)} cells of the first {len(cards)}"
    numbers = table_html(means.apply(pd.to_numeric))
    return HTML(
        f'<div style="overflow:auto">{numbers}</div><div style="{MUTED}">{summary} clips.</div>{"".join(cards)}'
    )
