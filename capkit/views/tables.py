"""Tables as static HTML: texts in full and at the left, numbers at the right."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_scalar

from capkit.text import escape
from capkit.views.html import HTML, MUTED

ROWS = 60
NO_FORMATS: Mapping[str, str] = MappingProxyType({})
WIDE_FROM, WIDTH = 40, "min-width:22em"  # columns with a text of more characters are at least so wide


def show_table(table: pd.DataFrame, limit: int = ROWS, formats: Mapping[str, str] = NO_FORMATS) -> HTML:
    """Show the first rows of a table, its texts in full, and say how many are left, or that there are none.

    Args:
        table: any; its index is shown unless it only counts rows. Missing values are left empty.
        limit: how many rows.
        formats: of columns whose numbers need another than three digits, such as {"share": "{:.0%}"}.
    """
    note = f"{len(table) - limit:,} more rows" if len(table) > limit else "" if len(table) else "no rows"
    below = f'<div style="{MUTED}">{note}</div>' if note else ""
    return HTML(f'<div style="overflow:auto">{table_html(table.head(limit), formats)}</div>{below}')


def table_html(table: pd.DataFrame, formats: Mapping[str, str] = NO_FORMATS) -> str:
    """A table as HTML that needs no style sheet, which Lab removes from untrusted notebooks; see `show_table`."""
    table = with_index(table)
    columns = [_column(str(name), table.iloc[:, place], formats) for place, name in enumerate(table.columns)]
    head, *rows = ("".join(cells) for cells in zip(*columns, strict=True)) if columns else ("",)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def with_index(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its index as its first columns, unless that only counts rows."""
    if table.index.name is None and is_numeric_dtype(table.index):
        return table
    names = [name or "" for name in table.index.names]
    return table.rename_axis(index=names).reset_index(allow_duplicates=True)


def _column(name: str, values: pd.Series, formats: Mapping[str, str]) -> list[str]:
    """The heading and the cells of a column as HTML."""
    is_text = is_bool_dtype(values) or not is_numeric_dtype(values)
    texts = [_text(value, formats.get(name)) for value in values]
    style = "vertical-align:top;" + ("text-align:left;white-space:pre-wrap" if is_text else "text-align:right")
    if max(map(len, texts), default=0) > WIDE_FROM:
        style += f";{WIDTH}"
    direction = ' dir="auto"' if is_text else ""
    return [f'<th style="{style}">{escape(name)}</th>'] + [
        f'<td{direction} style="{style}">{escape(text)}</td>' for text in texts
    ]


def _text(value: Any, form: str | None) -> str:
    if is_scalar(value) and pd.isna(value):
        return ""
    if form is not None:
        return form.format(value)
    if not isinstance(value, (float, np.floating)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
