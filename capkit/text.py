"""Messages, and text of others made safe to show in them: in a terminal, in HTML, in UTF-8."""

from __future__ import annotations

import difflib
import html
import re
import warnings
from collections.abc import Iterable

# Control characters can forge lines and drive a terminal (escape sequences); bidirectional embeddings, overrides and
# isolates reorder what follows them; lone surrogates cannot be printed. Joiners and marks of scripts stay as they are.
_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SPACES_IN_HTML = "\t\n\r"


def plain_text(text: object) -> str:
    r"""Text for a line of a terminal: control characters and such as escapes, like `\x1b`, `\n` and `\u202e`."""
    return _CONTROLS.sub(_escape, str(text))


def escape(text: object) -> str:
    """Text as HTML, also within quotes: markup as entities, control characters and such as escapes that are seen."""
    return without_controls(html.escape(str(text)))


def without_controls(markup: str) -> str:
    """HTML made by others, such as pandas, with control characters and such in it as escapes that are seen."""
    return _CONTROLS.sub(lambda match: match[0] if match[0] in _SPACES_IN_HTML else _escape(match), markup)


def encodable(text: str) -> str:
    """Text with lone surrogates, as in file names that are not UTF-8, as escapes: tables and files cannot hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_formula(value: object) -> bool:
    """Whether a spreadsheet that opens a CSV would take a cell for a formula, and run it."""
    return isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")


def spreadsheet_cell(value: object) -> object:
    """A cell of a table for people: an apostrophe before what a spreadsheet would run, NULs as escapes."""
    if not isinstance(value, str):
        return value
    return ("'" if is_formula(value) else "") + value.replace("\0", r"\0")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def plural(number: int, noun: str) -> str:
    """A number with its noun, such as "1 clip" and "2,000 clips"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def unknown_name(kind: str, name: str, names: Iterable[str], introduction: str) -> str:
    """Error message for an unknown name: the nearest match, if any, and all names after an introduction."""
    names = list(names)
    nearest = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {kind} {name!r}; {hint}{introduction}: {', '.join(names) or 'none'}"


class CapkitWarning(UserWarning):
    """What capkit warns of."""


def warn(message: str, stacklevel: int = 1) -> None:
    """Warn in a line of plain text; `stacklevel` counts from the caller, as in `warnings.warn`."""
    warnings.warn(plain_text(message), CapkitWarning, stacklevel + 1)


def show_warnings_plainly() -> None:
    """Show what capkit warns of in one line, without the place in the code; other warnings stay as Python shows them.

    For notebooks and commands, where the place is a line of a temporary file, or of capkit itself.
    """
    python_format = warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, CapkitWarning):
            return f"capkit: {message}\n"
        return python_format(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning
