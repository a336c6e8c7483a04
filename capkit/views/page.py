"""Every caption of a sweep, a store or two runs on one page: a matrix to search, sort and filter in any browser.

Libraries' tables (DataTables with itables, Tabulator) hold one value a cell, and add 0.6 MB of script to each page.
Here a cell holds captions with a dozen values each, a page shows all without its script, and 200 lines do the rest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from capkit.files import atomic_write
from capkit.runs import MARK_FIELDS, RECORD_FIELDS, CaptionStore
from capkit.text import escape, without_controls
from capkit.views import matrix
from capkit.views.html import (
    MUTED,
    caption_facts,
    card,
    error_text,
    file_name,
    frames_strip,
    mark_differences,
    mark_note,
    record_text,
    steps_html,
)
from capkit.views.matrix import Matrix, Record
from capkit.views.sweeps import compare_captions

ROWS_ON_A_PAGE = 1000
STRIP_BYTES = 26_000  # of a row; larger picture strips are scaled down, so that 1,000 rows of 8 cells stay under 60 MB
CARDS_IN_NOTEBOOK, ROWS_IN_NOTEBOOK = 20, 5
CELL_PIXELS = 230  # at least
NO_COLUMNS = (
    *("request", "strip", "text", "edited_text", "video_sha256"),
    *("frame_indices", "timestamps_seconds", "only_frames"),
)
SHOWN_FIELDS = (
    *RECORD_FIELDS,
    *MARK_FIELDS,
    "steps",
    "step_answers",
    "edited_text",
    "reference",
    "only_frames",
    "is_row_error",
)  # others are printed under the caption

# The content security policy forbids network access, and all scripts but this page's own, whatever captions contain.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<title>{title}</title><style>{css}</style></head>
<body class="{kind}" style="--cells:{num_cells};--cell:{cell_pixels}px"><header>
<div class="bar"><h1>{title}</h1><p>{summary}</p>{links}<div id="tools"></div></div>
<div class="row headings" role="row"><b class="clip" role="columnheader">clip</b>{headings}</div></header>
<main role="table">
{rows}
</main>{links}
<script type="application/json" id="columns">{columns}</script><script>{script}</script></body></html>
"""


class _Caption(NamedTuple):
    """A record where it stands, with further values for its columns."""

    record: Record
    more: Record


_Row = list[list[_Caption]]  # the captions of each cell


