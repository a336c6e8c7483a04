"""The clip itself, playing, as HTML; a link where it is large, and what a browser cannot play is said."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

from capkit.text import escape

PLAYER_BYTES = 8_000_000  # a larger file is not copied into a panel or a page
CARD_BYTES = 4_000_000  # of all files on a page of cards
PLAYED_CODECS = ("h264", "vp8", "vp9", "av1")  # by browsers, as FFmpeg names them
PLAYED_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mp4", ".webm": "webm", ".mkv": "webm"}


def video_player(
    path: str | Path, codec: str | None = None, link: str | None = None, most_bytes: float = PLAYER_BYTES
) -> str:
    """A file as an inline player; "" if it is not there.

    Args:
        path: the file.
        codec: FFmpeg's name of it; None if it is not known.
        link: the address behind the link that stands in for a player; None: the file's own.
        most_bytes: a larger file is a link.
    """
    path = Path(path).absolute()
    kind = PLAYED_FORMATS.get(path.suffix.lower())
    try:
        num_bytes = path.stat().st_size
        if kind and codec in (None, *PLAYED_CODECS) and num_bytes <= most_bytes:
            data = base64.b64encode(path.read_bytes()).decode()
            style = "width:224px;max-width:100%;max-height:300px;display:block"
            return f'<video controls loop muted style="{style}" src="data:video/{kind};base64,{data}"></video>'
    except (OSError, ValueError):  # not there, or of a name that no file can have
        return ""
    reason = f"of {num_bytes / 1e6:.0f} MB, too large to be played here"
    if not kind or codec not in (None, *PLAYED_CODECS):
        reason = f"few browsers play {path.suffix.lower() if codec in (None, *PLAYED_CODECS) else codec}"
    name = f'<a href="{escape(link or path.as_uri())}" target="_blank"><bdi>{escape(path.name)}</bdi></a>'
    return f"<small>the clip: {name}, {reason}</small>"


def video_players(videos: Iterable[str]) -> dict[str, str]:
    """A player for each file of a page of cards, by name; links once there are `CARD_BYTES` of them."""
    players: dict[str, str] = {}
    left = CARD_BYTES
    for video in dict.fromkeys(videos):
        players[video] = video_player(video, most_bytes=left)
        left -= len(players[video]) * 3 // 4 if players[video].startswith("<video") else 0
    return players
