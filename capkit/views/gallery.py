"""Captions of a store as one HTML page, made from its picture strips alone: no video is opened."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from capkit.files import write_page
from capkit.runs import RECORD_FIELDS, CaptionStore
from capkit.views.html import MUTED, card, frames_strip

STRIP_BYTES = 19_000  # larger picture strips are scaled down, so that a page of 1000 stays under 30 MB
SHOWN_IN_NOTEBOOK = 20
STATUSES = ("ok", "error")
FIELDS_ON_CARDS = ("video", "text", "prompt", "num_tokens", "status", "error")


@dataclass(frozen=True)
class Gallery:
    """Captions beside their frames; a notebook shows the first 20 of them, `save` writes all to one file.

    Attributes:
        store: where the picture strips are.
        records: the chosen ones, in order.
        title: of the page.
        summary: how they were chosen.
        extra_field: a field of the records to print on the cards, or None.
    """

    store: CaptionStore
    records: list[dict[str, Any]] = field(repr=False)
    title: str
    summary: str
    extra_field: str | None

    def _repr_html_(self) -> str:
        rest = len(self.records) - SHOWN_IN_NOTEBOOK
        more = f"<p>{rest} more on the full page: <code>.save(path)</code></p>" if rest > 0 else ""
        cards = "".join(map(self._card, self.records[:SHOWN_IN_NOTEBOOK]))
        return f"<b>{escape(self.title)}</b>{self._heading()}{cards}{more}"

    def save(self, path: str | os.PathLike) -> Path:
        """Write one page with all captions and pictures; returns its path."""
        with ThreadPoolExecutor() as pool:  # scaling picture strips down takes time
            cards = "\n".join(f"<article>{html}</article>" for html in pool.map(self._card, self.records))
        return write_page(Path(path).expanduser(), self.title, f"{self._heading()}\n{cards}")

    def _heading(self) -> str:
        return f'<p style="{MUTED}">{escape(self.summary)}</p>'

    def _card(self, record: dict[str, Any]) -> str:
        return card(record, frames_strip(self.store, record, STRIP_BYTES), self.extra_field)


def write_gallery(
    store: CaptionStore,
    status: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    order_by: str | None = None,
    descending: bool = False,
    limit: int | None = None,
    title: str = "Captions",
) -> Gallery:
    """Put a store's captions and errors on one HTML page, each beside its frames; `save` writes the file.

    Args:
        store: its picture strips are shown; the videos need not exist. Hand-edited texts replace the model's.
        status: "ok" or "error"; None for both.
        min_tokens, max_tokens: bounds on the number of tokens, both inclusive; errors have none.
        order_by: field of a record, such as "mean_logprob"; records without it come last. None keeps the store's order.
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
    records = store.current()
    chosen = [record for record in records if status in (None, record["status"])]
    criteria = [f"status {status}"] if status else []
    if min_tokens is not None or max_tokens is not None:
        chosen = [record for record in chosen if record["num_tokens"] is not None]
    if min_tokens is not None:
        chosen = [
            record for record in chosen if record["num_tokens"] is not None and record["num_tokens"] >= min_tokens
        ]
        criteria.append(f"at least {min_tokens} tokens")
    if max_tokens is not None:
        chosen = [
            record for record in chosen if record["num_tokens"] is not None and record["num_tokens"] <= max_tokens
        ]
        criteria.append(f"at most {max_tokens} tokens")
    if order_by is not None:
        fields = dict.fromkeys([*RECORD_FIELDS, *(name for record in records for name in record)])
        if order_by not in fields:
            raise ValueError(f"order_by={order_by!r}: no record has it; there are {', '.join(fields)}")
        chosen.sort(key=lambda record: _sort_key(record.get(order_by)), reverse=descending)
        chosen.sort(key=lambda record: record.get(order_by) is None)
        criteria.append(f"by {order_by}, {'largest' if descending else 'smallest'} first")
    summary = "; ".join([f"{len(chosen[:limit])} of {len(records)} captions in {store.path.name}", *criteria])
    is_extra = order_by is not None and order_by not in FIELDS_ON_CARDS
    return Gallery(store, chosen[:limit], title, summary, order_by if is_extra else None)


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, texts alphabetically, everything else as JSON."""
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, 0, value.casefold() if isinstance(value, str) else json.dumps(value, sort_keys=True)
