"""Blind comparison: which of two captions is better, without knowing where they come from. Needs no model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from capkit.captioning import Decoding
from capkit.runs import CaptionStore, is_stopped
from capkit.sweep import OUTCOMES, bradley_terry
from capkit.views import HTML, MUTED, frames_strip, record_text


def variant_name(record: dict[str, Any]) -> str:
    """What a caption was made with, in words: its prompt and `settings_name`."""
    return f"{record['prompt']} · {settings_name(record)}"


def settings_name(record: dict[str, Any]) -> str:
    """Settings in words: template, frame sampling and decoding; a window, and frame numbers that are true seconds."""
    sampling, end = record["frame_sampling"], record.get("end_seconds")
    how = [f"template {record['template']}", f"frames {sampling['strategy']} {sampling['num_frames']}"]
    if (start := record.get("start_seconds") or 0.0) or end is not None:
        how.append(f"from {start:g} s" + (f" to {end:g} s" if end is not None else ""))
    how += ["true seconds"] if record.get("frame_numbers") == "seconds" else []
    return " · ".join([*how, str(Decoding.of(record["decoding"]))])


class BlindRating(widgets.VBox):
    """Pairs of captions of the same clip, in random order and without labels: better, tie or worse.

    Args:
        store: where the captions are; hand edits win. Those stopped by hand are left out.
        ratings: file of ratings, JSON lines of `clip`, `first`, `second`, `outcome` and `seed`. Pairs rated there are
            not shown again.
        variants: as `variant_name` calls them; None for all that the store has.
        seed: of the order.

    Raises:
        ValueError: no clip has captions of two variants.
    """

    def __init__(
        self,
        store: CaptionStore,
        ratings: str | Path,
        variants: Sequence[str] | None = None,
        seed: int = 0,
    ):
        self.store, self.ratings, self.seed = store, Path(ratings), seed
        by_clip: dict[str, dict[str, dict]] = {}
        for record in store.current():
            name = variant_name(record)
            is_whole = record["status"] == "ok" and not is_stopped(record)
            if is_whole and (variants is None or name in variants):
                by_clip.setdefault(record["video"], {}).setdefault(name, record)
        pairs = [
            (clip, *pair)
            for clip, found in sorted(by_clip.items())
            for pair in itertools.combinations(sorted(found), 2)
        ]
        if not pairs:
            raise ValueError(f"{store.path}: no clip has captions of two variants to compare")
        random = np.random.default_rng(seed)
        rated = {(one["clip"], *sorted((one["first"], one["second"]))) for one in read_ratings(ratings)}
        self.records = by_clip
        # Sides are drawn for every pair before any is left out, so that a second sitting shows what the first would.
        turned = [(clip, *(pair[::-1] if random.random() < 0.5 else pair)) for clip, *pair in pairs]
        shuffled = [turned[place] for place in random.permutation(len(turned))]
        self.pairs = [(clip, *pair) for clip, *pair in shuffled if (clip, *sorted(pair)) not in rated]
        self.shown = widgets.HTML()
        named = {"A is better": "first", "tie": "tie", "B is better": "second"}
        self.buttons = widgets.HBox(
            [self._button(name, outcome) for name, outcome in named.items()], layout={"flex_flow": "row wrap"}
        )
        super().__init__([self.shown, self.buttons])
        self._show()

    def _button(self, name, outcome) -> widgets.Button:
        button = widgets.Button(description=name)
        button.on_click(lambda _: self.rate(outcome))
        return button

    def rate(self, outcome: str) -> None:
        """Rate the pair that is shown, and show the next one.

        Args:
            outcome: "first" (A is better), "tie" or "second".

        Raises:
            ValueError: another outcome, or no pair is left.
        """
        if outcome not in OUTCOMES or not self.pairs:
            raise ValueError(f"outcome={outcome!r}: must be one of {', '.join(OUTCOMES)}, and a pair must be left")
        clip, first, second = self.pairs.pop(0)
        rating = {"clip": clip, "first": first, "second": second, "outcome": outcome, "seed": self.seed}
        self.ratings.parent.mkdir(parents=True, exist_ok=True)
        with open(self.ratings, "a", encoding="utf-8") as file:
            file.write(json.dumps(rating, ensure_ascii=False) + "\n")
        self._show()

    def static(self) -> HTML:
        """The pair that is shown, where no button can be pressed."""
        return HTML(self.shown.value)

    def _show(self):
        if not self.pairs:
            for button in self.buttons.children:
                button.disabled = True
            self.shown.value = f"<b>All rated.</b>{ranking(self.ratings).to_html(float_format='{:.2f}'.format)}"
            return
        clip, *pair = self.pairs[0]
        first, second = (self.records[clip][name] for name in pair)
        sides = "".join(
            '<div style="flex:1 1 300px;border:1px solid #8886;border-radius:6px;padding:8px;overflow-wrap:anywhere">'
            f'<b>{side}</b><div dir="auto" style="white-space:pre-wrap">{escape(record_text(record))}</div></div>'
            for side, record in zip("AB", (first, second), strict=True)
        )
        left = "1 pair left" if len(self.pairs) == 1 else f"{len(self.pairs)} pairs left"
        self.shown.value = (
            f'<div style="line-height:1.45"><div style="{MUTED}"><bdi>{escape(Path(clip).name)}</bdi>, {left}</div>'
            f"{frames_strip(self.store, first)}"
            f'<div style="display:flex;flex-wrap:wrap;gap:10px;margin:6px 0">{sides}</div></div>'
        )


def read_ratings(path: str | Path) -> list[dict[str, Any]]:
    """The ratings in a file, the last one of each pair; none where there is no file yet.

    Raises:
        ValueError: a line that is no rating.
    """
    path, found = Path(path), {}
    if not path.exists():
        return []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rating = json.loads(line)
            found[(rating["clip"], *sorted((rating["first"], rating["second"])))] = rating
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no rating: {error!r}") from error
    return list(found.values())


def ranking(path: str | Path) -> pd.DataFrame:
    """`bradley_terry` of a file of ratings: a row per variant, the strongest first."""
    columns = ["clip", "first", "second", "outcome"]
    return bradley_terry(pd.DataFrame(read_ratings(path), columns=[*columns, "seed"])[columns])
