"""Mark captions as right, wrong or unsure while reading them beside their frames."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from capkit.playground.controls import SCROLLED, WIDE, button
from capkit.playground.kept import Kept
from capkit.runs import MARK_FIELDS, MARKS, OUTDATED, Audit, CaptionStore, CaptionStoreLike, record_text, select
from capkit.text import escape
from capkit.views import HTML, MUTED, caption_facts, file_name, frames_strip, note, table_html

_ROW = {"flex_flow": "row wrap"}
_TEXT = "line-height:1.45;overflow-wrap:anywhere"


class Marking(Kept):
    """Captions one after another, each below its frames, to mark as right, wrong or unsure; the marks are in the store.

    Opened again, it begins with the first caption that is not marked.

    Args:
        store: a `CaptionStore` or its path.
        captions: an `Audit`, whose error rate is shown as far as it is marked, or records of the store; None for all
            its captions.

    Attributes:
        place: number of the caption that is shown, from 0.

    Raises:
        ValueError: there is no caption to mark.
    """

    def __init__(self, store: CaptionStoreLike, captions: Audit | Sequence[dict[str, Any]] | None = None) -> None:
        self.store = CaptionStore.of(store)
        self.audit = captions if isinstance(captions, Audit) else None
        if captions is None:
            captions = select(self.store.current(), {"status": "ok"})
        chosen = captions.records if isinstance(captions, Audit) else captions
        self.requests = [record["request"] for record in chosen if record["status"] == "ok"]
        if not self.requests:
            raise ValueError(f"{self.store.path}: there is no caption to mark")
        self._is_marked = [_is_marked(record) for record in self.store.latest(self.requests)]
        self.place = 0 if all(self._is_marked) else self._is_marked.index(False)
        self._done: list[tuple[int, dict[str, Any], dict[str, Any]]] = []  # place, record, and mark before, by undo
        self._lock = threading.RLock()  # Lab handles messages in several threads of the kernel
        self.shown, self.message, self.rate = widgets.HTML(), widgets.HTML(), widgets.HTML()
        # Synchronized with every key: on leaving a box only, the click on a button could overtake the text.
        self.words = widgets.Text(placeholder="words that are wrong, with commas between", layout=WIDE)
        self.remark = widgets.Text(placeholder="remark", layout=WIDE)
        for control, name in ((self.words, "wrong words"), (self.remark, "remark")):
            control.description, control.style.description_width = name, "initial"
            control.layout.flex = "1 1 260px"
        styles = {"right": "success", "wrong": "danger", "unsure": "warning"}
        marks = [button(name, functools.partial(self.mark, name), button_style=styles[name]) for name in MARKS]
        self.previous_button = button("previous", functools.partial(self.go, -1), icon="arrow-left")
        self.next_button = button("next", functools.partial(self.go, 1), icon="arrow-right")
        self.undo_button = button("undo", self.undo, icon="undo")
        self.buttons = widgets.HBox([*marks, self.previous_button, self.next_button, self.undo_button], layout=_ROW)
        boxes = widgets.HBox([self.words, self.remark], layout=_ROW)
        super().__init__([self.shown, boxes, self.buttons, self.message, self.rate])
        self._show()

    def mark(self, mark: str) -> None:
        """Mark the caption that is shown, with the words and the remark in the boxes, and show the next one."""
        with self._lock:
            words = [word.strip() for word in self.words.value.split(",")]
            try:
                self.store.mark(self._record, mark, words, self.remark.value)
            except (ValueError, OSError) as error:
                self._say(str(error))
                return
            before = {name: self._record[name] for name in MARK_FIELDS} if _is_marked(self._record) else {}
            self._done.append((self.place, self._record, before))
            self._is_marked[self.place] = True
            self.go(1)

    def undo(self) -> None:
        """Take the latest mark back that was made here, and show its caption."""
        with self._lock:
            if not self._done:
                return
            place, record, before = self._done[-1]
            try:
                self.store.mark(record, before.get("mark"), before.get("wrong_words", ()), before.get("remark", ""))
            except OSError as error:
                self._say(str(error))
                return
            self._done.pop()
            self.place = place
            self._show()

    def go(self, step: int) -> None:
        """Show the caption so many places further on, if there is one."""
        with self._lock:
            self.place = min(max(self.place + step, 0), len(self.requests) - 1)
            self._show()

    def static(self) -> HTML:
        """What is shown, as static HTML."""
        return HTML(self.shown.value + self.rate.value)

    def _show(self) -> None:
        self._record = record = self.store.latest([self.requests[self.place]])[0]
        self._is_marked[self.place] = _is_marked(record)
        left = f"caption {self.place + 1} of {len(self.requests)}; {self._is_marked.count(False)} not marked"
        prompt = f'<span dir="auto">{escape(record.get("prompt", ""))}</span>'
        text = (
            f'<div dir="auto" style="white-space:pre-wrap;margin:6px 0;{SCROLLED}">{escape(record_text(record))}</div>'
        )
        self.shown.value = (
            f'<div style="{_TEXT}"><div style="{MUTED}">{file_name(record)}; {left}. {prompt}</div>'
            f'{frames_strip(self.store, record)}{text}<div style="{MUTED}">{caption_facts(record)}</div></div>'
        )
        mark = record if _is_marked(record) else {}
        self.words.value, self.remark.value = ", ".join(mark.get("wrong_words", ())), mark.get("remark", "")
        self.previous_button.disabled = self.place == 0
        self.next_button.disabled = self.place == len(self.requests) - 1
        self.undo_button.disabled = not self._done
        self._say("")
        if self.audit is not None:
            formats = dict.fromkeys(("share_wrong", "low", "high"), "{:.3f}")
            self.rate.value = table_html(self.audit.error_rate(), formats)

    def _say(self, message: str) -> None:
        self.message.value = f'<div role="alert" style="{_TEXT}">{note(escape(message))}</div>' if message else ""


def _is_marked(record: dict[str, Any]) -> bool:
    return record.get("mark", OUTDATED) != OUTDATED
