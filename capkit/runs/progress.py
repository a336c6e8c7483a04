"""Progress of long runs: a bar in a notebook or terminal, log lines elsewhere, and a heartbeat file."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from capkit.console import LINE_SECONDS, is_interactive
from capkit.files import atomic_write, now
from capkit.text import plain_text

BEAT_SECONDS = 5.0  # least time between writes of the heartbeat


class Progress:
    """A progress bar if interactive, throttled log lines otherwise.

    Args:
        noun: what is counted, such as "clips".
        total: number to do.
        num_done_before: finished by earlier runs; only shown.
        heartbeat: a JSON file for monitoring, rewritten (atomically) every few seconds with `pid`, `host`, `state`
            ("running", "finished" or "failed"), `total`, `done`, `errors`, `done_before`, `per_minute`, `seconds_left`,
            `last_video`, `started` and `updated`.
        label: prefix of log lines.
    """

    def __init__(self, noun: str, total: int, num_done_before: int, heartbeat: Path | None = None, label: str = ""):
        self.label, self.noun, self.total, self.count, self.errors = label, noun, total, 0, 0
        self.heartbeat, self.last_beat = heartbeat, float("-inf")
        self.run = {"pid": os.getpid(), "host": socket.gethostname(), "total": total}
        self.run |= {"done_before": num_done_before, "started": now()}
        self.started = self.last_line = time.monotonic()
        print(f"{label}{total} {noun} to caption, {num_done_before} done before", flush=True)
        self.bar = tqdm(total=total, unit=noun.removesuffix("s")) if total and is_interactive() else None
        self._beat("running")

    def update(self, record: dict[str, Any]) -> None:
        """Count a finished record."""
        self.count += 1
        if record["status"] == "error":
            self.errors += 1
            tqdm.write(plain_text(f"error: {record['error']}"))
        if time.monotonic() - self.last_beat >= BEAT_SECONDS:
            self._beat("running", record["video"])
        if self.bar is not None:
            self.bar.update()
        elif time.monotonic() - self.last_line >= LINE_SECONDS or self.count == self.total:
            left = timedelta(seconds=round((self.total - self.count) / self.per_second))
            counts = f"{self.label}{self.count}/{self.total} {self.noun}, {self.errors} errors"
            print(f"{counts}, {self.per_second * 60:.1f} a minute, {left} left", flush=True)
            self.last_line = time.monotonic()

    @property
    def per_second(self) -> float:
        """Average rate since the start."""
        return self.count / max(time.monotonic() - self.started, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self._beat("finished" if kind is None else "failed")
        except OSError:
            if kind is None:  # else the full disk may be why the run failed
                raise
        if self.bar is not None:
            self.bar.close()

    def _beat(self, state: str, last_video: str | None = None) -> None:
        if self.heartbeat is None:
            return
        rate = self.per_second
        beat = self.run | {
            "done": self.count,
            "errors": self.errors,
            "per_minute": round(rate * 60, 2),
            "seconds_left": round((self.total - self.count) / rate) if rate else None,
            "state": state,
            "last_video": last_video,
            "updated": now(),
        }
        atomic_write(self.heartbeat, json.dumps(beat, indent=1, ensure_ascii=False) + "\n")
        self.last_beat = time.monotonic()
