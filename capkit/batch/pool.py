"""The runs of a batch at work: a process for each, so many at a time; one that another command is at is waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from capkit.batch.run import BUSY, SAVING_SECONDS, now, write_status
from capkit.batch.table import Run

if TYPE_CHECKING:
    from capkit.batch.batch import Batch

POLL_SECONDS = 0.1
BUSY_SECONDS = 2.0  # between looks at a run that another command is at
LINE_SECONDS = 60.0  # between lines that say what is running


@dataclass
class _Working:
    run: Run
    process: subprocess.Popen
    since: float


class Pool:
    """Works off runs of a batch; see `Batch.run`.

    Args:
        batch: whose runs they are.
        runs: in order.
        workers: how many at a time.
        gpus: as CUDA_VISIBLE_DEVICES names them, for each worker one; none for whatever there is.

    Raises:
        ValueError: `workers` below 1.
    """

    def __init__(self, batch: Batch, runs: Iterable[Run], workers: int, gpus: Sequence[str] = ()):
        if workers < 1:
            raise ValueError(f"workers={workers!r}: must be at least 1")
        self.batch, self.workers, self.gpus = batch, workers, gpus
        self.queue = list(runs)
        self.total, self.num_ended, self.begun, self.told = len(self.queue), 0, now(), time.monotonic()
        self.working: dict[int, _Working] = {}  # by the worker's number
        self.not_before: dict[str, float] = {}  # of runs that another command was at

    def run(self) -> None:
        """Work them all off. Whatever ends this before its time ends the runs that are working, in order."""
        try:
            while self.queue or self.working:
                self._fill()
                self._reap()
                self._tell()
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop()
            raise
        finally:
            self.batch.write_index()

    def _fill(self) -> None:
        for worker in set(range(self.workers)) - set(self.working):
            ready = (run for run in self.queue if self.not_before.get(run.name, 0) <= time.monotonic())
            if (run := next(ready, None)) is not None:
                self.queue.remove(run)
                gpu = self.gpus[worker % len(self.gpus)] if self.gpus else None
                self.working[worker] = _Working(run, self._start(run, gpu), time.monotonic())

    def _reap(self) -> None:
        for worker, one in list(self.working.items()):
            if one.process.poll() is None:
                continue
            one.process.stdin.close()
            del self.working[worker]
            if one.process.returncode == BUSY:
                if one.run.name not in self.not_before:
                    print(f"{one.run.name}: another command is at it; waiting", flush=True)
                self.not_before[one.run.name] = time.monotonic() + BUSY_SECONDS
                self.queue.append(one.run)
                continue
            self.num_ended += 1
            told = _in_a_line(self._outcome(one.run, one.process.returncode))
            print(f"[{self.num_ended}/{self.total}] {told}", flush=True)
            self.batch.write_index()

    def _tell(self) -> None:
        moment = time.monotonic()
        if moment - self.told > LINE_SECONDS:
            names = [f"{one.run.name} ({(moment - one.since) / 60:.0f} min)" for one in self.working.values()]
            print(f"running: {', '.join(names) or 'none'}; {len(self.queue)} to come", flush=True)
            self.told = moment

    def _start(self, run: Run, gpu: str | None) -> subprocess.Popen:
        folder = self.batch.output_dir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        passed = run.parameters | ({"output_dir": str(self.batch.results_dir(run))} if run.has_output_dir else {})
        job = {"name": run.name, "notebook": str(run.notebook), "parameters": run.parameters, "passed": passed}
        job |= {"fingerprint": run.fingerprint, "folder": str(folder), "since": self.begun}
        job["time_limit_minutes"] = self.batch.table.time_limit_minutes
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", "from capkit.batch.run import main; main()"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.batch.table.path.parent,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}),
                start_new_session=True,  # Ctrl-C reaches the batch alone, which then ends its runs in order
            )
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()  # and left open: its end would end the run
        except BrokenPipeError:  # it has died already; its exit code will tell
            pass
        return process

    def _outcome(self, run: Run, code: int, state: str = "failed") -> dict[str, Any]:
        """A run's status after its process has ended; written here where the process could not."""
        if code != 0:
            folder, how = self.batch.output_dir / run.name, f"signal {-code}" if code < 0 else f"code {code}"
            log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(log) if line.strip()), "nothing")
            error = f"its process ended with {how} before it could say why; the last line of log.txt: {last}"
            status = {"name": run.name, "notebook": str(run.notebook), "parameters": run.parameters}
            status |= {"fingerprint": run.fingerprint, "status": state, "error": error, "ended": now()}
            write_status(folder, status)
        return self.batch.status(run)

    def _stop(self) -> None:
        for one in self.working.values():
            one.process.stdin.close()
        for one in self.working.values():
            try:
                code = one.process.wait(SAVING_SECONDS + 10)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(one.process.pid).children(recursive=True):
                    child.kill()
                one.process.kill()
                code = one.process.wait()
            if code != BUSY:
                print(_in_a_line(self._outcome(one.run, code, "interrupted")), flush=True)


def _in_a_line(status: dict[str, Any]) -> str:
    took = f" after {status['seconds']:g} s" if "seconds" in status else ""
    said = status.get("error") or status.get("headline") or ""
    return f"{status['name']}: {status['status']}{took}" + (f": {' '.join(said.split())}" if said else "")
