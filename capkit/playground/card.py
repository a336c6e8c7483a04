"""A card of the playground: a caption, what it was made with, and what can be done with it."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from capkit.captioning import Decoding
from capkit.playground.blind import settings_name
from capkit.playground.controls import SCROLLED, TEXT, WIDE, WRAP, button
from capkit.runs import prompt_title, setting
from capkit.text import escape
from capkit.video import FrameSampling
from capkit.views import MUTED, caption_facts, mark_differences, note, record_text


class Card(widgets.VBox):
    """A caption, to compare with a baseline, edit, fold, and take settings from.

    Args:
        record: the caption's.
        on_baseline, on_edit, on_settings, on_sweep: called with the card when one of its buttons is pressed; of an
            edit when it is to be saved, and `edit.value` is the new text.
        is_stored: whether it is of an earlier sitting.
    """

    def __init__(
        self,
        record: dict[str, Any],
        on_baseline: Callable[[Card], None],
        on_edit: Callable[[Card], None],
        on_settings: Callable[[Card], None],
        on_sweep: Callable[[Card], None],
        is_stored: bool = False,
    ) -> None:
        self.record, self.is_stored, self._is_folded, self._on_edit = record, is_stored, False, on_edit
        self._baseline, self._notice = record, ""
        self.shown = widgets.HTML()
        self.edit = widgets.Textarea(layout={"width": "100%", "display": "none"}, rows=6)
        self.baseline_button = button("make baseline", functools.partial(on_baseline, self), layout=WIDE)
        self.edit_button = button("edit", self._edit, layout=WIDE)
        self.discard_button = button("discard", self.close_edit, layout={"width": "auto", "display": "none"})
        self.sweep_button = button("to a sweep", functools.partial(on_sweep, self), layout=WIDE)
        self.settings_button = button("use settings", functools.partial(on_settings, self), layout=WIDE)
        self.fold_button = button("fold", self.fold, layout=WIDE)
        self.buttons = widgets.HBox(layout=WRAP)
        self.buttons.children = [self.baseline_button, self.edit_button, self.sweep_button, self.settings_button]
        self.buttons.children += (self.fold_button, self.discard_button)
        super().__init__([self.shown, self.edit, self.buttons], layout={"padding": "8px", "min_width": "0"})

    @property
    def is_edited(self) -> bool:
        """Whether a text is being typed."""
        return self.edit.layout.display != "none"

    def show(self, baseline: dict[str, Any], notice: str) -> None:
        """Show the caption with its differences from the baseline; a text that is being typed stays as it is.

        Args:
            baseline: the record of the baseline, perhaps this one.
            notice: see `demo_notice`; for captions of the demo model.
        """
        self._baseline, self._notice = baseline, notice
        record, is_baseline, text = self.record, self.record is baseline, record_text(self.record)
        title = f'<b dir="auto">{escape(prompt_title(record))}</b>{" · baseline" if is_baseline else ""}'
        self.layout.border = f"{3 if is_baseline else 1}px solid #8888"
        self.baseline_button.disabled = is_baseline
        if self._is_folded:
            line = f'{title} <span dir="auto">{escape(textwrap.shorten(text, 300, placeholder=" ..."))}</span>'
            self.shown.value = f'<div style="{TEXT};max-height:1.45em;overflow:hidden">{line}</div>'
            return
        marked = escape(text) if is_baseline else mark_differences(record_text(baseline), text)[1]
        notes = note(notice) if notice and record.get("model") == "demo" else ""
        others = "" if is_baseline else " · ".join(differences(record, baseline))
        other = f"<div>differs from the baseline: {escape(others)}</div>" if others else ""
        self.shown.value = (
            f'<div style="{TEXT}"><div style="max-height:4.5em;overflow:auto">{title}</div>{other}'
            f'<div dir="auto" style="white-space:pre-wrap;margin:6px 0;{SCROLLED}">{marked}</div>{notes}'
            f'<div style="{MUTED}">{escape(settings_name(record))}; {caption_facts(record)}</div></div>'
        )

    def fold(self) -> None:
        """Show only one line, or all again."""
        self._is_folded = not self._is_folded
        self.fold_button.description = "unfold" if self._is_folded else "fold"
        for control in self.buttons.children[:4]:
            control.layout.display = "none" if self._is_folded else None
        self.show(self._baseline, self._notice)

    def _edit(self) -> None:
        """Open the text for editing at the first click; save it at the second."""
        if self.is_edited:
            self._on_edit(self)
            return
        self.edit.value = record_text(self.record)
        self.edit.layout.display, self.discard_button.layout.display = "flex", None
        self.edit_button.description, self.edit_button.button_style = "save edit", "primary"
        self.fold_button.disabled = True

    def close_edit(self) -> None:
        """Leave the text as it was before the edit."""
        self.edit.layout.display = self.discard_button.layout.display = "none"
        self.edit_button.description, self.edit_button.button_style = "edit", ""
        self.fold_button.disabled = False


def differences(record: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Settings of a caption that differ from the baseline's, in words, by the names of the playground's controls."""
    values, others = _values(record), _values(baseline)
    texts = [name for name in ("prompt", "asked before") if values.pop(name) != others.pop(name)]
    changed = [
        f"{name} {_short(value)} instead of {_short(others[name])}"
        for name, value in values.items()
        if value != others[name]
    ]
    return [f"another {'prompt' if name == 'prompt' else 'question before'}" for name in texts] + changed


def _values(record: dict[str, Any]) -> dict[str, Any]:
    sampling, decoding = FrameSampling.of(record["frame_sampling"]), Decoding.of(record["decoding"])
    return {
        "prompt": setting(record, "prompt"),
        "asked before": setting(record, "steps") or [],
        "model": record.get("model"),
        "template": record["template"],
        "frame numbers": record.get("frame_numbers") or "index",
        "answer prefix": setting(record, "answer_prefix") or "",
        "frame sampling": sampling.strategy,
        "frames, at most": sampling.num_frames,
        "frames a second": sampling.frames_per_second,
        **{name: value for name, value in vars(decoding).items() if name not in ("dropped", "seed")},
        "seed": (decoding.seed or 0) if decoding.samples else None,
    }


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "none" if value is None or not text else textwrap.shorten(text, 40, placeholder=" ...")
