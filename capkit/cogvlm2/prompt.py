"""`Prompt`: the question about a clip, and the text that follows the frames in the model's input."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

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

    Raises:
        ValueError: unknown template or frame numbers, an empty text, one that is longer than 100,000 characters or not
            UTF-8, history that is not pairs of texts, an answer prefix that begins or ends with white space, or a
            setting that has no effect in combination with the others.
    """

    text: str = DEFAULT_PROMPT
    template: str = "chat"
    history: Sequence[tuple[str, str]] = ()
    frame_numbers: str = "index"
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("template", TEMPLATES), ("frame_numbers", FRAME_NUMBERS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
        if problem := _problem(self.text):
            raise ValueError(f"prompt={reprlib.repr(self.text)}: {problem}")
        prefix = self.answer_prefix
        if prefix != "" and (problem := _problem(prefix)):
            raise ValueError(f"answer_prefix={reprlib.repr(prefix)}: {problem}")
        if prefix != prefix.strip():
            raise ValueError(f"answer_prefix={prefix!r}: must not begin or end with white space")
        for turn in self.history if isinstance(self.history, (list, tuple)) else [self.history]:
            if not isinstance(turn, (list, tuple)) or [isinstance(part, str) for part in turn] != [True, True]:
                raise ValueError(f"history={turn!r}: must be (question, answer) pairs of texts")
        # Strings of NumPy and the like become Python's.
        object.__setattr__(self, "history", tuple((str(question), str(answer)) for question, answer in self.history))
        for name in ("text", "template", "frame_numbers", "answer_prefix"):
            object.__setattr__(self, name, str(getattr(self, name)))
        if self.history and self.template == "base":
            raise ValueError('history: no effect under template "base", which takes the prompt as it is')
        if self.frame_numbers == "seconds" and self.template != "chat":
            raise ValueError(
                f'frame_numbers="seconds": no effect under template "{self.template}", which numbers no frames'
            )

    @classmethod
    def of(cls, prompt: PromptLike) -> Prompt:
        """A `Prompt` from a `Prompt`, a text, or a dictionary of fields.

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
        return cls(prompt)  # type: ignore[arg-type]  # __post_init__ refuses other types

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Prompt:
        """The prompt of a caption record; fields that the record lacks take their defaults."""
        names = {"prompt": "text"} | {name: name for name in ("template", "history", "frame_numbers", "answer_prefix")}
        return cls(**{field: record[name] for name, field in names.items() if name in record})

    def to_record(self) -> dict[str, Any]:
        """The fields as a caption record holds them, in plain JSON values; `answer_prefix` only if there is one."""
        return {
            "template": self.template,
            "frame_numbers": self.frame_numbers,
            "prompt": self.text,
            "history": [list(turn) for turn in self.history],
            **({"answer_prefix": self.answer_prefix} if self.answer_prefix else {}),
        }

    def numbers(self, clip: Clip) -> list[int | None]:
        """The number after each frame of a clip; None under templates without frame numbers."""
        if self.template != "chat":
            return [None] * len(clip)
        if self.frame_numbers == "index":
            return list(range(len(clip)))
        return [round(float(time - clip.start_seconds)) for time in clip.timestamps_seconds]

    @property
    def full_text(self) -> str:
        """The text after the frames, as written by the original's `build_conversation_input_ids`."""
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


PromptLike = Prompt | str | dict[str, Any]
"""What `Prompt.of` takes."""
