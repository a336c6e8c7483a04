"""Text of others, such as captions and file names, made safe to show: in a terminal, in HTML, in UTF-8."""

from __future__ import annotations

import html
import re

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


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
