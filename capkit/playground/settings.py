"""The playground's settings: prompt, frames and decoding, as controls, as capkit's nouns, and as records have them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import ipywidgets as widgets

from capkit.captioning import Decoding
from capkit.cogvlm2 import Prompt
from capkit.playground.controls import TEXT, WIDE, decoding_controls, frame_controls, prompt_controls
from capkit.runs import setting
from capkit.sweep import PROMPT_PRESETS
from capkit.text import escape, plain_text
from capkit.video import FrameSampling

_SAMPLING = ("top_p", "top_k", "min_p", "seed")


class Settings:
    """Controls of the prompt, the sampled frames and the decoding.

    Args:
        earlier: prompts that were asked before.

    Attributes:
        controls: all but the lists of prompts, by the names of capkit's fields.
    """

    def __init__(self, earlier: Iterable[str] = ()) -> None:
        self.preset = widgets.Dropdown(options=["", *PROMPT_PRESETS], description="preset", layout=WIDE)
        self.earlier_prompts = widgets.Dropdown(options=[("", "")], description="earlier", layout=WIDE)
        self._earlier: dict[str, str] = {"": ""}  # labels by prompt
        for prompt in earlier:
            self.add_earlier(prompt, is_newest=False)
        # Synchronized with every key: on leaving the box only, the click on Caption could overtake the new text.
        self.prompt = widgets.Textarea(PROMPT_PRESETS["default"][0], description="prompt", rows=3, layout=WIDE)
        self.steps = widgets.Textarea(description="asked before", placeholder="a question a line", rows=2, layout=WIDE)
        for control in (self.preset, self.earlier_prompts, self.steps, self.prompt):
            control.style.description_width = "100px"
        self.of_prompt, self.of_frames, self.of_decoding = prompt_controls(), frame_controls(), decoding_controls()
        self.controls = {"prompt": self.prompt, "steps": self.steps}
        self.controls |= self.of_prompt | self.of_frames | self.of_decoding
        self.explained = widgets.HTML()
        for control in self.controls.values():
            control.observe(lambda _: self._explain(), "value")
        self.preset.observe(lambda change: self._set_prompt(PROMPT_PRESETS.get(change["new"], ("",))[0]), "value")
        self.earlier_prompts.observe(lambda change: self._set_prompt(change["new"]), "value")
        self.prompt.observe(lambda _: self._select_prompt(), "value")
        self._select_prompt()
        self._explain()

    def add_earlier(self, prompt: str, is_newest: bool = True) -> None:
        """Add a prompt to the list of earlier ones."""
        if prompt in self._earlier:
            return
        label = textwrap.shorten(plain_text(prompt), 80, placeholder=" ...") or prompt[:80]
        first, *others = self._earlier.items()
        self._earlier = dict([first, (prompt, label), *others] if is_newest else [first, *others, (prompt, label)])
        self.earlier_prompts.options = [(label, prompt) for prompt, label in self._earlier.items()]
        if is_newest:
            self._select_prompt()

    def _set_prompt(self, prompt: str) -> None:
        if prompt:
            self.prompt.value = prompt

    def _select_prompt(self) -> None:
        """Select the prompt in the lists above it; one that is not in a list selects nothing there."""
        prompt = self.prompt.value
        presets = [name for name, (text, _) in PROMPT_PRESETS.items() if text == prompt]
        self.preset.value = presets[0] if presets else ""
        self.earlier_prompts.value = prompt if prompt in self._earlier else ""

    def chosen_prompt(self) -> Prompt:
        """The prompt that the controls describe.

        Raises:
            ValueError: the prompt is empty.
        """
        value = {name: control.value for name, control in self.controls.items()}
        steps = [] if value["template"] == "base" else [*filter(None, map(str.strip, value["steps"].splitlines()))]
        numbers, prefix = self.effective_frame_numbers(), value["answer_prefix"].strip()
        return Prompt(value["prompt"], value["template"], (), numbers, prefix, steps)

    def frame_sampling(self) -> FrameSampling:
        """The frame sampling that the controls describe."""
        value = {name: control.value for name, control in self.of_frames.items()}
        rate = value["frames_per_second"] if value["strategy"] == "fps" else None
        return FrameSampling(value["strategy"], value["num_frames"], rate)

    def window(self) -> tuple[float, float | None]:
        """Start and end in seconds; None for the end of the video."""
        return self.of_frames["start_seconds"].value, self.of_frames["end_seconds"].value or None

    def decoding(self) -> Decoding:
        """The decoding that the controls describe, without those that have no effect."""
        values = {name: self.of_decoding[name].value for name in self._effective_decoding()}
        words = [word for word in values["forbidden_words"].split(",") if word.strip()]
        return Decoding(**values | {"forbidden_words": words})

    def effective_frame_numbers(self) -> str:
        """The frame numbers, where the template has any."""
        return self.of_prompt["frame_numbers"].value if self.of_prompt["template"].value == "chat" else "index"

    def apply(self, record: dict[str, Any]) -> list[str]:
        """Set the controls to what a caption was made with; returns the names of settings that they cannot show."""
        sampling, decoding = FrameSampling.of(record["frame_sampling"]), Decoding.of(record["decoding"])
        values = {name: setting(record, name) or "" for name in ("prompt", "answer_prefix")}
        values |= {"steps": "\n".join(setting(record, "steps") or ()), "template": record["template"]}
        values |= {"frame_numbers": record.get("frame_numbers") or "index"}
        values |= {name: getattr(sampling, name) for name in ("strategy", "num_frames")}
        values |= {name: record.get(name) or 0.0 for name in ("start_seconds", "end_seconds")}
        values |= {name: getattr(decoding, name) for name in self.of_decoding}
        values |= {"seed": decoding.seed or 0, "forbidden_words": ", ".join(decoding.forbidden_words)}
        values |= {} if sampling.frames_per_second is None else {"frames_per_second": sampling.frames_per_second}
        for name, value in values.items():
            self.controls[name].value = value
        lost = [name for name, value in values.items() if self.controls[name].value != value]
        lost += [name for name in ("history",) if record.get(name)]
        return lost + [name for name in ("word_bias",) if getattr(decoding, name)]

    def in_their_names(self, message: str) -> str:
        """An error message with the names of the controls in place of capkit's."""
        labels = {name: control.description.split(" (")[0] for name, control in self.controls.items()}
        names = {name: f'"{label}"' for name, label in labels.items() if label != name}
        own = "|".join(name for name in names if "_" in name)
        return re.sub(rf"\b(?:{own})\b|^(?:steps|strategy)(?=[=:])", lambda match: names[match[0]], message)

    def _effective_decoding(self) -> list[str]:
        names = ["max_new_tokens", "num_beams", "repetition_penalty", "no_repeat_ngram_size", "forbidden_words"]
        if self.of_decoding["num_beams"].value == 1:
            names.append("temperature")
            if self.of_decoding["temperature"].value > 0:
                names += [name for name in _SAMPLING if name != "top_k" or self.of_decoding["top_k"].value != 1]
        return names

    def _explain(self) -> None:
        """Disable the controls that have no effect, and say why."""
        effective, template = self._effective_decoding(), self.of_prompt["template"].value
        for name, control in self.of_decoding.items():
            control.disabled = name not in effective
        self.of_frames["frames_per_second"].disabled = self.of_frames["strategy"].value != "fps"
        self.of_prompt["frame_numbers"].disabled = template != "chat"
        self.steps.disabled = template == "base"
        if self.of_decoding["num_beams"].value > 1:
            reason = "beam search does not sample: temperature, top_p, top_k, min_p and seed have no effect"
        elif self.of_decoding["temperature"].value == 0:
            reason = "temperature 0 is greedy: top_p, top_k, min_p and seed have no effect"
        else:
            reason = "tokens are sampled: another seed gives another caption"
        if template != "chat":
            reason += f'; template "{template}" numbers no frames'
        self.explained.value = f'<div style="opacity:.7;{TEXT}">{escape(reason)}.</div>'
