"""The playground: a panel to choose a clip, prompt and settings, caption it, and compare the results."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from capkit.captioning import Caption, Captioner, CaptionStream, Decoding
from capkit.cogvlm2 import Prompt
from capkit.playground.blind import has_settings
from capkit.playground.card import Card
from capkit.playground.chooser import ClipChooser
from capkit.playground.controls import TEXT, button, locked, message_html
from capkit.playground.keys import KeyPanel, with_key
from capkit.playground.settings import Settings
from capkit.playground.sweeping import SweepBar
from capkit.runs import (
    MARK_FIELDS,
    CaptionStore,
    CaptionStoreLike,
    Item,
    clip_id,
    filled_prompt,
    is_stopped,
    new_record,
    request_settings,
    setting,
)
from capkit.sweep import run_sweep
from capkit.text import escape, plural
from capkit.video import Clip, VideoError

_GRID = {"grid_template_columns": "repeat(auto-fill, minmax(min(100%, 290px), 1fr))", "grid_gap": "2px 12px"}
_CARDS = {"grid_template_columns": "repeat(auto-fit, minmax(min(100%, 290px), 1fr))", "grid_gap": "12px"}
_CARDS |= {"align_items": "flex-start", "flex": "2 1 400px", "max_height": "85vh", "overflow": "auto"}
MOST_CARDS = 24  # of earlier
UPDATE_SECONDS = 0.05  # least time between two updates of the text: a fast model would flood the page


class Playground(KeyPanel):
    """A panel to try prompts and settings on clips. A thread makes the captions, so the panel stays usable.

    Ctrl+Enter captions, Escape stops, the left and right arrows change the clip.

    Args:
        captioner: from `load_captioner`.
        clips: file names.
        store: where results are saved, and earlier ones come from; None keeps them in the panel only.
        output_dir: folder for uploaded clips and sweep settings.

    Attributes:
        results: (record, caption) of the captions made in this panel, the newest first.
        settings, chooser: the controls, each also an attribute of its own, such as `panel.temperature`.
    """

    def __init__(
        self,
        captioner: Captioner,
        clips: Iterable[str],
        store: CaptionStoreLike | None = None,
        output_dir: str | Path = "runs/playground",
    ) -> None:
        self.captioner, self.output_dir = captioner, Path(output_dir)
        self.store = store = None if store is None else CaptionStore.of(store)
        self.results: list[tuple[dict[str, Any], Caption]] = []
        self._stored: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by clip, the newest last
        for record in [] if store is None else store.current():
            if has_settings(record):
                self._stored[clip_id(record)].append(record)
        prompts = [setting(record, "prompt") for records in self._stored.values() for record in reversed(records)]
        self.settings = Settings(dict.fromkeys(prompts))
        uploads = self.output_dir / "uploads"
        self.chooser = ClipChooser(map(str, clips), self.settings, captioner, uploads, self._show_clip)
        self._lock = self.chooser._lock
        controls = self.settings.controls | {
            name: control
            for part in (self.settings, self.chooser)
            for name, control in vars(part).items()
            if isinstance(control, widgets.Widget) and name != "message"
        }
        for name, control in controls.items():
            setattr(self, name, control)
        self._cards: dict[str, list[Card]] = {}  # by clip, the newest last
        self._baselines: dict[str, Card] = {}  # by clip
        self._captioned: dict[str, Any] | None = None  # settings of the caption that is being made
        self._words_clip = ""  # its picture and name
        self._stream: CaptionStream | None = None
        self._thread: threading.Thread | None = None
        self._is_stopped = threading.Event()  # a sweep
        self.message, self.progress = widgets.HTML(), widgets.HTML()
        self.caption_button = button("Caption", self.start, button_style="primary", icon="play")
        self.stop_button = button("Stop", self.stop, icon="stop", disabled=True)
        self.caption_button.tooltip, self.stop_button.tooltip = "Ctrl+Enter", "Escape"
        with_key(self.caption_button, "ctrl-enter")
        with_key(self.stop_button, "escape")
        self.words_clip = widgets.HTML()  # whose words come, where another clip is shown
        # Scrolled to its end, so that a long caption does not stretch the page.
        end = {"display": "flex", "flex_flow": "column-reverse", "max_height": "18em", "overflow": "auto"}
        self.words = widgets.HTML(layout=end)  # of the caption that is being made
        self.baseline = widgets.VBox(layout={"flex": "1 1 260px", "min_width": "0"})
        self.cards = widgets.GridBox(layout=_CARDS)
        self.older = widgets.HTML()
        axes_file = self.output_dir / "sweep_axes.yaml"
        self.sweep = SweepBar(axes_file, self.chooser.items, self._start_sweep, self._show_sweep)
        row = {"display": "flex", "flex_flow": "row wrap"}
        compared = widgets.Box([self.cards, self.baseline], layout=row | {"grid_gap": "12px", "margin": "10px 0"})
        self.baseline.layout.order = "-1"  # in the page the newest comes first, for the keyboard
        super().__init__([self._top(row), self.sweep, compared, self.older])
        for control in self.settings.controls.values():
            control.observe(lambda _: self._show_message(""), "value")
        self.chooser.read()

    def _top(self, row: dict[str, str]) -> widgets.Box:
        """The controls: the clip at the left, the settings at the right."""
        settings, chooser = self.settings, self.chooser
        clip = [*chooser.above, self.words_clip, self.words, *chooser.below]
        questions = [settings.preset, settings.earlier_prompts, settings.steps, settings.prompt]
        controls = widgets.GridBox([*settings.of_prompt.values(), *settings.of_decoding.values()], layout=_GRID)
        buttons = widgets.HBox([self.caption_button, self.stop_button])
        right = [*questions, controls, settings.explained, buttons, self.message, self.progress]
        left = widgets.VBox([*clip, *settings.of_frames.values()], layout={"flex": "1 1 280px", "min_width": "0"})
        right_box = widgets.VBox(right, layout={"flex": "2 1 340px", "min_width": "0"})
        return widgets.Box([left, right_box], layout=row | {"grid_gap": "0 16px"})

    @property
    def clip(self) -> Clip | None:
        """The chosen clip's frames; None if they could not be read."""
        return self.chooser.clip

    # ---- captioning ------------------------------------------------------------------------------------------------

    @locked
    def start(self) -> None:
        """Caption the chosen clip with the chosen settings, in a thread."""
        if self.is_busy:
            return
        if (clip := self.clip) is None:
            self._show_message("there is no clip to caption: choose one above")
            return
        try:
            decoding, settings = self.settings.decoding(), self._request_settings(clip)
            prompt = filled_prompt(settings, clip)
            self._stream = self.captioner.stream(clip, prompt, decoding) if decoding.num_beams == 1 else None
        except ValueError as error:
            self._show_message(self.settings.in_their_names(str(error)))
            return
        self._captioned = settings
        name = f"<b><bdi>{escape(Path(settings['video']).name)}</bdi></b>"
        self._words_clip = f'{self.chooser.thumbnail()}<div style="{TEXT}">{name}:</div>'
        self.words.value = "<i>reading the frames ...</i>"
        self._show_words_clip()
        self._in_thread(lambda: self._run(clip, settings, prompt, decoding), self._stream is not None)

    @property
    def is_busy(self) -> bool:
        """Whether a caption, or a sweep, is being made."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the running caption after the current token, and keep its text so far; or a sweep after its clip."""
        self._is_stopped.set()
        if self._stream is not None:
            self._stream.stop()

    def wait(self) -> None:
        """Wait until the running caption, or sweep, is finished."""
        if self._thread is not None:
            self._thread.join()

    def _in_thread(self, run: Callable[[], None], can_stop: bool) -> None:
        def run_and_tell() -> None:
            try:
                run()
            except Exception as error:  # whatever it is, it is shown in the panel
                kind = "" if isinstance(error, (ValueError, VideoError)) else f"{type(error).__name__}: "
                self._show_message(self.settings.in_their_names(f"{kind}{error}"))
            finally:
                self.caption_button.disabled, self.stop_button.disabled = False, True

        self._show_message("")
        self._is_stopped.clear()
        self.caption_button.disabled, self.stop_button.disabled = True, not can_stop
        self._thread = threading.Thread(target=run_and_tell, daemon=True)
        self._thread.start()

    def _request_settings(self, clip: Clip) -> dict[str, Any]:
        """A record's settings, with the prompt's fields filled for the clip.

        Raises:
            ValueError: as in `Settings.chosen_prompt`, or a field that has no value.
        """
        window, chosen = (clip.frame_sampling or "chat", clip.start_seconds, clip.end_seconds), self.settings
        video = clip.info.path or "frames in memory"
        return request_settings(self.captioner, video, chosen.chosen_prompt(), chosen.decoding(), *window)

    def _run(self, clip: Clip, settings: dict[str, Any], prompt: Prompt, decoding: Decoding) -> None:
        """Caption a clip and show the words as they come; beam search has them only at the end."""
        stream, text, updated = self._stream, "", 0.0
        try:
            for piece in stream or ():
                text += piece
                if time.monotonic() - updated >= UPDATE_SECONDS:
                    style = f"white-space:pre-wrap;{TEXT}"
                    self.words.value = f'<div dir="auto" style="{style}">{escape(text.lstrip())} ▏</div>'
                    updated = time.monotonic()
            self._add_result(
                clip, settings, stream.caption if stream else self.captioner.caption(clip, prompt, decoding)
            )
        finally:
            self._captioned, self.words.value = None, ""
            self._show_words_clip()

    def _show_words_clip(self) -> None:
        """Words are below the picture of their own clip: where another is shown, they bring theirs."""
        is_other = self._captioned is not None and clip_id(self._captioned) != self._clip_id()
        self.words_clip.value = self._words_clip if is_other else ""

    def _add_result(self, clip: Clip, settings: dict[str, Any], caption: Caption) -> None:
        record = new_record(settings, caption, clip)
        if self.store is not None:
            self.store.save_strip(settings, clip, self.captioner.processor.image_size)
            self.store.append(record)
        self.results.insert(0, (record, caption))
        self.settings.add_earlier(setting(record, "prompt"))
        self._add_card(record)

    def _start_sweep(self, items: list[Item], axes: dict[str, Any]) -> None:
        """Caption clips with the axes, in a thread."""
        if not self.is_busy:
            self._stream = None
            self._in_thread(lambda: self._run_sweep(items, axes), can_stop=True)

    def _run_sweep(self, items: list[Item], axes: dict[str, Any]) -> None:
        num_done = num_made = num_failed = 0
        try:
            for item in items:
                self.progress.value = f"<i>sweep: {num_done} of {plural(len(items), 'clip')}</i>"
                shown = {card.record["request"] for card in itertools.chain.from_iterable(self._cards.values())}
                for record in run_sweep(self.captioner, [item], self.store, **axes).records:
                    num_made += record["status"] == "ok"
                    num_failed += record["status"] == "error"
                    if has_settings(record) and record["request"] not in shown:
                        self._add_card(record)
                num_done += 1
                if self._is_stopped.is_set():
                    break
        finally:
            self.progress.value = ""
        place = "this panel" if self.store is None else self.store.path
        done = (
            f"{plural(num_made, 'caption')}, {plural(num_failed, 'error')}, {num_done} of {plural(len(items), 'clip')}"
        )
        self._show_message(f"sweep: {done}; in {place}", is_good=not num_failed)

    # ---- results ---------------------------------------------------------------------------------------------------

    def _clip_id(self) -> str:
        video = str(Path(self.chooser.video.value).expanduser().absolute()) if self.chooser.video.value else ""
        start, end = self.settings.window()
        return clip_id({"video": video, "start_seconds": start, "end_seconds": end})

    def _show_clip(self) -> None:
        self._show_message("")
        self._show_words_clip()
        self._show_results()
        self.sweep.show()  # clips may have been added

    def _cards_of(self, clip: str) -> list[Card]:
        """The cards of a clip, of earlier sittings first."""
        if clip not in self._cards:
            earlier = self._stored[clip][-MOST_CARDS:]
            self._cards[clip] = [self._new_card(record, is_stored=True) for record in earlier]
        return self._cards[clip]

    def _new_card(self, record: dict[str, Any], is_stored: bool = False) -> Card:
        actions = (self._make_baseline, self._save_edit, self._use_settings, self._to_sweep)
        return Card(record, *actions, is_stored=is_stored)

    @locked
    def _add_card(self, record: dict[str, Any]) -> None:
        """Add a caption to its clip's cards; it takes the place of the one that the store had for this request."""
        cards = self._cards_of(clip_id(record))
        same = [card for card in cards if card.record["request"] == record["request"]]
        by_hand = ("edited_text", *MARK_FIELDS)
        record |= {name: card.record[name] for card in same for name in by_hand if name in card.record}
        if same and same[0].is_stored and not is_stopped(record):
            card = same[0]
            card.record, card.is_stored = record, False
            cards.remove(card)
        else:
            card = self._new_card(record)
        cards.append(card)
        self._show_results()

    @locked
    def _show_results(self) -> None:
        """Show the captions of the chosen clip alone, the newest first: only those can be compared."""
        clip = self._clip_id()
        cards = self._cards_of(clip)[::-1]
        num_older = len(self._stored[clip]) - MOST_CARDS
        self.older.value = f"{num_older} older ones of this clip in the store" if num_older > 0 else ""
        if not cards:
            self.baseline.children = self.cards.children = ()
            return
        baseline = self._baselines.setdefault(clip, cards[-1])
        for place, card in enumerate(cards):
            card.show(baseline.record, self.chooser.notice)
            card.layout.order = str(place)
        others = [card for card in cards if card is not baseline]
        kept = [card for card in self.cards.children if card in others]
        if any(card.is_edited for card in kept):  # the page makes anew what comes after a change: the cursor were lost
            others = kept + [card for card in others if card not in kept]
        self.cards.children = others
        self.baseline.children = [baseline]

    def _make_baseline(self, card: Card) -> None:
        self._baselines[clip_id(card.record)] = card
        self._show_results()

    def _save_edit(self, card: Card) -> None:
        record = card.record
        record["edited_text"] = card.edit.value
        if self.store is not None:
            self.store.edit(record["request"], card.edit.value)
            latest = self.store.latest([record["request"]])[0]  # a mark of another text is outdated now
            record |= {name: latest[name] for name in MARK_FIELDS if name in latest}
        card.close_edit()
        self._show_message("kept" if self.store is not None else "kept in this panel; there is no store", is_good=True)
        self._show_results()

    def _use_settings(self, card: Card) -> None:
        lost: list[str] = []
        self.chooser.change(lambda: lost.extend(self.settings.apply(card.record)))
        if lost:
            self._show_message(f"the controls cannot show these settings, which were left out: {', '.join(lost)}")
        else:
            self._show_message("the controls have the settings of the caption", is_good=True)

    def _to_sweep(self, card: Card) -> None:
        """Add a card to the sweep, or take it out."""
        self.sweep.toggle(card.record)
        self._show_message(f"sweep axes written to {self.sweep.path}" if self.sweep.records else "", is_good=True)

    def _show_sweep(self) -> None:
        for card in itertools.chain.from_iterable(self._cards.values()):
            is_in = card.record["request"] in self.sweep.records
            card.sweep_button.description = "out of the sweep" if is_in else "to a sweep"

    def _show_message(self, message: str, is_good: bool = False) -> None:
        self.message.value = message_html(message, is_good)
