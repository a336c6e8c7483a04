"""Files that others read while they are written: whole or not at all; and what is in a file."""

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

# The policy forbids scripts and the network, whatever the body holds. Articles out of sight are neither laid out nor
# painted, so that thousands open at once.
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
def writing_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write bytes to, which gets its name once all is on disk: nobody ever reads half of it, not even after a
    power cut. Its folder is made.

    Raises:
        OSError: naming the path; what was there before is still there.
    """
    path = Path(path)
    # A name for each writer: threads of one process write the strip of the same frames at the same time.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            part.unlink()


def write_whole(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write a file as `writing_whole` does, text in UTF-8; returns where it is.

    What UTF-8 cannot hold (half a pair, out of a damaged file) is written as an escape that JSON reads.
    """
    with writing_whole(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
    return Path(path)


def file_sha256(path: str | os.PathLike) -> str:
    """The digest of a file's content in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_page(path: str | os.PathLike, title: str, body: str) -> Path:
    """Write a page without scripts; returns where it is.

    Args:
        path: file; its folder is made.
        title: as text.
        body: as HTML.
    """
    return write_whole(path, _PAGE.format(title=escape(title), body=body))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a file and wait until it is on disk.

    Raises:
        ValueError: it holds what JSON cannot.
        OSError: with the file's name, on a full disk for example; what was written of the line is taken back.
    """
    content = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
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
    """The lines of a file of JSON lines, if it is there. One that is not whole is skipped with a warning."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                warnings.warn(f"{path}, line {number} is not a whole record; skipped", stacklevel=4)


def now() -> str:
    """The time as records have it, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
