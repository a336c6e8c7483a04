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
    table_html,
    to_webp,
)
from capkit.views.page import CaptionsPage, page_path
from capkit.views.reading import captions_page, compare_runs
from capkit.views.replacements import show_replacement
from capkit.views.sweeps import compare_captions, show_sweep

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
    "table_html",
    "to_webp",
    "CaptionsPage",
    "page_path",
    "captions_page",
    "compare_runs",
    "compare_captions",
    "show_replacement",
    "show_sweep",
]
