"""Figures of sweeps and comparisons. matplotlib lives here only."""

from __future__ import annotations

import io
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

BLUE, RED, GREY = "#0072b2", "#d55e00", "#888888"  # Okabe and Ito's: told apart by colour-blind people too
LABEL_WIDTH = 42  # characters


class Chart(Figure):
    """A figure that a notebook shows by itself; `savefig` keeps it."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=110)
        return picture.getvalue()


def heat_map(table: pd.DataFrame, value: str, rows: str = "prompt", columns: str = "decoding") -> Chart:
    """The mean of a column for each pair of values of two axes, over clips and all other axes.

    Args:
        table: of `SweepResult.to_frame`, with diagnostics.
        value: a column of numbers.
        rows, columns: columns that name the axes.

    Raises:
        ValueError: no such column, or no numbers in it.
    """
    means = _numbers(table, value, rows, columns).pivot_table(value, rows, columns, sort=False)
    height, width = means.shape
    figure = Chart(figsize=(3.6 + 1.5 * width, 1.2 + 0.55 * height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(means, cmap="cividis", aspect="auto")
    axes.set_xticks(range(width), [_short(name, 22) for name in means.columns], rotation=20, ha="right", fontsize=8)
    axes.set_yticks(range(height), [_short(name) for name in means.index], fontsize=8)
    middle = np.nanmean([means.min(axis=None), means.max(axis=None)])
    for (row, column), number in np.ndenumerate(means.to_numpy(dtype=float)):
        colour = "black" if number > middle else "white"
        told = "" if np.isnan(number) else f"{number:.3g}"
        axes.text(column, row, told, ha="center", va="center", fontsize=9, color=colour)
    axes.set_title(f"mean {value}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def scatter(table: pd.DataFrame, x: str, y: str, label: str = "cell") -> Chart:
    """A numbered point for each cell: its means of two columns.

    Raises:
        ValueError: no such column, or no numbers in it.
    """
    means = _numbers(_numbers(table, x, label), y).groupby(label, sort=False)[[x, y]].mean()
    figure = Chart(figsize=(9, 0.8 + max(3.0, 0.24 * len(means))), layout="constrained")
    axes = figure.subplots()
    for number, (name, point) in enumerate(means.iterrows(), 1):  # names beside the points would hide each other
        axes.plot(*point, "o", color=BLUE, label=f"{number}  {_short(name)}")
        axes.annotate(str(number), point, (5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"mean {x}", ylabel=f"mean {y}")
    axes.margins(0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, frameon=False, handlelength=0)
    return figure


def forest_plot(comparison: pd.DataFrame, measure: str, baseline: str) -> Chart:
    """Differences from the baseline with their intervals, a line for each cell; filled where the corrected p < 0.05.

    Args:
        comparison: of `capkit.sweep.comparison.compare`.
        measure: what was compared; for the axis.
        baseline: what it was compared with.
    """
    figure = Chart(figsize=(8.5, 1.3 + 0.42 * len(comparison)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(comparison.itertuples()):
        is_clear = row.p_holm < 0.05
        colour = RED if is_clear else BLUE
        axes.plot([row.low, row.high], [place, place], color=colour)
        axes.plot(row.difference, place, "o", color=colour, markerfacecolor=colour if is_clear else "white")
    p_values = [f"p {p:.2g}" if p >= 0.001 else "p < 0.001" for p in comparison["p_holm"]]
    names = [f"{_short(cell)}  ({p})" for cell, p in zip(comparison["cell"], p_values, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{measure}: difference from {_short(baseline)!r}, mean over clips with interval")
    return figure


def ratio_bars(table: pd.DataFrame) -> Chart:
    """How many times better than the baseline, a bar for each row; to the left of 1 it is worse.

    Args:
        table: of `capkit.benchmark.results.to_frame`.
    """
    figure = Chart(figsize=(9.5, 1.0 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    colours = [BLUE if ratio >= 1 else RED for ratio in table["ratio"]]
    bars = axes.barh(range(len(table)), table["ratio"] - 1, left=1, color=colours, height=0.7)
    axes.bar_label(bars, [f"x {ratio:.2f}" for ratio in table["ratio"]], padding=3, fontsize=8)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(table)), [_short(name, 60) for name in table["name"]], fontsize=8)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="baseline / capkit, in time or memory (logarithmic)")
    axes.margins(x=0.12)
    return figure


def split_bars(table: pd.DataFrame, unit: str = "seconds") -> Chart:
    """A bar for each row, cut into a piece for each column."""
    figure = Chart(figsize=(9, 1.1 + 0.5 * len(table)), layout="constrained")
    axes = figure.subplots()
    before = np.zeros(len(table))
    for column, colour in zip(table.columns, (BLUE, "#e69f00", "#009e73", "#cc79a7", GREY), strict=False):
        axes.barh(list(table.index), table[column], left=before, label=column, color=colour)
        before += table[column].to_numpy()
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    return figure


def _numbers(table, value, *others):
    """The table without rows where the column has no number."""
    for name in (value, *others):
        if name not in table:
            raise ValueError(f"there is no column {name!r}, but {', '.join(map(str, table.columns))}")
    numbers = pd.to_numeric(table[value], errors="coerce")
    if not numbers.notna().any():
        raise ValueError(f"column {value!r} has no numbers")
    return table.assign(**{value: numbers.astype(float)}).dropna(subset=[value])


def _short(name, width=LABEL_WIDTH):
    return textwrap.shorten(str(name), width, placeholder=" ...") or str(name)[:width]


def token_histogram(num_tokens: pd.Series, limit: int, threshold: int | None = None) -> Chart:
    """How many captions have how many T5 tokens, with the limit beyond which training cuts them off.

    Args:
        num_tokens: a number for each caption; missing ones are left out.
        limit: tokens that the trainer keeps.
        threshold: where captions count as too long, if that is not at the limit.
    """
    counts = num_tokens.dropna().astype(int)
    figure = Chart(figsize=(8.5, 2.6), layout="constrained")
    axes = figure.subplots()
    width = max(1, -(-max([limit, *counts]) // 50))
    axes.hist(counts, bins=range(0, max([limit, *counts]) + 2 * width, width), color=BLUE)
    axes.axvline(limit, color=RED, label=f"{limit} tokens are kept")
    if threshold is not None and threshold != limit:
        axes.axvline(threshold, color=RED, linestyle="--", label=f"{threshold}: too long, if the estimate is low")
    axes.set(xlabel="T5 tokens", ylabel="captions")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return figure
