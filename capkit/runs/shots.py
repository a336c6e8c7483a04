"""Cut films where their shots change, so that each shot gets a caption of its own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from capkit.console import progress_bar
from capkit.files import append_lines, now, read_lines
from capkit.runs.manifests import Item
from capkit.runs.store import sha256_if_there
from capkit.text import warn
from capkit.video import LEAST_SHOT_SECONDS, VideoError, WorkerProcess

Cuts = tuple[list[float], float]  # when the second and later shots begin, and the film's duration; seconds


def check_shots() -> None:
    """Raise ImportError if films cannot be cut into shots, because PySceneDetect is not installed."""
    if importlib.util.find_spec("scenedetect") is None:
        raise ImportError("cutting films into shots needs PySceneDetect: pip install -e '.[shots]'")


def into_shots(items: Iterable[Item], kept_cuts: Path | None = None, timeout_seconds: float = 60.0) -> list[Item]:
    """Cut items where the shots of their films change; one without cuts stays as it is.

    A shot begins at the time of its first frame. Within an item's start and end, shots last at least half a second; a
    shorter one goes with the next, at the end with the one before. An item of several shots loses its reference. One
    whose film cannot be searched gets an error; one whose file is not there stays as it is.

    Args:
        items: from `find_clips`.
        kept_cuts: a file of JSON lines that keeps the cuts of each film by its SHA-256, so that it is searched only
            once; None: none is kept.
        timeout_seconds: longest time without progress in a film.

    Raises:
        ImportError: PySceneDetect is not installed.
        OSError: `kept_cuts` cannot be read or written.
    """
    items = list(items)
    films = dict.fromkeys(item.video for item in items if not item.error and os.path.isfile(item.video))
    found = _find_all(list(films), kept_cuts, timeout_seconds)
    shots = []
    for item in items:
        cuts = None if item.error else found.get(item.video)
        if isinstance(cuts, str):
            item = replace(item, error=cuts)
        starts = _shot_starts(cuts, item) if isinstance(cuts, tuple) else [item.start]
        if len(starts) == 1:
            shots.append(item)
            continue
        ends = [*starts[1:], item.end]
        shots += [replace(item, start=s, end=e, reference=None) for s, e in zip(starts, ends, strict=True)]
    return shots


def _shot_starts(cuts: Cuts, item: Item) -> list[float]:
    starts, end = [item.start], cuts[1] if item.end is None else item.end
    for cut in cuts[0]:
        if round(min(cut - starts[-1], end - cut), 3) >= LEAST_SHOT_SECONDS:
            starts.append(cut)
    return starts


def _find_all(films: list[str], kept_cuts: Path | None, timeout_seconds: float) -> dict[str, Cuts | str]:
    """The cuts of each film, or why they cannot be found."""
    kept = {} if kept_cuts is None else _read_kept(kept_cuts)
    found: dict[str, Cuts | str] = {}
    worker = WorkerProcess("capkit.video.shots", "find_cuts")
    with worker, progress_bar()(total=len(films), desc="films searched for cuts", disable=not films) as progress:
        for number, film in enumerate(films):
            if digest := sha256_if_there(film):
                try:
                    while digest not in kept:
                        answer = worker.call(film, timeout_seconds=timeout_seconds)
                        if isinstance(answer, float):
                            _show(progress, number + answer)
                        else:
                            kept[digest] = answer
                            _keep(kept_cuts, film, digest, answer)
                    found[film] = kept[digest]
                except (VideoError, MemoryError, TimeoutError, ChildProcessError) as error:
                    reason = error.reason if isinstance(error, VideoError) else str(error) or "not enough memory"
                    found[film] = f"{film}: its cuts cannot be found: {reason}"
            _show(progress, number + 1)
    return found


def _show(progress: Any, num_films: float) -> None:
    progress.n = round(num_films, 2)
    progress.refresh()


def _keep(path: Path | None, film: str, digest: str, cuts: Cuts) -> None:
    facts = {"cuts_seconds": cuts[0], "duration_seconds": cuts[1], "found": now()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(path, {"video": os.path.abspath(film), "video_sha256": digest} | facts)


def _read_kept(path: Path) -> dict[str, Cuts]:
    """The cuts of each film by its SHA-256."""
    kept = {}
    for line in read_lines(path):
        try:
            cuts = [float(cut) for cut in line["cuts_seconds"]], float(line["duration_seconds"])
            kept[str(line["video_sha256"])] = cuts
        except (KeyError, TypeError, ValueError):
            warn(f"{path}: {str(line)[:80]} tells no cuts of a film; skipped")
    return kept
