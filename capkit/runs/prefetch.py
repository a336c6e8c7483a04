"""What long runs share: clips read ahead of the model, progress that suits who watches."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from capkit.cogvlm2 import Prompt
from capkit.files import append_line, now, read_lines
from capkit.video import Clip, ClipReader, ReaderHung, ReaderLost, VideoError, load_clip


def read_ahead(
    todo: Iterable[dict[str, Any]],
    timeout_seconds: float | None,
    num_ahead: int,
    num_readers: int = 2,
    memory_bytes: int | None = None,
    quarantine: Quarantine | None = None,
    prepare: Callable[[dict[str, Any], Clip], None] | None = None,
) -> Generator[tuple[dict[str, Any], Clip | Exception]]:
    """Each request with its clip, or with the error in reading it; others are read while one is captioned.

    Args:
        todo: from `request_settings`.
        timeout_seconds: longest time to read one clip; None for no limit, and for reading in this process.
        num_ahead: requests that are read, or being read, beyond the one at hand.
        num_readers: how many are read at the same time, each in a child process that is kept.
        memory_bytes: while clips that wait take this much, no further one is begun; nor may one take more, or a process
            that reads it (POSIX). None: `memory_budget()`.
        quarantine: clips not to be read, and where those go that the process reading them did not survive.
        prepare: called with each request and its clip, in a thread, once it is read.
    """
    memory_bytes = memory_bytes or memory_budget()
    readers = [ClipReader(memory_bytes) for _ in range(num_readers)]
    idle, room = deque(readers), _Room(memory_bytes)

    def read(number, settings):
        room.wait(number)
        reader = idle.popleft()
        try:
            clip = read_clip(settings, timeout_seconds, reader, quarantine)
        finally:
            idle.append(reader)
        if prepare is not None and isinstance(clip, Clip):
            prepare(settings, clip)
        room.take(clip)
        return clip

    waiting: deque = deque()
    pool = ThreadPoolExecutor(num_readers)
    try:
        for number, settings in enumerate(todo):
            waiting.append((settings, pool.submit(read, number, settings)))
            if len(waiting) > num_ahead:
                yield room.leave(waiting.popleft())
        while waiting:
            yield room.leave(waiting.popleft())
    finally:
        room.limit = math.inf
        pool.shutdown(cancel_futures=True)
        for reader in readers:
            reader.close()


class _Room:
    """Bytes that clips take between being read and being handed over; the next to be handed over always finds room."""

    def __init__(self, limit: float):
        self.limit, self.taken, self.next_number, self._changed = limit, 0, 0, threading.Condition()

    def wait(self, number):
        with self._changed:
            while not (self.taken < self.limit or number == self.next_number):
                self._changed.wait(1)  # looks again, because the limit is lifted without a word

    def take(self, clip):
        with self._changed:
            self.taken += _num_bytes(clip)

    def leave(self, waited):
        settings, future = waited
        clip = future.result()
        with self._changed:
            self.taken -= _num_bytes(clip)
            self.next_number += 1
            self._changed.notify_all()
        return settings, clip


def _num_bytes(clip):
    return clip.frames.nbytes if isinstance(clip, Clip) else 0


def read_clip(
    settings: dict[str, Any], timeout_seconds: float | None, reader: ClipReader, quarantine: Quarantine | None
) -> Clip | Exception:
    """The clip of a request, or the error in reading it. Arguments as in `read_ahead`, with the `reader` to use."""
    video, window = settings["video"], (settings["start_seconds"], settings["end_seconds"])
    again = True  # what a process died of once may have come from outside: somebody who kills, memory that others take
    while True:
        try:
            Prompt.from_record(settings)  # a clip may have an unusable prompt of its own
            if quarantine is not None:
                quarantine.check(video)
            return load_clip(video, settings["frame_sampling"], *window, timeout_seconds, reader)
        except ReaderLost as error:
            if not again or isinstance(error, ReaderHung):
                if quarantine is not None:
                    quarantine.add(video, error.reason)
                return error
            again = False
        except (VideoError, ValueError) as error:
            return error


def memory_budget() -> int:
    """Bytes that clips may take by default: half of what is free, at most 8 GiB."""
    return min(psutil.virtual_memory().available // 2, 2**33)


class Quarantine:
    """Clips that the process reading them did not survive: a line each in a file (JSON Lines). No later run reads them.

    A clip is known by its path, size and time of modification: once replaced, it is read again.

    Args:
        path: the file; made with the first line.
        also: files of others, only to be read.
    """

    def __init__(self, path: str | os.PathLike, also: Iterable[Path] = ()):
        self.path, self._lock, self._reasons = Path(path), threading.Lock(), {}
        for line in (line for each in {self.path, *also} for line in read_lines(each)):
            self._reasons[line["video"], line["size"], line["mtime_ns"]] = line["reason"]

    def check(self, video: str) -> None:
        """Raises:
        VideoError: this clip is in quarantine.
        """
        if self._reasons and (reason := self._reasons.get(self._key(video))):
            told = f"{reason}; not read again, because it stands in {self.path}"
            raise VideoError(video, told)

    def add(self, video: str, reason: str) -> None:
        """Note a clip, durably."""
        key = self._key(video)
        with self._lock:
            self._reasons[key] = reason
            told = dict(zip(("video", "size", "mtime_ns"), key, strict=True)) | {"reason": reason, "added": now()}
            append_line(self.path, told)

    @staticmethod
    def _key(video):
        try:
            status = os.stat(video)
        except OSError:
            return video, None, None
        return video, status.st_size, status.st_mtime_ns
