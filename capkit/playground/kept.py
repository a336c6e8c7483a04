"""Widgets that leave what they show in the saved notebook, for readers without a kernel or scripts."""

from __future__ import annotations

import re
import threading
from typing import Any
from uuid import uuid4

import ipywidgets as widgets
from IPython.display import DisplayHandle, display

from capkit.text import escape
from capkit.views import HTML, MUTED

UPDATE_SECONDS = 1.0  # between a change and the update of the static twin, which holds pictures


class Kept(widgets.VBox):
    """A box that a notebook shows with its static twin, which is hidden as long as the box itself is there.

    Lab saves a widget without its state, so that a notebook opened later has nothing to show in its place.
    """

    def _ipython_display_(self) -> None:
        name = f"capkit-kept-{uuid4().hex[:12]}"
        hide = widgets.HTML(f"<style>.{name} {{ display: none }}</style>", layout={"display": "none"})
        bundle = widgets.VBox([self, hide])._repr_mimebundle_()
        display(bundle | {"text/plain": ""}, raw=True)  # else its source stands where nothing can show it
        _Twin(self, name)


class _Twin:
    """Static HTML of a box in an output of its own, updated soon after each change."""

    def __init__(self, box: widgets.Box, name: str):
        self._box, self._name = box, name
        self._lock, self._is_waiting = threading.Lock(), False
        self._observe(box)
        self._handle: DisplayHandle = display(self._html(), display_id=True)

    def _observe(self, widget: widgets.Widget) -> None:
        widget.observe(self._changed, ["value", "children", "disabled"])
        for child in getattr(widget, "children", ()):
            self._observe(child)

    def _changed(self, change: Any) -> None:
        if change["name"] == "children":
            self._observe(change["owner"])
        with self._lock:
            if self._is_waiting:
                return
            self._is_waiting = True
        timer = threading.Timer(UPDATE_SECONDS, self._update)
        timer.daemon = True
        timer.start()

    def _update(self) -> None:
        with self._lock:
            self._is_waiting = False
        self._handle.update(self._html())

    def _html(self) -> HTML:
        return HTML(f'<div class="{self._name}">{static_html(self._box)}</div>')


def static_html(widget: widgets.Widget) -> str:
    """What a widget shows, as HTML without scripts: texts and pictures as they are, controls as their values."""
    if isinstance(widget, widgets.Box):
        parts = [f"<div>{part}</div>" for part in map(static_html, widget.children) if part]
        is_row = isinstance(widget, (widgets.HBox, widgets.GridBox))
        style = "display:flex;flex-wrap:wrap;gap:6px 16px" if is_row else ""
        return f'<div style="{style}">{"".join(parts)}</div>' if parts else ""
    if isinstance(widget, widgets.HTML):
        return re.sub(r"<video\b.*?</video>", "", widget.value)  # megabytes, which every update would send again
    name, value = getattr(widget, "description", ""), getattr(widget, "label", getattr(widget, "value", None))
    if not name or value in (None, "", ()) or getattr(widget, "disabled", False):
        return ""
    return f'<span style="{MUTED}">{escape(name)}:</span> <span dir="auto">{escape(value)}</span>'
