"""`Prompt`: the question about a clip, and the text that follows the frames in the model's input."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from capkit.text import unknown_name
from capkit.video import Clip

# From CogVideo's tools/caption, which wrote the training captions of CogVideoX.
DEFAULT_PROMPT = "Please describe this video in detail."

MAX_CHARACTERS = 100_000  # of a prompt; a whole file pasted by mistake would fill the memory
TEMPLATES = ("chat", "vqa", "base")  # the original's `template_version`
FRAME_NUMBERS = ("index", "seconds")
_ANSWER = {"chat": "Answer:", "vqa": "Short answer:"}


@dataclass(frozen=True)
class Prompt:
    """The question about a clip. The defaults are those of the original's caption tool.

    Attributes:
        text: the question.
        template: "chat" (`Question: ... Answer:`, frames numbered), "vqa" (`Question: ... Short answer:`) or "base"
            (the text as it is).
        history: earlier (question, answer) turns, a list or tuple of pairs, written before the question under "chat"
            and "vqa".
        frame_numbers: the number after each frame under "chat": its "index", as in the original, or its time since the
            clip's start in whole "seconds". The two are equal at one frame a second.
        answer_prefix: what the caption begins with, after `Answer:` and a space; the model goes on from there. It
            belongs to the caption's text, not to its tokens and their log probabilities.
        steps: questions that are asked before, a list or tuple of texts: the model answers each, seeing the earlier
            questions and its answers as history; its answer to `text` is the caption. Under "chat" and "vqa".

    Raises:
        ValueError: unknown template or frame numbers, an empty text, one that is longer than 100,000 characters or not
            UTF-8, history that is not pairs of texts, an answer prefix that begins or ends with white space, steps that
            are no texts, or a setting that has no effect in combination with the others.
    """

    text: str = DEFAULT_PROMPT
    template: str = "chat"
    history: Sequence[tuple[str, str]] = ()
    frame_numbers: str = "index"
    answer_prefix: str = ""
    steps: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("template", TEMPLATES), ("frame_numbers", FRAME_NUMBERS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
        if not isinstance(self.steps, (list, tuple)):
            raise ValueError(f"steps={reprlib.repr(self.steps)}: must be a list of questions")
        prefix = self.answer_prefix
        texts = [("prompt", self.text), *(("steps", step) for step in self.steps)]
        for name, text in [*texts, *([("answer_prefix", prefix)] if prefix != "" else [])]:
            if problem := _problem(text):
                raise ValueError(f"{name}={reprlib.repr(text)}: {problem}")
        if prefix != prefix.strip():
            raise ValueError(f"answer_prefix={prefix!r}: must not begin or end with white space")
        for turn in self.history if isinstance(self.history, (list, tuple)) else [self.history]:
            if not isinstance(turn, (list, tuple)) or [isinstance(part, str) for part in turn] != [True, True]:
                raise ValueError(f"history={turn!r}: must be (question, answer) pairs of texts")
        # Strings of NumPy and the like become Python's.
        object.__setattr__(self, "history", tuple((str(question), str(answer)) for question, answer in self.history))
        object.__setattr__(self, "steps", tuple(map(str, self.steps)))
        for name in ("text", "template", "frame_numbers", "answer_prefix"):
            object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("history", "steps"):
            if getattr(self, name) and self.template == "base":
                raise ValueError(f'{name}: no effect under template "base", which takes the prompt as it is')
        if self.frame_numbers == "seconds" and self.template != "chat":
            raise ValueError(
                f'frame_numbers="seconds": no effect under template "{self.template}", which numbers no frames'
            )

    @classmethod
    def of(cls, prompt: PromptLike) -> Prompt:
        """A `Prompt` from a `Prompt`, a text, a dictionary of fields, or a list of questions: `steps`, then the text.

        Raises:
            ValueError: another type, unknown fields, or as in `Prompt`.
        """
        if isinstance(prompt, cls):
            return prompt
        if isinstance(prompt, Mapping):
            names = [field.name for field in fields(cls)]
            if unknown := sorted(set(prompt) - set(names), key=str):
                raise ValueError(f"prompt={dict(prompt)!r}: {unknown_name('field', unknown[0], names, 'known')}")
            return cls(**prompt)
        if isinstance(prompt, (list, tuple)) and prompt:
            *steps, text = prompt
            return cls(text, steps=steps)
        return cls(prompt)  # type: ignore[arg-type]  # __post_init__ refuses other types

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Prompt:
        """The prompt of a caption record; fields that the record lacks take their defaults."""
        names = {"text": "prompt"}
        names |= {name: name for name in ("template", "history", "frame_numbers", "answer_prefix", "steps")}
        return cls(**{field: record[name] for field, name in names.items() if name in record})

    def to_record(self) -> dict[str, Any]:
        """The fields as a caption record holds them, in plain JSON values; the last two only where they are given."""
        return {
            "template": self.template,
            "frame_numbers": self.frame_numbers,
            "prompt": self.text,
            "history": [list(turn) for turn in self.history],
            **({"answer_prefix": self.answer_prefix} if self.answer_prefix else {}),
            **({"steps": list(self.steps)} if self.steps else {}),
        }

    def after(self, answers: Sequence[str]) -> Prompt:
        """The question that comes after these answers to the first steps: they are its history, and it has no steps.

        Spaces around an answer are left out, as there is one before it in the history already.
        """
        if not self.steps:
            return self
        turns = zip(self.steps, (answer.strip() for answer in answers), strict=False)
        question = (*self.steps, self.text)[len(answers)]
        prefix = self.answer_prefix if len(answers) == len(self.steps) else ""  # of the caption only
        return replace(self, text=question, history=(*self.history, *turns), answer_prefix=prefix, steps=())

    @property
    def title(self) -> str:
        """All questions in a line."""
        return " → ".join((*self.steps, self.text))

    def numbers(self, clip: Clip) -> list[int | None]:
        """The number after each frame of a clip; None under templates without frame numbers."""
        return self.numbers_at(clip.timestamps_seconds, clip.start_seconds)

    def numbers_at(self, timestamps_seconds: Sequence[float] | np.ndarray, start_seconds: float) -> list[int | None]:
        """The number after each frame at these times of a clip that starts at `start_seconds`; see `numbers`."""
        if self.template != "chat":
            return [None] * len(timestamps_seconds)
        if self.frame_numbers == "index":
            return list(range(len(timestamps_seconds)))
        return [round(float(time - start_seconds)) for time in timestamps_seconds]

    @property
    def full_text(self) -> str:
        """The text after the frames, as written by the original's `build_conversation_input_ids`.

        Raises:
            ValueError: there are steps, whose answers are not known; see `after`.
        """
        if self.steps:
            raise ValueError("steps: are asked one after another, so that there is no one text; see Prompt.after")
        if self.template == "base":
            return self.text
        answer = _ANSWER[self.template]
        turns = "".join(f"Question: {question} {answer} {reply}\n" for question, reply in self.history)
        return f"{turns}Question: {self.text} {answer}"


def _problem(text: Any) -> str:
    """What is wrong with a prompt's text, or ""."""
    if not isinstance(text, str) or not text.strip():
        return "must be a text that is not empty"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text)} characters, more than {MAX_CHARACTERS}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8, or was cut within a character"
    return ""


PromptLike = Prompt | str | dict[str, Any] | list[str] | tuple[str, ...]
"""What `Prompt.of` takes."""
