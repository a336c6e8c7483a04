"""Look into clips for an export: what their trainer sees of them, whether it can take them, and windows to cut out."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from capkit.export.choose import CUT, Choice, Chosen, ChosenRecords, choose_records
from capkit.export.clip_names import safe_stem
from capkit.export.layouts import LAYOUTS, Layout
from capkit.export.write import ExportError
from capkit.files import file_sha256
from capkit.runs import CaptionStore, TrainerSettings, trainer_span
from capkit.video import FrameSampling, VideoError, VideoInfo, WorkerProcess, load_clip

READ_SECONDS, CUT_SECONDS = 60.0, 3600.0  # longest times for a clip
MOST_KEPT = 10_000  # clips of which the facts are kept, for others with the same content
Facts = tuple[np.ndarray, VideoInfo, str]  # as from `read_facts`
EXPORT_OPTIONS = ("leave_out", "trainer", "cut", "crf", "several", "empty_share", "seed", "tokenizer")
"""Arguments of `export_dataset` that notebook 05 has in one parameter."""


def choose_for(
    layout: str,
    stores: Any,
    choose: Choice | Sequence[Choice] = (),
    trainer: TrainerSettings | Mapping[str, Any] | None = None,
    cut: str = "",
    several: bool = False,
    leave_out: Sequence[str] = ("wrong",),
    **others: Any,
) -> ChosenRecords:
    """What `export_dataset` with the same arguments chooses: a record for each clip, or why there is none.

    Raises:
        TypeError: `others` are not among EXPORT_OPTIONS; those that are do not change the choice.
        ValueError: as in `choose_records`.
    """
    if unknown := set(others) - set(EXPORT_OPTIONS):
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")
    kind = LAYOUTS[layout]
    with ClipFiles(kind, TrainerSettings.of(kind.window_rule, trainer), Path() if cut else None) as files:
        return choose_records(stores, choose, leave_out, is_seen=files.is_seen, cut=bool(cut), several=several)


class ClipFiles:
    """The clips of an export. They are read and encoded in worker processes.

    Args:
        layout, settings: of the trainer.
        cuts: folder of windows that are cut out, made when there is one; those in it are used again. None: none are.
        crf: quality of these, as of `cut_clip`.
    """

    def __init__(self, layout: Layout, settings: TrainerSettings, cuts: Path | None, crf: int = 18):
        self._layout, self._settings, self._cuts, self._crf = layout, settings, cuts, crf
        self._reader = WorkerProcess("capkit.video.facts", "read_facts")
        self._cutter = WorkerProcess("capkit.video.cutting", "cut_clip")
        self._span: tuple[str, tuple[float, float | None] | None] = ("", None)  # of the latest clip
        self._known: dict[str, tuple[str, dict[str, Any]]] = {}  # by content: why it is refused, or the facts of a clip
        self._stores: dict[Path, CaptionStore] = {}

    def __enter__(self) -> ClipFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.close()
        self._cutter.close()

    def is_seen(self, record: dict[str, Any]) -> bool:
        """Whether a record's window is what the trainer sees of the clip.

        Of a clip that the trainer cannot take, all are, if none is cut out: the clip is refused for that reason then.
        """
        rule, video = self._layout.window_rule, record["video"]
        if not rule:
            return False
        if self._span[0] != video:
            span = None
            if not isinstance(facts := self._facts(Path(video), by_decord=False), str):
                span = trainer_span(rule, facts[0], facts[1].average_fps, self._settings)
            self._span = (video, span)
        if (seen := self._span[1]) is None:
            return self._cuts is None
        start, end = record.get("start_seconds") or 0.0, record.get("end_seconds")
        ends = (end, seen[1])
        same_end = end == seen[1] if None in ends else isclose(*ends, abs_tol=1e-6)  # type: ignore[arg-type]  # floats
        return isclose(start, seen[0], abs_tol=1e-6) and same_end

    def check(self, chosen: Chosen, row: dict[str, Any]) -> str:
        """Why a clip cannot be exported, or "" with its file and its digest in the row; a window is cut out first."""
        clip = chosen.clip
        reason = "" if chosen.part == CUT else self._unfit_suffix(clip)
        reason = reason or _unfit_content(chosen, row)
        if not reason and chosen.part == CUT and self._cuts:
            reason = self._cut(chosen, row, self._cuts)
        if not reason and self._layout.with_strips:
            row["strip"] = self._strip(chosen)
        if reason or not self._layout.is_choosy:
            return reason
        if (content := row["sha256"]) not in self._known:
            if len(self._known) == MOST_KEPT:
                self._known.clear()
            self._known[content] = self._unfit(Path(row["clip"]))
        reason, row["facts"] = self._known[content]
        return reason

    def _strip(self, chosen: Chosen) -> str:
        """The file of a record's picture strip, or "" if its store does not have it."""
        store = self._stores.setdefault(chosen.store, CaptionStore(chosen.store))
        with suppress(ValueError):
            store.read_strip(chosen.record)
            return str(store.strip_path(chosen.record))
        return ""

    def _unfit_suffix(self, clip: Path) -> str:
        suffixes, suffix = self._layout.clip_suffixes, clip.suffix.lower()
        if not suffixes or suffix in suffixes:
            return ""
        return f"{self._layout.trainer} takes only {', '.join(sorted(suffixes))}, not {suffix or 'no suffix at all'}"

    def _unfit(self, clip: Path) -> tuple[str, dict[str, Any]]:
        """Why the trainer cannot take a clip, or "" with `Pair.facts`."""
        facts = self._facts(clip, self._layout.decoder == "decord")
        if isinstance(facts, str):
            return f"the clip cannot be read as a video: {facts}", {}
        _, info, problem = facts
        if problem:
            return f"{self._layout.trainer} reads clips with decord, and {problem}", {}
        size = (info.width, info.height) if "90 degrees" in info.orientation else (info.height, info.width)  # as stored
        seconds = info.num_frames / info.average_fps
        found = {"num_frames": info.num_frames, "height": size[0], "width": size[1], "duration": seconds}
        reason = self._layout.unfit_clip(info.num_frames, info.average_fps, self._settings)
        return reason, found | {"fps": info.average_fps}

    def _cut(self, chosen: Chosen, row: dict[str, Any], cuts: Path) -> str:
        """Cut a window out, unless that was done before; why it cannot be, or "" with the file in the row."""
        facts = self._facts(chosen.clip, by_decord=False)
        if isinstance(facts, str):
            return f"the clip cannot be read as a video: {facts}"
        start, end = chosen.record.get("start_seconds") or 0.0, chosen.record.get("end_seconds")
        inside = np.flatnonzero((facts[0] >= start) & (facts[0] < (np.inf if end is None else end)))
        if not inside.size:
            return "no frame of the clip is in the window"
        first, last = int(inside[0]), int(inside[-1])
        origin = f"{chosen.clip}\0{row['sha256']}\0{self._crf}".encode("utf-8", "surrogateescape")
        name = f"{safe_stem(chosen.clip.stem) or 'clip'}_{first}-{last}-x{hashlib.sha256(origin).hexdigest()[:10]}.mp4"
        try:
            cuts.mkdir(exist_ok=True)
            made = self._facts(target := cuts / name, by_decord=False)
            if isinstance(made, str) or len(made[0]) != last - first + 1:  # not there, or damaged since
                arguments = (str(chosen.clip), first, last, str(target), self._crf)
                if reason := _call(self._cutter, CUT_SECONDS, *arguments):
                    return f"the window cannot be cut out: {reason}"
        except OSError as error:
            advice = "windows cut out so far are kept: make room, and the same export goes on"
            raise ExportError(f"{cuts}: cannot be written: {error.strerror}; {advice}") from error
        row |= {"clip": str(target), "sha256": file_sha256(target)}
        return ""

    def _facts(self, clip: Path, by_decord: bool) -> Facts | str:
        """Facts of a clip, or the reason why it cannot be read."""
        if not os.path.isfile(clip):
            return "no such file"
        facts: Facts | str = _call(self._reader, READ_SECONDS, str(clip), by_decord)
        return facts


