"""Which clip a caption is of: windows of one video are clips of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def clip_id(record: Mapping[str, Any]) -> str:
    """The clip of a caption record: its video's path, and its window as a media fragment, as in "/a.mp4#t=4.0,6.0".

    Args:
        record: a record, or any mapping with `video` and, for a window, `start_seconds` and `end_seconds`.
    """
    start, end = _window(record)
    if not start and end is None:
        return record["video"]
    return f"{record['video']}#t={start}" + ("" if end is None else f",{end}")


def window_name(record: Mapping[str, Any]) -> str:
    """The window of a caption record in words, such as "4 to 6 s"; "" for the entire video."""
    start, end = _window(record)
    if not start and end is None:
        return ""
    return f"{start:.6g} s to the end" if end is None else f"{start:.6g} to {end:.6g} s"


def seen_part(record: Mapping[str, Any]) -> str:
    """How much of its clip or window a caption rests on, such as "24 of 60 s"; "" if it is all of it, or not known.

    A frame stands for the time until the next one would come.
    """
    times, duration = record.get("timestamps_seconds"), record.get("duration_seconds")
    if not times or not duration:
        return ""
    first, last = min(times), max(times)
    step = (last - first) / (len(times) - 1) if len(times) > 1 else 1.0
    seen = last + step - _window(record)[0]
    return "" if seen + step / 2 >= duration else f"{round(seen, 1):.6g} of {round(duration, 1):.6g} s"


def _window(record: Mapping[str, Any]) -> tuple[float, float | None]:
    start, end = record.get("start_seconds") or 0.0, record.get("end_seconds")
    return float(start), None if end is None else float(end)
