"""Atomic file writes, appended JSON lines, locks, digests and timestamps."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import stat
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from capkit.text import encodable, escape, warn

# What flock answers on file systems without it, such as some of Lustre and NFS.
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
LEASE_SECONDS, RENEWAL_SECONDS = 120.0, 5.0  # NFS may show a renewal a minute late

# The content security policy forbids scripts and network access, whatever the body contains.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 1em auto; padding: 0 12px }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


@contextmanager
def atomic_writer(path: str | os.PathLike[str], durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for an atomic write of bytes: it appears under its name once all of it is on disk.

    Readers see the previous content or the new one, never a part; if `durable`, even after a power cut. Missing folders
    are created.

    Raises:
        OSError: with the path; the previous content is still there.
    """
    path = Path(path)
    # Several threads of a process may write the same path, so each writer has its own temporary file; a name may not
    # become too long.
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except FileExistsError as error:  # in place of the folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            part.unlink()


def atomic_write(path: str | os.PathLike[str], content: str | bytes, durable: bool = True) -> Path:
    """Write a file with `atomic_writer`, text as UTF-8 with lone surrogates escaped; returns its path."""
    with atomic_writer(path, durable) as file:
        file.write(content if isinstance(content, bytes) else encodable(content).encode())
    return Path(path)


def output_folder(path: str | os.PathLike[str], name: str = "output_dir") -> Path:
    """Make the folder that an argument names, and check that files can be made in it; returns its path.

    Raises:
        ValueError: it is empty, a file, or cannot be written; names the argument and its value.
        OSError: the disk is full.
    """
    if not str(path).strip():
        raise ValueError(f'{name}={str(path)!r}: is empty; name a folder, "." is the current one')
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = "it is a file" if os.path.isfile(folder) else error.strerror  # Path.is_file() refuses long names
        raise ValueError(f"{name}={str(path)!r}: no folder to write into: {reason}") from error


