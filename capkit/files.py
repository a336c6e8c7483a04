"""Atomic file writes, appended JSON lines, digests and timestamps."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

# The content security policy forbids scripts and network access, whatever the body contains. content-visibility skips
# layout and painting of off-screen articles, so that a page with thousands of them opens quickly.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 1em auto; padding: 0 12px }}
article {{ content-visibility: auto; contain-intrinsic-size: auto 330px }}
article img {{ height: auto }}
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
    # Several threads of a process may write the same path, so each writer has its own temporary file.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            part.unlink()


def atomic_write(path: str | os.PathLike[str], content: str | bytes, durable: bool = True) -> Path:
    """Write a file with `atomic_writer`, text as UTF-8; returns its path.

    Lone surrogates, which UTF-8 cannot encode, become escapes that JSON readers understand.
    """
    with atomic_writer(path, durable) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
    return Path(path)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_page(path: str | os.PathLike[str], title: str, body: str) -> Path:
    """Write an HTML page without scripts; returns its path. `title` is plain text, `body` is HTML."""
    return atomic_write(path, _PAGE.format(title=escape(title), body=body))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON to a file and wait until it is on disk.

    Lone surrogates, as in file names that are not UTF-8, become escapes that JSON readers understand.

    Raises:
        ValueError: the line contains a value that JSON cannot represent, such as NaN.
        OSError: with the path, for example when the disk is full; the file is as long as before.
    """
    content = json.dumps(line, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; none if it does not exist. Incomplete lines are skipped with a warning."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                warnings.warn(f"{path}, line {number} is not valid JSON; skipped", stacklevel=4)


def now() -> str:
    """The current time in UTC as ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
