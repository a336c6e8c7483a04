"""The clip itself, playing: what a browser can play, and a player in static HTML."""

from __future__ import annotations

import base64
from pathlib import Path

from capkit.text import escape
from capkit.views.html import MUTED

EMBEDDED_BYTES = 20e6  # a larger file is not copied into a page
# Names of FFmpeg's, and what a browser calls the containers.
PLAYED_CODECS = ("h264", "vp8", "vp9", "av1")
PLAYED_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mp4", ".webm": "webm", ".mkv": "webm"}


def unplayable(path: str | Path, codec: str | None) -> str:
    """Why a browser cannot play a file, such as "browsers do not play hevc"; "" if most can.

    Args:
        path: the file's name.
        codec: FFmpeg's name of it; None if it is not known.
    """
    suffix = Path(path).suffix.lower()
    if codec is not None and codec not in PLAYED_CODECS:
        return f"few browsers play {codec}"
    return "" if suffix in PLAYED_FORMATS else f"few browsers play {suffix or 'such'} files"


def video_player(path: str | Path, codec: str | None = None, link: str | None = None) -> str:
    """A file as an inline player, as HTML; as a link if it is large, and what a browser cannot play is said.

    Args:
        path: the file.
        codec: FFmpeg's name of it; None if it is not known.
        link: the address behind the link; None: the file's own.
    """
    path = Path(path).absolute()
    try:
        num_bytes, reason = path.stat().st_size, unplayable(path, codec)
        if not reason and num_bytes <= EMBEDDED_BYTES:
            data = base64.b64encode(path.read_bytes()).decode()
            source = f"data:video/{PLAYED_FORMATS[path.suffix.lower()]};base64,{data}"
            return f'<video controls loop muted preload="metadata" style="max-width:100%" src="{source}"></video>'
    except OSError as error:
        return f'<div style="{MUTED}">not to be played: {escape(error.strerror)}</div>'
    reason = reason or f"{num_bytes / 1e6:.0f} MB, too large to be shown here"
    name = f'<a href="{escape(link or path.as_uri())}" target="_blank">{escape(path.name)}</a>'
    return f'<div style="{MUTED}">{name}: {escape(reason)}</div>'
