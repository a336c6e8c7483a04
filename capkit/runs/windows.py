"""Cut videos into windows, write captions as WebVTT, and find the part of a clip that a trainer really sees."""

from __future__ import annotations

import html
import itertools
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from capkit.files import atomic_write
from capkit.runs.manifests import Item, check_items
from capkit.runs.shots import check_shots, into_shots
from capkit.runs.trainers import DEFAULTS, TRAINERS, TrainerSettings, check_trainer, trainer_indices
from capkit.text import without_controls
from capkit.video import VideoError, VideoInfo, WorkerProcess, finite_float

LEAST_WINDOW_SECONDS = 0.1  # hardly more than a frame: nothing happens in less
MOST_WINDOWS = 100_000  # of one video: more than a day of seconds
LEAST_REMAINDER = 0.25  # of a window; a shorter rest at a video's end is added to the window before


def cut_into(
    items: Iterable[Item],
    window_seconds: float | None = None,
    trainer: str = "",
    num_frames: int | None = None,
    timeout_seconds: float = 60.0,
    frames_per_second: float | None = None,
    stride: int | None = None,
    shots: bool = False,
    kept_cuts: str | os.PathLike[str] | None = None,
) -> list[Item]:
    """Cut items into windows as a trainer does, where their shots change, by time, or not at all.

    This is `trainer_windows` if `trainer` is set; else `into_shots` if `shots` is, and then `into_windows` if
    `window_seconds` is.

    An item whose file cannot be read stays as it is, or gets an error: captioning gives it a record with the error.

    Args:
        items: from `find_clips`.
        window_seconds: length of a window.
        trainer: one of `TRAINERS`.
        num_frames, frames_per_second, stride: what the trainer is set to, see `TrainerSettings`; None for the defaults.
        timeout_seconds: longest time to list one file's frames, or without progress in the search for its cuts.
        shots: cut where the shots of a film change; with `window_seconds`, shots that last longer are cut again.
        kept_cuts: a file that keeps the cuts, see `into_shots`.

    Raises:
        ValueError: a trainer is set with another way of cutting, `window_seconds` is below 0.1, unknown trainer, a
            setting out of range or without effect, or a trainer and an item with a window of its own.
        ImportError: PySceneDetect, which `shots` needs, is not installed.
    """
    items = check_items(items)
    settings = {"num_frames": num_frames, "frames_per_second": frames_per_second, "stride": stride}
    given = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
    if given and not trainer:
        raise ValueError(f"{given[0]}: no effect without a trainer; one of {', '.join(TRAINERS)}")
    if type(shots) is not bool:
        raise ValueError(f"shots={shots!r}: must be true or false")
    if trainer and (shots or window_seconds is not None):
        other = "shots" if shots else "window_seconds"
        raise ValueError(f"{other} and trainer are both set: a trainer sees complete files, so choose one")
    if trainer:
        check_trainer(trainer)
        return trainer_windows(items, trainer, TrainerSettings.of(trainer, settings), timeout_seconds)
    if shots:
        check_shots()
        items = into_shots(items, None if kept_cuts is None else Path(kept_cuts), timeout_seconds)
    return items if window_seconds is None else into_windows(items, window_seconds, timeout_seconds)


def into_windows(items: Iterable[Item], window_seconds: float, timeout_seconds: float = 60.0) -> list[Item]:
    """Cut items into consecutive windows; the last one of an item is shorter, or up to a quarter longer.

    Windows stay within an item's start and end. An item of several windows loses its reference. One of more than
    100,000 windows, for which a damaged file's duration is enough, gets an error in their place.

    Raises:
        ValueError: `window_seconds` is no number, or below 0.1.
    """
    if (finite_float(window_seconds) or 0) < LEAST_WINDOW_SECONDS:
        least = f"at least {LEAST_WINDOW_SECONDS}"
        raise ValueError(f"window_seconds={window_seconds!r}: must be a positive number of seconds, {least}")
    windows = []
    for item, listing in _with_frame_times(items, timeout_seconds):
        number = 1
        if listing is not None:
            duration = listing[1].duration_seconds
            end = duration if item.end is None else min(item.end, duration)
            number = max(int((end - item.start) / window_seconds + 1 - LEAST_REMAINDER), 1)
        if number > MOST_WINDOWS:
            many = f"would be {number:,} windows of {window_seconds:g} s; {MOST_WINDOWS:,} are the most of one video"
            item, number = replace(item, error=f"{item.video}: {many}"), 1
        if number == 1:
            windows.append(item)
            continue
        starts = [round(item.start + index * window_seconds, 6) for index in range(number)]
        ends = [*starts[1:], item.end]
        windows += [replace(item, start=s, end=e, reference=None) for s, e in zip(starts, ends, strict=True)]
    return windows


