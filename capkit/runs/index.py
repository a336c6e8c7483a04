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
from capkit.runs.lines import MARK_FIELDS, OUTDATED, is_by_hand, naming, read_store

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
NO_EDIT = -1


class Records(Sequence[dict[str, Any]]):
    """Records of a store, in order; each is read from the file when it is asked for.

    It compares equal to a list of the same records. Slices are `Records` too.

    Raises:
        OSError: on reading, if the file was taken away or replaced since.
    """

    def __init__(
        self,
        path: Path,
        starts: npt.NDArray[np.int64],
        edits: dict[int, int],
        marks: dict[int, int],
        file_id: tuple[int, ...],
    ):
        """
        Args:
            path: the store.
            starts: int64 (N,), where the records begin in it.
            edits, marks: where their hand edits and their marks begin, by where the records do.
            file_id: device and inode of the file that they were found in.
        """
        self._path, self._starts, self._file_id = path, starts, file_id
        self.edits, self.marks = edits, marks

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
                if (mark := self.marks.get(start)) is not None:
                    record |= _mark_fields(self._read(file, mark), record)
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
        return Records(self._path, self._starts[places], self.edits, self.marks, self._file_id)

    def since(self, num_bytes: int) -> Records:
        """The records that were written, edited or marked after the first so many bytes of the file."""
        by_hand = [start for start, at in [*self.edits.items(), *self.marks.items()] if at >= num_bytes]
        return self.at(np.flatnonzero((self._starts >= num_bytes) | np.isin(self._starts, by_hand)))

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
        self._edits: dict[str, int] = {}  # where the one that counts begins, by request
        self._marks: dict[str, int] = {}
        self._batches: dict[str, dict[str, int]] = {}  # where a batch's edits begin, by request
        self._complete: dict[str, None] = {}  # batches, in order
        self._undone: set[str] = set()
        self._before: dict[int, int] = {}  # where the edit begins that one of a batch replaced, or NO_EDIT
        self._row_errors: dict[int, set[int]] = {}  # places, by subject
        self._mended: set[int] = set()  # those with a complete caption after them

    @property
    def size(self) -> int:
        """Bytes of the file that have been read."""
        return self._file_state[2] if self._file_state else 0

    @property
    def end(self) -> int:
        """Where the last complete line that was read ends, in bytes."""
        return self._end

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
        if is_by_hand(record):
            self._add_by_hand(record, start)
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

    def _add_by_hand(self, line: dict[str, Any], start: int) -> None:
        if "edits" in line:
            of = self._batches.setdefault(line["batch"], {}) if "batch" in line else self._edits
            of[line["edits"]] = start
        elif "marks" in line:
            self._marks[line["marks"]] = start
        elif "completes" in line:
            self._complete_batch(line["completes"], set(line["leaves_out"]))
        else:
            self._undo_batch(line["undoes"])

    def _complete_batch(self, batch: str, leaves_out: set[str]) -> None:
        """Let the edits of a batch count from here on, but for texts that someone has edited since they were read."""
        self._complete[batch] = None
        for request, start in self._batches.get(batch, {}).items():
            before = self._edits.get(request, NO_EDIT)
            if before < start and request not in leaves_out:
                self._before[start], self._edits[request] = before, start
        if batch in self._undone:  # as in a merged store, where clocks decide the order
            self._undo_batch(batch)

    def _undo_batch(self, batch: str) -> None:
        """Go back to what was before a batch; an edit made after it stays."""
        self._undone.add(batch)
        undone = {start for name in self._undone for start in self._batches.get(name, {}).values()}
        for request in self._batches.get(batch, {}):
            while self._edits.get(request) in undone:
                before = self._before[self._edits.pop(request)]
                if before != NO_EDIT:
                    self._edits[request] = before

    def edits(self) -> dict[str, int]:
        """Where the hand edit of each request begins."""
        with self._lock:
            self.refresh()
            return dict(self._edits)

    def batches(self) -> dict[str, tuple[int, int] | None]:
        """Of each batch of edits: how many of them count, and how many were edited again; None if it was undone."""
        with self._lock:
            self.refresh()
            found: dict[str, tuple[int, int] | None] = {}
            for batch in self._complete:
                edits = [item for item in self._batches.get(batch, {}).items() if item[1] in self._before]
                num_current = sum(self._edits.get(request) == start for request, start in edits)
                found[batch] = None if batch in self._undone else (num_current, len(edits) - num_current)
            return found

    def __contains__(self, request: str) -> bool:
        with self._lock:
            self.refresh()
            return isinstance(request, str) and request in self._places

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
            records, _ = self._records()
            return records.at([self._places[request] for request in requests if request in self._places])

    def current(self) -> Records:
        """The current records, without those that another request for the same video and settings supersedes."""
        with self._lock:
            self.refresh()
            records, heirs = self._records()
            is_current = heirs == np.arange(len(heirs))
            is_current[list(self._mended)] = False
            return records.at(np.flatnonzero(is_current))

    def _records(self) -> tuple[Records, npt.NDArray[np.int64]]:
        """All records and `_heirs`; an heir of the same content has the last edit and mark of all it replaces."""

        def by_start(by_hand: dict[str, int]) -> dict[int, int]:
            return {self._starts[self._places[name]]: at for name, at in by_hand.items() if name in self._places}

        starts, heirs = np.array(self._starts, np.int64), self._heirs()
        records = Records(self.path, starts, by_start(self._edits), by_start(self._marks), self._file_state[:2])
        for request in self._edits | self._marks:
            if (place := self._places.get(request)) is not None and (heir := int(heirs[place])) != place:
                old, new = records.at([place, heir])
                if old.get("video_sha256") and old["video_sha256"] == new.get("video_sha256"):
                    for by_hand in (records.edits, records.marks):
                        if (at := by_hand.get(self._starts[place])) is not None:
                            by_hand[self._starts[heir]] = max(at, by_hand.get(self._starts[heir], at))
        return records, heirs

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


def record_text(record: dict[str, Any]) -> str:
    """The text of a record, stripped: the hand-edited one if there is one, else the model's; "" after an error."""
    return (record.get("edited_text", record.get("text")) or "").strip()


def _mark_fields(line: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What a mark adds to its record: nothing once it was taken away, and OUTDATED once the text is another one."""
    if line["mark"] is None:
        return {}
    is_of_text = line["text"].strip() == record_text(record)
    return {name: line[name] for name in MARK_FIELDS} | ({} if is_of_text else {"mark": OUTDATED})


def mark_text(record: dict[str, Any]) -> str:
    """A record's mark in words, such as "marked wrong (red): it is blue"; "" if it has none."""
    if "mark" not in record:
        return ""
    text = "marked before the text changed" if record["mark"] == OUTDATED else f"marked {record['mark']}"
    text += f" ({', '.join(words)})" if (words := record.get("wrong_words")) else ""
    return text + (f": {remark}" if (remark := record.get("remark")) else "")


def is_stopped(record: dict[str, Any]) -> bool:
    """Whether a person stopped the caption before its end."""
    return record.get("finish_reason") == "stopped"


def is_complete(record: dict[str, Any]) -> bool:
    """Whether a record holds a caption that was not stopped."""
    return record["status"] == "ok" and not is_stopped(record)


def is_row_error(record: dict[str, Any]) -> bool:
    """Whether a request or its record is of a manifest's row that cannot be used."""
    return "is_row_error" in record
