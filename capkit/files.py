"""Files that others read while they are written: whole or not at all."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

# The policy forbids scripts and the network, whatever the body holds. Articles out of sight are neither laid out nor
# painted, so that thousands open at once.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 1em auto; padding: 0 12px }}
article {{ content-visibility: auto; contain-intrinsic-size: auto 330px }}
article img {{ height: auto }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def write_whole(path: str | os.PathLike, text: str) -> Path:
    """Write a text file in UTF-8, so that nobody ever reads half of it; returns where it is. Its folder is made.

    What UTF-8 cannot hold (half a pair, out of a damaged file) is written as an escape that JSON reads.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def write_page(path: str | os.PathLike, title: str, body: str) -> Path:
    """Write a page without scripts; returns where it is.

    Args:
        path: file; its folder is made.
        title: as text.
        body: as HTML.
    """
    return write_whole(path, _PAGE.format(title=escape(title), body=body))
