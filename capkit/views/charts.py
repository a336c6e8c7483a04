"""Charts of sweeps, comparisons, benchmarks and exports, with matplotlib."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from capkit.views.html import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

LABEL_WIDTH, LABEL_LINES = 42, 3  # characters of a line, and lines
NEAR_POINTS = 16  # numbers of a scatter plot's dots that are nearer than this, in typographic points, stand together
UNITS = {
    "seconds": "s",
    "seconds_beyond_clip": "s",
    "support": "nats a token",
    "mean_logprob": "nats a token",
    "repeated_4grams": "share",
    "supported_words": "words",
    "longest_repeat_words": "words",
    "num_words": "words",
    "num_tokens": "tokens",
    "num_t5_tokens": "T5 tokens",
    "over_t5_limit": "share of captions",
    "stopped_by_length": "share of captions",
}
"""Of columns of a sweep's table whose names do not say what they count."""
# Fonts with Chinese, Japanese or Korean characters, of Linux, macOS and Windows.
_ASIAN = ("Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic")


class Chart(Figure):
    """A figure that a notebook shows without pyplot; `savefig` writes it to a file.

    Texts are written as they are, "$" too; a character that no font has is a box.
    """

    def draw(self, renderer: RendererBase) -> None:
        fonts = [name for name in _ASIAN if name in font_manager.get_font_names()]
        for text in self.findobj(Text):
            text.set_fontfamily(["sans-serif", *fonts])
            text.set_parse_math(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            super().draw(renderer)

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
    figure, axes = _new_chart(4.2 + 1.5 * width, 1.6 + 0.6 * height)
    image = axes.imshow(means, cmap="cividis", aspect="auto")
    names = _labels(means.columns, 24)
    axes.set_xticks(range(width), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(height), _labels(means.index), fontsize=8)
    axes.set(xlabel=columns, ylabel=rows)
    middle = np.nanmean([means.min(axis=None), means.max(axis=None)])
    for (row, column), mean in np.ndenumerate(means.to_numpy(dtype=float)):
        text, colour = "" if np.isnan(mean) else f"{mean:.3g}", "black" if mean > middle else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_title(_mean(value), fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)  # its label is the title
    return figure


def scatter(table: pd.DataFrame, x: str, y: str, label: str = "cell") -> Chart:
    """Scatter plot of the means of two columns, with a numbered point for each cell.

    Raises:
        ValueError: no such column, or no numbers in it.
    """
    means = _with_numbers(_with_numbers(table, x, label), y).groupby(label, sort=False)[[x, y]].mean()
    names = [_label(name) for name in means.index]
    figure, axes = _new_chart(9, 0.8 + max(3.0, 0.13 * (len(names) + sum(name.count("\n") + 1 for name in names))))
    for number, (name, point) in enumerate(zip(names, means.to_numpy(), strict=True), 1):
        axes.plot(*point, "o", color=BLUE, label=f"{number}  {name}")  # names beside the points would overlap
    axes.set(xlabel=_mean(x), ylabel=_mean(y))
    axes.margins(0.1)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, frameon=False, handlelength=0, title="number of a point"
    )
    _number_points(figure, axes, means.to_numpy())
    return figure


def _number_points(figure: Chart, axes: Axes, points: np.ndarray) -> None:
    """Write the numbers of points (N, 2) beside them, those of points that are near each other together."""
    figure.draw_without_rendering()  # only now it is known where points are
    places = axes.transData.transform(points) * 72 / figure.dpi
    groups: list[list[int]] = []
    for point, place in enumerate(places):
        near = (group for group in groups if np.linalg.norm(places[group[0]] - place) < NEAR_POINTS)
        group = next(near, None)
        if group is None:
            groups.append(group := [])
        group.append(point)
    for group in groups:
        numbers = textwrap.fill(", ".join(str(point + 1) for point in group), 24)
        rightmost = max(group, key=lambda point: places[point][0])
        axes.annotate(numbers, points[rightmost], (5, 4), textcoords="offset points", fontsize=8)


def forest_plot(comparison: pd.DataFrame, measure: str, baseline: str) -> Chart:
    """Forest plot: differences from the baseline with their joint intervals; filled where the corrected p < 0.05.

    Args:
        comparison: of `capkit.sweep.compare`.
        measure: the compared quantity.
        baseline: name of the baseline.
    """
    rows = comparison[comparison["measure"] == measure]
    figure, axes = _new_chart(8.5, 2.0 + 0.48 * len(rows))
    axes.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(rows.itertuples()):
        is_clear = row.p_adjusted < 0.05
        colour = RED if is_clear else BLUE
        axes.plot([row.low, row.high], [place, place], color=colour)
        axes.plot(row.difference, place, "o", color=colour, markerfacecolor=colour if is_clear else "white")
    names = [f"{cell}  ({_p_value(p)})" for cell, p in zip(_labels(rows["cell"]), rows["p_adjusted"], strict=True)]
    _name_rows(axes, names)
    axes.set_xlabel(f"{_mean(measure)}: difference from\n{_label(baseline, 50)}", fontsize=9)
    handles = [
        Line2D([], [], color=GREY, label="95 % intervals, which hold all together"),
        Line2D([], [], color=RED, marker="o", label="filled: p < 0.05, corrected for all comparisons"),
        Line2D([], [], color=BLUE, marker="o", markerfacecolor="white", label="hollow: larger p, or not tested"),
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False)
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
    _name_rows(axes, [_label(name, 60) for name in table["name"]])
    axes.set(xscale="log", xlabel="baseline / capkit, in time or memory (logarithmic); right of 1 capkit is better")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
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
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)  # where no bar can be
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


def _p_value(p: float) -> str:
    return "not tested" if np.isnan(p) else "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def _mean(column: str) -> str:
    return f"mean {column} ({UNITS[column]})" if column in UNITS else f"mean {column}"


def _label(name: Hashable, width: int = LABEL_WIDTH) -> str:
    """A name on lines of `width` characters; of more than three, the first and the last are left."""
    lines = textwrap.wrap(str(name), width) or [str(name)]
    if len(lines) > LABEL_LINES:
        lines = [f"{lines[0]} ...", *lines[1 - LABEL_LINES :]]
    return "\n".join(lines)


def _labels(names: Iterable[Hashable], width: int = LABEL_WIDTH) -> list[str]:
    """Names as labels; those that cutting made equal begin with a number."""
    labels = [_label(name, width) for name in names]
    count = Counter(labels)
    return [f"{place}. {label}" if count[label] > 1 else label for place, label in enumerate(labels, 1)]
