"""capkit: describe videos in words with CogVLM2-Caption. The public names, each imported when first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares the two lists
    from capkit.captioning import Caption, Captioner, CaptionStream, Decoding, Score, load_captioner
    from capkit.cogvlm2 import DEFAULT_PROMPT, CheckpointError, Prompt
    from capkit.runs import CaptionStore, caption_clips, find_clips
    from capkit.sweep import SweepPlan, SweepResult, plan_sweep, run_sweep
    from capkit.video import Clip, FrameSampling, VideoError, VideoInfo, load_clip

_NAMES_BY_ROOM = {
    "video": ("Clip", "FrameSampling", "VideoError", "VideoInfo", "load_clip"),
    "cogvlm2": ("DEFAULT_PROMPT", "CheckpointError", "Prompt"),
    "captioning": ("Caption", "CaptionStream", "Captioner", "Decoding", "Score", "load_captioner"),
    "runs": ("CaptionStore", "caption_clips", "find_clips"),
    "sweep": ("SweepPlan", "SweepResult", "plan_sweep", "run_sweep"),
}
_ROOM_OF = {name: room for room, names in _NAMES_BY_ROOM.items() for name in names}

__all__ = [
    "DEFAULT_PROMPT",
    "Caption",
    "CaptionStore",
    "CaptionStream",
    "Captioner",
    "CheckpointError",
    "Clip",
    "Decoding",
    "FrameSampling",
    "Prompt",
    "Score",
    "SweepPlan",
    "SweepResult",
    "VideoError",
    "VideoInfo",
    "__version__",
    "caption_clips",
    "find_clips",
    "load_captioner",
    "load_clip",
    "plan_sweep",
    "run_sweep",
]


if not TYPE_CHECKING:  # a type checker that sees this takes every name for Any

    def __getattr__(name: str) -> Any:
        if name not in _ROOM_OF:
            raise AttributeError(f"module 'capkit' has no attribute {name!r}")
        return getattr(importlib.import_module(f"capkit.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_formatters() -> None:
    """Have IPython show clips, captions and sweeps as `capkit.views` draws them; that is imported with the first."""
    shell = sys.modules["IPython"].get_ipython()
    if shell is None:
        return

    def draw_with(function: str) -> Callable[[Any], str]:
        return lambda value: getattr(importlib.import_module("capkit.views"), function)(value).html

    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type_by_name("capkit.video.clip", "Clip", draw_with("show_clip"))
    formatter.for_type_by_name("capkit.captioning.generate", "Caption", draw_with("show_caption"))
    formatter.for_type_by_name("capkit.sweep.run", "SweepResult", draw_with("show_sweep"))


if sys.modules.get("IPython"):
    _register_formatters()
