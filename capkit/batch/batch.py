"""Notebooks as programs: their parameters checked, and many of them run, each once, whatever happens to the others."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from capkit import __version__
from capkit.batch.pool import Pool
from capkit.batch.run import now, read_status
from capkit.batch.table import Run, Table, TableError, near_miss, parameter_annotations, read_table
from capkit.files import write_page

INJECTED = "# Parameters"  # papermill's first line of the cell that it injects
COLOURS = {"done": "#009e73", "failed": "#d55e00", "running": "#0072b2"}  # of the words in the index page


def check_parameters(cells: Sequence[str]) -> None:
    """Refuse parameters that a notebook does not have; call it in a notebook as `check_parameters(In)`.

    papermill injects an unknown name with no more than a warning, so that a misspelt one runs the default.

    Args:
        cells: sources of the cells run so far, which IPython keeps in `In`: among them the parameters cell and, right
            after it, papermill's, if there is one.

    Raises:
        ValueError: naming the unknown parameter, the nearest known one and all known ones.
    """
    sources = [source for source in cells if source.strip()]
    for before, source in zip(sources, sources[1:], strict=False):
        if not source.startswith(INJECTED):
            continue
        known = parameter_annotations(before)
        for name in parameter_annotations(source):
            if name not in known:
                hint = near_miss(name, known)
                raise ValueError(f"unknown parameter {name!r}; {hint}This notebook has: {', '.join(known)}")


class Batch:
    """The runs of a table and what has become of them.

    A run has a folder of its name in `output_dir`, and in it the executed notebook, its HTML, `log.txt`, `status.json`
    and, unless the table gives the notebook another `output_dir`, `results/`, where the notebook writes. `index.html`
    links all. Notebooks run in the folder of the table, so that relative paths among their parameters begin there.

    Args:
        table: from `read_table`.
        output_dir: where the folders go, instead of where the table says.
    """

    def __init__(self, table: Table, output_dir: str | os.PathLike | None = None):
        self.table = table
        self.output_dir = (table.output_dir if output_dir is None else Path(output_dir).expanduser()).resolve()

    @property
    def index(self) -> Path:
        """The page that links all runs."""
        return self.output_dir / "index.html"

    def status(self, run: Run) -> dict[str, Any]:
        """What is known of a run: `status` is "done", "failed", "running", "interrupted", "changed" or "not run".

        "changed" is one that was tried, with another code of the notebook or other parameters than the table's now.
        """
        status = read_status(self.output_dir / run.name)
        if status.get("fingerprint") == run.fingerprint:
            return status
        return {"name": run.name, "status": "changed" if status else "not run"}

    def to_do(self, retry: Sequence[str] | None = None) -> list[Run]:
        """The runs that are neither done nor failed; or, to be tried again, those that failed.

        Args:
            retry: None for what has not been tried; empty for all that failed; or names of runs, done ones left out.

        Raises:
            ValueError: a name that the table does not have.
        """
        names = [run.name for run in self.table.runs]
        for name in retry or ():
            if name not in names:
                raise ValueError(f"no run {name!r}; {near_miss(name, names)}There are: {', '.join(names)}")
        states = {run.name: self.status(run)["status"] for run in self.table.runs}
        if retry is None:
            return [run for run in self.table.runs if states[run.name] not in ("done", "failed")]
        if not retry:
            return [run for run in self.table.runs if states[run.name] == "failed"]
        return [run for run in self.table.runs if run.name in retry and states[run.name] != "done"]

    def run(self, runs: Iterable[Run], workers: int | None = None, gpus: Sequence[str] = ()) -> None:
        """Run them, each in a process of its own, and keep what becomes of each in its status file.

        A run that another command is at is waited for, not run a second time. KeyboardInterrupt ends those that are
        running; they count as not tried.

        Args:
            runs: of the table, such as `to_do()`.
            workers: how many at a time; None for what the table says, or one for each of `gpus`.
            gpus: as CUDA_VISIBLE_DEVICES names them; each worker has one to itself, as far as they go round.

        Raises:
            ValueError: `workers` below 1.
        """
        Pool(self, runs, (len(gpus) or self.table.workers) if workers is None else workers, gpus).run()

    def write_index(self) -> Path:
        """Write the page that links all runs with their headlines; returns where it is."""
        statuses = [self.status(run) for run in self.table.runs]
        counts = Counter(status["status"] for status in statuses)
        told = f"{escape(str(self.table.path))}: " + ", ".join(f"{number} {name}" for name, number in counts.items())
        rows = "".join(self._row(run, status) for run, status in zip(self.table.runs, statuses, strict=True))
        heads = "".join(f'<th style="text-align:left">{name}</th>' for name in ("run", "status", "headline", "files"))
        table = f'<table cellpadding="6"><tr>{heads}</tr>{rows}</table>'
        return write_page(self.index, "Runs", f"<p>{told}</p>{table}<p>capkit {__version__}, {now()}</p>")

    def _row(self, run, status):
        folder = self.output_dir / run.name
        notebook = folder / run.notebook.name
        page = notebook.with_suffix(".html")
        name = self._link(page, run.name) if page.exists() else escape(run.name)
        own = ", ".join(f"{key}={json.dumps(run.parameters[key], ensure_ascii=False)}" for key in run.varied)
        state, seconds = status["status"], status.get("seconds")
        took = "" if seconds is None else f"<br><small>{seconds:g} s</small>"
        said = escape(status.get("error") or status.get("headline") or "")
        files = {"notebook": notebook, "log": folder / "log.txt", "results": self.results_dir(run)}
        links = " ".join(self._link(path, word) for word, path in files.items() if path.exists())
        return (
            f'<tr style="vertical-align:top"><td>{name}<br><small>{escape(own)}</small></td>'
            f'<td style="white-space:nowrap;color:{COLOURS.get(state, "inherit")}">{state}{took}</td>'
            f'<td style="white-space:pre-wrap;overflow-wrap:anywhere">{said}</td><td>{links}</td></tr>'
        )

    def _link(self, path, word):
        to = os.path.relpath(path, self.output_dir).replace(os.sep, "/")
        return f'<a href="{escape(quote(to))}">{escape(word)}</a>'

    def results_dir(self, run: Run) -> Path:
        """Where the notebook of a run writes, if it has a parameter `output_dir`."""
        given = run.parameters.get("output_dir")
        if isinstance(given, str):
            return self.table.path.parent / Path(given).expanduser()
        return self.output_dir / run.name / "results"


def run_command(
    path: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    retry: Sequence[str] | None = None,
    gpus: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """`python -m capkit batch`: read a table, run what is to be run, and say what came of it.

    Args:
        path: the table.
        output_dir, workers, retry, gpus: as in `Batch`.
        dry_run: only say what would be done.

    Returns:
        The exit code: 0 if no run has failed, 1 if some have, 2 if the table or an argument is wrong, 130 if stopped.
    """
    try:
        batch = Batch(read_table(path), output_dir)
        runs = batch.to_do(retry)
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: must be at least 1")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    states = Counter(batch.status(run)["status"] for run in batch.table.runs if run not in runs)
    before = "".join(f", {number} {state} before" for state, number in states.items())
    print(f"{len(batch.table.runs)} runs, {len(runs)} to do{before}", flush=True)
    if dry_run:
        print(*(f"  {run.name}: {json.dumps(run.parameters, ensure_ascii=False)}" for run in runs), sep="\n")
        return 0
    try:
        batch.run(runs, workers, gpus)
    except KeyboardInterrupt:
        print("stopped; what is done stays done, and the same command goes on with the rest", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"the batch stopped: {error}", file=sys.stderr)  # a folder that cannot be written to, a disk that is full
        return 1
    failed = [run.name for run in batch.table.runs if batch.status(run)["status"] == "failed"]
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}\nTo try them again: add --retry")
    print(f"All runs: {batch.index}")
    return 1 if failed else 0


__all__ = ["Batch", "Run", "Table", "TableError", "check_parameters", "read_table", "run_command"]
