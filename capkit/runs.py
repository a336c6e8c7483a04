"""What long runs share: clips read ahead of the model, progress that suits who watches."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm.auto import tqdm

from capkit.cogvlm2.processing import check_settings
from capkit.frames import Clip, VideoError, load_clip

LINE_SECONDS = 10.0  # at most so often a line of progress where there is no bar


def read_ahead(
    todo: Iterable[dict[str, Any]], timeout_seconds: float | None, num_ahead: int
) -> Iterator[tuple[dict[str, Any], Clip | Exception]]:
    """Each request with its clip, or with the error in reading it; others are read while one is captioned.

    Args:
        todo: from `request_settings`.
        timeout_seconds: longest time to read one clip; None for no limit.
        num_ahead: requests that are read, or being read, beyond the one at hand.
    """

    def read(settings):
        try:
            check_settings(settings["prompt"])
            window = (settings["start_seconds"], settings["end_seconds"])
            return load_clip(settings["video"], settings["frame_sampling"], *window, timeout_seconds=timeout_seconds)
        except (VideoError, ValueError) as error:
            return error

    waiting: deque = deque()
    with ThreadPoolExecutor(2) as pool:
        for settings in todo:
            waiting.append((settings, pool.submit(read, settings)))
            if len(waiting) > num_ahead:
                settings, future = waiting.popleft()
                yield settings, future.result()
        for settings, future in waiting:
            yield settings, future.result()


class Progress:
    """A bar where somebody watches, throttled plain lines where nobody does.

    Args:
        noun: what is counted, such as "clips".
        total: how many there are to do.
        num_done_before: only to be told.
    """

    def __init__(self, noun: str, total: int, num_done_before: int):
        self.noun, self.total, self.count, self.errors = noun, total, 0, 0
        self.started = self.told = time.monotonic()
        print(f"{total} {noun} to caption, {num_done_before} done before")
        self.bar = tqdm(total=total, unit=noun.removesuffix("s")) if total and someone_watches() else None

    def update(self, record: dict[str, Any]) -> None:
        """Count a record that is done."""
        self.count += 1
        failed = record["status"] == "error"
        self.errors += failed
        if failed:
            tqdm.write(f"error: {record['error']}")
        if self.bar is not None:
            self.bar.update()
            return
        now = time.monotonic()
        if now - self.told >= LINE_SECONDS or self.count == self.total:
            rate = self.count / (now - self.started)
            left = (self.total - self.count) / rate
            told = f"{self.count}/{self.total} {self.noun}, {self.errors} errors"
            print(f"{told}, {rate * 60:.1f} a minute, {left:.0f} s left")
            self.told = now

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def someone_watches() -> bool:
    """True in a notebook that a person runs and in a terminal; false under papermill and in a log file."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return sys.stderr.isatty()
    return bool(kernel.get_parent().get("content", {}).get("allow_stdin"))  # papermill forbids to ask a person
