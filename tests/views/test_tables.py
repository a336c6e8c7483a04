"""Tables: texts in full and at the left, numbers at the right, nothing that Lab removes."""

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest

from capkit.views import show_table

LONG = "A very long text that goes on and on. " * 20


def cells(html):
    """Rows of (style, text); the first is the heading."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    cell = re.compile(r'<t[hd](?: dir="auto")? style="([^"]*)">(.*?)</t[hd]>', re.DOTALL)
    return [[(style, unescape(text)) for style, text in cell.findall(row)] for row in rows]


def test_texts_are_in_full_at_the_left_and_numbers_at_the_right():
    table = pd.DataFrame(
        {"text": [LONG, "<b>"], "count": [1, 20_000], "share": [0.12345, 1234.5], "flag": [True, False]}
    )
    heading, first, second = cells(show_table(table)._repr_html_())
    assert [text for _, text in heading] == ["text", "count", "share", "flag"]
    assert [text for _, text in first] == [LONG, "1", "0.123", "True"]
    assert [text for _, text in second] == ["<b>", "20000", "1,234", "False"]
    for row in (heading, first, second):
        assert [re.search("text-align:(left|right)", style)[1] for style, _ in row] == [
            "left",
            "right",
            "right",
            "left",
        ]
    assert "min-width" in first[0][0] and not any("min-width" in style for style, _ in first[1:])


def test_an_index_is_a_column_where_it_names_rows():
    table = pd.DataFrame({"words": [1, 2]})
    assert [text for _, text in cells(show_table(table)._repr_html_())[0]] == ["words"]
    named = table.set_axis(pd.Index([f"{LONG}1", f"{LONG}2"], name="cell"))
    heading, first, _ = cells(show_table(named)._repr_html_())
    assert [text for _, text in heading] == ["cell", "words"] and first[0][1] == f"{LONG}1"
    pairs = table.set_axis(pd.MultiIndex.from_tuples([("a", 1), ("a", 2)], names=["stage", "place"]))
    assert [text for _, text in cells(show_table(pairs)._repr_html_())[2]] == ["a", "2", "2"]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_what_is_missing_is_empty(missing):
    table = pd.DataFrame({"value": pd.Series([missing, "there"], dtype=object)})
    assert [row[0][1] for row in cells(show_table(table)._repr_html_())] == ["value", "", "there"]


def test_formats_are_of_columns():
    table = pd.DataFrame({"share": [0.5, None], "other": [0.5, None]})
    assert [text for _, text in cells(show_table(table, formats={"share": "{:.0%}"})._repr_html_())[1]] == [
        "50%",
        "0.5",
    ]


def test_the_rest_is_counted():
    html = show_table(pd.DataFrame({"number": range(1500)}), limit=10)._repr_html_()
    assert len(cells(html)) == 11 and "1,490 more rows" in html
    assert "more rows" not in show_table(pd.DataFrame({"number": range(10)}), limit=10)._repr_html_()


def test_empty_tables_keep_their_heading_and_say_so():
    html = show_table(pd.DataFrame({"a": []}))._repr_html_()
    assert [[text for _, text in row] for row in cells(html)] == [["a"]] and "no rows" in html
    assert cells(show_table(pd.DataFrame())._repr_html_()) == [[]]
