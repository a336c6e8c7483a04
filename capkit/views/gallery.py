"""Captions of a store as HTML pages, made from its picture strips alone: no video is opened."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from capkit.files import write_page
from capkit.runs import RECORD_FIELDS, CaptionStore, CaptionStoreLike, Records, Where, select
from capkit.text import escape
from capkit.views.html import MUTED, card, frames_strip

CAPTIONS_ON_A_PAGE = 1000
STRIP_BYTES = 19_000  # larger picture strips are scaled down, so that a page stays under 30 MB
SHOWN_IN_NOTEBOOK = 20
STATUSES = ("ok", "error")
FIELDS_ON_CARDS = ("video", "text", "prompt", "num_tokens", "status", "error")


@dataclass(frozen=True)
class Gallery:
    """Captions beside their frames; a notebook shows the first 20 of them, `save` writes all, 1,000 to a page.

    Attributes:
        store: where the picture strips are.
        records: the chosen ones, in order, read from the store when they are used.
        title: of the page.
        summary: how they were chosen.
        extra_field: a field of the records to print on the cards, or None.
    """

    store: CaptionStore
    records: Records = field(repr=False)
    title: str
    summary: str
    extra_field: str | None

    def _repr_html_(self) -> str:
        rest = len(self.records) - SHOWN_IN_NOTEBOOK
        more = f"<p>{rest} more on the full page: <code>.save(path)</code></p>" if rest > 0 else ""
        cards = "".join(map(self._card, self.records[:SHOWN_IN_NOTEBOOK]))
        return f"<b>{escape(self.title)}</b>{self._heading()}{cards}{more}"

    def save(self, path: str | os.PathLike) -> Path:
        """Write all captions and pictures, 1,000 to a page; returns the path of the first page.

        Further pages are `<name>.page2.html` and so on, beside the first; those that an earlier gallery of more
        captions left there are deleted.
        """
        first = Path(path).expanduser()
        starts = range(0, max(len(self.records), 1), CAPTIONS_ON_A_PAGE)
        with ThreadPoolExecutor() as pool:  # scaling picture strips down takes time
            for number in range(len(starts), 0, -1):  # the first page last: all it leads to is there
                on_page = self.records[starts[number - 1] :][:CAPTIONS_ON_A_PAGE]
                cards = "\n".join(f"<article>{html}</article>" for html in pool.map(self._card, on_page))
                links = _links(first, number, len(starts))
                write_page(_page(first, number), self.title, f"{self._heading()}{links}\n{cards}{links}")
        number = len(starts) + 1
        while (left := _page(first, number)).is_file():
            left.unlink()
            number += 1
        return first

    def _heading(self) -> str:
        return f'<p style="{MUTED}">{escape(self.summary)}</p>'

    def _card(self, record: dict[str, Any]) -> str:
        return card(record, frames_strip(self.store, record, STRIP_BYTES), self.extra_field)


def write_gallery(
    store: CaptionStoreLike,
    status: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    order_by: str | None = None,
    descending: bool = False,
    limit: int | None = None,
    title: str = "Captions",
    where: Where | None = None,
) -> Gallery:
    """Put a store's captions and errors on HTML pages, each beside its frames; `save` writes the files.

    Args:
        store: a `CaptionStore` or its path. Its picture strips are shown; the videos need not exist. Hand-edited texts
            replace the model's.
        status: "ok" or "error"; None for both.
        min_tokens, max_tokens: bounds on the number of tokens, both inclusive; errors have none.
        order_by: field of a record, such as "mean_logprob"; records without it come last. None keeps the store's order.
        descending: the largest first.
        limit: only the first so many.
        title: of the page.
        where: columns with the values that they must have, such as {"mark": "wrong"}; see `capkit.runs.select`.

    Raises:
        ValueError: an unknown status, a column or field that no record has, or a limit below 1.
    """
    if status not in (None, *STATUSES):
        raise ValueError(f"status={status!r}: must be 'ok', 'error' or None for both")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: must be at least 1, or None for all")
    criteria = [f"status {status}"] if status else []
    criteria += [] if min_tokens is None else [f"at least {min_tokens} tokens"]
    criteria += [] if max_tokens is None else [f"at most {max_tokens} tokens"]
    store = CaptionStore.of(store)
    everything = store.current()
    records = select(everything, where)
    criteria += [f"{name} {value or 'empty'}" for name, value in (where or {}).items()]
    chosen: list[tuple[Any, int]] = []  # what to order by, and the place
    lacking: list[int] = []  # places of records without it
    fields: dict[str, None] = {}
    for place, record in enumerate(records):
        fields |= dict.fromkeys(record)
        num_tokens = record.get("num_tokens")
        if status not in (None, record["status"]) or not _is_within(num_tokens, min_tokens, max_tokens):
            continue
        value = None if order_by is None else record.get(order_by)
        if order_by is not None and value is None:
            lacking.append(place)
        else:
            chosen.append((_sort_key(value), place))
    if order_by is not None:
        fields = dict.fromkeys([*RECORD_FIELDS, *fields])
        if order_by not in fields:
            raise ValueError(f"order_by={order_by!r}: no record has it; there are {', '.join(fields)}")
        chosen.sort(key=lambda pair: pair[0], reverse=descending)
        criteria.append(f"by {order_by}, {'largest' if descending else 'smallest'} first")
    places = [*(place for _, place in chosen), *lacking][:limit]
    summary = "; ".join([f"{len(places)} of {len(everything)} captions in {store.path.name}", *criteria])
    is_extra = order_by is not None and order_by not in FIELDS_ON_CARDS
    return Gallery(store, records.at(places), title, summary, order_by if is_extra else None)


def _is_within(num_tokens: int | None, min_tokens: int | None, max_tokens: int | None) -> bool:
    if num_tokens is None:
        return min_tokens is None and max_tokens is None
    return (min_tokens is None or num_tokens >= min_tokens) and (max_tokens is None or num_tokens <= max_tokens)


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, texts alphabetically, everything else as JSON; texts by their first 100 characters."""
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, 0, (value.casefold() if isinstance(value, str) else json.dumps(value, sort_keys=True))[:100]


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
    return f"<p>page {number:,} of {num_pages:,}: {' · '.join(links)}</p>"