def write_webvtt(records: Iterable[dict[str, Any]], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the captions of each video as WebVTT subtitles, one cue per window; returns the files' paths.

    Args:
        records: from `caption_clips` or `CaptionStore.current()`; hand edits are used, errors and
            captions without times left out.
        folder: made if missing. Files are named after the videos, with a number where two share a name.
    """
    cues = defaultdict(list)
    for record in records:
        if record["status"] == "ok" and record.get("duration_seconds") is not None:
            start = record.get("start_seconds", 0.0)
            text = " ".join(record.get("edited_text", record["text"]).split())
            text = without_controls(html.escape(text, quote=False))
            cues[record["video"]].append((start, start + record["duration_seconds"], text))
    paths = []
    reserved = {_as_file_systems_compare(Path(video).stem) for video in cues}
    taken: set[str] = set()
    for video, of_video in cues.items():
        name = stem = Path(video).stem
        numbers = itertools.count(2)
        while (key := _as_file_systems_compare(name)) in taken or (name != stem and key in reserved):
            name = f"{stem} ({next(numbers)})"
        taken.add(key)
        blocks = [f"{_clock(start)} --> {_clock(end)}\n{text}" for start, end, text in sorted(of_video)]
        content = "\n\n".join(["WEBVTT", *blocks]) + "\n"
        paths.append(atomic_write(Path(folder).expanduser() / f"{name}.vtt", content))
    return paths


def _as_file_systems_compare(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()  # macOS


def _clock(seconds: float) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}"


def trainer_windows(
    items: Iterable[Item], trainer: str, settings: TrainerSettings = DEFAULTS, timeout_seconds: float = 60.0
) -> list[Item]:
    """Cut each clip to the part that a trainer sees, so that only this is captioned: from its first frame to its last.

    Where the trainer skips frames between these, frames are sampled among those that it takes. A clip that the trainer
    cannot take stays as it is: the export says why.

    Raises:
        ValueError: an item has a window of its own, which trainers do not support; or as in `trainer_indices`.
    """
    check_trainer(trainer)
    parts = []
    for item, listing in _with_frame_times(items, timeout_seconds):
        if item.start or item.end is not None:
            raise ValueError(f"{item.video}: has start or end, but a trainer takes the complete file; cut it first")
        times, info = listing or (np.empty(0), None)
        if info and (span := trainer_span(trainer, times, info.average_fps, settings)):
            taken = tuple(trainer_indices(trainer, len(times), info.average_fps, settings))
            skips = len(taken) <= taken[-1] - taken[0]
            item = replace(item, start=span[0], end=span[1], only_frames=taken if skips else None)
        parts.append(item)
    return parts


def trainer_span(
    trainer: str, times: np.ndarray, average_fps: float, settings: TrainerSettings = DEFAULTS
) -> tuple[float, float | None] | None:
    """The window of a clip that a trainer sees, from its first frame to its last, as start and end in seconds.

    None if it cannot take the clip; an end of None is the clip's.
    """
    indices = trainer_indices(trainer, len(times), average_fps, settings)
    if not indices:
        return None
    first, after = indices[0], indices[-1] + 1
    return float(times[first]) if first else 0.0, None if after == len(times) else float(times[after])


def unseen_by_trainer(
    records: Iterable[dict[str, Any]],
    trainer: str,
    settings: TrainerSettings = DEFAULTS,
    timeout_seconds: float = 60.0,
) -> list[dict[str, Any]]:
    """Find captions that rest on frames before the first or after the last one that a trainer sees.

    Args:
        records: from `caption_clips` or `CaptionStore.current()`; errors and missing files are left out.
        trainer, settings: as in `trainer_indices`.

    Returns:
        For each such record `request`, `video`, `num_unseen` and `num_captioned` (frames), and the span that the
        trainer sees, `seen_from_seconds` and `seen_to_seconds` (None where it finds no frame).
    """
    good, flagged = [record for record in records if record["status"] == "ok"], []
    listings = _with_frame_times([Item(record["video"]) for record in good], timeout_seconds)
    for record, (_, listing) in zip(good, listings, strict=True):
        if listing is None:
            continue
        times, info = listing
        seen = trainer_indices(trainer, len(times), info.average_fps, settings)
        captioned = record.get("frame_indices") or []
        unseen = [index for index in captioned if not seen or not seen[0] <= index <= seen[-1]]
        if unseen:
            counts = {"num_unseen": len(unseen), "num_captioned": len(captioned)}
            first, last = (float(times[seen[0]]), float(times[seen[-1]])) if seen else (None, None)
            span = {"seen_from_seconds": first, "seen_to_seconds": last}
            flagged.append({"request": record["request"], "video": record["video"]} | counts | span)
    return flagged


def _with_frame_times(
    items: Iterable[Item], timeout_seconds: float
) -> list[tuple[Item, tuple[np.ndarray, VideoInfo] | None]]:
    """Each item with its file's frame times in seconds and `VideoInfo`, None where the file cannot be read."""
    items = list(items)
    videos = list(dict.fromkeys(item.video for item in items))

    def list_each(worker: WorkerProcess, videos: list[str]) -> list[tuple[np.ndarray, VideoInfo] | None]:
        return [_frame_times(worker, video, timeout_seconds) for video in videos]

    one, other = (WorkerProcess("capkit.video.reading", "read_timestamps") for _ in range(2))
    with ThreadPoolExecutor(2) as pool, one, other:  # interrupted, it closes the workers, which ends the threads
        even, odd = pool.map(list_each, (one, other), (videos[::2], videos[1::2]))
    listings = dict(zip(videos[::2] + videos[1::2], even + odd, strict=True))
    return [(item, None if item.error else listings[item.video]) for item in items]


def _frame_times(worker: WorkerProcess, video: str, timeout_seconds: float) -> tuple[np.ndarray, VideoInfo] | None:
    if not os.path.isfile(video):
        return None
    try:
        return worker.call(video, timeout_seconds=timeout_seconds)
    except (VideoError, MemoryError, TimeoutError, ChildProcessError):
        return None
