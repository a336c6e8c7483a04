"""A table of notebook runs, read and checked before any of them starts; all that is wrong with it is told at once."""

from __future__ import annotations

import ast
import csv
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TABLE_KEYS = ("output_dir", "workers", "time_limit_minutes", "notebook", "parameters", "grid", "runs")
RUN_KEYS = ("name", "notebook", "parameters", "grid")
ALSO_LISTS = ("videos",)  # written as `str`, because papermill does not see a union; a list of them is as good
NAME = re.compile(r"\w[\w .,=+-]*")
LONGEST_NAME = 60  # characters; each value in it VALUE_LENGTH at most
VALUE_LENGTH = 20
KINDS = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict, "None": type(None)}
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}


class TableError(ValueError):
    """A table that cannot be run as it stands.

    Attributes:
        path: the table.
        problems: everything that is wrong with it, one text each.
    """

    def __init__(self, path: Path, problems: Iterable[str]):
        self.path, self.problems = path, list(dict.fromkeys(problems))
        super().__init__("\n".join(f"{path}: {problem}" for problem in self.problems))


@dataclass(frozen=True)
class Run:
    """A notebook with parameters.

    Attributes:
        name: of its folder; no two runs of a table have the same.
        notebook: an absolute path.
        parameters: as the table has them; those that it does not name keep the notebook's defaults.
        fingerprint: changes with the notebook's code and with the parameters: a run is finished under its fingerprint.
        varied: the parameters that are its own in the table, for people to tell runs by.
        has_output_dir: the notebook has a parameter of that name.
    """

    name: str
    notebook: Path
    parameters: dict[str, Any]
    fingerprint: str
    varied: tuple[str, ...] = ()
    has_output_dir: bool = False


@dataclass(frozen=True)
class Table:
    """Runs, and how to do them.

    Attributes:
        path: the file, absolute. Relative paths in it, those among parameters too, are relative to its folder.
        runs: in order.
        output_dir: where their folders go: as the table says, else beside it in a folder of its name.
        workers: how many run at a time.
        time_limit_minutes: longest time for a run; None for no limit.
    """

    path: Path
    runs: tuple[Run, ...]
    output_dir: Path
    workers: int = 1
    time_limit_minutes: float | None = None


@dataclass
class _Notebook:
    path: Path
    digest: str = ""
    annotations: dict[str, ast.expr | None] = field(default_factory=dict)
    problem: str | None = None


def read_table(path: str | Path) -> Table:
    """Read a table of runs and check it against the notebooks' own parameters.

    YAML: a mapping with `runs`, a list of mappings with `notebook`, and, if wanted, `name`, `parameters` and `grid`
    (parameters with lists of values, which are crossed). `notebook`, `parameters` and `grid` beside `runs` hold for all
    of them; a run's own go before. Without `runs` they are the one run, or the one grid of runs. Beside them may stand
    `output_dir`, `workers` and `time_limit_minutes`. A bare list is taken for `runs`.

    CSV: a row for each run, with columns `notebook`, `name` if wanted, and parameters. A blank leaves the default; what
    is not text by the notebook's own word is read as YAML.

    Raises:
        TableError: with everything that is wrong with it.
    """
    path = Path(path).expanduser().absolute()
    try:
        content = _read(path)
    except (OSError, ValueError, csv.Error, yaml.YAMLError) as error:
        raise TableError(path, [f"cannot be read as a table of runs: {error}"]) from error
    problems = [*_check_top(content)]
    if problems:
        raise TableError(path, problems)
    entries = content.get("runs", [{}])
    shared = {name: content.get(name) for name in RUN_KEYS[1:]}
    notebooks: dict[str, _Notebook] = {}
    drafts = []
    for number, entry in enumerate(entries, 1):
        where = f"row {number}" if path.suffix.lower() == ".csv" else f"run {number}"
        found = list(_check_entry(entry, where, shared))
        problems += found
        if not found:
            drafts += _expand(entry, where, shared, notebooks, path, problems)
    runs = _distinct(drafts, problems)
    problems += _shared_outputs(runs, path.parent)
    if not runs and not problems:
        problems.append("has no runs")
    if problems:
        raise TableError(path, problems)
    output_dir = path.parent / Path(content.get("output_dir") or path.stem).expanduser()
    return Table(path, tuple(runs), output_dir, content.get("workers", 1), content.get("time_limit_minutes"))


