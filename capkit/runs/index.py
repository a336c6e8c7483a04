"""Where the current records of a caption store are in its file; the records themselves stay on disk."""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from capkit.runs.fields import setting
from capkit.runs.lines import naming, read_store

TAIL_BYTES = 4096
SETTINGS = (
    *("video", "start_seconds", "end_seconds", "frame_sampling", "template", "frame_numbers", "prompt", "history"),
    *("decoding", "sample", "model_fingerprint", "dtype", "quantization"),
)
"""What makes two requests one, if only the video's file has changed since."""
SETTINGS_OF_ROWS = tuple(name for name in SETTINGS if name not in ("start_seconds", "end_seconds", "prompt"))
"""What a row that cannot be used shares with what it becomes once it is right."""
LATER_SETTINGS = ("answer_prefix", "steps")
"""Settings that a record has only if they differ from their default."""
NO_SUBJECT = 0


class Records(Sequence[dict[str, Any]]):
    """Records of a store, in order; each is read from the file when it is asked for.

    It compares equal to a list of the same records. Slices are `Records` too.

    Raises:
        OSError: on reading, if the file was taken away or replaced since.
    """

    def __init__(self, path: Path, starts: npt.NDArray[np.int64], edits: dict[int, int], file_id: tuple[int, ...]):
        """
        Args:
            path: the store.
            starts: int64 (N,), where the records begin in it.
            edits: where their hand edits begin, by where the records do.
            file_id: device and inode of the file that they were found in.
        """
        self._path, self._starts, self.edits, self._file_id = path, starts, edits, file_id

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not len(self):
            return
        with naming(self._path), open(self._path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) != self._file_id:
                raise OSError(f"{self._path}: another file took its place while it was read; read it again")
            for start in self._starts.tolist():
                record = self._read(file, start)
                if (edit := self.edits.get(start)) is not None:
                    record["edited_text"] = self._read(file, edit)["text"]
                yield record

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> Records: ...
    def __getitem__(self, place: int | slice) -> dict[str, Any] | Records:
        if isinstance(place, slice):
            return self.at(place)
        if not -len(self) <= place < len(self):
            raise IndexError(f"record {place} of {len(self)}")
        (record,) = self.at([place])
        return record

    def at(self, places: Any) -> Records:
        """The records at some places, in this order; places as NumPy takes them."""
        return Records(self._path, self._starts[places], self.edits, self._file_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"<{len(self)} records in {self._path}>"

    def _read(self, file: BinaryIO, start: int) -> dict[str, Any]:
        file.seek(start)
        try:
            record = json.loads(file.readline().decode("utf-8-sig"))
            if isinstance(record, dict):
                return record
        except ValueError:
            pass
        raise OSError(f"{self._path}: was changed or cut while it was read (at byte {start}); read it again")


class StoreIndex:
    """The place of each request's current record in a store, kept up to date as the file grows.

    For a million requests it takes about 0.2 GB. It is made anew when the file was replaced or changed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()
        self._clear()

    def _clear(self) -> None:
        self._file_state: tuple[int, ...] = ()
        self._end, self._num_lines, self._tail = 0, 0, b""
        self._places: dict[str, int] = {}  # of a request in the following, in the order of first attempts
        self._starts, self._subjects = array("q"), array("q")
        self._is_complete, self._is_stopped = bytearray(), bytearray()
        self._edits: dict[str, int] = {}
        self._row_errors: dict[int, set[int]] = {}  # places, by subject
        self._mended: set[int] = set()  # those with a complete caption after them

    @property
    def size(self) -> int:
        """Bytes of the file that have been read."""
        return self._file_state[2] if self._file_state else 0

    def refresh(self) -> None:
        """Read what was added to the file; nothing if it does not exist."""
        with self._lock, naming(self.path):
            try:
                status = os.stat(self.path)
            except FileNotFoundError:
                self._clear()
                return
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if state == self._file_state:
                return
            if state[:2] != self._file_state[:2] or not self._is_continued():
                self._clear()
            for line in read_store(self.path, self._end, self._num_lines):
                if line.is_terminated:  # else it is read again, because more of it may come
                    self._end, self._num_lines = line.end, line.number
                if line.record is not None:
                    self._add(line.record, line.start)
            self._file_state = state
            self._tail = self._read_tail()

    def _is_continued(self) -> bool:
        return os.path.getsize(self.path) >= self._end and self._read_tail() == self._tail

    def _read_tail(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(max(self._end - TAIL_BYTES, 0))
            return file.read(min(self._end, TAIL_BYTES))

    def _add(self, record: dict[str, Any], start: int) -> None:
        if "edits" in record:
            self._edits[record["edits"]] = start
            return
        place = self._places.setdefault(record["request"], len(self._starts))
        complete = is_complete(record)
        if is_row_error(record):
            self._row_errors.setdefault(_subject(record, SETTINGS_OF_ROWS), set()).add(place)
            self._mended.discard(place)
        elif complete and self._row_errors:
            self._mended |= self._row_errors.pop(_subject(record, SETTINGS_OF_ROWS), set())
        if place == len(self._starts):
            self._starts.append(start)
            self._subjects.append(NO_SUBJECT if is_row_error(record) else _subject(record, SETTINGS))
            self._is_complete.append(complete)
            self._is_stopped.append(is_stopped(record))
        elif complete or not self._is_complete[place]:
            self._starts[place], self._is_complete[place] = start, complete
            self._is_stopped[place] = is_stopped(record)

    def __contains__(self, request: str) -> bool:
        with self._lock:
            self.refresh()
            return request in self._places

    def done(self, retry_errors: bool) -> set[str]:
        """Requests with a complete caption or, unless `retry_errors`, with an error."""
        with self._lock:
            self.refresh()
            flags = zip(self._places, self._is_complete, self._is_stopped, strict=True)
            return {request for request, complete, stopped in flags if complete or not (stopped or retry_errors)}

    def latest(self, requests: Iterable[str]) -> Records:
        """The current record of each of these requests that the store has, superseded or not."""
        with self._lock:
            self.refresh()
            return self._records().at([self._places[request] for request in requests if request in self._places])

    def current(self) -> Records:
        """The current records, without those that another request for the same video and settings supersedes."""
        with self._lock:
            self.refresh()
            records, heirs = self._records(), self._heirs()
            for request, edit in self._edits.items():  # go over to the heir, if it is of the same content
                place = self._places.get(request, 0)
                if request in self._places and (heir := int(heirs[place])) != place:
                    old, new = records.at([place, heir])
                    if old.get("video_sha256") and old["video_sha256"] == new.get("video_sha256"):
                        records.edits.setdefault(self._starts[heir], edit)
            is_current = heirs == np.arange(len(heirs))
            is_current[list(self._mended)] = False
            return records.at(np.flatnonzero(is_current))

    def _records(self) -> Records:
        edits = {self._starts[self._places[name]]: edit for name, edit in self._edits.items() if name in self._places}
        return Records(self.path, np.array(self._starts, np.int64), edits, self._file_state[:2])

    def _heirs(self) -> npt.NDArray[np.int64]:
        """For each place the one shown instead: of those with equal subjects the last complete one, else the last."""
        starts, subjects = np.array(self._starts, np.int64), np.array(self._subjects, np.int64)
        order = np.lexsort((starts, np.frombuffer(bytes(self._is_complete), np.uint8), subjects))
        subjects = subjects[order]
        is_last = np.append(subjects[1:] != subjects[:-1], True)[: len(order)] | (subjects == NO_SUBJECT)
        ends = np.flatnonzero(is_last)
        heirs = np.empty(len(order), np.int64)
        heirs[order] = order[ends[np.searchsorted(ends, np.arange(len(order)))]]
        return heirs


def _subject(record: dict[str, Any], names: tuple[str, ...]) -> int:
    """A 64-bit number of these settings; NO_SUBJECT if one is missing."""
    if any(name not in record for name in names):
        return NO_SUBJECT
    settings = [setting(record, name) for name in (*names, *LATER_SETTINGS)]
    if "prompt" in names:  # with `{duration}`, which is the file's, unfilled
        settings.append(record.get("prompt_fields"))
    return hash(tuple(map(str, settings))) or 1


def is_stopped(record: dict[str, Any]) -> bool:
    """Whether a person stopped the caption before its end."""
    return record.get("finish_reason") == "stopped"


def is_complete(record: dict[str, Any]) -> bool:
    """Whether a record holds a caption that was not stopped."""
    return record["status"] == "ok" and not is_stopped(record)


def is_row_error(record: dict[str, Any]) -> bool:
    """Whether a request or its record is of a manifest's row that cannot be used."""
    return "is_row_error" in record
