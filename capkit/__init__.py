"""Describe videos in words with CogVLM2-Caption.

The public names, each imported when first used. The rooms, each importing only from those before it:

    video       frames, and reading exactly those
    cogvlm2     the model, its prompt and processor
    captioning  a clip and a prompt in, a caption out
    runs        many clips into a store
    sweep       prompts and settings against each other
    views       HTML and charts
    export      training data
    playground  widgets
    batch, benchmark, demo      beside each other: many notebooks, what notebook 06 measures, the demo model
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from capkit.text import show_warnings_plainly

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares the two lists
    from capkit.captioning import Caption as Caption
    from capkit.captioning import Captioner as Captioner
    from capkit.captioning import CaptionStream as CaptionStream
    from capkit.captioning import Decoding as Decoding
    from capkit.captioning import Score as Score
    from capkit.captioning import load_captioner as load_captioner
    from capkit.cogvlm2 import DEFAULT_PROMPT as DEFAULT_PROMPT
    from capkit.cogvlm2 import CheckpointError as CheckpointError
    from capkit.cogvlm2 import Prompt as Prompt
    from capkit.runs import CaptionStore as CaptionStore
    from capkit.runs import audit as audit
    from capkit.runs import caption_clips as caption_clips
    from capkit.runs import find_clips as find_clips
    from capkit.runs import replace as replace
    from capkit.runs import undo as undo
    from capkit.sweep import SweepPlan as SweepPlan
    from capkit.sweep import SweepResult as SweepResult
    from capkit.sweep import plan_sweep as plan_sweep
    from capkit.sweep import run_sweep as run_sweep
    from capkit.video import Clip as Clip
    from capkit.video import FrameSampling as FrameSampling
    from capkit.video import VideoError as VideoError
    from capkit.video import VideoInfo as VideoInfo
    from capkit.video import load_clip as load_clip

_NAMES = {
    "video": ("Clip", "FrameSampling", "VideoError", "VideoInfo", "load_clip"),
    "cogvlm2": ("DEFAULT_PROMPT", "CheckpointError", "Prompt"),
    "captioning": ("Caption", "CaptionStream", "Captioner", "Decoding", "Score", "load_captioner"),
    "runs": ("CaptionStore", "audit", "caption_clips", "find_clips", "replace", "undo"),
    "sweep": ("SweepPlan", "SweepResult", "plan_sweep", "run_sweep"),
}
_ROOMS = (*_NAMES, "views", "export", "playground", "batch", "benchmark", "demo")
_ROOM_OF = {name: room for room, names in _NAMES.items() for name in names}
__all__ = [*_ROOM_OF, "__version__"]

if not TYPE_CHECKING:  # seeing this, a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"capkit.{name}")
        if name not in _ROOM_OF:
            raise AttributeError(f"module 'capkit' has no attribute {name!r}")
        return getattr(importlib.import_module(f"capkit.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _prepare_notebook() -> None:
    """Have IPython show capkit's warnings in a plain line, and clips, captions, sweeps and replacements as views.

    `capkit.views` draws them; the views are imported with the first of these.
    """
    shell = sys.modules["IPython"].get_ipython()
    if shell is None:
        return
    show_warnings_plainly()

    def draw_with(function: str) -> Callable[[Any], str]:
        return lambda value: getattr(importlib.import_module("capkit.views"), function)(value).html

    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type_by_name("capkit.video.clip", "Clip", draw_with("show_clip"))
    formatter.for_type_by_name("capkit.captioning.generate", "Caption", draw_with("show_caption"))
    formatter.for_type_by_name("capkit.sweep.run", "SweepResult", draw_with("show_sweep"))
    formatter.for_type_by_name("capkit.runs.replacing", "Replacement", draw_with("show_replacement"))


if sys.modules.get("IPython"):
    _prepare_notebook()