def near_miss(name: str, known: Iterable[str]) -> str:
    """The nearest of the names that exist, as a question; "" where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def parameter_annotations(source: str) -> dict[str, ast.expr | None]:
    """The parameters that a parameters cell assigns, with the types that it writes beside them.

    Read by Python's own parser, because papermill's reading overlooks `int | None`, and lines with a second `=`.
    """
    found: dict[str, ast.expr | None] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node.annotation
        elif isinstance(node, ast.Assign):
            found |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
    return found


def _read(path: Path) -> dict[str, Any]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() != ".csv":
            content = yaml.safe_load(file)
            return {"runs": content} if isinstance(content, list) else content
        rows = list(csv.DictReader(file, strict=True))
    if any(None in row for row in rows):
        raise ValueError("a row has more fields than there are columns")
    cells = [{name: value for name, value in row.items() if value not in (None, "")} for row in rows]
    own = ("name", "notebook")
    return {
        "runs": [
            {name: row[name] for name in own if name in row}
            | {"parameters": {name: _CSVCell(value) for name, value in row.items() if name not in own}}
            for row in cells
        ]
    }


class _CSVCell(str):
    """A value that is text so far."""


def _check_top(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"must be a list of runs, or a mapping with some of: {', '.join(TABLE_KEYS)}"
        return
    yield from _unknown(content, TABLE_KEYS, "")
    yield from _check_shapes(content, "")
    runs = content.get("runs", [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        yield "runs: must be a list of mappings, each with some of: " + ", ".join(RUN_KEYS)
    if not isinstance(content.get("output_dir", ""), str):
        yield "output_dir: must be the name of a folder"
    workers, limit = content.get("workers", 1), content.get("time_limit_minutes")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        yield f"workers: {workers!r} must be a whole number of at least 1"
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
        yield f"time_limit_minutes: {limit!r} must be a number above 0"


def _check_entry(entry: dict, where: str, shared: dict) -> Iterator[str]:
    yield from _unknown(entry, RUN_KEYS, f"{where}: ")
    yield from _check_shapes(entry, f"{where}: ")
    name = entry.get("name")
    if name is not None and not (isinstance(name, str) and len(name) <= 2 * LONGEST_NAME and NAME.fullmatch(name)):
        yield f"{where}: name {name!r} must be text fit for a folder: letters, digits, spaces and . , = + - _"
    if entry.get("notebook", shared["notebook"]) is None:
        yield f"{where}: has no notebook"


def _unknown(given: dict, known: tuple[str, ...], where: str) -> Iterator[str]:
    for name in given:
        if name not in known:
            yield f"{where}unknown {name!r}; {near_miss(name, known)}known are: {', '.join(known)}"


def _check_shapes(given: dict, where: str) -> Iterator[str]:
    parameters, grid = given.get("parameters") or {}, given.get("grid") or {}
    if not isinstance(given.get("notebook", ""), str):
        yield f"{where}notebook: must be the name of a file"
    if not isinstance(parameters, dict) or not all(isinstance(name, str) for name in parameters):
        yield f"{where}parameters: must be a mapping of names to values"
    elif not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        yield f"{where}grid: must be a mapping of parameters to lists of values, none of them empty"
    else:
        for name in set(parameters) & set(grid):
            yield f"{where}{name!r} stands in parameters and in grid"


def _expand(entry, where, shared, notebooks, path, problems) -> Iterator[Run]:
    """The runs of an entry; what is wrong with it goes to `problems`."""
    given = entry.get("notebook", shared["notebook"])
    if given not in notebooks:
        notebooks[given] = _load_notebook(Path(os.path.normpath(path.parent / Path(given).expanduser())))
        problems += [notebooks[given].problem] if notebooks[given].problem else []
    notebook = notebooks[given]
    if notebook.problem:
        return
    own, grid = entry.get("parameters") or {}, entry.get("grid") or {}
    parameters = {name: value for name, value in (shared["parameters"] or {}).items() if name not in grid} | own
    axes = {name: values for name, values in (shared["grid"] or {}).items() if name not in own} | grid
    found = []
    parameters = {name: _checked(notebook, name, value, where, found) for name, value in parameters.items()}
    axes = {name: [_checked(notebook, name, one, where, found) for one in values] for name, values in axes.items()}
    problems += found
    if found:
        return
    name, combinations = entry.get("name"), list(itertools.product(*axes.values()))
    for values in combinations:
        every = parameters | dict(zip(axes, values, strict=True))
        digest = _digest([notebook.digest, every])
        if name is None:
            label = _label(notebook.path.stem, {key: every[key] for key in (*axes, *own)}, digest)
        else:
            label = name if len(combinations) == 1 else _label(name, {key: every[key] for key in axes}, digest)
        varied, has_output_dir = tuple(dict.fromkeys([*axes, *own])), "output_dir" in notebook.annotations
        yield Run(label, notebook.path, every, digest, varied, has_output_dir)


def code_cells(path: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook file, their sources as text, their tags in `tags`.

    Without nbformat, whose import takes longer than all else that a batch does before its first run.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no notebook, or one of before 2014.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("nbformat") != 4:
        raise ValueError("no notebook of format 4")
    found = [cell for cell in content.get("cells", []) if cell["cell_type"] == "code"]
    return [cell | {"source": "".join(cell["source"]), "tags": cell["metadata"].get("tags", [])} for cell in found]


def _load_notebook(path: Path) -> _Notebook:
    try:
        code = code_cells(path)
    except FileNotFoundError:
        return _Notebook(path, problem=f"notebook {path}: no such file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _Notebook(path, problem=f"notebook {path}: cannot be read as a notebook: {error!r}")
    tagged = [cell["source"] for cell in code if "parameters" in cell["tags"]]
    try:
        annotations = parameter_annotations(tagged[0]) if tagged else {}
    except SyntaxError as error:
        return _Notebook(path, problem=f"notebook {path}: its parameters cell is not plain Python: {error}")
    return _Notebook(path, _digest([cell["source"] for cell in code]), annotations)


def _checked(notebook: _Notebook, name: str, value: Any, where: str, problems: list[str]) -> Any:
    """The value as the notebook gets it; what is wrong with it goes to `problems`."""
    known = notebook.annotations
    if name not in known:
        listed = f"{notebook.path.name} has: {', '.join(known)}" if known else "it has no cell tagged 'parameters'"
        problems.append(f"{where}: unknown parameter {name!r}; {near_miss(name, known)}{listed}")
        return value
    kinds = _kinds(known[name])
    if isinstance(value, _CSVCell):
        try:
            value = str(value) if "str" in kinds else yaml.safe_load(value)
        except yaml.YAMLError:
            problems.append(f"{where}: {name}: {str(value)!r} cannot be read as YAML")
            return value
    try:
        json.dumps(value)
    except TypeError as error:
        problems.append(f"{where}: {name}: {value!r} cannot be passed to a notebook ({error}); quote it to pass text")
        return value
    if kinds and name in ALSO_LISTS:
        kinds = [*kinds, "list"]
    if kinds and not any(_is(value, kind) for kind in kinds):
        told = f"{value!r} is {WORDS.get(type(value), 'a ' + type(value).__name__)}, not {' or '.join(kinds)}"
        problems.append(f"{where}: {name}: {told}{_type_hint(value, kinds)}")
    return value


def _kinds(annotation: ast.expr | None) -> list[str]:
    """The built-in types that an annotation allows; none where it says nothing that can be checked."""
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return ["None"]
    if isinstance(annotation, ast.Name):
        return [annotation.id.lower()] if annotation.id.lower() in KINDS else []
    parts = []
    if isinstance(annotation, ast.BinOp):
        parts = [_kinds(annotation.left), _kinds(annotation.right)]
    elif isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rpartition(".")[2]
        if outer not in ("Optional", "Union"):
            return _kinds(annotation.value)
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        parts = [_kinds(part) for part in inner] + ([["None"]] if outer == "Optional" else [])
    return [kind for part in parts for kind in part] if all(parts) else []


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))


def _type_hint(value, kinds):
    if isinstance(value, list) and "list" not in kinds:
        return "; several values to try, a run each, go under grid"
    if "str" in kinds:
        return "; put it in quotes"
    if isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+[eE][+-]?\d+", value):
        return "; YAML wants a point and a sign in it, such as 1.0e-3"
    return ""


def _label(start: str, own: dict[str, Any], digest: str) -> str:
    """A name that says what is a run's own, and that stays when others are added to the table."""
    words = [f"{name}={_short(value)}" for name, value in own.items()]
    label = "-".join([start, *words])
    if len(label) <= LONGEST_NAME and all(len(str(value)) <= VALUE_LENGTH for value in own.values()):
        return label
    return f"{label[:LONGEST_NAME].rstrip('-= .')}-{digest[:6]}"


def _distinct(runs: list[Run], problems: list[str]) -> list[Run]:
    """Runs whose names differ, also where a file system does not tell A from a."""
    taken = Counter(run.name.casefold() for run in runs)
    alike = [run for run in runs if taken[run.name.casefold()] > 1]
    for (name, _), number in Counter((run.name, run.fingerprint) for run in alike).items():
        if number > 1:
            problems.append(f"{name}: the same run is there {number} times")
    return [dataclasses.replace(run, name=f"{run.name}-{run.fingerprint[:6]}") if run in alike else run for run in runs]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = " ".join(map(str, value.values()))
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.,+-]+", "_", text).strip("_.")[:VALUE_LENGTH]


def _shared_outputs(runs: list[Run], folder: Path) -> Iterator[str]:
    taken: dict[Path, str] = {}
    for run in runs:
        if isinstance(run.parameters.get("output_dir"), str):
            place = (folder / Path(run.parameters["output_dir"]).expanduser()).resolve()
            if place in taken:
                told = f"{taken[place]} and {run.name} would both write into {place}"
                yield f"{told}; leave output_dir out, and each run gets its own"
            taken.setdefault(place, run.name)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
