"""The playground: a panel to choose a clip, prompt and settings, caption it, and compare the results."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import yaml
from PIL import Image

from capkit.captioning import Caption, Captioner, CaptionStream, Decoding, demo_notice
from capkit.cogvlm2 import Prompt, pixels_to_frames, preprocess_frames
from capkit.files import atomic_write
from capkit.playground.blind import has_settings, settings_name
from capkit.playground.controls import WIDE, button, decoding_controls, frame_controls, prompt_controls, sweep_axes
from capkit.playground.kept import Kept
from capkit.runs import (
    MARK_FIELDS,
    CaptionStore,
    CaptionStoreLike,
    clip_id,
    filled_prompt,
    new_record,
    prompt_title,
    request_settings,
    setting,
)
from capkit.sweep import PROMPT_PRESETS
from capkit.text import escape, plain_text
from capkit.video import Clip, FrameSampling, VideoError, load_clip
from capkit.views import MUTED, caption_facts, mark_differences, note, numbers_warning, picture, record_text, to_webp

_GRID = {"grid_template_columns": "repeat(auto-fill, minmax(min(100%, 290px), 1fr))", "grid_gap": "2px 12px"}
_CARDS = {"grid_template_columns": "repeat(auto-fit, minmax(min(100%, 290px), 1fr))", "grid_gap": "12px"}
_CARDS |= {"align_items": "flex-start", "margin": "10px 0"}
_TEXT = "line-height:1.45;overflow-wrap:anywhere"  # widgets inherit the line height of controls
MOST_CARDS = 24
UPDATE_SECONDS = 0.05  # least time between two updates of the text: a fast model would flood the page
_SAMPLING = ("top_p", "top_k", "min_p", "seed")


def _locked(method: Callable[..., None]) -> Callable[..., None]:
    """Run one such method at a time: Lab handles messages in several threads of the kernel (subshells), and of two
    clips chosen at once the one shown must be the one captioned."""

    @functools.wraps(method)
    def run(self: Playground) -> None:
        with self._lock:
            method(self)

    return run


class Playground(Kept):
    """A panel to try prompts and settings on clips. A thread makes the captions, so the panel stays usable.

    Args:
        captioner: from `load_captioner`.
        clips: file names.
        store: where results are saved, and earlier ones come from; None keeps them in the panel only.
        output_dir: folder for uploaded clips and sweep settings.

    Attributes:
        results: (record, caption) of the captions made in this panel, the newest first.
        clip: the chosen clip's frames; None if they could not be read.
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
        self.clip: Clip | None = None
        stored = [] if store is None else store.current()
        self._stored = [record for record in reversed(stored) if has_settings(record)]
        self._baselines: dict[str, dict[str, Any]] = {}  # by clip
        self._frames: np.ndarray | None = None  # the clip's, as the model sees them
        self._notice = ""  # beside captions of the demo model
        self._lock = threading.RLock()
        self._stream: CaptionStream | None = None
        self._thread: threading.Thread | None = None
        names = [(plain_text(Path(clip).name), str(clip)) for clip in clips]
        self.video = widgets.Dropdown(options=names, description="clip", layout=WIDE)
        self.upload = widgets.FileUpload(accept="video/*", description="add a clip")
        self.path = widgets.Text(placeholder="or a file name, for any size", continuous_update=False, layout=WIDE)
        self.frame = widgets.IntSlider(0, min=0, max=0, description="frame", layout=WIDE)
        self.picture = widgets.HTML()  # unlike widgets.Image it has an alternative text for screen readers
        self.about_frame = widgets.HTML()
        self.preset = widgets.Dropdown(options=["", *PROMPT_PRESETS], description="preset", layout=WIDE)
        earlier = dict.fromkeys(setting(record, "prompt") for record in self._stored)
        self.earlier_prompts = widgets.Dropdown(options=["", *earlier], description="earlier", layout=WIDE)
        # Synchronized with every key: on leaving the box only, the click on Caption could overtake the new text.
        self.prompt = widgets.Textarea(PROMPT_PRESETS["default"][0], description="prompt", rows=3, layout=WIDE)
        self.steps = widgets.Textarea(description="asked before", placeholder="a question a line", rows=2, layout=WIDE)
        self._prompt_controls, self._frame_controls = prompt_controls(), frame_controls()
        self._decoding_controls = decoding_controls()
        for name, control in (self._prompt_controls | self._frame_controls | self._decoding_controls).items():
            setattr(self, name, control)
        self.explained, self.message = widgets.HTML(), widgets.HTML()
        self.caption_button = button("Caption", self.start, button_style="primary", icon="play")
        self.stop_button = button("Stop", self.stop, icon="stop", disabled=True)
        self.words = widgets.HTML()  # of the caption that is being made
        self.cards = widgets.GridBox(layout=_CARDS)
        super().__init__([self._top(), self.cards])
        self._observe()
        self._select_prompt(self.prompt.value)
        self._explain()
        self._read_clip()

    def _top(self) -> widgets.Box:
        """The controls: the clip at the left, the settings at the right."""
        add = widgets.HBox([self.upload, self.path])
        clip = [self.video, add, self.picture, self.frame, self.about_frame, *self._frame_controls.values()]
        controls = [*self._prompt_controls.values(), *self._decoding_controls.values()]
        questions = [self.preset, self.earlier_prompts, self.steps, self.prompt]
        buttons = widgets.HBox([self.caption_button, self.stop_button])
        right = [*questions, widgets.GridBox(controls, layout=_GRID), self.explained, buttons, self.message, self.words]
        left = widgets.VBox(clip, layout={"flex": "1 1 300px", "min_width": "0"})
        right = widgets.VBox(right, layout={"flex": "2 1 400px", "min_width": "0"})
        return widgets.Box([left, right], layout={"display": "flex", "flex_flow": "row wrap", "grid_gap": "0 16px"})

    def _observe(self) -> None:
        frames, prompts = self._frame_controls.values(), self._prompt_controls.values()
        for control in (self.video, *frames):
            control.observe(lambda _: self._read_clip(), "value")
        for control in (*frames, *prompts, *self._decoding_controls.values()):
            control.observe(lambda _: self._explain(), "value")
        for control in (self.frame, *prompts):
            control.observe(lambda _: self._show_frame(), "value")
        self.upload.observe(lambda _: self._add_uploads(), "value")
        self.path.observe(lambda change: self._add_clip(change["new"].strip()), "value")
        self.preset.observe(lambda change: self._set_prompt(PROMPT_PRESETS.get(change["new"], ("",))[0]), "value")
        self.earlier_prompts.observe(lambda change: self._set_prompt(change["new"]), "value")
        self.prompt.observe(lambda change: self._select_prompt(change["new"]), "value")

    # ---- prompt and settings ---------------------------------------------------------------------------------------

    def _set_prompt(self, prompt: str) -> None:
        if prompt:
            self.prompt.value = prompt

    def _select_prompt(self, prompt: str) -> None:
        """Select the prompt in the lists above it; one that is not in a list selects nothing there."""
        presets = [name for name, (text, _) in PROMPT_PRESETS.items() if text == prompt]
        self.preset.value = presets[0] if presets else ""
        self.earlier_prompts.value = prompt if prompt in self.earlier_prompts.options else ""

    def chosen_prompt(self) -> Prompt:
        """The prompt that the controls describe.

        Raises:
            ValueError: the prompt is empty.
        """
        steps = [] if self.template.value == "base" else [*filter(None, map(str.strip, self.steps.value.splitlines()))]
        numbers, prefix = self._effective_frame_numbers(), self.answer_prefix.value.strip()
        return Prompt(self.prompt.value, self.template.value, (), numbers, prefix, steps)

    def frame_sampling(self) -> FrameSampling:
        """The frame sampling that the controls describe."""
        rate = self.frames_per_second.value if self.strategy.value == "fps" else None
        return FrameSampling(self.strategy.value, self.num_frames.value, rate)

    def decoding(self) -> Decoding:
        """The decoding that the controls describe, without those that have no effect."""
        settings = {name: self._decoding_controls[name].value for name in self._effective_decoding()}
        words = [word for word in settings["forbidden_words"].split(",") if word.strip()]
        return Decoding(**settings | {"forbidden_words": words})

    def _effective_frame_numbers(self) -> str:
        return self.frame_numbers.value if self.template.value == "chat" else "index"

    def _effective_decoding(self) -> list[str]:
        names = ["max_new_tokens", "num_beams", "repetition_penalty", "no_repeat_ngram_size", "forbidden_words"]
        if self.num_beams.value == 1:
            names.append("temperature")
            if self.temperature.value > 0:
                names += [name for name in _SAMPLING if name != "top_k" or self.top_k.value != 1]
        return names

    def _explain(self) -> None:
        """Disable the controls that have no effect, and say why."""
        effective = self._effective_decoding()
        for name, control in self._decoding_controls.items():
            control.disabled = name not in effective
        self.frames_per_second.disabled = self.strategy.value != "fps"
        self.frame_numbers.disabled = self.template.value != "chat"
        self.steps.disabled = self.template.value == "base"
        if self.num_beams.value > 1:
            reason = "beam search does not sample: temperature, top_p, top_k, min_p and seed have no effect"
        elif self.temperature.value == 0:
            reason = "temperature 0 is greedy: top_p, top_k, min_p and seed have no effect"
        else:
            reason = "tokens are sampled: another seed gives another caption"
        if self.template.value != "chat":
            reason += f'; template "{self.template.value}" numbers no frames'
        self.explained.value = f'<div style="opacity:.7;{_TEXT}">{escape(reason)}.</div>'

    # ---- the clip --------------------------------------------------------------------------------------------------

    @_locked
    def _read_clip(self) -> None:
        self.clip = self._frames = None
        self._notice = ""
        self._show_message("")
        try:
            if self.video.value:
                self.clip = load_clip(self.video.value, self.frame_sampling(), *self._window())
        except (VideoError, ValueError) as error:
            self._show_message(str(error))
        if self.clip is not None:
            self._frames = pixels_to_frames(preprocess_frames(self.clip.frames, self.captioner.processor.image_size))
            self._notice = demo_notice("demo", self._frames)
            self.frame.max = len(self.clip) - 1
        self._show_frame()
        self._show_results()

    def _window(self) -> tuple[float, float | None]:
        return self.start_seconds.value, self.end_seconds.value or None

    @_locked
    def _show_frame(self) -> None:
        if self.clip is None or self._frames is None:
            self.picture.value = self.about_frame.value = ""
            return
        place = min(self.frame.value, len(self._frames) - 1)
        time = self.clip.timestamps_seconds[place]
        numbers = Prompt(template=self.template.value, frame_numbers=self._effective_frame_numbers()).numbers(self.clip)
        text = f"frame {place + 1} of {len(self._frames)}, as the model sees it; at {time:.2f} s"
        webp = to_webp(Image.fromarray(self._frames[place]), 90)
        self.picture.value = picture(webp, text, "width:300px;max-width:100%;display:block")
        text += "" if numbers[place] is None else f"; its number in the prompt is {numbers[place]}"
        text += f"<br>{warning}" if (warning := numbers_warning(self.clip, numbers)) else ""
        self.about_frame.value = f'<div style="{_TEXT}">{text}</div>'

    def _add_uploads(self) -> None:
        folder = self.output_dir / "uploads"
        for upload in self.upload.value:
            path = folder / Path(upload["name"]).name
            atomic_write(path, bytes(upload["content"]))
            self._add_clip(str(path))

    def _add_clip(self, path: str) -> None:
        if not path:
            return
        if path not in [value for _, value in self.video.options]:
            self.video.options = [*self.video.options, (plain_text(Path(path).name), path)]
        if self.video.value == path:
            self._read_clip()  # the file may have changed
        self.video.value = path
        self.path.value = ""

    # ---- captioning ------------------------------------------------------------------------------------------------

    @_locked
    def start(self) -> None:
        """Caption the chosen clip with the chosen settings, in a thread."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self.clip is None:
            self._show_message("there is no clip to caption: choose one above")
            return
        try:
            decoding, settings = self.decoding(), self._settings(self.clip)
            prompt = filled_prompt(settings, self.clip)
            self._stream = self.captioner.stream(self.clip, prompt, decoding) if decoding.num_beams == 1 else None
        except ValueError as error:
            self._show_message(str(error))
            return
        self._show_message("")
        self.words.value = "<i>reading the frames ...</i>"
        self.caption_button.disabled, self.stop_button.disabled = True, self._stream is None
        self._thread = threading.Thread(target=self._run, args=(self.clip, settings, prompt, decoding), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the running caption after the current token; its text so far is kept."""
        if self._stream is not None:
            self._stream.stop()

    def wait(self) -> None:
        """Wait until the running caption is finished."""
        if self._thread is not None:
            self._thread.join()

    def _settings(self, clip: Clip) -> dict[str, Any]:
        """A record's settings, with the prompt's fields filled for the clip.

        Raises:
            ValueError: as in `chosen_prompt`, or a field that has no value.
        """
        window = (clip.frame_sampling or "chat", clip.start_seconds, clip.end_seconds)
        video = clip.info.path or "frames in memory"
        return request_settings(self.captioner, video, self.chosen_prompt(), self.decoding(), *window)

    def _run(self, clip: Clip, settings: dict[str, Any], prompt: Prompt, decoding: Decoding) -> None:
        """Caption a clip and show the words as they come; beam search has them only at the end."""
        stream, text, updated = self._stream, "", 0.0
        try:
            for piece in stream or ():
                text += piece
                if time.monotonic() - updated >= UPDATE_SECONDS:
                    style = f"white-space:pre-wrap;{_TEXT}"
                    self.words.value = f'<div dir="auto" style="{style}">{escape(text.lstrip())} ▏</div>'
                    updated = time.monotonic()
            self._add_result(
                clip, settings, stream.caption if stream else self.captioner.caption(clip, prompt, decoding)
            )
        except Exception as error:  # whatever it is, it is shown in the panel
            self._show_message(f"{type(error).__name__}: {error}")
        finally:
            self.words.value = ""
            self.caption_button.disabled, self.stop_button.disabled = False, True

    def _add_result(self, clip: Clip, settings: dict[str, Any], caption: Caption) -> None:
        record = new_record(settings, caption, clip)
        if self.store is not None:
            self.store.save_strip(settings, clip, self.captioner.processor.image_size)
            self.store.append(record)
        self.results.insert(0, (record, caption))
        if (prompt := setting(record, "prompt")) not in self.earlier_prompts.options:
            self.earlier_prompts.options = ["", prompt, *self.earlier_prompts.options[1:]]
            self._select_prompt(self.prompt.value)
        self._show_results()

    # ---- results ---------------------------------------------------------------------------------------------------

    @_locked
    def _show_results(self) -> None:
        """Show the captions of the chosen clip alone, the newest first: only those can be compared."""
        video = str(Path(self.video.value).expanduser().absolute()) if self.video.value else ""
        start, end = self._window()
        clip = clip_id({"video": video, "start_seconds": start, "end_seconds": end})
        new = [record for record, _ in self.results]
        repeated = {record["request"] for record in new}
        records = [*new, *(record for record in self._stored if record["request"] not in repeated)]
        records = [record for record in records if clip_id(record) == clip]
        cards = []
        if records:
            baseline = self._baselines.setdefault(clip, records[-1])
            cards = [self._card(record, baseline) for record in records[:MOST_CARDS]]
        if len(records) > MOST_CARDS:
            cards.append(widgets.HTML(f"{len(records) - MOST_CARDS} older ones of this clip in the store"))
        self.cards.children = cards

    def _card(self, record: dict[str, Any], baseline: dict[str, Any]) -> widgets.VBox:
        is_baseline, text = record is baseline, record_text(record)
        marked = escape(text) if is_baseline else mark_differences(record_text(baseline), text)[1]
        mark = " · baseline" if is_baseline else ""
        notice = self._notice if record.get("model") == "demo" else ""
        shown = widgets.HTML(
            f'<div style="{_TEXT}"><b dir="auto">{escape(prompt_title(record))}</b>{mark}'
            f'<div dir="auto" style="white-space:pre-wrap;margin:6px 0">{marked}</div>'
            f"{notice and note(notice)}"
            f'<div style="{MUTED}">{escape(settings_name(record))}; {caption_facts(record)}</div></div>'
        )
        edit = widgets.Textarea(text, layout={"width": "100%", "display": "none"}, rows=4)
        buttons = [
            button("make baseline", lambda: self._make_baseline(record), layout=WIDE, disabled=is_baseline),
            button("edit", lambda: self._edit(record, edit), layout=WIDE),
            button("to a sweep", lambda: self._to_sweep(record), layout=WIDE),
        ]
        border = {"border": f"{3 if is_baseline else 1}px solid #8888", "padding": "8px", "min_width": "0"}
        return widgets.VBox([shown, edit, widgets.HBox(buttons, layout={"flex_flow": "row wrap"})], layout=border)

    def _make_baseline(self, record: dict[str, Any]) -> None:
        self._baselines[clip_id(record)] = record
        self._show_results()

    def _edit(self, record: dict[str, Any], edit: widgets.Textarea) -> None:
        """Open the text for editing at the first click; save it at the second."""
        if edit.layout.display == "none":
            edit.layout.display = "flex"
            return
        record["edited_text"] = edit.value
        if self.store is not None:
            self.store.edit(record["request"], edit.value)
            latest = self.store.latest([record["request"]])[0]  # a mark of another text is outdated now
            record |= {name: latest[name] for name in MARK_FIELDS if name in latest}
        self._show_message("kept" if self.store is not None else "kept in this panel; there is no store")
        self._show_results()

    def _to_sweep(self, record: dict[str, Any]) -> None:
        """Write the result's settings as axes for notebook 03."""
        path = self.output_dir / "sweep_axes.yaml"
        atomic_write(path, yaml.safe_dump(sweep_axes(record), sort_keys=False, allow_unicode=True))
        self._show_message(f"sweep axes written to {path}")

    def _show_message(self, message: str) -> None:
        self.message.value = f'<div role="alert" style="{_TEXT}">{note(escape(message))}</div>' if message else ""