def page_path(path: str | os.PathLike[str]) -> Path:
    """Where a page goes. Raises ValueError unless it ends as a page does, so that no store or clip is overwritten."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: is no name of a page; let it end in .html")
    return path


@dataclass(frozen=True)
class CaptionsPage:
    """Captions beside their frames, a row for each clip and a cell for each combination of settings.

    A notebook shows the first rows; `save` writes all, as pages to search, sort and filter, 1,000 rows to a page.

    Attributes:
        records: the chosen ones, in order, read from the store when they are used.
        matrix: where each stands.
        stores: of each cell, where its picture strips are; None for no pictures.
        columns: further values for the records, by name.
        baseline: number of the cell that words are compared with.
        title, summary: of the page.
        extra_field: a field of the records to print below the captions, or None.
        first_filter: the column that the page offers to filter by at first, or None.
    """

    records: Sequence[Record] = field(repr=False)
    matrix: Matrix = field(repr=False)
    stores: Sequence[CaptionStore | None]
    columns: Mapping[str, Sequence[Any]] = field(repr=False)
    baseline: int
    title: str
    summary: str
    extra_field: str | None = None
    first_filter: str | None = None

    def _repr_html_(self) -> str:
        is_list = len(self.matrix.names) == 1
        num_rows = min(self.matrix.num_rows, CARDS_IN_NOTEBOOK if is_list else ROWS_IN_NOTEBOOK)
        rest = self.matrix.num_rows - num_rows
        more = f"<p>{rest:,} more on the full page: <code>.save(path)</code></p>" if rest > 0 else ""
        shown = (self._cards(row) if is_list else self._comparison(row) for row in self._rows(range(num_rows)))
        return f'<b>{escape(self.title)}</b><p style="{MUTED}">{escape(self.summary)}</p>{"".join(shown)}{more}'

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all captions and pictures, 1,000 rows to a page; returns the path of the first page.

        Further pages are `<name>.page2.html` and so on, beside the first; those that an earlier page of more captions
        left there are deleted.

        Raises:
            ValueError: as `page_path` does.
        """
        first = page_path(path)
        starts = range(0, max(self.matrix.num_rows, 1), ROWS_ON_A_PAGE)
        with ThreadPoolExecutor() as pool:  # scaling picture strips down takes time
            for number in range(len(starts), 0, -1):  # the first page last: all it leads to is there
                rows = range(starts[number - 1], min(starts[number - 1] + ROWS_ON_A_PAGE, self.matrix.num_rows))
                links = _links(first, number, len(starts))
                atomic_write(_page(first, number), self._html([*pool.map(self._row, self._rows(rows))], links))
        number = len(starts) + 1
        while (left := _page(first, number)).is_file():
            left.unlink()
            number += 1
        return first

    def _html(self, rows: Sequence[tuple[str, list[Record]]], links: str) -> str:
        package = files("capkit.views")
        css, script = (package.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
        values = [flat for _, of_row in rows for flat in of_row]
        names = dict.fromkeys(name for flat in values for name in flat)
        columns = {name: [flat.get(name) for flat in values] for name in names}
        columns = {name: column for name, column in columns.items() if any(value != column[0] for value in column)}
        data = {
            "columns": columns,
            "filter": self.first_filter,
            "cells": [without_controls(n) for n in self.matrix.names],
        }
        return _PAGE.format(
            title=escape(self.title),
            css=css,
            script=script,
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            summary=escape(self.summary),
            links=links,
            kind="one" if len(self.matrix.names) == 1 else "",
            num_cells=len(self.matrix.names),
            cell_pixels=CELL_PIXELS,
            headings="".join(map(self._heading, range(len(self.matrix.names)))),
            rows="\n".join(html for html, _ in rows),
            columns=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        )

    def _rows(self, rows: range) -> Iterable[_Row]:
        for places in self.matrix.places(rows):
            row: _Row = [[] for _ in self.matrix.names]
            for place in places.tolist():
                more = {name: column[place] for name, column in self.columns.items()}
                row[self.matrix.cells[place]].append(_Caption(self.records[place], more))
            yield row

    def _heading(self, cell: int) -> str:
        """The name of a cell, with all settings of its first caption to unfold."""
        places = np.flatnonzero(self.matrix.cells == cell)[:1].tolist()
        settings = matrix.settings_of(self.records[places[0]], matrix.REPEATS) if places else {}
        listed = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in settings.items())
        mark = " <small>baseline</small>" if cell == self.baseline and len(self.matrix.names) > 1 else ""
        return (
            f'<div class="cell c{cell}" role="columnheader"><b dir="auto">{escape(self.matrix.names[cell])}</b>{mark}'
            f"<details><summary>settings</summary><ul>{listed}</ul></details></div>"
        )

    # ---- a row -----------------------------------------------------------------------------------------------------

    def _row(self, row: _Row) -> tuple[str, list[Record]]:
        """A row as HTML, and the values of its captions' columns, in order."""
        marked = self._marked(row)
        values: list[Record] = []
        cells = []
        for number, captions in enumerate(row):
            parts = []
            for caption in captions:
                text, num_changed = marked[len(values)]
                parts.append(self._caption(caption.record, text, len(captions) > 1))
                values.append(_values(caption, num_changed if number != self.baseline else None))
            content = "".join(parts) or '<p class="none">no caption</p>'
            kind = " baseline" if number == self.baseline else ""
            cells.append(f'<div class="cell c{number}{kind}" role="cell">{content}</div>')
        first = next(captions[0].record for captions in row if captions)
        head = (
            f'<div class="clip" role="rowheader"><div class="name">{self._head(first)}</div>{self._frames(row)}</div>'
        )
        return f'<div class="row" role="row">{head}{"".join(cells)}</div>', values

    def _head(self, record: Record) -> str:
        name = matrix.name_settings(matrix.settings_of(record), self.matrix.varying)
        if not self.matrix.varying and len(self.matrix.names) == 1:
            name = record.get("prompt") or ""
        return f'{file_name(record)} <span dir="auto">{escape(name)}</span>'

    def _frames(self, row: _Row) -> str:
        """The picture strips of a row, one for each frame sampling; of two runs the later one's."""
        strips: dict[str, tuple[CaptionStore, Record]] = {}
        for store, captions in zip(self.stores, row, strict=True):
            for record, _ in captions:
                sampling = matrix.name_settings(record.get("frame_sampling") or {}, matrix.SAMPLING)
                if store is not None and (record["status"] == "ok" or sampling not in strips):
                    strips[sampling] = store, record
        each = [
            (f"<small>{escape(sampling)}</small>" if len(strips) > 1 else "")
            + frames_strip(store, record, STRIP_BYTES / len(strips))
            for sampling, (store, record) in strips.items()
        ]
        # Left to load when they come into view: a page of 1,000 then opens in two thirds of the time.
        return "".join(each).replace("<img ", '<img loading="lazy" decoding="async" ')

    def _marked(self, row: _Row) -> list[tuple[str, int]]:
        """Each caption's text as HTML, words that the baseline lacks marked; how many these are."""
        records = [caption.record for captions in row for caption in captions]
        texts = [_text(record) for record in records]
        html = [(escape(text), 0) for text in texts]
        start = sum(map(len, row[: self.baseline]))
        first = next((place for place in range(start, start + len(row[self.baseline])) if texts[place]), None)
        others = [place for place, text in enumerate(texts) if text and place != first]
        if first is not None and others:
            places = [first, *others]
            all_marked = mark_differences(*(texts[place] for place in places), has_styles=False)
            for place, marked in zip(places, all_marked, strict=True):
                html[place] = marked, sum(len(run.split()) for run in re.findall("<u>(.*?)</u>", marked, re.DOTALL))
        return html

    def _caption(self, record: Record, text: str, is_repeat: bool) -> str:
        is_edited, error = "edited_text" in record, error_text(record)
        facts = [caption_facts(record)] if not error else ["<b>✎ edited by hand</b>"] if is_edited else []
        facts += [f"sample {record.get('sample')}"] if is_repeat else []
        names = dict.fromkeys(name for name in record if name not in SHOWN_FIELDS or name == self.extra_field)
        values = {name: _plain(record.get(name)) for name in names}
        facts += [escape(f"{name}: {value}") for name, value in values.items() if value not in (None, "")]
        parts = [mark_note(record), f'<p dir="auto">{text}</p>' if text else "", steps_html(record)]
        parts += [f'<p class="why">{error}</p>'] if error else []
        if is_edited and not error:
            own = f'<p dir="auto">{escape((record["text"] or "").strip())}</p>'
            parts.append(f"<details><summary>the model's caption</summary>{own}</details>")
        kind = " edited" if is_edited else " error" if error else ""
        return f'<div class="caption{kind}">{"".join(parts)}<small>{"; ".join(filter(None, facts))}</small></div>'

    # ---- in a notebook ---------------------------------------------------------------------------------------------

    def _cards(self, row: _Row) -> str:
        store = self.stores[0]
        return "".join(
            card(record, frames_strip(store, record, STRIP_BYTES) if store else "", self.extra_field)
            for captions in row
            for record, _ in captions
        )

    def _comparison(self, row: _Row) -> str:
        order = [self.baseline, *(cell for cell in range(len(row)) if cell != self.baseline)]
        captions = [(cell, record) for cell in order for record, _ in row[cell]]
        names = [self.matrix.names[cell] for cell, _ in captions]
        store = next((store for store in self.stores if store), None)
        return compare_captions([record for _, record in captions], names, store=store).html


