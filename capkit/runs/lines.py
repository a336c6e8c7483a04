"""Read and check the lines of a caption store, one at a time; what is no line of one is skipped with a warning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from capkit.files import open_regular
from capkit.text import warn

MAX_LINE_BYTES = 10**7  # real records have 2,500
MAX_TEXT_CHARACTERS = 200_000  # captions have some thousand; tables and exports take seconds for one of so many
MAX_PATH_CHARACTERS = 2**15  # Windows; elsewhere 4,096 bytes
MOST_WARNINGS = 20  # of one reading; the rest are counted
MAX_NUMBER = 1e20  # seeds have up to 63 bits
_NUMBER, _TEXT, _NONE = frozenset((int, float)), frozenset((str,)), frozenset((type(None),))
_TYPES = {
    **dict.fromkeys(
        ("template", "frame_numbers", "answer_prefix", "model", "model_fingerprint", "dtype", "strip", "created"), _TEXT
    ),
    **dict.fromkeys(("edited_text", "mark", "remark"), _TEXT),  # of a record that was copied from another store
    **dict.fromkeys(("text", "error", "quantization", "finish_reason", "video_sha256"), _TEXT | _NONE),
    **dict.fromkeys(("start_seconds", "sample"), _NUMBER),
    **dict.fromkeys(("end_seconds", "duration_seconds", "mean_logprob", "seconds"), _NUMBER | _NONE),
    "num_tokens": frozenset((int,)) | _NONE,
    **dict.fromkeys(("frame_sampling", "decoding"), frozenset((dict,))),
    **dict.fromkeys(("history", "steps", "step_answers", "step_finish_reasons"), frozenset((list,))),
    **dict.fromkeys(("prompt_pattern", "answer_prefix_pattern"), _TEXT),
    "prompt_fields": frozenset((dict,)),
    **dict.fromkeys(("history_pattern", "steps_pattern", "wrong_words", "only_frames"), frozenset((list,))),
    **dict.fromkeys(("frame_indices", "timestamps_seconds", "video_notes"), frozenset((list,)) | _NONE),
}
_TYPES_IN_LISTS = {
    **dict.fromkeys(("frame_indices", "only_frames"), frozenset((int,))),
    **{"timestamps_seconds": _NUMBER, "wrong_words": _TEXT},
    **dict.fromkeys(("video_notes", "steps", "steps_pattern", "step_answers", "step_finish_reasons"), _TEXT),
}
_IN_DECODING = {"forbidden_words": frozenset((list,)), "word_bias": frozenset((dict,))}
_IN_FRAME_SAMPLING = {"strategy": _TEXT, "num_frames": frozenset((int,)), "frames_per_second": _NUMBER | _NONE}
MARKS = ("right", "wrong", "unsure")
"""What a person may find of a caption."""
MARK_FIELDS = ("mark", "wrong_words", "remark")
OUTDATED = "outdated"  # a mark of a text that has changed since; it is shown, and counts nowhere
BY_HAND = ("edits", "marks", "completes", "undoes")
"""Keys by which lines are known that are no records: a text written by hand; what a person finds of a caption; that a
batch of edits is complete, from where on it counts; and that one counts no longer."""


class Line(NamedTuple):
    """A line of a store: its number from 1, where it begins and ends in bytes, and its record or line by hand."""

    number: int
    start: int
    end: int
    record: dict[str, Any] | None  # None: not a record; reading has warned
    is_terminated: bool


def read_store(path: Path, start: int = 0, num_before: int = 0) -> Iterator[Line]:
    """The lines of a store from a byte position on, blank ones left out; a warning names each that is no record.

    A last line without its newline is a record if it is complete.

    Args:
        path: the store.
        start: where to begin.
        num_before: number of lines before that.

    Raises:
        OSError: with the path.
    """
    number, num_bad = num_before, 0
    with naming(path), open_regular(path) as file:
        file.seek(start)
        while content := file.readline(MAX_LINE_BYTES):
            number, end = number + 1, start + len(content)
            is_terminated = content.endswith(b"\n")
            record = None
            try:
                if len(content) == MAX_LINE_BYTES and not is_terminated:
                    end, is_terminated = _skip_line(file)
                    raise ValueError(f"has more than {MAX_LINE_BYTES:,} bytes")
                if not content.isspace():
                    record = parse_line(content)
            except ValueError as error:
                num_bad += 1
                if num_bad <= MOST_WARNINGS:
                    warn(f"{path}, line {number} is skipped: {error}", stacklevel=2)
            if not content.isspace():
                yield Line(number, start, end, record, is_terminated)
            start = end
    if num_bad > MOST_WARNINGS:
        warn(f"{path}: {num_bad - MOST_WARNINGS} more lines are skipped", stacklevel=2)


def _skip_line(file: BinaryIO) -> tuple[int, bool]:
    """Read to the end of a line; returns the position, and whether the line has its newline."""
    while content := file.readline(1 << 20):
        if content.endswith(b"\n"):
            return file.tell(), True
    return file.tell(), False


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the path to an `OSError` that lacks it, as when a disk goes away under an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # ours
            raise
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from None


def parse_line(content: bytes) -> dict[str, Any]:
    """The record or line by hand in a line of the file.

    Raises:
        ValueError: why it is none.
    """
    try:
        line = _DECODER.decode(content.decode("utf-8-sig").strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"torn or damaged, no JSON ({error.msg} at character {error.pos})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"torn or damaged, not in UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError("damaged, it is nested too deeply") from None
    check_line(line)
    return line


def check_line(line: Any) -> None:
    """Check a caption record or one of the lines `BY_HAND`.

    A record needs `request`, `video`, `status`, and `text` or `error`; other fields may be missing, but not of another
    type than capkit writes.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(line, dict):
        raise ValueError(f"no record, but {_shorten(line)}")
    if is_by_hand(line):
        _check_by_hand(line)
        return
    if "request" not in line:
        raise ValueError("a record needs its `request`: make it with new_record()")
    _check_texts(line, "request", "video", "status")
    if line["status"] not in ("ok", "error"):
        raise ValueError(f"status={_shorten(line['status'])}: must be 'ok' or 'error'")
    _check_texts(line, "text" if line["status"] == "ok" else "error")
    for name, types in _TYPES.items():
        if name in line:
            _check_value(name, line[name], types)
    if "\0" in line["video"] or "\0" in line.get("strip", ""):
        raise ValueError("a file name has a NUL in it")
    if len(line["video"]) > MAX_PATH_CHARACTERS:
        raise ValueError(f"the video's name has more than {MAX_PATH_CHARACTERS:,} characters")
    for name, types in _TYPES_IN_LISTS.items():
        if (values := line.get(name)) and not (set(map(type, values)) <= types and _are_in_range(values)):
            for value in values:
                _check_value(f"an item of {name}", value, types)
    if (line.get("mean_logprob") or 0) > 1:
        raise ValueError(f"mean_logprob={line['mean_logprob']!r}: must not be above 0")
    if line["status"] == "ok" and "prompt" in line:  # of an error it may be the reason
        _check_value("prompt", line["prompt"], _TEXT)
    for turn in line.get("history", ()):
        if not (type(turn) is list and [*map(type, turn)] == [str, str]):
            raise ValueError(f"history has {_shorten(turn)} in it: must be a question and an answer")
    for name, value in line.get("decoding", {}).items():
        _check_value(f"decoding: {name}", value, _IN_DECODING.get(name, _NUMBER | _NONE))
    for word in line.get("decoding", {}).get("forbidden_words", ()):
        _check_value("an item of forbidden_words", word, _TEXT)
    for number in line.get("decoding", {}).get("word_bias", {}).values():
        _check_value("a number of word_bias", number, _NUMBER)
    for name, value in line.get("frame_sampling", {}).items():
        _check_value(f"frame_sampling: {name}", value, _IN_FRAME_SAMPLING.get(name, _NUMBER | _TEXT | _NONE))


