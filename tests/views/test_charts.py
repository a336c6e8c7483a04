"""Figures: what stands in them, read back from their parts."""

import numpy as np
import pandas as pd
import pytest

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
    assert {"2", "5", "9", "mean words"} <= set(written(figure))


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
