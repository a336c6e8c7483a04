"""Read a table of notebook runs (YAML or CSV), and check all of it before any run starts."""

from __future__ import annotations

import ast
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from capkit.batch.parameters import code_cells, convert_value, parameter_annotations
from capkit.files import atomic_write, read_regular
from capkit.text import plain_text, unknown_name

LONGEST_NAME = 60  # characters; each value in it VALUE_LENGTH at most
VALUE_LENGTH = 20
MOST_RUNS = 10_000  # of a table; a grid multiplies quickly
NAME = re.compile(r"\w[\w .,=+-]*")
RUN_KEYS = ("name", "notebook", "parameters", "grid")
TABLE_KEYS = ("output_dir", "workers", "time_limit_minutes", "notebook", "parameters", "grid", "runs")
CHECKS: dict[str, tuple[Callable[[Any], object], str]] = {
    "output_dir": (lambda value: isinstance(value, str), "must be the name of a folder"),
    "workers": (lambda value: type(value) is int and value > 0, "must be a whole number of at least 1"),
    "time_limit_minutes": (lambda value: type(value) in (int, float) and value > 0, "must be a number above 0"),
    "runs": (
        lambda value: isinstance(value, list) and all(isinstance(run, dict) for run in value),
        f"must be a list of mappings, each with some of: {', '.join(RUN_KEYS)}",
    ),
    "name": (
        lambda value: isinstance(value, str) and len(value) <= 2 * LONGEST_NAME and NAME.fullmatch(value),
        "must be text that can name a folder: letters, digits, spaces and . , = + - _",
    ),
    "notebook": (lambda value: isinstance(value, str), "must be the name of a file"),
    "parameters": (
        lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
        "must be a mapping of names to values",
    ),
    "grid": (
        lambda value: isinstance(value, dict) and all(isinstance(item, list) and item for item in value.values()),
        "must be a mapping of parameters to lists of values, none of them empty",
    ),
}


class TableError(ValueError):
    """A table with errors in it.

    Attributes:
        path: the table.
        problems: everything that is wrong with it, one text each.
    """

    def __init__(self, path: Path, problems: Iterable[str]):
        self.path, self.problems = path, list(dict.fromkeys(problems))
        super().__init__("\n".join(plain_text(f"{path}: {problem}") for problem in self.problems))


@dataclass(frozen=True)
class Run:
    """A notebook with parameters, and its status file.

    Attributes:
        name: of its folder; unique in the table.
        notebook: an absolute path.
        parameters: as given in the table; others keep the notebook's defaults.
        fingerprint: digest of the notebook's code and the parameters; a status counts only under its fingerprint.
        varied: names of the parameters that the table gives for this run in particular.
        has_output_dir: the notebook has a parameter `output_dir`.
        time_limit_minutes: None for no limit.
        working_dir: where the notebook runs, the folder of the table: relative paths begin there.
        batch_dir: where the runs' folders are.
    """

    name: str
    notebook: Path
    parameters: dict[str, Any]
    fingerprint: str
    varied: tuple[str, ...]
    has_output_dir: bool
    time_limit_minutes: float | None
    working_dir: Path
    batch_dir: Path

    @property
    def folder(self) -> Path:
        """Folder of the executed notebook, its HTML, `log.txt`, `status.json` and, by default, `results/`."""
        return self.batch_dir / self.name

    @property
    def results_dir(self) -> Path:
        """Where the notebook writes, if it has a parameter `output_dir`: as the table says, or `results/`."""
        output_dir = self.parameters.get("output_dir")
        if isinstance(output_dir, str):
            return self.working_dir / Path(output_dir).expanduser()
        return self.folder / "results"

    def read_status(self) -> dict[str, Any]:
        """The content of the status file; `status` is "done", "failed", "running" or "interrupted".

        Without a file it is "not run"; it is "changed" if the notebook's code or the parameters have changed since.
        """
        try:
            status = json.loads(read_regular(self.folder / "status.json"))
        except (OSError, ValueError, RecursionError):
            status = None
        if not isinstance(status, dict):
            return {"name": self.name, "status": "not run"}
        return status if status.get("fingerprint") == self.fingerprint else {"name": self.name, "status": "changed"}

    def write_status(self, status: str, **fields: Any) -> None:
        """Replace the status file."""
        content = {"name": self.name, "notebook": str(self.notebook), "parameters": self.parameters}
        content |= {"fingerprint": self.fingerprint, "status": status} | fields
        atomic_write(self.folder / "status.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")


@dataclass(frozen=True)
class Table:
    """Runs, and how to run them.

    Attributes:
        path: the file.
        runs: in order.
        output_dir: where the runs' folders are.
        workers: how many run at a time.
    """

    path: Path
    runs: tuple[Run, ...]
    output_dir: Path
    workers: int


