"""Make the page of every caption of a sweep or a store, and of what changed between two runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from capkit.runs import RECORD_FIELDS, CaptionStore, CaptionStoreLike, Records, Where, matching
from capkit.sweep import SweepResult
from capkit.text import plural, unknown_name
from capkit.views import matrix
from capkit.views.matrix import Joined, Record
from capkit.views.page import CaptionsPage

if TYPE_CHECKING:
    import pandas as pd

CaptionsLike = SweepResult | CaptionStoreLike | Sequence[Record]
"""A sweep's result, a caption store or its path, or caption records."""


def captions_page(
    captions: CaptionsLike,
    store: CaptionStoreLike | None = None,
    baseline: str | None = None,
    columns: pd.DataFrame | None = None,
    status: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    order_by: str | None = None,
    descending: bool = False,
    limit: int | None = None,
    title: str = "Captions",
    where: Where | None = None,
) -> CaptionsPage:
    """Put captions and errors on a page, a row for each clip beside its frames; `save` writes the file.

    The settings that differ name the cells of a row. Where each caption has its own, as with a prompt for each clip,
    each has a row. Hand-edited texts replace the model's. The page needs neither the videos nor a network.

    Args:
        captions: a sweep's result, a caption store or its path, or caption records.
        store: where the picture strips are, if `captions` is no store; None for no pictures.
        baseline: name of the cell that words are compared with; None for the first one.
        columns: a row for each record, such as `describe` returns: further columns to sort and filter by.
        status: "ok" or "error"; None for both.
        min_tokens, max_tokens: bounds on the number of tokens, both inclusive; errors have none.
        order_by: field of a record, such as "mean_logprob"; records without it come last. None keeps the order.
        descending: the largest first.
        limit: only the first so many captions.
        title: of the page.
        where: columns with the values that they must have, such as {"mark": "wrong"}; see `capkit.runs.select`.

    Raises:
        ValueError: an unknown status or cell, a column or field that no record has, a limit below 1, or columns of
            other length.
    """
    records, own_store = _read(captions)
    strips = own_store if store is None else CaptionStore.of(store)
    places, criteria = matrix.choose(records, status, min_tokens, max_tokens, order_by, descending, limit)
    if columns is not None and len(columns) != len(records):
        raise ValueError(f"columns: {len(columns)} rows for {plural(len(records), 'record')}: give one for each")
    if where:
        places = places[np.isin(places, matching(records, where))]
        criteria += [f"{name} {value or 'empty'}" for name, value in where.items()]
    if isinstance(captions, SweepResult):
        places = matrix.without_repeated_requests(records, places)
        table = matrix.of_sweep(captions).at(places)
    else:  # cells stand in the order of the records, in whatever order the rows are
        in_order = np.sort(places)
        table = matrix.of_records(_at(records, in_order)).at(np.searchsorted(in_order, places))
    extra = {} if columns is None else _extra_columns(columns, places)
    chosen = _at(records, places)
    if baseline is not None and baseline not in table.names:
        raise ValueError(unknown_name("cell", baseline, table.names, "there are"))
    number = 0 if baseline is None else table.names.index(baseline)
    source = f" in {strips.path.name}" if strips else ""
    counts = [f"{len(places):,} of {len(records):,} captions{source}", matrix.count_of_rows(table), *criteria]
    is_extra = order_by is not None and order_by not in ("video", "text", "prompt", "num_tokens", "status", "error")
    extra_field = order_by if is_extra else None
    stores = [strips] * len(table.names)
    return CaptionsPage(chosen, table, stores, extra, number, title, "; ".join(filter(None, counts)), extra_field)


def compare_runs(old: CaptionsLike, new: CaptionsLike, title: str = "What changed") -> CaptionsPage:
    """Put the captions of two runs side by side: which were added, removed or changed, and in which words.

    Captions are of the same thing if clip, frames, prompt and decoding are the same, whatever the model. A setting with
    one value in all of the old run and another one in all of the new does not keep captions apart, and is named. Clips
    are told apart by their paths; by file name if the runs have no path in common. The page filters by `change`.

    Args:
        old, new: a caption store or its path, a sweep's result or records; only stores have frames to show.
        title: of the page.
    """
    (before, old_store), (after, new_store) = _read(old), _read(new)
    where, changes, summary = matrix.of_two_runs(before, after)
    records = Joined(before, after)
    columns = {"change": changes}
    return CaptionsPage(records, where, (old_store, new_store), columns, 0, title, summary, first_filter="change")


def _read(captions: CaptionsLike) -> tuple[Sequence[Record], CaptionStore | None]:
    """The records, and the store that they are from, if they are."""
    if isinstance(captions, SweepResult):
        return captions.all_records, None
    if isinstance(captions, (str, os.PathLike, CaptionStore)):
        store = CaptionStore.of(captions)
        return store.current(), store
    return captions, None


def _at(records: Sequence[Record], places: matrix.Places) -> Sequence[Record]:
    return records.at(places) if isinstance(records, Records) else [records[place] for place in places]


def _extra_columns(table: pd.DataFrame, places: matrix.Places) -> dict[str, Sequence[Any]]:
    """The columns that records do not have themselves, of the records at some places, in plain JSON values."""
    own = {*RECORD_FIELDS, "cell", "cell_number", "clip", "edited_text"}
    rows = table.iloc[places]
    return {
        str(name): rows[name].astype(object).where(rows[name].notna(), None).tolist()
        for name in table.columns
        if name not in own
    }
