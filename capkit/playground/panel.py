"""The playground: choose a clip, drag through its frames, ask, watch the words come, keep results side by side."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import yaml
from PIL import Image

from capkit.captioning import Caption, Captioner, Decoding
from capkit.cogvlm2 import Prompt, pixels_to_frames, preprocess_frames
from capkit.playground.blind import settings_name
from capkit.playground.controls import WIDE, asking_controls, decoding_controls, frame_controls
from capkit.runs import CaptionStore, new_record, request_settings
from capkit.sweep import PROMPT_PRESETS
from capkit.video import Clip, FrameSampling, VideoError, load_clip
from capkit.views import MUTED, RED, mark_differences, numbers_warning, picture, record_text, to_webp

_GRID = {"grid_template_columns": "repeat(auto-fill, minmax(min(100%, 290px), 1fr))", "grid_gap": "2px 12px"}
_CARDS = _GRID | {"grid_template_columns": _GRID["grid_template_columns"].replace("fill", "fit")}
_CARDS |= {"grid_gap": "12px", "align_items": "flex-start", "margin": "10px 0"}
_TEXT = "line-height:1.45;overflow-wrap:anywhere"  # a widget's lines are as far apart as its controls
MOST_CARDS = 24
UPDATE_SECONDS = 0.05  # words are shown at most so often: a fast model would flood the page
_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
"""Settings that act on the draw alone, and the values at which they do nothing."""


def _in_turn(method):
    """One at a time: Lab has messages handled in several threads of the kernel (its subshells), and of two clips read
    at once the one shown might not be the one captioned."""

    @functools.wraps(method)
    def waiting(self, *args):
        with self._turn:
            return method(self, *args)

    return waiting


class Playground(widgets.VBox):
    """A panel to try prompts and settings on clips. Captions are made in a thread: the panel stays usable.

    Args:
        captioner: from `load_captioner`.
        clips: file names.
        store: where results go as they come, and from which earlier ones come back; None keeps them in the panel
            alone.
        output_dir: where uploaded clips and sweep settings go.

    Attributes:
        results: (record, caption) of what was captioned in this panel, the newest first.
        clip: the frames at hand, or None where they could not be read.
    """

    def __init__(
        self,
        captioner: Captioner,
        clips: Sequence[str],
        store: CaptionStore | None = None,
        output_dir: str | Path = "runs/playground",
    ):
        self.captioner, self.store, self.output_dir = captioner, store, Path(output_dir)
        self.results: list[tuple[dict[str, Any], Caption]] = []
        stored = [] if store is None else store.current()
        self._stored = [record for record in reversed(stored) if record["status"] == "ok"]
        self._baselines: dict[str, dict[str, Any]] = {}
        self._turn = threading.RLock()
        self.clip, self._stream, self._thread = None, None, None
        names = [(Path(clip).name, str(clip)) for clip in clips]
        self.video = widgets.Dropdown(options=names, description="clip", layout=WIDE)
        self.upload = widgets.FileUpload(accept="video/*", description="add a clip")
        self.path = widgets.Text(placeholder="or a file name, for any size", continuous_update=False, layout=WIDE)
        self.frame = widgets.IntSlider(0, min=0, max=0, description="frame", layout=WIDE)
        self.picture = widgets.HTML()  # of which widgets.Image would tell a screen reader nothing
        self.about_frame = widgets.HTML()
        self._make_settings()
        self.caption_button = widgets.Button(description="Caption", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.words = widgets.HTML()
        self.message = widgets.HTML()
        self.cards = widgets.GridBox(layout=_CARDS)
        add = widgets.HBox([self.upload, self.path])
        seen = [self.video, add, self.picture, self.frame, self.about_frame, *self._choose_frames]
        left = widgets.VBox(seen, layout={"flex": "1 1 300px", "min_width": "0"})
        buttons = widgets.HBox([self.caption_button, self.stop_button])
        right = widgets.VBox(
            [self.settings, buttons, self.message, self.words], layout={"flex": "2 1 400px", "min_width": "0"}
        )
        top = widgets.Box([left, right], layout={"display": "flex", "flex_flow": "row wrap", "grid_gap": "0 16px"})
        super().__init__([top, self.cards])
        self._listen()
        self._explain()
        self._read_clip()

    def _make_settings(self):
        self.preset = widgets.Dropdown(options=["", *PROMPT_PRESETS], description="preset", layout=WIDE)
        asked = dict.fromkeys(record["prompt"] for record in self._stored)
        self.asked_before = widgets.Dropdown(options=["", *asked], description="asked", layout=WIDE)
        start = PROMPT_PRESETS["default"][0]
        # Told with every letter: told on leaving the box, it could be overtaken by the click on Caption.
        self.prompt = widgets.Textarea(start, description="prompt", rows=3, layout=WIDE)
        self.explained = widgets.HTML()
        asking, frames, decoding = asking_controls(), frame_controls(), decoding_controls()
        vars(self).update(asking | frames | decoding)
        self._choose_frames, self._decode = tuple(frames.values()), decoding
        controls = widgets.GridBox([*asking.values(), *decoding.values()], layout=_GRID)
        self.settings = widgets.VBox([self.preset, self.asked_before, self.prompt, controls, self.explained])

    def _listen(self):
        self.video.observe(lambda _: self._read_clip(), "value")
        for control in self._choose_frames:
            control.observe(lambda _: self._read_clip(), "value")
        for control in (*self._choose_frames, *self._decode.values(), self.template, self.frame_numbers):
            control.observe(lambda _: self._explain(), "value")
        for control in (self.frame, self.frame_numbers, self.template):
            control.observe(lambda _: self._show_frame(), "value")
        self.upload.observe(lambda _: self._add_uploads(), "value")
        self.path.observe(lambda change: self._add_clip(change["new"].strip()), "value")
        self.preset.observe(lambda change: self._ask(PROMPT_PRESETS.get(change["new"], ("",))[0]), "value")
        self.asked_before.observe(lambda change: self._ask(change["new"]), "value")
        self.prompt.observe(lambda change: self._name_prompt(change["new"]), "value")
        self._name_prompt(self.prompt.value)
        self.caption_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())

    def _ask(self, prompt):
        if prompt:
            self.prompt.value = prompt

    def _name_prompt(self, prompt):
        """The lists above the prompt show what it is: an edited preset is none any more, and can be chosen again."""
        presets = [name for name, (text, _) in PROMPT_PRESETS.items() if text == prompt]
        self.preset.value = presets[0] if presets else ""
        self.asked_before.value = prompt if prompt in self.asked_before.options else ""

    # ---- what is asked ---------------------------------------------------------------------------------------------

    def decoding(self) -> Decoding:
        """The decoding that the controls stand for; those that are greyed are left out."""
        return Decoding(**{name: getattr(self, name).value for name in self._names_with_effect()})

    def _names_with_effect(self):
        names = ["max_new_tokens", "num_beams", "repetition_penalty", "no_repeat_ngram_size"]
        if self.num_beams.value == 1:
            names.append("temperature")
            if self.temperature.value > 0:
                names += [name for name in _SAMPLING if name != "top_k" or self.top_k.value != 1]
        return names

    def frame_sampling(self) -> FrameSampling:
        """The frame sampling that the controls stand for."""
        rate = self.frames_per_second.value if self.strategy.value == "fps" else None
        return FrameSampling(self.strategy.value, self.num_frames.value, rate)

    def chosen_prompt(self) -> Prompt:
        """The prompt that the controls stand for.

        Raises:
            ValueError: the prompt is empty.
        """
        return Prompt(self.prompt.value, self.template.value, frame_numbers=self._frame_numbers())

    def _frame_numbers(self) -> str:
        return self.frame_numbers.value if self.template.value == "chat" else "index"

    def _explain(self):
        """Grey out what has no effect, and say why."""
        effective = self._names_with_effect()
        for name, control in self._decode.items():
            control.disabled = name not in effective
        self.frames_per_second.disabled = self.strategy.value != "fps"
        self.frame_numbers.disabled = self.template.value != "chat"
        if self.num_beams.value > 1:
            why = (
                "beam search keeps several captions and does not draw: temperature and what goes with it have no effect"
            )
        elif self.temperature.value == 0:
            why = "temperature 0 is greedy, always the likeliest word: top_p, top_k, min_p and seed have no effect"
        else:
            why = "words are drawn: another seed gives another caption"
        if self.template.value != "chat":
            why += f'; template "{self.template.value}" numbers no frames'
        self.explained.value = f'<div style="opacity:.7;{_TEXT}">{escape(why)}.</div>'

    # ---- the clip --------------------------------------------------------------------------------------------------

    @_in_turn
    def _read_clip(self):
        try:
            window = (self.start_seconds.value, self.end_seconds.value or None)
            self.clip = load_clip(self.video.value, self.frame_sampling(), *window) if self.video.value else None
            self._tell("")
        except (VideoError, ValueError) as error:
            self.clip = None
            self._tell(str(error))
        self._seen = None
        if self.clip is not None:
            self._seen = pixels_to_frames(preprocess_frames(self.clip.frames, self.captioner.processor.image_size))
            self.frame.max = len(self.clip) - 1
        self._show_frame()
        self._show_results()

    @_in_turn
    def _show_frame(self):
        if self._seen is None:
            self.picture.value, self.about_frame.value = "", ""
            return
        place = min(self.frame.value, len(self._seen) - 1)
        time = self.clip.timestamps_seconds[place]
        numbers = Prompt(template=self.template.value, frame_numbers=self._frame_numbers()).numbers(self.clip)
        told = f"frame {place + 1} of {len(self._seen)}, as the model sees it; at {time:.2f} s"
        webp = to_webp(Image.fromarray(self._seen[place]), 90)
        self.picture.value = picture(webp, told, "width:300px;max-width:100%;display:block")
        if self.template.value == "chat":
            told += f"; its number in the prompt is {numbers[place]}"
        told += f"<br>{warning}" if (warning := numbers_warning(self.clip, numbers)) else ""
        self.about_frame.value = f'<div style="{_TEXT}">{told}</div>'

    def _add_uploads(self):
        folder = self.output_dir / "uploads"
        folder.mkdir(parents=True, exist_ok=True)
        for upload in self.upload.value:
            path = folder / Path(upload["name"]).name
            path.write_bytes(upload["content"])
            self._add_clip(str(path))

    def _add_clip(self, path):
        if path:
            if path not in [known for _, known in self.video.options]:
                self.video.options = [*self.video.options, (Path(path).name, path)]
            if self.video.value == path:
                self._read_clip()  # the file may be another now
            self.video.value = path
            self.path.value = ""

    # ---- captions --------------------------------------------------------------------------------------------------

    @_in_turn
    def start(self) -> None:
        """Caption the clip at hand with the settings at hand, in a thread."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self.clip is None:
            self._tell("there is no clip to caption: choose one above")
            return
        try:
            prompt, decoding = self.chosen_prompt(), self.decoding()
            self._stream = self.captioner.stream(self.clip, prompt, decoding) if decoding.num_beams == 1 else None
        except ValueError as error:
            self._tell(str(error))
            return
        self._tell("")
        self.words.value = "<i>reading the frames ...</i>"
        self.caption_button.disabled, self.stop_button.disabled = True, self._stream is None
        self._thread = threading.Thread(target=self._follow, args=(self.clip, prompt, decoding), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the caption on its way after the word at hand; what was said stays."""
        if self._stream is not None:
            self._stream.stop()

    def wait(self) -> None:
        """Until the caption on its way is there."""
        if self._thread is not None:
            self._thread.join()

    def _follow(self, clip: Clip, prompt: Prompt, decoding: Decoding) -> None:
        try:
            text, told = "", 0.0
            for piece in self._stream or ():
                text += piece
                if time.monotonic() - told >= UPDATE_SECONDS:
                    self.words.value = (
                        f'<div dir="auto" style="white-space:pre-wrap;{_TEXT}">{escape(text.lstrip())} ▏</div>'
                    )
                    told = time.monotonic()
            caption = self._stream.caption if self._stream else self.captioner.caption(clip, prompt, decoding)
            self._keep(clip, caption)
            self.words.value = ""
        except Exception as error:  # told in the panel, whatever it is
            self._tell(f"{type(error).__name__}: {error}")
            self.words.value = ""
        finally:
            self.caption_button.disabled, self.stop_button.disabled = False, True

    def _keep(self, clip: Clip, caption: Caption) -> None:
        video = clip.info.path or "frames in memory"
        how = (clip.frame_sampling or "chat", clip.start_seconds, clip.end_seconds)
        settings = request_settings(self.captioner, video, caption.prompt, caption.decoding, *how)
        record = new_record(settings, caption, clip)
        if self.store is not None:
            self.store.save_strip(settings, clip, self.captioner.processor.image_size)
            self.store.append(record)
        self.results.insert(0, (record, caption))
        if caption.prompt.text not in self.asked_before.options:
            self.asked_before.options = ["", caption.prompt.text, *self.asked_before.options[1:]]
            self._name_prompt(self.prompt.value)
        self._show_results()

    # ---- results ---------------------------------------------------------------------------------------------------

    @_in_turn
    def _show_results(self):
        """Those of the clip at hand, the newest first: captions of other clips are not to be compared with them."""
        video = str(Path(self.video.value).expanduser().absolute()) if self.video.value else None
        made = [record for record, _ in self.results]
        again = {record["request"] for record in made}
        every = [*made, *(record for record in self._stored if record["request"] not in again)]
        shown = [record for record in every if record["video"] == video]
        baseline = self._baselines.setdefault(video, shown[-1]) if shown else None
        cards = [self._card(record, baseline) for record in shown[:MOST_CARDS]]
        if len(shown) > MOST_CARDS:
            cards.append(widgets.HTML(f"{len(shown) - MOST_CARDS} older ones of this clip in the store"))
        self.cards.children = cards

    def _card(self, record, baseline):
        text = record_text(record)
        marked = escape(text) if record is baseline else mark_differences(record_text(baseline), text)[1]
        facts = f"{record['num_tokens']} tokens, ended by {record['finish_reason']}, {record['seconds']:.2f} s"
        marks = " · baseline" if record is baseline else ""
        marks += " · ✎ edited by hand" if "edited_text" in record else ""
        shown = widgets.HTML(
            f'<div style="{_TEXT}"><b dir="auto">{escape(record["prompt"])}</b>{marks}'
            f'<div dir="auto" style="white-space:pre-wrap;margin:6px 0">{marked}</div>'
            f'<div style="{MUTED}">{escape(settings_name(record))}; {facts}</div></div>'
        )
        edit = widgets.Textarea(text, layout={"width": "100%", "display": "none"}, rows=4)
        buttons = [
            self._button("make baseline", lambda: self._make_baseline(record)),
            self._button("edit", lambda: self._edit(record, edit)),
            self._button("to a sweep", lambda: self._to_sweep(record)),
        ]
        buttons[0].disabled = record is baseline
        border = {"border": f"{3 if record is baseline else 1}px solid #8888", "padding": "8px", "min_width": "0"}
        row = widgets.HBox(buttons, layout={"flex_flow": "row wrap"})
        return widgets.VBox([shown, edit, row], layout=border)

    def _button(self, name, do: Callable[[], None]):
        button = widgets.Button(description=name, layout={"width": "auto"})
        button.on_click(lambda _: do())
        return button

    def _make_baseline(self, record):
        self._baselines[record["video"]] = record
        self._show_results()

    def _edit(self, record, edit):
        """First click: open the text. Second: keep it."""
        if edit.layout.display == "none":
            edit.layout.display = "flex"
            return
        record["edited_text"] = edit.value
        if self.store is not None:
            self.store.edit(record["request"], edit.value)
        self._tell("kept" if self.store is not None else "kept in this panel; there is no store")
        self._show_results()

    def _to_sweep(self, record):
        """Write the result's settings as axes of notebook 03."""
        axes = {
            "prompts": [record["prompt"]],
            "decodings": [record["decoding"]],
            "frame_samplings": [{name: value for name, value in record["frame_sampling"].items() if value is not None}],
            "templates": [record["template"]],
            "frame_numbers": [record["frame_numbers"]],
        }
        path = self.output_dir / "sweep_axes.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(axes, sort_keys=False, allow_unicode=True), encoding="utf-8")
        self._tell(f"axes of a sweep, to be added to: {path}")

    def _tell(self, message):
        mark = f"border-left:4px solid {RED};padding-left:6px;{_TEXT}"
        self.message.value = f'<div role="alert" style="{mark}">{escape(message)}</div>' if message else ""
