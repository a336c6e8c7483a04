"""Parts of videos: long ones as consecutive windows, captions as WebVTT, and the part that a trainer really looks at.

The rules of the CogVideoX trainers were read in their sources:

- "cogvideo" (zai-org/CogVideo, finetune/) and "cogkit" (THUDM/CogKit): of n frames every (n // F)-th from the first,
  F in all; a clip of fewer is used whole, and its last frame repeated.
- "diffusers" (examples/cogvideo): the same; a shorter clip is cut to 4k + 1 frames.
- "sat" (zai-org/CogVideo, sat/): without the first 3 frames, F frames at about 8 a second; of clips too short for that
  every ((n - 6) // F)-th without the last 3 either, or 4k + 1 frames as they come.
"""

from __future__ import annotations

import html
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from capkit.runs.clips import Item
from capkit.video import VideoError, VideoInfo, WorkerProcess

TRAINERS = ("cogvideo", "cogkit", "diffusers", "sat")
SAT_SKIPPED_FRAMES, SAT_FRAMES_PER_SECOND = 3, 8
LEAST_REMAINDER = 0.25  # of a window; less than that at a video's end belongs to the window before


def cut_into(
    items: Iterable[Item],
    window_seconds: float | None = None,
    trainer: str = "",
    num_frames: int = 49,
    timeout_seconds: float = 60.0,
) -> list[Item]:
    """Items as `into_windows` or `trainer_windows` cuts them, or as they are.

    Args:
        items: from `find_clips`.
        window_seconds: for windows; None for none.
        trainer, num_frames: as in `trainer_windows`; "" for none.
        timeout_seconds: longest time to list one file's frames.

    Raises:
        ValueError: windows and a trainer at once, or as in these two.
    """
    if window_seconds is not None and trainer:
        raise ValueError("window_seconds and trainer are both set: a trainer looks at whole files, so choose one")
    if trainer:
        return trainer_windows(items, trainer, num_frames, timeout_seconds)
    return list(items) if window_seconds is None else into_windows(items, window_seconds, timeout_seconds)


def into_windows(items: Iterable[Item], window_seconds: float, timeout_seconds: float = 60.0) -> list[Item]:
    """Each item as consecutive windows of this length, the last one shorter, or up to a quarter longer.

    An item that is no longer than one window stays as it is, and so does one whose file cannot be read: its caption
    will be the error.

    Args:
        items: from `find_clips`; their own start and end are kept to. A reference goes with no window of several.
        window_seconds: length of a window.
        timeout_seconds: longest time to list one file's frames.

    Raises:
        ValueError: `window_seconds` is not positive.
    """
    if not window_seconds > 0:
        raise ValueError(f"window_seconds={window_seconds!r}: must be a positive number of seconds")
    windows = []
    for item, found in _with_times(items, timeout_seconds):
        if found is None:
            windows.append(item)
            continue
        duration = found[1].duration_seconds
        end = duration if item.end is None else min(item.end, duration)
        number = max(int(np.floor((end - item.start) / window_seconds + 1 - LEAST_REMAINDER)), 1)
        starts = [round(item.start + index * window_seconds, 6) for index in range(number)]
        if number == 1:
            windows.append(item)
            continue
        for start, stop in zip(starts, [*starts[1:], item.end], strict=True):
            windows.append(replace(item, start=start, end=stop, reference=None))
    return windows


def write_webvtt(records: Iterable[dict[str, Any]], folder: str | os.PathLike) -> list[Path]:
    """Write the captions of each video as subtitles (WebVTT): a cue for each window. Returns the files' paths.

    Args:
        records: from `caption_clips` or `CaptionStore.current()`; hand edits win, errors are left out.
        folder: made if it is not there. Files are named after the videos, with a number where two share a name.
    """
    cues = defaultdict(list)
    for record in records:
        if record["status"] == "ok":
            end = record["start_seconds"] + record["duration_seconds"]
            text = " ".join(record.get("edited_text", record["text"]).split())
            cues[record["video"]].append((record["start_seconds"], end, html.escape(text, quote=False)))
    folder, paths, taken = Path(folder).expanduser(), [], Counter()
    folder.mkdir(parents=True, exist_ok=True)
    for video, of_video in cues.items():
        stem = Path(video).stem
        taken[stem.lower()] += 1
        number = taken[stem.lower()]
        paths.append(folder / (f"{stem}.vtt" if number == 1 else f"{stem} ({number}).vtt"))
        blocks = [f"{_clock(start)} --> {_clock(end)}\n{text}" for start, end, text in sorted(of_video)]
        paths[-1].write_text("\n\n".join(["WEBVTT", *blocks]) + "\n", encoding="utf-8")
    return paths


def _clock(seconds):
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


