"""Captions and frames to look at: static HTML and matplotlib charts."""

from capkit.views.captions import show_caption
from capkit.views.charts import forest_plot, heat_map, ratio_bars, scatter, split_bars, token_histogram
from capkit.views.frames import load_first_clip, numbers_warning, show_clip
from capkit.views.html import (
    CARD,
    HTML,
    MUTED,
    caption_facts,
    captions_table,
    file_name,
    frames_strip,
    mark_differences,
    note,
    picture,
    record_text,
    show_captions,
    to_webp,
)
from capkit.views.page import CaptionsPage
from capkit.views.reading import captions_page, compare_runs
from capkit.views.replacements import show_replacement
from capkit.views.sweeps import compare_captions, show_sweep
from capkit.views.tables import show_table, table_html, with_index

__all__ = [
    "show_caption",
    "forest_plot",
    "heat_map",
    "ratio_bars",
    "scatter",
    "split_bars",
    "token_histogram",
    "load_first_clip",
    "numbers_warning",
    "show_clip",
    "CARD",
    "HTML",
    "MUTED",
    "caption_facts",
    "captions_table",
    "file_name",
    "frames_strip",
    "mark_differences",
    "note",
    "picture",
    "record_text",
    "show_captions",
    "to_webp",
    "CaptionsPage",
    "captions_page",
    "compare_runs",
    "compare_captions",
    "show_replacement",
    "show_sweep",
    "show_table",
    "table_html",
    "with_index",
]