def _call(worker: WorkerProcess, seconds: float, *arguments: Any) -> Any:
    """The result of a worker process, or the reason why there is none."""
    try:
        return worker.call(*arguments, timeout_seconds=seconds)
    except VideoError as error:
        return error.reason
    except MemoryError:
        return "it takes more memory than there is"
    except (TimeoutError, ChildProcessError) as error:
        return f"reading it {error}"


def _unfit_content(chosen: Chosen, row: dict[str, Any]) -> str:
    """Why a clip's file is not what was captioned, or "" with its digest in the row."""
    try:
        if not stat.S_ISREG(os.stat(chosen.clip).st_mode):  # a pipe would have no end
            return "the clip is not a regular file"
        row["sha256"] = file_sha256(chosen.clip)
    except (OSError, ValueError) as error:
        return f"the clip cannot be read: {getattr(error, 'strerror', None) or error}"
    captioned = chosen.record.get("video_sha256")
    if captioned and captioned != row["sha256"]:
        return "the clip has changed since it was captioned; caption it again"
    if not captioned:  # nothing tells that this file was captioned, and a store of someone else may name any
        try:
            load_clip(chosen.clip, FrameSampling("uniform", 1))
        except VideoError as error:
            return f"the clip cannot be read as a video: {error.reason}"
    return ""
