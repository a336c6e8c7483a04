"""The playground's input widgets: their ranges, labels and tooltips."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from capkit.cogvlm2 import FRAME_NUMBERS, TEMPLATES
from capkit.text import escape
from capkit.video import STRATEGIES
from capkit.views import GREEN, RED, note

WIDE = {"width": "auto"}
WRAP = {"flex_flow": "row wrap"}
TEXT = "line-height:1.45;overflow-wrap:anywhere"  # widgets inherit the line height of controls
SCROLLED = "max-height:20em;overflow:auto"  # a caption that repeats itself does not stretch the page
_INTEGER, _FLOAT, _SLIDER = widgets.BoundedIntText, widgets.BoundedFloatText, widgets.FloatSlider


def prompt_controls() -> dict[str, widgets.Widget]:
    """Controls of `Prompt`, by the names of its fields."""
    templates = "chat: numbers the frames; vqa: asks for a short answer; base: the prompt as it is"
    numbers = "the number of a frame in the prompt: its index or its time in seconds"
    return {
        "template": _control(widgets.Dropdown, "template", templates, options=TEMPLATES),
        "frame_numbers": _control(widgets.Dropdown, "frame numbers", numbers, options=FRAME_NUMBERS),
        "answer_prefix": _text("answer prefix", "what the caption begins with, such as: The video shows"),
    }


def frame_controls() -> dict[str, widgets.Widget]:
    """Controls of the sampled frames, by the names of `FrameSampling`'s fields and `load_clip`'s arguments."""
    strategies = "chat: one frame a second from the start; base: over the first minute; uniform: over the full clip"
    return {
        "strategy": _control(widgets.Dropdown, "frame sampling", strategies, options=STRATEGIES),
        "num_frames": _number(_INTEGER, 24, 1, 100, "frames, at most", "the published model takes 24"),
        "frames_per_second": _number(_FLOAT, 1.0, 0.01, 60, "frames a second", "for frame sampling fps"),
        "start_seconds": _number(_FLOAT, 0.0, 0, 1e6, "from second", "of the file; nothing earlier is sampled"),
        "end_seconds": _number(_FLOAT, 0.0, 0, 1e6, "to second (0: end)", "of the file; nothing later is sampled"),
    }


def decoding_controls() -> dict[str, widgets.Widget]:
    """Controls of `Decoding`, by the names of its fields."""
    controls = (
        (_SLIDER, 0.0, 0, 2, "temperature", "0: always the most likely token; above: tokens are sampled, more freely"),
        (_SLIDER, 1.0, 0.05, 1, "top_p", "sample from the most likely tokens that add up to this probability; 1: all"),
        (_INTEGER, 0, 0, 1000, "top_k", "sample from this many of the most likely tokens; 0: all"),
        (_SLIDER, 0.0, 0, 0.95, "min_p", "sample from tokens with this share of the highest probability; 0: all"),
        (_INTEGER, 0, 0, 2**53 - 1, "seed", "of the sampling: the same seed gives the same caption"),
        (_INTEGER, 1, 1, 16, "num_beams", "captions that beam search keeps while decoding; 1: no beam search"),
        (_SLIDER, 1.0, 1, 2, "repetition_penalty", "above 1, tokens that the caption already has become less likely"),
        (_INTEGER, 0, 0, 20, "no_repeat_ngram_size", "no sequence of this many tokens twice; 0: allowed"),
        (_INTEGER, 2048, 1, 2048, "max_new_tokens", "the caption is cut off after this many tokens"),
    )
    made = {name: _number(kind, value, low, high, name, tooltip) for kind, value, low, high, name, tooltip in controls}
    words = "words and phrases that the caption never holds, with commas between"
    made["forbidden_words"] = _text("forbidden_words", words)
    return made


def button(name: str, action: Callable[[], None], **settings: Any) -> widgets.Button:
    """A button that calls a function without arguments."""
    made = widgets.Button(description=name, **settings)
    made.on_click(lambda _: action())
    return made


def _number(kind: Callable[..., Any], value: float, low: float, high: float, name: str, tooltip: str) -> widgets.Widget:
    step = {"step": 0.05} if kind is _SLIDER else {}
    return _control(kind, name, tooltip, value=value, min=low, max=high, continuous_update=False, **step)


def _text(name: str, tooltip: str) -> widgets.Widget:
    return _control(widgets.Text, name, tooltip, continuous_update=False)


def _control(kind: Callable[..., Any], name: str, tooltip: str, **settings: Any) -> widgets.Widget:
    return kind(**settings, description=name, tooltip=tooltip, layout=WIDE, style={"description_width": "150px"})


def message_html(message: str, is_good: bool = False) -> str:
    """A message, which a screen reader says at once: an error unless it is good."""
    color = GREEN if is_good else RED
    return f'<div role="alert" style="{TEXT}">{note(escape(message), color)}</div>' if message else ""


def locked(method: Callable[..., None]) -> Callable[..., None]:
    """Run one such method at a time: Lab handles messages in several threads of the kernel (subshells), and of two
    clips chosen at once the one shown must be the one captioned."""

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> None:
        with self._lock:
            method(self, *args)

    return run
