"""SHA-256 of videos that are captioned, once for each file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from capkit.files import file_sha256

DIGESTS_KEPT = 1000  # a video's windows follow one another


def sha256_if_there(path: str) -> str | None:
    """The file's SHA-256, or None if it is gone since it was read: its caption is still worth keeping."""
    try:
        return file_sha256(path)
    except OSError:
        return None


def digest_once() -> Callable[[str], str | None]:
    """`sha256_if_there` for several threads: once for each file, though many windows of it are captioned."""
    lock, latest = threading.Lock(), dict[tuple[str, int, int], tuple[threading.Lock, list[str | None]]]()

    def digest(path: str) -> str | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        with lock:
            own_lock, known = latest.setdefault((path, status.st_size, status.st_mtime_ns), (threading.Lock(), []))
            if len(latest) > DIGESTS_KEPT:
                del latest[next(iter(latest))]
        with own_lock:
            if not known:
                known.append(sha256_if_there(path))
            return known[0]

    return digest