def _values(caption: _Caption, num_changed: int | None) -> Record:
    """What a page can sort and filter a caption by; controls are seen, and only numbers are no text."""
    record = caption.record
    flat: Record = {"clip": Path(record["video"]).name}
    flat |= {name: value for name, value in matrix.flatten(record).items() if name not in NO_COLUMNS}
    flat |= {"edited": "yes" if "edited_text" in record else "no", "words that differ": num_changed} | caption.more
    return {without_controls(name): _plain(value) for name, value in flat.items()}


def _plain(value: Any) -> Any:
    """A number or None as it is, everything else as text with controls seen."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return without_controls(str(value))


def _text(record: Record) -> str:
    return record_text(record) if "edited_text" in record or record["status"] == "ok" else ""


def _page(first: Path, number: int) -> Path:
    return first if number == 1 else first.with_name(f"{first.stem}.page{number}{first.suffix}")


def _links(first: Path, number: int, num_pages: int) -> str:
    """Links from a page to others as HTML; "" if it is the only one."""
    if num_pages == 1:
        return ""
    others = {"first": 1, "previous": number - 1, "next": number + 1, "last": num_pages}
    links = [
        f'<a href="{quote(os.fsencode(_page(first, other).name))}">{name}</a>'
        for name, other in others.items()
        if other != number and 1 <= other <= num_pages
    ]
    where = f"page {number:,} of {num_pages:,}, each searched and filtered by itself"
    return f"<p>{where}: {' · '.join(links)}</p>"
