"""The command `python -m capkit batch`: run what is left to do of a table."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence

from capkit.batch.pool import Pool
from capkit.batch.table import Run, Table, TableError, read_table
from capkit.files import output_folder
from capkit.text import plain_text, plural, unknown_name


def runs_to_do(table: Table, retry: Sequence[str] | None = None) -> list[Run]:
    """The runs that are neither done nor failed; or failed ones, to try them again.

    Args:
        table: from `read_table`.
        retry: None for runs that have not been tried; empty for all that failed; or names of runs, of which done ones
            are left out.

    Raises:
        ValueError: a name that is not in the table.
    """
    names = [run.name for run in table.runs]
    for name in retry or ():
        if name not in names:
            raise ValueError(unknown_name("run", name, names, "the table has"))
    status = {run.name: run.read_status()["status"] for run in table.runs}
    if retry is None:
        return [run for run in table.runs if status[run.name] not in ("done", "failed")]
    if not retry:
        return [run for run in table.runs if status[run.name] == "failed"]
    return [run for run in table.runs if run.name in retry and status[run.name] != "done"]


def run_command(
    path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    retry: Sequence[str] | None = None,
    gpus: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Read a table, run what is to be run, and print the outcome.

    Args:
        path, output_dir: see `read_table`.
        retry: see `runs_to_do`.
        workers, gpus: see `Pool`.
        dry_run: only print what would be run.

    Returns:
        The exit code: 0 if no run has failed, 1 if some have, 2 if the table or an argument is wrong, 130 if stopped.
    """
    try:
        table = read_table(path, output_dir)
        runs = runs_to_do(table, retry)
        pool = Pool(table, runs, workers, gpus)
        if not dry_run:
            output_folder(table.output_dir)
    except ValueError as error:
        print(error if isinstance(error, TableError) else plain_text(error), file=sys.stderr)
        return 2
    to_do = {run.name for run in runs}
    states = Counter(run.read_status()["status"] for run in table.runs if run.name not in to_do)
    before = "".join(f", {number} {state} before" for state, number in states.items())
    print(f"{plural(len(table.runs), 'run')}, {len(runs)} to do{before}", flush=True)
    if dry_run:
        for run in runs:
            print(plain_text(f"  {run.name}: {json.dumps(run.parameters, ensure_ascii=False)}"))
        return 0
    try:
        pool.run()
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, and the same command runs the rest", file=sys.stderr)
        return 130
    except OSError as error:  # such as a full disk, or a folder without permission
        print(plain_text(f"the batch stopped: {error}"), file=sys.stderr)
        return 1
    failed = [run.name for run in table.runs if run.read_status()["status"] == "failed"]
    if failed:
        print(f"{len(failed)} failed: {plain_text(', '.join(failed))}\nTo try them again: add --retry")
    print(f"All runs: {table.output_dir / 'index.html'}")
    return 1 if failed else 0