def unused_name(path: Path) -> Path:
    """The path, or if something is there, the first of `<path>.2`, `<path>.3` and so on where nothing is."""
    paths = chain([path], (path.with_name(f"{path.name}.{number}") for number in count(2)))
    return next(path for path in paths if not os.path.lexists(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes. A folder cannot be read, and a pipe or a device may never end.

    Raises:
        OSError: with the path.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path}: is not a regular file")
    return open(path, "rb")


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_page(path: str | os.PathLike[str], title: str, body: str) -> Path:
    """Write an HTML page without scripts; returns its path. `title` is plain text, `body` is HTML."""
    return atomic_write(path, _PAGE.format(title=escape(title), body=body))


def append_lines(path: Path, *lines: dict[str, Any]) -> int:
    """Append lines of JSON to a file, wait until they are on disk, and return the file's length.

    Threads and processes may append to one file at the same time. The first line begins on its own, whatever a killed
    process has left at the end of the file. Lone surrogates, as in file names that are not UTF-8, become escapes that
    JSON readers understand.

    Raises:
        ValueError: a line contains a value that JSON cannot represent, such as NaN.
        OSError: with the path, for example when the disk is full; part of the lines may be in the file.
    """
    texts = (encodable(json.dumps(line, ensure_ascii=False, allow_nan=False)) for line in lines)
    content = "".join(f"{text}\n" for text in texts).encode()
    try:
        with open(path, "ab+", buffering=0) as file:
            is_begun = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                is_begun = file.read(1) != b"\n"  # or another writes right now: then an empty line comes between
            # In one write, so that no other line comes between. What fits only in part is begun once more.
            while file.write(b"\n" * is_begun + content) < is_begun + len(content):
                is_begun = True
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; none if it does not exist. Other lines are skipped with a warning."""
    if not path.exists():
        return
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            fault = "not a JSON object"
            try:
                content = json.loads(line)
            except ValueError:
                content, fault = None, "not valid JSON"
            if isinstance(content, dict):
                yield content
            else:
                warn(f"{path}, line {number} is {fault}; skipped", stacklevel=4)


class DiskList(Sequence[Any]):
    """A list of JSON values in a temporary file, for more of them than memory should hold; it can only grow.

    Args:
        folder: where the file is, which nobody else sees.
        read: makes an item of a value.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, read: Callable[[Any], Any] = lambda value: value):
        self._file, self._folder, self._read = tempfile.TemporaryFile(dir=folder), folder, read
        self._starts, self._end = array("q"), 0
        weakref.finalize(self, self._file.close)

    def append(self, value: Any) -> None:
        try:
            self._file.seek(self._end)
            self._starts.append(self._end)
            self._end += self._file.write(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        self._file.seek(self._starts[place])
        return self._read(json.loads(self._file.readline()))


class Busy(Exception):
    """Another process, or another thread of this one, holds a lock."""

    advice = "is at work here; wait for it, or end it"


@contextmanager
def hold_lock(path: Path, error: type[Busy] = Busy) -> Iterator[None]:
    """Lock a file or a folder until the block or the process ends, even by a crash.

    A file `.<name>.capkit-lock` beside it is locked; it names process, host and start. Where the file system has no
    flock, a file `.<name>.capkit-lease` is the lock, and its time is renewed every few seconds. Others take it over
    when its process is gone, or, on another host, when it was not renewed for two minutes.

    Args:
        path: what to lock, there or not; its folder is made if missing.
        error: what to raise if the lock is held.

    Raises:
        Busy: the lock is held; the message names the holder and says what to do.
        OSError: the folder cannot be written, or a file that is not capkit's has the lock's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.capkit-lock")
    _check_own(file)
    try:
        lock = _acquire(file)
    except Timeout:
        raise error(f"{path}: {_holder(file)} {error.advice}") from None
    try:
        with suppress(OSError):  # a full disk, or Windows, where nobody can read a locked file
            file.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}))
        yield
    finally:
        with suppress(OSError):
            _check_own(file)  # or another took its place
            file.unlink()
        lock.release()


def _check_own(file: Path) -> None:
    """Raise OSError if a file that `hold_lock` did not write has the name of a lock: it would be lost."""
    with suppress(FileNotFoundError, PermissionError):  # Windows: nobody can read a locked file
        status = os.lstat(file)
        is_plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        if not is_plain or status.st_size and not file.read_bytes().startswith(b'{"pid": '):
            raise OSError(f"{file}: is in the way of a lock, and not capkit's; move it away")


def _acquire(path: Path) -> BaseFileLock:
    """Acquire a lock file. Raises filelock's Timeout if another holds it."""
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # filelock's own fallback knows no lost hosts
    try:
        lock.acquire()
        return lock
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise

    def lost(_: object) -> None:
        message = f"{path}: another process has taken over this lock, because it was not renewed"
        warn(message, stacklevel=2)

    def renewed() -> int | None:
        try:
            return marker.stat().st_mtime_ns
        except OSError:
            return None

    marker = path.with_suffix(".capkit-lease")
    lease = SoftFileLease(
        marker, lease_duration=LEASE_SECONDS, heartbeat_interval=RENEWAL_SECONDS, on_compromise=lost, thread_local=False
    )
    before = renewed()
    try:
        lease.acquire(timeout=0)
    except Timeout:
        message = f"{path}: waiting up to {LEASE_SECONDS:g} s to see whether {_holder(path)} lives"
        warn(message, stacklevel=4)
        lease.acquire(LEASE_SECONDS + RENEWAL_SECONDS, cancel_check=lambda: renewed() not in (before, None))
    return lease


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file tells."""
    try:
        holder = json.loads(path.read_text())
        where = (holder["pid"], holder["host"])
        name = "another thread of this process" if where == (os.getpid(), socket.gethostname()) else "process {} on {}"
        return f"{name.format(*where)} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def now(precision: str = "seconds") -> str:
    """The current time in UTC as ISO 8601; `precision` is a `timespec` of `datetime.isoformat`."""
    return datetime.now(timezone.utc).isoformat(timespec=precision)
