"""One run of a batch, in a process of its own: `python -m capkit.batch.run`, the job as a line of JSON on its input.

The end of the input, be it that the batch stops or that it was killed, ends the run: its kernel is killed, and
papermill saves the notebook as far as it came. The lock is held as long as this process lives, whatever became of the
batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from capkit.batch.table import code_cells
from capkit.files import atomic_write

BUSY = 75  # exit code: another command is at this run
SAVING_SECONDS = 20.0  # for papermill to save the notebook after its kernel was killed
LONGEST_HEADLINE = 500  # characters
STATUS = "status.json"


def main() -> None:
    """Read the job, run the notebook unless it is locked or done by now, and leave the outcome in its status file."""
    job = json.loads(sys.stdin.readline())
    folder = Path(job["folder"])
    stop = _Stop(folder)
    threading.Thread(target=stop.with_parent, daemon=True).start()
    try:
        with FileLock(folder / ".lock", timeout=0):
            before = read_status(folder)
            same = before.get("fingerprint") == job["fingerprint"]
            done_by_others = before.get("status") == "failed" and before.get("ended", "") >= job["since"]
            if not same or before.get("status") != "done" and not done_by_others:
                _run(job, folder, stop)
    except Timeout:
        sys.exit(BUSY)


def read_status(folder: Path) -> dict[str, Any]:
    """What is known of a run; an empty dictionary where that is nothing."""
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def write_status(folder: Path, status: dict[str, Any]) -> None:
    """Keep what is known of a run."""
    atomic_write(folder / STATUS, json.dumps(status, ensure_ascii=False, indent=1) + "\n")


def now() -> str:
    """The time in UTC, to be compared as text."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class _Stop:
    """Ends the run before its time: `status` and `reason` say why, once it has begun to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.status = self.reason = None
        self.running: dict[str, Any] = {}  # the run's status file so far

    def with_parent(self) -> None:
        """Wait for the end of the input."""
        sys.stdin.read()
        self.now("interrupted", "stopped before it was done")

    def now(self, status: str, reason: str) -> None:
        """Kill the kernel, and this process too if it does not come to its end then."""
        self.status, self.reason = self.status or status, self.reason or reason
        until = time.monotonic() + SAVING_SECONDS
        while time.monotonic() < until:  # again and again, because a kernel may be about to start
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            time.sleep(0.2)
        if self.running:
            ended = {"status": self.status, "error": self.reason, "ended": now()}
            write_status(self.folder, self.running | ended)
        os._exit(0)


def _run(job: dict[str, Any], folder: Path, stop: _Stop) -> None:
    status = {name: job[name] for name in ("name", "notebook", "parameters", "fingerprint")}
    status |= {"status": "running", "started": now(), "process": os.getpid()}
    started, stop.running = time.perf_counter(), status
    write_status(folder, status)
    print(f"\n==== {status['started']} {job['name']}", file=sys.stderr, flush=True)
    if limit := job["time_limit_minutes"]:
        timer = threading.Timer(limit * 60, stop.now, ("failed", f"stopped after {limit:g} minutes, its time limit"))
        timer.daemon = True
        timer.start()
    executed = folder / Path(job["notebook"]).name
    error = _execute(job, executed, stop)
    _write_html(executed)
    if error is None:
        outcome = {"status": "done", "headline": read_headline(executed)}
    else:
        outcome = {"status": stop.status or "failed", "error": error}
    write_status(folder, status | outcome | {"ended": now(), "seconds": round(time.perf_counter() - started, 1)})


def _execute(job: dict[str, Any], executed: Path, stop: _Stop) -> str | None:
    """Run the notebook; returns None, or what went wrong."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    executed.unlink(missing_ok=True)
    doubled = [str(path).replace("{", "{{").replace("}", "}}") for path in (job["notebook"], executed)]
    try:  # papermill fills in braces of paths
        papermill.execute_notebook(
            *doubled, job["passed"], kernel_name="python3", language="python", progress_bar=False, log_output=True
        )
        return None
    except papermill.PapermillExecutionError as error:
        logging.error(_plain(str(error)))
        return f"cell {error.exec_count}: {error.ename}: {_plain(error.evalue)}"
    except DeadKernelError:
        why = stop.reason or "crashed, or killed from outside, most often because memory ran out; see log.txt"
        told = f"the kernel died {_cells_run(executed)}: {why}"
    except Exception as error:  # whatever it is, it ends this run and no other
        logging.exception("not run to its end")
        told = stop.reason or f"{type(error).__name__}: {_plain(str(error))}"
    _say_in_notebook(executed, told)
    return told


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def _cells_run(executed: Path) -> str:
    try:
        cells = code_cells(executed)
    except (OSError, ValueError):
        return "at its start"
    begun = [number for number, cell in enumerate(cells, 1) if cell["metadata"]["papermill"]["start_time"]]
    return f"in code cell {begun[-1]}" if begun else "at its start"


def _say_in_notebook(executed: Path, told: str) -> None:
    """On top, as papermill does it for an error in a cell; a notebook that is not there yet is left alone."""
    import nbformat

    try:
        notebook = nbformat.read(executed, 4)
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"**Not run to its end:** `{told}`"))
        atomic_write(executed, nbformat.writes(notebook))
    except (OSError, ValueError):
        logging.exception("%s could not be marked as failed", executed)


def read_headline(executed: Path) -> str:
    """What the cells tagged `headline` printed or returned, as text; "" where there are none."""
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
    except Exception:  # a page that cannot be made takes nothing away from the run
        logging.exception("%s could not be converted to HTML", executed)


if __name__ == "__main__":
    main()