def trainer_indices(trainer: str, num_video_frames: int, average_fps: float, num_frames: int = 49) -> list[int]:
    """Positions of the frames of a video that a trainer looks at, each once, in order.

    Args:
        trainer: one of `TRAINERS`.
        num_video_frames, average_fps: of the video.
        num_frames: F, how many frames the trainer is set to.

    Returns:
        At most `num_frames` positions; none where the trainer would find no frame (under "sat", fewer than 7).

    Raises:
        ValueError: unknown trainer, or a number below 1.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"unknown trainer {trainer!r}; choose one of {', '.join(TRAINERS)}")
    if num_frames < 1 or num_video_frames < 1:
        raise ValueError(f"num_frames={num_frames!r} of {num_video_frames!r}: both must be at least 1")
    if trainer == "sat":
        return _sat_indices(num_video_frames, average_fps, num_frames)
    indices = list(range(0, num_video_frames, max(num_video_frames // num_frames, 1)))[:num_frames]
    return indices[: _4k_plus_1(len(indices))] if trainer == "diffusers" else indices


def _sat_indices(count, fps, num_frames):
    start, end = SAT_SKIPPED_FRAMES, count - SAT_SKIPPED_FRAMES
    if count / fps * SAT_FRAMES_PER_SECOND > num_frames:
        end = int(start + num_frames / SAT_FRAMES_PER_SECOND * fps)
        indices = range(start, end, max((end - start) // num_frames, 1))
    elif count > num_frames:
        indices = range(start, end, max((end - start) // num_frames, 1))
    else:
        indices = range(start, start + _4k_plus_1(max(end - start, 0)))
    return [index for index in indices if index < count][:num_frames]


def _4k_plus_1(count):
    return max(count - (count - 1) % 4, 0)


def trainer_windows(
    items: Iterable[Item], trainer: str, num_frames: int = 49, timeout_seconds: float = 60.0
) -> list[Item]:
    """The part of each clip, from the first frame to the last, that a trainer looks at, to be captioned instead of all.

    Args:
        items: from `find_clips`. One whose file cannot be read stays as it is.
        trainer, num_frames: as in `trainer_indices`.
        timeout_seconds: longest time to list one file's frames.

    Raises:
        ValueError: an item with a window of its own, which no trainer knows of; or as in `trainer_indices`.
    """
    trainer_indices(trainer, 1, 1.0, num_frames)
    parts = []
    for item, found in _with_times(items, timeout_seconds):
        if item.start or item.end is not None:
            raise ValueError(f"{item.video}: has start or end, but a trainer takes the whole file; cut it first")
        indices = [] if found is None else trainer_indices(trainer, len(found[0]), found[1].average_fps, num_frames)
        if indices:
            times = found[0]
            start = 0.0 if indices[0] == 0 else float(times[indices[0]])
            end = None if indices[-1] + 1 == len(times) else float(times[indices[-1] + 1])
            item = replace(item, start=start, end=end)
        parts.append(item)
    return parts


def unseen_by_trainer(
    records: Iterable[dict[str, Any]], trainer: str, num_frames: int = 49, timeout_seconds: float = 60.0
) -> list[dict[str, Any]]:
    """Captions that rest on frames before the first or after the last frame that a trainer looks at.

    Args:
        records: from `caption_clips` or `CaptionStore.current()`; errors are left out, and clips that are gone.
        trainer, num_frames: as in `trainer_indices`.
        timeout_seconds: longest time to list one file's frames.

    Returns:
        Of each such record `request`, `video`, `num_unseen` of `num_captioned` frames, and `seen_from_seconds` and
        `seen_to_seconds`, between which the trainer looks (None where it finds no frame).
    """
    good, flagged = [record for record in records if record["status"] == "ok"], []
    listed = _with_times([Item(record["video"]) for record in good], timeout_seconds)
    for record, (_, found) in zip(good, listed, strict=True):
        if found is None:
            continue
        times, info = found
        seen = trainer_indices(trainer, len(times), info.average_fps, num_frames)
        captioned = record["frame_indices"]
        unseen = [index for index in captioned if not seen or not seen[0] <= index <= seen[-1]]
        if unseen:
            span = [float(times[seen[0]]), float(times[seen[-1]])] if seen else [None, None]
            told = {"num_unseen": len(unseen), "num_captioned": len(captioned)}
            told |= dict(zip(("seen_from_seconds", "seen_to_seconds"), span, strict=True))
            flagged.append({"request": record["request"], "video": record["video"]} | told)
    return flagged


def _with_times(
    items: Iterable[Item], timeout_seconds: float
) -> list[tuple[Item, tuple[np.ndarray, VideoInfo] | None]]:
    """Each item with its file's timestamps_seconds and `VideoInfo`, None where it cannot be read."""
    items = list(items)
    videos = list(dict.fromkeys(item.video for item in items))

    def list_them(some: Sequence[str]):
        with WorkerProcess("capkit.video.reading", "read_timestamps") as worker:
            return [_listed(worker, video, timeout_seconds) for video in some]

    found = {}
    with ThreadPoolExecutor(2) as pool:
        halves = videos[::2], videos[1::2]
        for half, listed in zip(halves, pool.map(list_them, halves), strict=True):
            found |= dict(zip(half, listed, strict=True))
    return [(item, found[item.video]) for item in items]


def _listed(worker, video, timeout_seconds):
    if not os.path.isfile(video):
        return None
    try:
        return worker.call(video, timeout_seconds=timeout_seconds)
    except (VideoError, MemoryError, TimeoutError, ChildProcessError):
        return None
