"""Figures: what stands in them, read back from their parts."""

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from capkit.views import forest_plot, heat_map, scatter, token_histogram

TABLE = pd.DataFrame(
    {
        "cell": ["a", "a", "b", "b", "c"],
        "prompt": ["Why?", "Why?", "Who?", "Who?", "Who?"],
        "decoding": ["greedy", "greedy", "greedy", "greedy", "temperature=0.8"],
        "words": [1, 3, 5, None, 9],
        "seconds": [0.1, 0.3, 0.5, 0.7, 0.9],
        "text": list("vwxyz"),
    }
)
COMPARISON = pd.DataFrame(
    {
        "cell": ["b", "c <&> $x"],
        "difference": [1.0, -0.5],
        "low": [0.5, -1.0],
        "high": [1.5, 0.2],
        "p_adjusted": [0.0004, 0.3],
        "measure": "words",
    }
)


def written(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(match=lambda part: hasattr(part, "get_text"))]


def test_a_heat_map_shows_means_and_leaves_gaps_empty():
    figure = heat_map(TABLE, "words")
    image = figure.axes[0].images[0].get_array()
    assert np.ma.filled(image, np.nan).tolist()[0][0] == 2
    assert image[1].tolist() == [5, 9]
    assert {"2", "5", "9", "mean words", "prompt", "decoding"} <= set(written(figure))


LONG = "Please describe this video in detail, with all objects, colours, motions and what happens, in the style of a "


def test_names_are_told_apart_by_their_ends_and_written_as_they_are():
    names = [LONG + "critic.", LONG + "poet.", "Costs $5 or $10?", "请详细描述这个视频"]
    figure = heat_map(pd.DataFrame({"prompt": names, "decoding": "greedy", "seconds": [1.0, 2, 3, 4]}), "seconds")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of characters that no font has
        texts = {" ".join(text.split()) for text in written(figure)}
    assert {"Costs $5 or $10?", "请详细描述这个视频", "mean seconds (s)"} <= set(texts)
    assert not any(text.get_parse_math() for text in figure.findobj(Text))
    for end in ("critic.", "poet."):
        assert sum(text.startswith("Please describe this video") and text.endswith(end) for text in texts) == 1


def test_names_that_look_alike_have_numbers():
    names = [LONG + word + LONG for word in ("critic. ", "poet. ")]
    figure = forest_plot(COMPARISON.assign(cell=names), "words", "a")
    assert [label.get_text()[:9] for label in figure.axes[0].get_yticklabels()] == ["1. Please", "2. Please"]


@pytest.mark.parametrize("draw", [heat_map, forest_plot])
def test_many_long_names_do_not_overprint(draw):
    names = [f"{number}: {LONG}" for number in range(12)]
    if draw is heat_map:
        table = pd.DataFrame({"prompt": names * 12, "decoding": np.repeat(names, 12), "words": range(144)})
        figure = heat_map(table, "words")
    else:
        columns = COMPARISON.iloc[:1].drop(columns="cell").to_dict("records")[0]
        figure = forest_plot(pd.DataFrame([columns | {"cell": name} for name in names]), "words", LONG)
    figure.draw_without_rendering()
    (axes, *_), page = figure.axes, figure.bbox.padded(1)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 12 and not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    boxes += [axes.xaxis.label.get_window_extent()]
    assert all(page.count_contains(box.corners()) == 4 for box in boxes)


def test_numbers_of_points_that_are_near_each_other_stand_together():
    table = pd.DataFrame({"cell": list("abc"), "x": [0, 1, 1.001], "y": [0.0, 1, 1]})
    figure = scatter(table, "x", "y")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2, 3"]


def test_a_scatter_plot_has_a_point_for_each_cell():
    figure = scatter(TABLE, "words", "seconds")
    points = [tuple(line.get_xydata()[0]) for line in figure.axes[0].lines]
    assert points == [
        (2, pytest.approx(0.2)),
        (5, 0.5),
        (9, 0.9),
    ]
    assert {"1", "2", "3", "1  a", "2  b", "3  c"} <= set(written(figure))


def test_a_forest_plot_fills_only_what_is_significant():
    figure = forest_plot(COMPARISON, "words", "a")
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [tuple(point.get_xydata()[0]) for point in points] == [(1.0, 0), (-0.5, 1)]
    assert points[0].get_markerfacecolor() != "white" and points[1].get_markerfacecolor() == "white"
    assert any("p < 0.001" in text for text in written(figure)) and any("p 0.3" in text for text in written(figure))
    legend = {text.get_text().split(":")[0]: mark for text, mark in zip(*legend_of(figure), strict=True)}
    assert legend["filled"].get_markerfacecolor() == points[0].get_markerfacecolor()
    assert legend["hollow"].get_markerfacecolor() == "white" and "95 % intervals, which hold all together" in legend


def legend_of(figure):
    (legend,) = figure.legends
    return legend.get_texts(), legend.legend_handles


def test_what_could_not_be_tested_is_said():
    figure = forest_plot(COMPARISON.assign(p_adjusted=np.nan), "words", "a")
    assert all("(not tested)" in label.get_text() for label in figure.axes[0].get_yticklabels())


@pytest.mark.parametrize("column", ["nothing", "text"])
def test_columns_that_are_no_numbers_are_named(column):
    for draw in (lambda: heat_map(TABLE, column), lambda: scatter(TABLE, column, "seconds")):
        with pytest.raises(ValueError, match=column):
            draw()


def test_token_histogram_marks_the_limit_and_counts_every_caption():
    figure = token_histogram(pd.Series([30, 31, pd.NA, 400], dtype="Int64"), 224)
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert [line.get_xdata()[0] for line in axes.lines] == [224]
    figure.draw_without_rendering()
    assert not axes.get_legend().get_window_extent().overlaps(axes.bbox)  # it hides no bar
