"""One run of a batch, in a process of its own, which reads from standard input what to do.

The end of standard input (the batch stops, or was killed) ends the run: its kernel is killed, and papermill saves the
notebook as it stands. The process holds the run's lock until it exits, even if the batch is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from capkit.batch.parameters import code_cells
from capkit.batch.table import Run
from capkit.files import Busy, atomic_write, hold_lock, now

BUSY = 75  # exit code: another command is running this run
SAVING_SECONDS = 20.0  # for papermill to save the notebook after its kernel was killed at the time limit
STOPPING_SECONDS = 0.8  # the same if the batch stops: a person waits, and the run will be repeated
LONGEST_HEADLINE = 500  # characters


def main() -> None:
    """Run a notebook unless its run is locked, or another command has tried it by now; write its status.

    Standard input holds, pickled, the run and the time at which the attempt before this batch ended, or None.
    """
    run, last_ended = pickle.load(sys.stdin.buffer)
    stop = _Stop(run)
    threading.Thread(target=stop.at_end_of_input, daemon=True).start()
    try:
        with hold_lock(run.folder):
            before = run.read_status()
            failed_elsewhere = before["status"] == "failed" and before.get("ended") != last_ended
            if before["status"] != "done" and not failed_elsewhere:
                _run(run, stop)
    except Busy:
        sys.exit(BUSY)


class _Stop:
    """Stops a run before its end."""

    def __init__(self, run: Run):
        self.run = run
        self.status = self.reason = ""  # empty unless it is being stopped
        self.progress: dict[str, Any] = {}  # fields of the run's status; empty before it has started

    def at_end_of_input(self) -> None:
        """Wait for the end of standard input, then stop the run."""
        os.read(sys.stdin.fileno(), 1)  # not buffered: the buffer's lock would abort the interpreter's exit
        self.stop("interrupted", "stopped before it was done", STOPPING_SECONDS)

    def stop(self, status: str, reason: str, saving_seconds: float = SAVING_SECONDS) -> None:
        """Kill the kernel, and exit if the run has not ended soon after."""
        self.status, self.reason = self.status or status, self.reason or reason
        until = time.monotonic() + saving_seconds
        while time.monotonic() < until:  # repeatedly, because a kernel may be about to start
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            time.sleep(0.2)
        if self.progress:
            self.run.write_status(self.status, **self.progress, error=self.reason, ended=now())
        os._exit(0)


def _run(run: Run, stop: _Stop) -> None:
    started = time.perf_counter()
    stop.progress = {"started": now(), "process": os.getpid()}
    run.write_status("running", **stop.progress)
    print(f"\n==== {stop.progress['started']} {run.name}", file=sys.stderr, flush=True)
    if limit := run.time_limit_minutes:
        timer = threading.Timer(limit * 60, stop.stop, ("failed", f"stopped after {limit:g} minutes, its time limit"))
        timer.daemon = True
        timer.start()
    executed = run.folder / run.notebook.name
    error = _execute(run, executed, stop)
    if stop.status != "interrupted":
        _write_html(executed)
    if error is None:
        status, outcome = "done", {"headline": _read_headline(executed)}
    else:
        status, outcome = stop.status or "failed", {"error": error}
    seconds = round(time.perf_counter() - started, 1)
    run.write_status(status, **stop.progress, **outcome, ended=now(), seconds=seconds)


def _execute(run: Run, executed: Path, stop: _Stop) -> str | None:
    """Run the notebook; returns an error message, or None."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    executed.unlink(missing_ok=True)
    # papermill formats paths, so braces are doubled.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (run.notebook, executed)]
    parameters = run.parameters | ({"output_dir": str(run.results_dir)} if run.has_output_dir else {})
    try:
        papermill.execute_notebook(
            *paths,
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            log_output=True,
            extra_arguments=["--IPKernelApp.ignore_cwd=True"],  # see `capkit.batch.pool.START`
        )
        return None
    except papermill.PapermillExecutionError as error:
        logging.error(_plain(str(error)))
        return f"cell {error.exec_count}: {error.ename}: {_plain(error.evalue)}"
    except DeadKernelError:
        reason = stop.reason or "crashed, or killed from outside, most often because memory ran out; see log.txt"
        message = f"the kernel died {_last_cell(executed)}: {reason}"
    except Exception as error:  # any error is recorded as the run's
        logging.exception("the notebook did not run to its end")
        message = stop.reason or f"{type(error).__name__}: {_plain(str(error))}"
    _mark_as_failed(executed, message)
    return message


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def _last_cell(executed: Path) -> str:
    try:
        cells = code_cells(executed)
    except (OSError, ValueError):
        cells = []
    started = [number for number, cell in enumerate(cells, 1) if cell["metadata"]["papermill"]["start_time"]]
    return f"in code cell {started[-1]}" if started else "at its start"


def _mark_as_failed(executed: Path, message: str) -> None:
    """Put an error message on top of the notebook, as papermill does for an error in a cell."""
    import nbformat

    try:
        notebook = nbformat.read(executed, 4)
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"**Not run to its end:** `{message}`"))
        atomic_write(executed, nbformat.writes(notebook))
    except (OSError, ValueError):
        logging.exception("%s could not be marked as failed", executed)


def _read_headline(executed: Path) -> str:
    """Output of the cells tagged `headline`, as text; "" without such cells."""
    tagged = [cell for cell in code_cells(executed) if "headline" in cell["tags"]]
    outputs = [output for cell in tagged for output in cell["outputs"] if output.get("name") != "stderr"]
    texts = ["".join(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in outputs]
    return "\n".join(text.strip() for text in texts if text.strip())[:LONGEST_HEADLINE]


def _write_html(executed: Path) -> None:
    if not executed.exists():
        return
    from nbconvert import HTMLExporter

    try:
        html, _ = HTMLExporter().from_filename(str(executed))
        atomic_write(executed.with_suffix(".html"), html)
    except Exception:  # a missing page does not make the run fail
        logging.exception("%s could not be converted to HTML", executed)
