"""Run the runs of a table in processes, several at a time; wait for those that another command is running."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

from capkit.batch.index import write_index
from capkit.batch.run import BUSY, STOPPING_SECONDS
from capkit.batch.table import Run, Table
from capkit.files import now
from capkit.text import plain_text

POLL_SECONDS = 0.1
BUSY_SECONDS = 2.0  # before a run that another command is running is tried again
# Without the table's folder, in which a run works, among the places of modules: a file there may be called like one.
START = "import sys; sys.path = [place for place in sys.path if place]; from capkit.batch.run import main; main()"
REPORT_SECONDS = 60.0  # between lines that list what is running


@dataclass
class _Running:
    run: Run
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    since: float


class Pool:
    """Runs notebooks, each in a process of its own; the outcome of each is in its status file.

    Args:
        table: of the runs.
        runs: in order, such as `runs_to_do(table)`.
        workers: how many at a time; None for one for each of `gpus`, or else the table's number.
        gpus: names for CUDA_VISIBLE_DEVICES; each worker gets one, in turn.

    Raises:
        ValueError: `workers` below 1.
    """

    def __init__(self, table: Table, runs: Iterable[Run], workers: int | None = None, gpus: Sequence[str] = ()):
        self.workers = (len(gpus) or table.workers) if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers={workers!r}: must be at least 1")
        self.table, self.gpus = table, gpus
        self.queue = list(runs)
        self.last_ended = {run.name: run.read_status().get("ended") for run in self.queue}
        self.total, self.num_ended = len(self.queue), 0
        self.running: dict[int, _Running] = {}  # by the worker's number
        self.not_before: dict[str, float] = {}  # earliest time to try again, of runs that another command is running

    def run(self) -> None:
        """Run all. KeyboardInterrupt, or any other exception, ends those that are running; they count as not tried."""
        last_report = time.monotonic()
        try:
            while self.queue or self.running:
                self._start_runs()
                self._collect_ended()
                if time.monotonic() - last_report > REPORT_SECONDS:
                    last_report = time.monotonic()
                    names = [
                        f"{one.run.name} ({(last_report - one.since) / 60:.0f} min)" for one in self.running.values()
                    ]
                    print(f"running: {', '.join(names) or 'none'}; {len(self.queue)} to come", flush=True)
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop()
            raise
        finally:
            write_index(self.table)

    def _start_runs(self) -> None:
        for worker in set(range(self.workers)) - set(self.running):
            ready = (run for run in self.queue if self.not_before.get(run.name, 0) <= time.monotonic())
            if (run := next(ready, None)) is not None:
                self.queue.remove(run)
                self.running[worker] = self._start(run, self.gpus[worker % len(self.gpus)] if self.gpus else None)

    def _start(self, run: Run, gpu: str | None) -> _Running:
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", START],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=run.working_dir,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}),
                start_new_session=True,  # Ctrl-C reaches the batch only, which then ends its runs
            )
        assert process.stdin is not None  # it is a pipe
        try:
            pickle.dump((run, self.last_ended[run.name]), process.stdin)
            process.stdin.flush()  # and not closed, which would end the run
        except BrokenPipeError:  # the process has died already; its exit code is handled like any other
            pass
        return _Running(run, process, process.stdin, time.monotonic())

    def _collect_ended(self) -> None:
        for worker, running in list(self.running.items()):
            if running.process.poll() is None:
                continue
            running.stdin.close()
            del self.running[worker]
            run = running.run
            if running.process.returncode == BUSY:
                if run.name not in self.not_before:
                    print(f"{run.name}: another command is running it; waiting", flush=True)
                self.not_before[run.name] = time.monotonic() + BUSY_SECONDS
                self.queue.append(run)
            else:
                self.num_ended += 1
                print(f"[{self.num_ended}/{self.total}] {_outcome(run, running.process.returncode)}", flush=True)
                write_index(self.table)

    def _stop(self) -> None:
        for running in self.running.values():
            running.stdin.close()
        until = time.monotonic() + STOPPING_SECONDS + 0.2
        for running in self.running.values():
            process = running.process
            try:
                code = process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()  # its kernel ends when it finds its parent gone
                code = process.wait()
            if code != BUSY:
                print(_outcome(running.run, code, "interrupted"), flush=True)


def _outcome(run: Run, exit_code: int, status_if_crashed: str = "failed") -> str:
    """Describe how a run ended, in one line; write its status if its process could not."""
    if exit_code != 0:
        cause = f"signal {-exit_code}" if exit_code < 0 else f"code {exit_code}"
        log = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last_line = next((line for line in reversed(log) if line.strip()), "nothing")
        error = f"its process ended with {cause} before it could say why; the last line of log.txt: {last_line}"
        run.write_status(status_if_crashed, error=error, ended=now())
    status = run.read_status()
    duration = f" after {status['seconds']:g} s" if "seconds" in status else ""
    message = " ".join((status.get("error") or status.get("headline") or "").split())
    return plain_text(f"{run.name}: {status['status']}{duration}" + (f": {message}" if message else ""))