def is_by_hand(line: dict[str, Any]) -> bool:
    """Whether a line is no record, but one of `BY_HAND`."""
    return "request" not in line and any(key in line for key in BY_HAND)


def _check_by_hand(line: dict[str, Any]) -> None:
    key = next(key for key in BY_HAND if key in line)
    _check_texts(line, key, *({"created", "batch"} & line.keys()))
    if key == "edits":
        _check_texts(line, "text")
    elif key == "marks":
        _check_texts(line, "text", "remark")
        if line.get("mark", "") not in (None, *MARKS):
            raise ValueError(f"mark is {_shorten(line.get('mark'))}: must be one of {', '.join(MARKS)}, or null")
        _check_list(line, "wrong_words")
    elif key == "completes":
        _check_list(line, "leaves_out")


def _check_list(line: dict[str, Any], name: str) -> None:
    _check_value(name, line.get(name), frozenset((list,)))
    for value in line[name]:
        _check_value(f"an item of {name}", value, _TEXT)
        _check_characters(f"an item of {name}", value)


def _check_texts(line: dict[str, Any], *names: str) -> None:
    for name in names:
        if name not in line:
            raise ValueError(f"has no `{name}`")
        _check_value(name, line[name], _TEXT)
        if name in ("text", "remark"):
            _check_characters(f"the {name}", line[name])


def _check_characters(name: str, text: str) -> None:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"{name} has more than {MAX_TEXT_CHARACTERS:,} characters, which no caption has")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} has half a character in it (a lone surrogate)") from None


def _check_value(name: str, value: Any, types: frozenset[type]) -> None:
    if type(value) not in types:
        raise ValueError(f"{name} is {_shorten(value)}: must be {_describe(types)}")
    if type(value) in _NUMBER and not -MAX_NUMBER < value < MAX_NUMBER:
        raise ValueError(f"{name} is {_shorten(value)}: out of range")


def _are_in_range(values: list[Any]) -> bool:
    return isinstance(values[0], str) or -MAX_NUMBER < min(values) and max(values) < MAX_NUMBER


def _describe(types: frozenset[type]) -> str:
    names = {str: "a text", int: "an integer", float: "a number", dict: "an object", list: "a list", type(None): "null"}
    return " or ".join(sorted(names[kind] for kind in types))


def _shorten(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, TypeError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    line = dict(pairs)
    if len(line) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has {next(_shorten(name) for name in names if names.count(name) > 1)} twice")
    return line


def _refuse_constant(name: str) -> None:
    raise ValueError(f"has {name} in it, which is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
