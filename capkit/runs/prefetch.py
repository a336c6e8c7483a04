"""Read clips ahead of the model, in child processes and within a memory budget; skip clips in quarantine."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from capkit.cogvlm2 import Prompt
from capkit.files import append_lines, now, read_lines
from capkit.runs.store import CaptionStore
from capkit.text import warn
from capkit.video import Clip, ClipReader, ReaderHung, ReaderLost, VideoError, load_clip, memory_budget


def read_ahead(
    todo: Iterable[dict[str, Any]],
    timeout_seconds: float | None,
    num_ahead: int,
    num_readers: int = 2,
    memory_bytes: int | None = None,
    quarantine: Quarantine | None = None,
    image_size: int | None = None,
    store: CaptionStore | None = None,
    prepare: Callable[[dict[str, Any], Clip], None] | None = None,
) -> Generator[tuple[dict[str, Any], Clip | Exception]]:
    """Yield each request with its clip, or with the error in reading it; the next ones are read meanwhile.

    Args:
        todo: from `request_settings`.
        timeout_seconds: longest time to read one clip; None for no limit, and to read in this process.
        num_ahead: requests read, or being read, beyond the current one.
        num_readers: clips read at the same time, each in a child process.
        memory_bytes: no new clip is begun while those that wait take this much; a clip, or the process that reads it
            (POSIX), may not take more either. None: `memory_budget()`.
        quarantine: clips not to read; those that crash or hang their reader are added.
        image_size: as in `load_clip`.
        store: with `image_size`, the clips come with the picture strips that this store has not.
        prepare: called in a thread with each request and its clip, once read.
    """
    memory_bytes = memory_bytes or memory_budget()
    readers = [ClipReader(memory_bytes) for _ in range(num_readers)]
    idle, budget = deque(readers), _MemoryBudget(memory_bytes)

    def read(number: int, settings: dict[str, Any]) -> Clip | Exception:
        budget.wait(number)
        reader = idle.popleft()
        try:
            clip = read_clip(settings, timeout_seconds, reader, quarantine, image_size, store)
        finally:
            idle.append(reader)
        if prepare is not None and isinstance(clip, Clip):
            prepare(settings, clip)
        budget.change(_num_bytes(clip))
        return clip

    waiting: deque[tuple[dict[str, Any], Future[Clip | Exception]]] = deque()

    def take_first() -> tuple[dict[str, Any], Clip | Exception]:
        settings, future = waiting.popleft()
        clip = future.result()
        budget.change(-_num_bytes(clip), num_taken=1)
        return settings, clip

    pool = ThreadPoolExecutor(num_readers)
    try:
        for number, settings in enumerate(todo):
            waiting.append((settings, pool.submit(read, number, settings)))
            if len(waiting) > num_ahead:
                yield take_first()
        while waiting:
            yield take_first()
    finally:
        for reader in readers:  # first, because the pool's threads may be waiting for clips that hang
            reader.close()
        budget.limit = math.inf
        budget.change(0)
        pool.shutdown(wait=False, cancel_futures=True)  # not for the digest of a large file either


class _MemoryBudget:
    """Memory budget for prefetched clips; the next one in order is always admitted, so it cannot deadlock."""

    def __init__(self, limit: float):
        self.limit, self._num_bytes, self._next_number, self._changed = limit, 0, 0, threading.Condition()

    def wait(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._num_bytes < self.limit or number == self._next_number)

    def change(self, num_bytes: int, num_taken: int = 0) -> None:
        with self._changed:
            self._num_bytes += num_bytes
            self._next_number += num_taken
            self._changed.notify_all()


def _num_bytes(clip: Clip | Exception) -> int:
    return clip.nbytes if isinstance(clip, Clip) else 0


def read_clip(
    settings: dict[str, Any],
    timeout_seconds: float | None,
    reader: ClipReader,
    quarantine: Quarantine | None,
    image_size: int | None = None,
    store: CaptionStore | None = None,
    retry: bool = True,
) -> Clip | Exception:
    """Read the clip of a request with `reader`; returns the clip, or the error. Other arguments as in `read_ahead`."""
    video, window = settings["video"], (settings["start_seconds"], settings["end_seconds"])
    if settings.get("error") is not None:  # such as a bad row of a manifest
        return ValueError(settings["error"])
    try:
        Prompt.from_record(settings)  # a clip may have an invalid prompt of its own
        if quarantine is not None:
            quarantine.check(video)
        with_strip = store is not None and not store.strip_path(settings).exists()
        sampling, only = settings["frame_sampling"], settings.get("only_frames")
        return load_clip(video, sampling, *window, timeout_seconds, reader, None, image_size, with_strip, only)
    except ReaderLost as error:
        if retry and not isinstance(error, ReaderHung):  # the crash may be external, such as the OOM killer's
            return read_clip(settings, timeout_seconds, reader, quarantine, image_size, store, retry=False)
        if quarantine is not None:
            quarantine.add(video, error.reason)
        return error
    except (VideoError, ValueError, TypeError) as error:
        return error
    except OSError as error:
        if error.filename != os.path.expanduser(video):
            raise  # the machine's, such as a full disk
        return error


class Quarantine:
    """Clips that crashed or hung the process that read them, kept in a JSON Lines file; later runs skip them.

    A clip is identified by path, size and modification time: once replaced, it is read again.

    Args:
        path: the file; made with the first line.
        also: quarantine files of other processes, only read.
    """

    def __init__(self, path: str | os.PathLike[str], also: Iterable[Path] = ()):
        self.path, self._lock = Path(path), threading.Lock()
        self._reasons: dict[tuple[str, int | None, int | None], str] = {}
        for each in {self.path, *also}:
            for line in read_lines(each):
                try:
                    self._reasons[line["video"], line["size"], line["mtime_ns"]] = line["reason"]
                except (KeyError, TypeError):
                    warn(f"{each}: {line} names no clip in quarantine; skipped", stacklevel=2)

    def check(self, video: str) -> None:
        """Raise `VideoError` if this clip is in quarantine."""
        if self._reasons and (reason := self._reasons.get(self._key(video))):
            raise VideoError(video, f"{reason}; not read again, because it is in {self.path}")

    def add(self, video: str, reason: str) -> None:
        """Add a clip, durably."""
        key = self._key(video)
        line = dict(zip(("video", "size", "mtime_ns"), key, strict=True)) | {"reason": reason, "added": now()}
        with self._lock:
            self._reasons[key] = reason
            append_lines(self.path, line)

    @staticmethod
    def _key(video: str) -> tuple[str, int | None, int | None]:
        try:
            status = os.stat(video)
        except OSError:
            return video, None, None
        return video, status.st_size, status.st_mtime_ns
