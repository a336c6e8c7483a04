"""All captions of a store on one page, from its picture strips: no video is opened, nothing is fetched."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from capkit.files import write_page
from capkit.runs import CaptionStore
from capkit.views.html import HTML, MUTED, card, picture, to_webp

STRIP_BYTES = 19_000  # a larger strip is made smaller, so that 1000 of them stay under 30 MB as text
SHOWN_IN_NOTEBOOK = 20
STATUSES = ("ok", "error")


class Gallery(HTML):
    """Captions beside their frames; a notebook shows the first 20 of them, `save` writes all to one file.

    Attributes:
        records: those chosen, in order.
    """

    def __init__(
        self, store: CaptionStore, records: Sequence[dict[str, Any]], title: str, told: str, column: str | None
    ):
        self.store, self.records, self.title, self.told, self.column = store, list(records), title, told, column

    @property
    def html(self) -> str:
        """The first captions, for a notebook."""
        rest = len(self.records) - SHOWN_IN_NOTEBOOK
        more = f"<p>{rest} more on the whole page: <code>.save(path)</code></p>" if rest > 0 else ""
        heading = f"<b>{escape(self.title)}</b>{self._heading()}"
        return heading + "".join(map(self._card, self.records[:SHOWN_IN_NOTEBOOK])) + more

    def save(self, path: str | os.PathLike) -> Path:
        """Write one page with all of them, pictures included; returns where it is."""
        with ThreadPoolExecutor() as pool:  # making strips smaller takes time
            cards = "\n".join(f"<article>{one}</article>" for one in pool.map(self._card, self.records))
        return write_page(Path(path).expanduser(), self.title, f"{self._heading()}\n{cards}")

    def _heading(self):
        return f'<p style="{MUTED}">{escape(self.told)}</p>'

    def _card(self, record):
        return card(record, frames_strip(self.store, record), [self.column] if self.column else [])


def gallery(
    store: CaptionStore,
    status: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    order_by: str | None = None,
    descending: bool = False,
    limit: int | None = None,
    title: str = "Captions",
) -> Gallery:
    """The captions of a store beside the frames that the model saw, errors among them in words.

    Texts edited by hand go before the model's, and are marked.

    Args:
        store: the caption store; its strips are shown, its videos need not be there.
        status: only "ok" or only "error"; None for both.
        min_tokens, max_tokens: only captions with so many new tokens, both included; errors have none.
        order_by: a field of the records, such as "num_tokens", "mean_logprob" or "video"; records without it come last.
            None leaves them in the order in which they were asked for.
        descending: the largest first.
        limit: only the first so many.
        title: of the page.

    Raises:
        ValueError: an unknown status, a field that no record has, or a limit below 1.
    """
    if status not in (None, *STATUSES):
        raise ValueError(f"status={status!r}: must be 'ok', 'error' or None for both")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: must be at least 1, or None for all")
    every = store.current()
    chosen = [record for record in every if status in (None, record["status"])]
    if min_tokens is not None or max_tokens is not None:
        least, most = min_tokens or 0, float("inf") if max_tokens is None else max_tokens
        chosen = [one for one in chosen if one["num_tokens"] is not None and least <= one["num_tokens"] <= most]
    if order_by is not None:
        fields = dict.fromkeys(name for record in every for name in record)
        if every and order_by not in fields:
            raise ValueError(f"order_by={order_by!r}: no record has it; there are {', '.join(fields)}")
        known = [record for record in chosen if record.get(order_by) is not None]
        known.sort(key=lambda record: _sortable(record[order_by]), reverse=descending)
        chosen = known + [record for record in chosen if record.get(order_by) is None]
    shown = chosen[:limit]
    told = [f"{len(shown)} of {len(every)} captions in {store.path.name}"]
    told += [f"status {status}"] if status else []
    told += [f"at least {min_tokens} tokens"] if min_tokens is not None else []
    told += [f"at most {max_tokens} tokens"] if max_tokens is not None else []
    told += [f"by {order_by}, {'largest' if descending else 'smallest'} first"] if order_by else []
    column = None if order_by in ("video", "text", "prompt", "num_tokens", "status", "error") else order_by
    return Gallery(store, shown, title, "; ".join(told), column)


def _sortable(value):
    """Numbers by size, texts by the alphabet, everything else as it is written."""
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, 0, value.casefold() if isinstance(value, str) else json.dumps(value, sort_keys=True)


def frames_strip(store, record):
    """A record's picture strip, made smaller where it is large; nothing where it is missing or damaged."""
    try:
        data = store.strip_path(record).read_bytes()
        image = Image.open(io.BytesIO(data))
        (width, height), scale = image.size, 1.0
        while len(data) > STRIP_BYTES and scale > 0.2:
            scale *= 0.95 * (STRIP_BYTES / len(data)) ** 0.5
            data = to_webp(image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS))
    except OSError:
        return ""
    return picture(data, "frames that the model saw", f"width:{width}px;max-width:100%") + "<br>"