def read_table(path: str | os.PathLike[str], output_dir: str | os.PathLike[str] | None = None) -> Table:
    """Read a table of runs, and check it against the parameters of its notebooks.

    YAML: a mapping with `runs`, a list of mappings with `notebook` and optionally `name`, `parameters` and `grid`
    (parameters with lists of values; every combination is a run). `notebook`, `parameters` and `grid` beside `runs`
    apply to all runs; a run's own override them. Without `runs` they are the only entry. `output_dir`, `workers` and
    `time_limit_minutes` are optional beside them. A bare list is taken for `runs`.

    CSV: a row for each run, with columns `notebook`, optionally `name`, and parameters. An empty cell leaves the
    default; text for parameters that take none is read as `convert_value` says, and as YAML without an annotation.

    Args:
        path: file, CSV by its suffix or else YAML.
        output_dir: replaces the table's, which is by default a folder beside the table, named like it.

    Raises:
        TableError: lists everything that is wrong with it.
    """
    path = Path(path).expanduser().absolute()
    is_csv = path.suffix.lower() == ".csv"
    try:
        content = _read(path, is_csv)
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise TableError(path, [f"cannot be read as a table of runs: {' '.join(str(error).split())}"]) from error
    if not isinstance(content, dict):
        raise TableError(path, [f"must be a list of runs, or a mapping with some of: {', '.join(TABLE_KEYS)}"])
    if problems := list(_check(content, TABLE_KEYS)):
        raise TableError(path, problems)
    if output_dir is None:
        output_dir = path.parent / Path(content.get("output_dir") or path.stem).expanduser()
    batch_dir = Path(output_dir).expanduser().resolve()
    reader = _Reader(path, is_csv, batch_dir, content)
    runs: list[Run] = []
    for number, entry in enumerate(content["runs"] or () if "runs" in content else [{}], 1):
        runs += reader.read_entry(entry, f"{'row' if is_csv else 'run'} {number}")
    runs = _with_unique_names(runs)
    problems = [*reader.problems, *_check_outputs(runs)]
    if not runs and not problems:
        problems.append("has no runs")
    if problems:
        raise TableError(path, problems)
    return Table(path, tuple(runs), batch_dir, content.get("workers") or 1)


def _read(path: Path, is_csv: bool) -> Any:
    text = read_regular(path).decode("utf-8-sig")
    if not is_csv:
        content = yaml.safe_load(text)
        return {"runs": content} if isinstance(content, list) else content
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    if any(None in row for row in rows):
        raise ValueError("a row has more fields than there are columns")
    runs = []
    for row in rows:
        values = {name: value for name, value in row.items() if value not in (None, "")}
        entry = {name: values.pop(name) for name in ("name", "notebook") if name in values}
        runs.append(entry | {"parameters": values})
    return {"runs": runs}


