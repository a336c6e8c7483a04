"""Progress of long runs: a bar in a notebook or terminal, log lines elsewhere, and a heartbeat file."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from capkit.console import LINE_SECONDS, is_interactive, progress_bar
from capkit.files import atomic_write, now
from capkit.text import plain_text, plural

BEAT_SECONDS = 5.0  # least time between writes of the heartbeat


class Progress:
    """A progress bar if interactive, throttled log lines otherwise.

    Args:
        task: a noun and a verb for what is counted, such as ("clip", "caption").
        total: number to do.
        num_done_before: finished by earlier runs; only shown.
        num_failed_before: those of earlier runs that are not tried again; only shown.
        heartbeat: a JSON file for monitoring, rewritten (atomically) every few seconds with `pid`, `host`, `state`
            ("running", "finished" or "failed"), `total`, `done`, `errors`, `done_before`, `failed_before`, `per_minute`
            (errors not counted), `seconds_left`, `last_video`, `started` and `updated`.
        label: prefix of log lines.
    """

    def __init__(
        self,
        task: tuple[str, str],
        total: int,
        num_done_before: int,
        num_failed_before: int = 0,
        heartbeat: Path | None = None,
        label: str = "",
    ):
        (noun, verb), self.label, self.total, self.count, self.errors = task, label, total, 0, 0
        self.last_error, self.num_repeats = "", 0
        self.heartbeat, self.last_beat = heartbeat, float("-inf")
        self.run = {"pid": os.getpid(), "host": socket.gethostname(), "total": total}
        self.run |= {"done_before": num_done_before, "failed_before": num_failed_before, "started": now()}
        self.started = self.last_line = time.monotonic()
        failed = f", {num_failed_before} failed before (retry_errors tries them again)" if num_failed_before else ""
        print(f"{label}{plural(total, noun)} to {verb}, {num_done_before} done before{failed}", flush=True)
        self.noun = noun if total == 1 else f"{noun}s"
        self.bar = progress_bar()(total=total, unit=noun) if total and is_interactive() else None
        self._beat("running")

    def update(self, record: dict[str, Any]) -> None:
        """Count a finished record."""
        self.count += 1
        if record["status"] == "error":
            self.errors += 1
            self._tell(record["error"])
        if time.monotonic() - self.last_beat >= BEAT_SECONDS:
            self._beat("running", record["video"])
        if self.bar is not None:
            self.bar.update()
        elif time.monotonic() - self.last_line >= LINE_SECONDS or self.count == self.total:
            left = timedelta(seconds=round(self.seconds_left or 0))
            counts = f"{self.label}{self.count}/{self.total} {self.noun}, {plural(self.errors, 'error')}"
            print(f"{counts}, {self.per_minute:.1f} captioned a minute, {left} left", flush=True)
            self.last_line = time.monotonic()

    @property
    def per_minute(self) -> float:
        """Average rate of captions since the start; errors, which take less time, do not count."""
        return 60 * (self.count - self.errors) / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """As long as the rest takes if it has as many errors as before; None before the first record."""
        return (time.monotonic() - self.started) / self.count * (self.total - self.count) if self.count else None

    def _tell(self, error: str) -> None:
        """Print an error; one that comes several times in a row, as of a clip in a sweep, once and then its number."""
        if error == self.last_error:
            self.num_repeats += 1
            return
        if self.num_repeats:
            tqdm.write(f"  (the same error {self.num_repeats + 1} times)")
        if error:
            tqdm.write(plain_text(f"error: {error}"))
        self.last_error, self.num_repeats = error, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._tell("")
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
        left = self.seconds_left
        beat = self.run | {
            "done": self.count,
            "errors": self.errors,
            "per_minute": round(self.per_minute, 2),
            "seconds_left": None if left is None else round(left),
            "state": state,
            "last_video": last_video,
            "updated": now(),
        }
        atomic_write(self.heartbeat, json.dumps(beat, indent=1, ensure_ascii=False) + "\n")
        self.last_beat = time.monotonic()
