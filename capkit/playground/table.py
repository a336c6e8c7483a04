"""A table to sort and filter, and its static form."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
import pandas as pd

from capkit.playground.kept import Kept
from capkit.runs import is_interactive
from capkit.views import HTML, table_html, with_index


def browse(table: pd.DataFrame, sort_by: str | None = None) -> widgets.Widget | HTML:
    """A table to sort and filter; static HTML where nobody can use widgets, as under papermill.

    Args:
        table: any.
        sort_by: the column that it is sorted by at first, largest first; None keeps the order.
    """
    ordered = table if sort_by is None else table.sort_values(sort_by, ascending=False)
    if not is_interactive():
        return HTML(_html(ordered))
    columns = [("as it is", None), *((str(name), name) for name in table.columns)]
    by = widgets.Dropdown(options=columns, value=sort_by, description="sort by")
    ascending = widgets.ToggleButton(value=False, description="smallest first")
    pattern = widgets.Text(placeholder="only rows with this text", continuous_update=False, description="filter")
    shown = widgets.HTML(_html(ordered))

    def update(_: Any) -> None:
        rows = table if by.value is None else table.sort_values(by.value, ascending=ascending.value)
        wanted = pattern.value.casefold()
        shown.value = _html(rows[[wanted in " ".join(map(str, row)).casefold() for row in with_index(rows).to_numpy()]])

    for control in (by, ascending, pattern):
        control.observe(update, "value")
    return Kept([widgets.HBox([by, ascending, pattern], layout={"flex_flow": "row wrap"}), shown])


def _html(table: pd.DataFrame) -> str:
    return f'<div style="overflow:auto;max-height:420px">{table_html(table)}</div>'
