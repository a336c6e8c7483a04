"""Blind comparison of captions: rate pairs of the same clip without knowing what they were made with.

A window of a video is a clip of its own.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from capkit.captioning import Decoding
from capkit.files import append_lines, atomic_write, read_lines
from capkit.playground.controls import SCROLLED, WRAP, button
from capkit.playground.keys import KeyPanel, with_key
from capkit.runs import CaptionStore, CaptionStoreLike, clip_id, is_stopped, prompt_title
from capkit.sweep import OUTCOMES, bradley_terry, bradley_terry_pairs
from capkit.text import escape, spreadsheet_cell
from capkit.video import FrameSampling
from capkit.views import HTML, MUTED, file_name, frames_strip, record_text, table_html

UNDONE = "undone"  # in place of an outcome
Pair = tuple[str, str, str]
"""A clip, as `clip_id` names it, and the names of the two variants."""


def has_settings(record: dict[str, Any]) -> bool:
    """Whether a record holds a caption and tells what it was made with; of one not written by capkit it may not."""
    try:
        return record["status"] == "ok" and bool(variant_name(record))
    except (KeyError, ValueError, TypeError):
        return False


def variant_name(record: dict[str, Any]) -> str:
    """What a caption was made with: its prompt and `settings_name`."""
    return f"{prompt_title(record)} · {settings_name(record)}"


def settings_name(record: dict[str, Any]) -> str:
    """A record's template, frame sampling, frame numbers, answer prefix and decoding, in short."""
    sampling = FrameSampling.of(record["frame_sampling"])
    settings = [f"template {record['template']}", f"frames {sampling.strategy} {sampling.num_frames}"]
    settings += ["true seconds"] if record.get("frame_numbers") == "seconds" else []
    settings += [f"begins {record['answer_prefix']!r}"] if record.get("answer_prefix") else []
    return " · ".join([*settings, str(Decoding.of(record["decoding"]))])


