"""Progress of long runs: a bar in a notebook or terminal, log lines elsewhere, a heartbeat file."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from capkit.files import atomic_write, now

LINE_SECONDS = 10.0  # at most so often a line of progress where there is no bar
BEAT_SECONDS = 5.0


class Progress:
    """A bar where somebody watches, throttled plain lines where nobody does.

    Args:
        noun: what is counted, such as "clips".
        total: how many there are to do.
        num_done_before: only to be told.
        heartbeat: a file (JSON) rewritten every few seconds, for who watches from elsewhere: `pid`, `host`, `state`
            ("running", "finished" or "failed"), `total`, `done`, `errors`, `done_before`, `per_minute`, `seconds_left`,
            `last_video`, `started`, `updated`. Never seen half-written.
        label: what lines of progress begin with.
    """

    def __init__(self, noun: str, total: int, num_done_before: int, heartbeat: Path | None = None, label: str = ""):
        self.label, self.noun, self.total, self.count, self.errors = label, noun, total, 0, 0
        self.heartbeat, self.beaten = heartbeat, float("-inf")
        self.told_always = {"pid": os.getpid(), "host": socket.gethostname(), "total": total}
        self.told_always |= {"done_before": num_done_before, "started": now()}
        self.started = self.told = time.monotonic()
        print(f"{label}{total} {noun} to caption, {num_done_before} done before", flush=True)
        self.bar = tqdm(total=total, unit=noun.removesuffix("s")) if total and someone_watches() else None
        self._beat("running")

    def update(self, record: dict[str, Any]) -> None:
        """Count a record that is done."""
        self.count += 1
        failed = record["status"] == "error"
        self.errors += failed
        if failed:
            tqdm.write(f"error: {record['error']}")
        if time.monotonic() - self.beaten >= BEAT_SECONDS:
            self._beat("running", record["video"])
        if self.bar is not None:
            self.bar.update()
            return
        if time.monotonic() - self.told >= LINE_SECONDS or self.count == self.total:
            rate = self.per_second
            left = timedelta(seconds=round((self.total - self.count) / rate))
            told = f"{self.label}{self.count}/{self.total} {self.noun}, {self.errors} errors"
            print(f"{told}, {rate * 60:.1f} a minute, {left} left", flush=True)
            self.told = time.monotonic()

    @property
    def per_second(self) -> float:
        """On average since the start."""
        return self.count / max(time.monotonic() - self.started, 1e-9)

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        self.close("finished" if kind is None else "failed")

    def close(self, state: str = "finished") -> None:
        """Leave the bar as it stands."""
        with contextlib.suppress(OSError if state == "failed" else ()):  # what failed may be the disk
            self._beat(state)
        if self.bar is not None:
            self.bar.close()

    def _beat(self, state, last_video=None):
        if self.heartbeat is None:
            return
        rate = self.per_second
        left = round((self.total - self.count) / rate) if rate else None
        told = {"done": self.count, "errors": self.errors, "per_minute": round(rate * 60, 2), "seconds_left": left}
        told |= {"state": state, "last_video": last_video, "updated": now()}
        atomic_write(self.heartbeat, json.dumps(self.told_always | told, indent=1, ensure_ascii=False) + "\n")
        self.beaten = time.monotonic()


def someone_watches() -> bool:
    """True in a notebook that a person runs and in a terminal; false under papermill and in a log file."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return sys.stderr.isatty()
    return bool(kernel.get_parent().get("content", {}).get("allow_stdin"))  # papermill forbids to ask a person
