"""Fields in prompts, such as `{name}` or a column of the manifest: each clip's prompt is filled with its own values.

A field is a word in braces, or the name of a column in braces. `{{` is a brace, and `}}` the one that closes it; all
other braces are text, so that an example in JSON stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capkit.cogvlm2 import Prompt
from capkit.text import encodable, unknown_name
from capkit.video import Clip

if TYPE_CHECKING:
    from capkit.runs.manifests import Item

FILLED = ("prompt", "history", "steps", "answer_prefix")  # fields of a record that may have fields
WORD = r"[^\W\d]\w*"


def clip_seconds(clip: Clip) -> float:
    """How long the video is, or the window of it that was sampled."""
    duration = clip.info.duration_seconds
    return (duration if clip.end_seconds is None else min(clip.end_seconds, duration)) - clip.start_seconds


def fill(
    settings: Mapping[str, Any], video: str, columns: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Fill the fields of a prompt, but for `{duration}`, which the video's file tells once it is read.

    Args:
        settings: from `Prompt.to_record`.
        video: the clip's path, for `{name}`, the file's name without its suffix, and `{folder}`, that of its folder.
        columns: further values by name, which go before these.

    Returns:
        `settings` as filled; what a record has beside them: those that had fields as they were (`prompt_pattern`, ...),
        and the fields' values (`prompt_fields`); whether `{duration}` is left.

    Raises:
        ValueError: names the prompt, the field and the clip, if there is no such field or it is empty.
    """
    if not any("{" in str(settings.get(name)) for name in FILLED):
        return dict(settings), {}, False
    path = Path(video).absolute()
    values = {"name": encodable(path.stem), "folder": encodable(path.parent.name), "duration": "{duration}", **columns}
    filled, patterns, used = dict(settings), dict[str, Any](), dict[str, str]()
    for name in FILLED:
        fields: dict[str, str] = {}
        try:
            filled[name] = _fill(settings[name], values, fields)
        except KeyError:
            continue
        except ValueError as error:
            raise ValueError(f"{name}={settings[name]!r:.300}: {error} (clip: {encodable(video)})") from None
        if fields or filled[name] != settings[name]:
            patterns[f"{name}_pattern"] = settings[name]
        used |= fields
    has_duration = "duration" in used and "duration" not in columns
    if has_duration:
        del used["duration"]
    return filled, patterns | ({"prompt_fields": used} if used else {}), has_duration


def check_fields(prompt: Prompt, items: Iterable[Item]) -> None:
    """Check before a run that a prompt's fields, and those of the items' own prompts, can be filled for every clip.

    Raises:
        ValueError: as in `fill`, for the first clip of which they cannot.
    """
    for item in items:
        fields_of(prompt, item)


def fields_of(prompt: Prompt, item: Item) -> dict[str, str]:
    """The fields in a prompt for an item, or in the item's own prompt, with their values; but for `{duration}`.

    Raises:
        ValueError: as in `fill`.
    """
    if item.error is not None or not (_has_braces(prompt) or "{" in (item.prompt or "")):
        return {}  # at once, for a million items
    record = prompt.to_record() | ({} if item.prompt is None else {"prompt": item.prompt})
    return fill(record, item.video, item.values)[1].get("prompt_fields", {})


@lru_cache
def _has_braces(prompt: Prompt) -> bool:
    return "{" in str(prompt.to_record())


def filled_prompt(settings: dict[str, Any], clip: Clip) -> Prompt:
    """The prompt of a request, with `{duration}` filled: in seconds, with at most one decimal; also in `settings`."""
    values = {"duration": f"{clip_seconds(clip):.1f}".removesuffix(".0"), **settings.get("prompt_fields", {})}
    for name in FILLED:
        if f"{name}_pattern" in settings:
            settings[name] = _fill(settings[f"{name}_pattern"], values, {})
    return Prompt.from_record(settings)


def setting(record: Mapping[str, Any], name: str) -> Any:
    """A setting of a record as it was given: the prompt with its fields, not as filled for this clip."""
    return record.get(f"{name}_pattern", record.get(name))


def prompt_title(record: Mapping[str, Any]) -> str:
    """The questions of a record in a line, as they were given."""
    return " → ".join([*(setting(record, "steps") or ()), setting(record, "prompt")])


def _fill(value: Any, values: Mapping[str, Any], used: dict[str, str]) -> Any:
    """A text, or a list of texts, with its fields filled; `used` gets their values."""
    if isinstance(value, (list, tuple)):
        return [_fill(part, values, used) for part in value]
    if not isinstance(value, str) or "{" not in value:
        return value
    others = [re.escape(name) for name in values if not re.fullmatch(f"{WORD}|\\s*", name)]
    num_open = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal num_open
        name = match[1]
        if name is not None:
            used[name] = _text(name, values)
            return used[name]
        if match[0] == "}}" and not num_open:
            return match[0]
        num_open += 1 if match[0] == "{{" else -1
        return match[0][0]

    return re.sub(r"\{\{|\}\}|\{(" + "|".join([WORD, *others]) + r")\}", replace, value)


def _text(name: str, values: Mapping[str, Any]) -> str:
    if name not in values:
        problem = unknown_name("field", name, values, "there are")
        raise ValueError(f"{problem}; for these braces themselves write {{{{{name}}}}}")
    value = values[name]
    if isinstance(value, (list, tuple, dict, bytes, np.ndarray)):
        raise ValueError(f"{{{name}}} is no text or number, but a {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of whole numbers where a cell is empty
    if value is None or not (text := str(value).strip()):
        raise ValueError(f"{{{name}}} is empty")
    return text