class BlindRating(KeyPanel):
    """Pairs of captions of the same clip, unlabelled and in random order, to rate as better, tie or worse.

    Above a pair are the frames that the model saw; where they differ, each caption has its own. Keys: A, T and B rate,
    S or the right arrow skips, U undoes. The ranking so far is below, folded, as it may sway; it is also in two tables
    beside the ratings, `<name>_ranking.csv` and `<name>_ranking_pairs.csv`.

    Args:
        store: where the captions are. Hand-edited texts replace the model's; stopped captions are left out.
        ratings: file of ratings, JSON lines of `clip`, `first`, `second`, `outcome` and `seed`. Pairs rated there are
            not shown again. The last line of a pair counts; the outcome "undone" takes it back.
        variants: as `variant_name` names them; None for all in the store.
        seed: of the order.

    Raises:
        ValueError: no clip has captions of two variants.
    """

    def __init__(
        self, store: CaptionStoreLike, ratings: str | Path, variants: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        self.store = store = CaptionStore.of(store)
        self.ratings, self.seed = Path(ratings), seed
        self.records: dict[str, dict[str, dict[str, Any]]] = {}  # by clip and variant
        for record in store.current():
            if not has_settings(record) or is_stopped(record):
                continue
            name = variant_name(record)
            if variants is None or name in variants:
                self.records.setdefault(clip_id(record), {}).setdefault(name, record)
        pairs = [
            (clip, first, second)
            for clip, by_name in sorted(self.records.items())
            for first, second in itertools.combinations(sorted(by_name), 2)
        ]
        if not pairs:
            raise ValueError(f"{store.path}: no clip has captions of two variants to compare")
        random = np.random.default_rng(seed)
        self._rated = {_unordered(rating): rating for rating in read_ratings(ratings)}
        # Sides are drawn for every pair before rated ones are left out, so that a later session keeps the order.
        pairs = [(clip, b, a) if random.random() < 0.5 else (clip, a, b) for clip, a, b in pairs]
        pairs = [pairs[place] for place in random.permutation(len(pairs))]
        self.pairs: list[Pair] = [pair for pair in pairs if (pair[0], *sorted(pair[1:])) not in self._rated]
        self._done: list[tuple[Pair, bool]] = []  # pairs of this sitting, and whether they were rated or skipped
        self.shown, self.ranking = widgets.HTML(), widgets.HTML()
        outcomes = {"A is better": ("first", "a"), "tie": ("tie", "t"), "B is better": ("second", "b")}
        buttons = [
            with_key(button(name, functools.partial(self.rate, outcome), tooltip=f"key {key.upper()}"), key)
            for name, (outcome, key) in outcomes.items()
        ]
        self.skip_button = with_key(button("skip", self.skip, icon="arrow-right", tooltip="key S"), "s", "arrowright")
        self.undo_button = with_key(button("undo", self.undo, icon="undo", tooltip="key U"), "u")
        self.buttons = widgets.HBox(buttons, layout=WRAP)
        more = widgets.HBox([self.skip_button, self.undo_button], layout=WRAP)
        ranked = widgets.Accordion([self.ranking], titles=["the ranking so far"])
        super().__init__([self.shown, widgets.HBox([self.buttons, more], layout=WRAP), ranked])
        self._show()

    def rate(self, outcome: str) -> None:
        """Rate the pair that is shown, and show the next one.

        Args:
            outcome: "first" (A is better), "tie" or "second".

        Raises:
            ValueError: another outcome, or no pair is left.
        """
        if outcome not in OUTCOMES or not self.pairs:
            raise ValueError(f"outcome={outcome!r}: must be one of {', '.join(OUTCOMES)}, and a pair must be left")
        self._write(self.pairs[0], outcome)
        self._done.append((self.pairs.pop(0), True))
        self._show()

    def skip(self) -> None:
        """Show another pair; this one comes again at the end."""
        if len(self.pairs) > 1:
            self._done.append((self.pairs[0], False))
            self.pairs.append(self.pairs.pop(0))
            self._show()

    def undo(self) -> None:
        """Show the pair again that was rated or skipped last in this sitting, and take its rating back."""
        if not self._done:
            return
        pair, was_rated = self._done[-1]
        if was_rated:
            self._write(pair, UNDONE)
        else:
            self.pairs.remove(pair)
        self._done.pop()
        self.pairs.insert(0, pair)
        self._show()

    def _write(self, pair: Pair, outcome: str) -> None:
        self.ratings.parent.mkdir(parents=True, exist_ok=True)
        rating = dict(zip(("clip", "first", "second"), pair, strict=True)) | {"outcome": outcome, "seed": self.seed}
        append_lines(self.ratings, rating)
        self._rated.pop(_unordered(rating), None)
        if outcome != UNDONE:
            self._rated[_unordered(rating)] = rating
        for name, table in zip(("ranking", "ranking_pairs"), rankings(self._rated.values()), strict=True):
            content = table.map(spreadsheet_cell).to_csv(index=False)
            atomic_write(self.ratings.with_name(f"{self.ratings.stem}_{name}.csv"), content)

    def static(self) -> HTML:
        """The pair that is shown, as static HTML."""
        return HTML(self.shown.value)

    def _show(self) -> None:
        tables = rankings(self._rated.values())
        html = "<br>".join(map(table_html, tables))
        self.ranking.value = f'<div style="overflow:auto">{html if self._rated else "nothing is rated yet"}</div>'
        for control in self.buttons.children:
            control.disabled = not self.pairs
        self.skip_button.disabled, self.undo_button.disabled = len(self.pairs) < 2, not self._done
        if not self.pairs:
            self.shown.value = f"<b>All rated.</b><br>{self.ranking.value}"
            return
        clip, *names = self.pairs[0]
        records = [self.records[clip][name] for name in names]
        strips = [frames_strip(self.store, record) for record in records]
        shared = strips[0] if strips[0] == strips[1] else ""
        sides = "".join(
            '<div style="flex:1 1 300px;border:1px solid #8886;border-radius:6px;padding:8px;overflow-wrap:anywhere">'
            f"<b>{side}</b><br>{'' if shared else strip}"
            f'<div dir="auto" style="white-space:pre-wrap;{SCROLLED}">{escape(record_text(record))}</div></div>'
            for side, record, strip in zip("AB", records, strips, strict=True)
        )
        left = "1 pair left" if len(self.pairs) == 1 else f"{len(self.pairs)} pairs left"
        self.shown.value = (
            f'<div style="line-height:1.45"><div style="{MUTED}">{file_name(records[0])}; {left}</div>{shared}'
            f'<div style="display:flex;flex-wrap:wrap;gap:10px;margin:6px 0">{sides}</div></div>'
        )


def _unordered(rating: dict[str, Any]) -> Pair:
    """A rated pair, whichever caption was on which side."""
    first, second = sorted((rating["first"], rating["second"]))
    return rating["clip"], first, second


def read_ratings(path: str | Path) -> list[dict[str, Any]]:
    """The ratings in a file, the last one of each pair; none if there is no file yet. Damaged lines give a warning.

    Raises:
        ValueError: an object that is no rating.
    """
    ratings: dict[Pair, dict[str, Any]] = {}
    for rating in read_lines(Path(path)):
        names = (rating.get("clip"), rating.get("first"), rating.get("second"))
        if not all(isinstance(name, str) for name in names) or rating.get("outcome") not in (*OUTCOMES, UNDONE):
            raise ValueError(f"{path}: {json.dumps(rating)} is no rating; mend or delete this line")
        ratings.pop(_unordered(rating), None)
        if rating["outcome"] != UNDONE:
            ratings[_unordered(rating)] = rating
    return list(ratings.values())


def rankings(ratings: Iterable[dict[str, Any]]) -> list[pd.DataFrame]:
    """`bradley_terry` and `bradley_terry_pairs` of ratings: variants, and one variant against another."""
    table = pd.DataFrame(list(ratings), columns=["clip", "first", "second", "outcome"])
    return [bradley_terry(table), bradley_terry_pairs(table)]
