"""Charts of sweeps, comparisons, benchmarks and exports, with matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Hashable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from capkit.views.html import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

LABEL_WIDTH = 42  # characters


class Chart(Figure):
    """A figure that a notebook shows without pyplot; `savefig` writes it to a file."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()


def heat_map(table: pd.DataFrame, value: str, rows: str = "prompt", columns: str = "decoding") -> Chart:
    """Heat map of a column's mean for each pair of values of two axes, over clips and all other axes.

    Args:
        table: of `SweepResult.to_frame`, with diagnostics.
        value: a column of numbers.
        rows, columns: columns that name the axes.

    Raises:
        ValueError: no such column, or no numbers in it.
    """
    means = _with_numbers(table, value, rows, columns).pivot_table(value, rows, columns, sort=False)
    height, width = means.shape
    figure, axes = _new_chart(3.6 + 1.5 * width, 1.2 + 0.55 * height)
    image = axes.imshow(means, cmap="cividis", aspect="auto")
    axes.set_xticks(range(width), [_short(name, 22) for name in means.columns], rotation=20, ha="right", fontsize=8)
    axes.set_yticks(range(height), [_short(name) for name in means.index], fontsize=8)
    middle = np.nanmean([means.min(axis=None), means.max(axis=None)])
    for (row, column), mean in np.ndenumerate(means.to_numpy(dtype=float)):
        text, colour = "" if np.isnan(mean) else f"{mean:.3g}", "black" if mean > middle else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_title(f"mean {value}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def scatter(table: pd.DataFrame, x: str, y: str, label: str = "cell") -> Chart:
    """Scatter plot of the means of two columns, with a numbered point for each cell.

    Raises:
        ValueError: no such column, or no numbers in it.
    """
    means = _with_numbers(_with_numbers(table, x, label), y).groupby(label, sort=False)[[x, y]].mean()
    figure, axes = _new_chart(9, 0.8 + max(3.0, 0.24 * len(means)))
    for number, (name, point) in enumerate(means.iterrows(), 1):  # names beside the points would overlap
        axes.plot(*point, "o", color=BLUE, label=f"{number}  {_short(name)}")
        axes.annotate(str(number), tuple(point), (5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"mean {x}", ylabel=f"mean {y}")
    axes.margins(0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, frameon=False, handlelength=0)
    return figure


def forest_plot(comparison: pd.DataFrame, measure: str, baseline: str) -> Chart:
    """Forest plot: differences from the baseline with their joint intervals; filled where the corrected p < 0.05.

    Args:
        comparison: of `capkit.sweep.compare`.
        measure: the compared quantity.
        baseline: name of the baseline.
    """
    rows = comparison[comparison["measure"] == measure]
    figure, axes = _new_chart(8.5, 1.7 + 0.42 * len(rows))
    axes.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(rows.itertuples()):
        is_clear = row.p_adjusted < 0.05
        colour = RED if is_clear else BLUE
        axes.plot([row.low, row.high], [place, place], color=colour)
        axes.plot(row.difference, place, "o", color=colour, markerfacecolor=colour if is_clear else "white")
    p_values = [f"p {p:.2g}" if p >= 0.001 else "p < 0.001" for p in rows["p_adjusted"]]
    names = [f"{_short(cell)}  ({p})" for cell, p in zip(rows["cell"], p_values, strict=True)]
    _name_rows(axes, names)
    axes.set_xlabel(
        f"mean {measure}, difference from {_short(baseline)!r}\n"
        "lines: intervals that hold together; filled: p < 0.05, corrected for all comparisons"
    )
    return figure


def ratio_bars(table: pd.DataFrame) -> Chart:
    """Bars of how many times better than the baseline each row is; left of 1 it is worse.

    Args:
        table: of `capkit.benchmark.to_frame`.
    """
    figure, axes = _new_chart(9.5, 1.0 + 0.32 * len(table))
    colours = [BLUE if ratio >= 1 else RED for ratio in table["ratio"]]
    bars = axes.barh(range(len(table)), table["ratio"] - 1, left=1, color=colours, height=0.7)
    axes.bar_label(bars, [f"x {ratio:.2f}" for ratio in table["ratio"]], padding=3, fontsize=8)
    axes.axvline(1, color=GREY, linewidth=1)
    _name_rows(axes, [_short(name, 60) for name in table["name"]])
    axes.set(xscale="log", xlabel="baseline / capkit, in time or memory (logarithmic)")
    axes.margins(x=0.12)
    return figure


def split_bars(table: pd.DataFrame, unit: str = "seconds") -> Chart:
    """Stacked bars: one for each row, with a piece for each column."""
    figure, axes = _new_chart(9, 1.1 + 0.5 * len(table))
    left = np.zeros(len(table))
    for column, colour in zip(table.columns, (BLUE, ORANGE, GREEN, PURPLE, GREY), strict=False):
        axes.barh(list(table.index), table[column], left=left, label=column, color=colour)
        left += table[column].to_numpy()
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    return figure


def token_histogram(num_tokens: pd.Series, limit: int) -> Chart:
    """Histogram of captions by their T5 tokens, with the limit beyond which training cuts them off.

    Args:
        num_tokens: a number for each caption; missing ones are left out.
        limit: tokens that the trainer keeps.
    """
    counts = num_tokens.dropna().astype(int)
    figure, axes = _new_chart(8.5, 2.6)
    width = max(1, -(-max([limit, *counts]) // 50))
    axes.hist(counts, bins=list(range(0, max([limit, *counts]) + 2 * width, width)), color=BLUE)
    axes.axvline(limit, color=RED, label=f"{limit} tokens are kept")
    axes.set(xlabel="T5 tokens", ylabel="captions")
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.legend(fontsize=8)
    return figure


def _new_chart(width: float, height: float) -> tuple[Chart, Axes]:
    """An empty chart, its size in inches."""
    figure = Chart(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _name_rows(axes: Axes, names: list[str]) -> None:
    """Write names at the left, from the top down."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _with_numbers(table: pd.DataFrame, value: str, *others: str) -> pd.DataFrame:
    """The rows in which a column has a number.

    Raises:
        ValueError: one of the columns is missing, or there are no numbers.
    """
    for name in (value, *others):
        if name not in table:
            raise ValueError(f"there is no column {name!r}, but {', '.join(map(str, table.columns))}")
    numbers = pd.to_numeric(table[value], errors="coerce")
    if not numbers.notna().any():
        raise ValueError(f"column {value!r} has no numbers")
    return table.assign(**{value: numbers.astype(float)}).dropna(subset=[value])


def _short(name: Hashable, width: int = LABEL_WIDTH) -> str:
    return textwrap.shorten(str(name), width, placeholder=" ...") or str(name)[:width]
