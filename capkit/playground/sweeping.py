"""Cards of the playground as one sweep: its axes in a file for notebook 03, and its captions made here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import yaml

from capkit.files import atomic_write
from capkit.playground.controls import TEXT, WIDE, WRAP, button
from capkit.runs import Item, setting
from capkit.text import escape, plural


class SweepBar(widgets.VBox):
    """The captions whose settings make a sweep, and its start; hidden while there is none.

    Args:
        path: the YAML file of the axes.
        clips: returns the clips of a sweep: of the chosen one, or of all.
        start: called with a sweep's clips and axes.
        on_change: called when captions were added or taken out.
    """

    def __init__(
        self,
        path: Path,
        clips: Callable[[bool], list[Item]],
        start: Callable[[list[Item], dict[str, Any]], None],
        on_change: Callable[[], None],
    ) -> None:
        self.path, self._clips, self._start, self._on_change = path, clips, start, on_change
        self.records: dict[str, dict[str, Any]] = {}  # by request
        self.about = widgets.HTML()
        self.here_button = button("sweep this clip", functools.partial(self.start, False), layout=WIDE, icon="play")
        self.all_button = button("sweep all clips", functools.partial(self.start, True), layout=WIDE, icon="play")
        self.clear_button = button("no sweep", self.clear, layout=WIDE)
        buttons = widgets.HBox([self.here_button, self.all_button, self.clear_button], layout=WRAP)
        border = {"border": "1px solid #8888", "padding": "8px", "margin": "10px 0 0", "display": "none"}
        super().__init__([self.about, buttons], layout=border)

    def toggle(self, record: dict[str, Any]) -> None:
        """Add the settings of a caption to the sweep, or take them out again, and write the axes.

        Raises:
            OSError: the file cannot be written.
        """
        if self.records.pop(record["request"], None) is None:
            self.records[record["request"]] = record
        if self.records:
            atomic_write(self.path, yaml.safe_dump(self.axes, sort_keys=False, allow_unicode=True))
        self.show()
        self._on_change()

    def clear(self) -> None:
        """Take all out; the file stays."""
        self.records.clear()
        self.show()
        self._on_change()

    @property
    def axes(self) -> dict[str, Any]:
        """The axes of the sweep, as of `read_axes`: every prompt with every decoding and frame sampling."""
        return sweep_axes(self.records.values())

    def start(self, has_all: bool) -> None:
        """Make the captions of the chosen clip, or of all clips."""
        self._start(self._clips(has_all), self.axes)

    def show(self) -> None:
        """Say what the sweep is."""
        self.layout.display = "flex" if self.records else "none"
        if not self.records:
            return
        axes, clips = self.axes, self._clips(True)
        sizes = [(axes["prompts"], "prompt"), (axes["decodings"], "decoding")]
        sizes += [(axes["frame_samplings"], "frame sampling")]
        product = " × ".join(plural(len(values), noun) for values, noun in sizes)
        cells = math.prod(map(len, axes.values()))
        about = f"Sweep of {plural(len(self.records), 'card')}: {product} = {plural(cells, 'caption')} of a clip"
        about += f", {cells * len(clips):,} of all {plural(len(clips), 'clip')}. Its axes are in {self.path}"
        self.about.value = f'<div style="{TEXT}">{escape(about)}, for notebook 03 too.</div>'


def sweep_axes(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The settings of captions as axes of a sweep, each value once."""
    axes: dict[str, list[Any]] = {"prompts": [], "decodings": [], "frame_samplings": []}
    for record in records:
        names = ("steps", "answer_prefix", "template", "frame_numbers")
        prompt = {"text": setting(record, "prompt")} | {name: setting(record, name) for name in names}
        sampling = {name: value for name, value in record["frame_sampling"].items() if value is not None}
        values = ({name: value for name, value in prompt.items() if value}, dict(record["decoding"]), sampling)
        for axis, value in zip(axes.values(), values, strict=True):
            axis += [] if value in axis else [value]
    return axes
