"""The playground's controls: which there are, how far they go, and what they are for."""

from __future__ import annotations

import ipywidgets as widgets

from capkit.cogvlm2 import FRAME_NUMBERS, TEMPLATES
from capkit.video import STRATEGIES

WIDE = {"width": "auto"}


def asking_controls() -> dict[str, widgets.Widget]:
    """How the prompt is put, by the names of `Captioner.caption`'s arguments."""
    return {
        "template": _one_of(
            TEMPLATES, "template", "chat numbers the frames; vqa asks for a short answer; base is bare"
        ),
        "frame_numbers": _one_of(
            FRAME_NUMBERS, "frame numbers", "what a frame carries in the prompt: its place (index) or its true second"
        ),
    }


def frame_controls() -> dict[str, widgets.Widget]:
    """Which frames, by the names of `FrameSampling`'s fields and `load_clip`'s arguments."""
    strategies = "chat: one frame a second from the start; base: over the first minute; uniform: over the whole clip"
    return {
        "strategy": _one_of(STRATEGIES, "frame sampling", strategies),
        "num_frames": _number(24, 1, 100, "frames, at most", "the published model takes 24"),
        "frames_per_second": _fraction(1.0, 0.01, 60, "frames a second", "for frame sampling fps"),
        "start_seconds": _fraction(0.0, 0, 1e6, "from second", "of the file; nothing before it is seen"),
        "end_seconds": _fraction(0.0, 0, 1e6, "to second (0: end)", "of the file; nothing after it is seen"),
    }


def decoding_controls() -> dict[str, widgets.Widget]:
    """Those of `Decoding`, by the names of its fields: so they can be looked up, and carried over."""
    return {
        "temperature": _slider(
            0.0, 0, 2, "temperature", "0: always the likeliest word; above: drawn, ever more freely"
        ),
        "top_p": _slider(1.0, 0.05, 1, "top_p", "draw among the likeliest that together are so probable; 1: among all"),
        "top_k": _number(0, 0, 1000, "top_k", "draw among so many of the likeliest; 0: among all"),
        "min_p": _slider(0.0, 0, 0.95, "min_p", "draw among those so many times as likely as the likeliest; 0: all"),
        "seed": _number(0, 0, 2**31 - 1, "seed", "of the draw: the same seed gives the same caption"),
        "num_beams": _number(1, 1, 16, "num_beams", "captions kept on the way by beam search; 1: no beam search"),
        "repetition_penalty": _slider(1.0, 1, 2, "repetition_penalty", "above 1, what was said becomes less likely"),
        "no_repeat_ngram_size": _number(
            0, 0, 20, "no_repeat_ngram_size", "never so many tokens in a row twice; 0: may"
        ),
        "max_new_tokens": _number(2048, 1, 2048, "max_new_tokens", "the caption is cut off after so many"),
    }


def _one_of(options, name, told):
    return widgets.Dropdown(options=options, **_named(name, told))


def _number(value, lowest, highest, name, told):
    return widgets.BoundedIntText(value, min=lowest, max=highest, continuous_update=False, **_named(name, told))


def _fraction(value, lowest, highest, name, told):
    return widgets.BoundedFloatText(value, min=lowest, max=highest, continuous_update=False, **_named(name, told))


def _slider(value, lowest, highest, name, told):
    settings = {"min": lowest, "max": highest, "step": 0.05, "continuous_update": False}
    return widgets.FloatSlider(value, **settings, **_named(name, told))


def _named(name, told):
    return {"description": name, "tooltip": told, "layout": WIDE, "style": {"description_width": "150px"}}