def _check(mapping: dict[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    for key, value in mapping.items():
        if key not in keys:
            yield unknown_name("key", key, keys, "the keys are")
        elif value is not None and not CHECKS[key][0](value):
            yield f"{key}: {reprlib.repr(value)} {CHECKS[key][1]}"
    parameters, grid = mapping.get("parameters"), mapping.get("grid")
    if isinstance(parameters, dict) and isinstance(grid, dict):
        yield from (f"{name!r} is both in parameters and in grid" for name in parameters if name in grid)


class _Reader:
    """Makes runs of a table's entries; collects what is wrong with them in `problems`."""

    def __init__(self, path: Path, is_csv: bool, batch_dir: Path, content: dict[str, Any]):
        self.is_csv, self.time_limit_minutes = is_csv, content.get("time_limit_minutes")
        self.working_dir, self.batch_dir = path.parent, batch_dir
        self.notebook, self.parameters, self.grid = map(content.get, ("notebook", "parameters", "grid"))
        self.load_notebook = functools.cache(_load_notebook)
        self.num_runs = 0
        self.problems: list[str] = []

    def read_entry(self, entry: dict[str, Any], where: str) -> list[Run]:
        """The runs of an entry, one for each combination of its grid; none if there are problems."""
        problems, runs = list(_check(entry, RUN_KEYS)), []
        file = entry.get("notebook") or self.notebook
        if not file:
            problems.append("has no notebook")
        elif not problems:
            try:
                notebook = self.load_notebook(os.path.normpath(self.working_dir / Path(file).expanduser()))
                runs = self._expand(entry, notebook, problems)
            except ValueError as error:  # the notebook's: listed without the entry, once for all entries
                self.problems.append(str(error))
        self.problems += [f"{where}: {problem}" for problem in problems]
        return runs

    def _expand(self, entry: dict[str, Any], notebook: _Notebook, problems: list[str]) -> list[Run]:
        own = entry.get("parameters") or {}
        axes = {name: values for name, values in (self.grid or {}).items() if name not in own}
        axes |= entry.get("grid") or {}
        candidates = {name: [value] for name, value in ((self.parameters or {}) | own).items()} | axes
        choices: dict[str, list[Any]] = {name: [] for name in candidates}
        for name, values in candidates.items():
            for value in values:
                try:
                    choices[name].append(_convert(notebook, name, value, self.is_csv))
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            return []
        self.num_runs += (number := math.prod(map(len, choices.values())))
        if self.num_runs > MOST_RUNS:  # before they are made
            sizes = " x ".join(str(len(values)) for values in choices.values() if len(values) > 1) or "1"
            table = "" if self.num_runs == number else f", of {self.num_runs:,} in the table"
            many = f"its grid is {sizes} = {number:,} runs{table}; a table may have {MOST_RUNS:,}"
            problems.append(f"{many}: give fewer values, or use several tables")
            return []
        runs = []
        varied = tuple(dict.fromkeys([*axes, *own]))
        for combination in itertools.product(*choices.values()):
            parameters = dict(zip(choices, combination, strict=True))
            digest, name = _digest([notebook.digest, parameters]), entry.get("name")
            if name is None:
                name = _label(notebook.path.stem, {key: parameters[key] for key in varied}, digest)
            elif any(len(choices[key]) > 1 for key in axes):
                name = _label(name, {key: parameters[key] for key in axes}, digest)
            run = Run(
                name=name,
                notebook=notebook.path,
                parameters=parameters,
                fingerprint=digest,
                varied=varied,
                has_output_dir="output_dir" in notebook.annotations,
                time_limit_minutes=self.time_limit_minutes,
                working_dir=self.working_dir,
                batch_dir=self.batch_dir,
            )
            runs.append(run)
        return runs


class _Notebook(NamedTuple):
    path: Path
    digest: str  # of its code
    annotations: dict[str, ast.expr | None]


def _load_notebook(path: str) -> _Notebook:
    try:
        cells = code_cells(Path(path))
        tagged = [cell["source"] for cell in cells if "parameters" in cell["tags"]]
        annotations = parameter_annotations(tagged[0]) if tagged else {}
    except FileNotFoundError:
        raise ValueError(f"notebook {path}: no such file") from None
    except SyntaxError as error:
        raise ValueError(f"notebook {path}: its parameters cell is not plain Python: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"notebook {path}: cannot be read as a notebook: {error!r}") from error
    return _Notebook(Path(path), _digest([cell["source"] for cell in cells]), annotations)


def _convert(notebook: _Notebook, name: str, value: Any, from_csv: bool) -> Any:
    if not notebook.annotations:
        raise ValueError(f"unknown parameter {name!r}; {notebook.path.name} has no cell tagged 'parameters'")
    if name not in notebook.annotations:
        raise ValueError(unknown_name("parameter", name, notebook.annotations, f"{notebook.path.name} has"))
    annotation = notebook.annotations[name]
    try:
        if from_csv and annotation is None:
            value = yaml.safe_load(value)
        json.dumps(value)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name}: {reprlib.repr(value)} cannot be read as YAML") from error
    except TypeError as error:
        message = f"{name}: {value!r} cannot be passed to a notebook ({error}); quote it to pass text"
        raise ValueError(message) from error
    return convert_value(name, value, annotation)


def _label(start: str, parameters: dict[str, Any], digest: str) -> str:
    """Name a run by its own parameters, so that the name stays when other runs are added to the table."""
    label = "-".join([start, *(f"{name}={_short(value)}" for name, value in parameters.items())])
    if len(label) <= LONGEST_NAME and all(len(str(value)) <= VALUE_LENGTH for value in parameters.values()):
        return label
    return f"{label[:LONGEST_NAME].rstrip('-= .')}-{digest[:6]}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = " ".join(map(str, value.values()))
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.,+-]+", "_", text).strip("_.")[:VALUE_LENGTH]


def _with_unique_names(runs: list[Run]) -> list[Run]:
    """Add a digest to names that are equal on a file system that ignores case."""
    count = Counter(run.name.casefold() for run in runs)
    return [
        dataclasses.replace(run, name=f"{run.name}-{run.fingerprint[:6]}") if count[run.name.casefold()] > 1 else run
        for run in runs
    ]


def _check_outputs(runs: list[Run]) -> Iterator[str]:
    """Check that each run writes into a folder of its own."""
    owners: dict[Path, Run] = {}
    for run in runs:
        owner = owners.setdefault(run.results_dir.resolve(), run)
        if owner.fingerprint == run.fingerprint and owner is not run:
            yield f"{run.name}: the same run occurs more than once"
        elif owner is not run:
            message = f"{owner.name} and {run.name} would both write into {run.results_dir}"
            yield f"{message}; leave output_dir out, and each run gets its own"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
