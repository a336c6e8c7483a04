"""Click a word of a caption and see where the model looked for it."""

from __future__ import annotations

import functools
import threading

import ipywidgets as widgets

from capkit.captioning import AttentionMap
from capkit.playground.controls import WIDE, button
from capkit.playground.kept import Kept
from capkit.text import plain_text
from capkit.video import Clip
from capkit.views import content_words, word_frames


class Looked(Kept):
    """The words of a caption as buttons; a click shows the frames, bright where the word attends to them.

    `capkit.views.show_attention` shows all content words at once, without a kernel.

    Args:
        looked: from `attend`.
        clip: the same clip.

    Attributes:
        place: of the word that is shown, in `looked.words`; at first of the first content word.

    Raises:
        ValueError: the clip has another number of frames, or the caption has no words.
    """

    def __init__(self, looked: AttentionMap, clip: Clip) -> None:
        if not looked.words:
            raise ValueError("there are no words in this caption")
        self.looked, self.clip, self._lock = looked, clip, threading.Lock()
        self.buttons = widgets.HBox(
            [
                button(plain_text(word), functools.partial(self.show, at), layout=WIDE)
                for at, (word, _) in enumerate(looked.words)
            ],
            layout={"flex_flow": "row wrap"},
        )
        self.shown = widgets.HTML()
        super().__init__([self.buttons, self.shown])
        self.place = 0
        self.show(next(iter(content_words(looked)), 0))

    def show(self, place: int) -> None:
        """Show where the model looked for the word at this place."""
        with self._lock:  # Lab handles messages in several threads of the kernel
            self.buttons.children[self.place].button_style = ""
            self.place = place
            self.buttons.children[place].button_style = "info"
            self.shown.value = word_frames(self.looked, self.clip, place).html
