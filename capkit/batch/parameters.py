"""Parameters of notebooks: read them from the parameters cell, and check values for them by name and type."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

INJECTED = "# Parameters"  # first line of the cell that papermill injects
ALSO_LISTS = ("videos",)  # annotated as `str`, because papermill does not understand unions; a list is accepted too
TYPES: dict[str, type | tuple[type, ...]] = {
    **{"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict},
    "None": type(None),
}
DESCRIPTIONS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}


def check_parameters(cells: Sequence[str]) -> None:
    """Check that a notebook has all parameters that papermill passed; call it in the notebook: `check_parameters(In)`.

    papermill only warns about unknown names, so a misspelt parameter would run with its default.

    Args:
        cells: sources of the cells run so far, as in IPython's `In`: the parameters cell, and right after it the one
            that papermill injects, if any.

    Raises:
        ValueError: names the unknown parameter, the nearest match and all parameters of the notebook.
    """
    sources = [source for source in cells if source.strip()]
    for defaults, injected in zip(sources, sources[1:], strict=False):
        if injected.startswith(INJECTED):
            parameters = parameter_annotations(defaults)
            for name in parameter_annotations(injected):
                if name not in parameters:
                    raise ValueError(unknown_name("parameter", name, parameters, "This notebook has"))


def unknown_name(kind: str, name: str, names: Iterable[str], introduction: str) -> str:
    """Error message for an unknown name: the nearest match, if any, and all names after an introduction."""
    names = list(names)
    nearest = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {kind} {name!r}; {hint}{introduction}: {', '.join(names)}"


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Read the code cells of a notebook file: the sources as text, the tags in `tags`.

    nbformat is not used because importing it takes longer than everything else a batch does before its first run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a notebook of format 4.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("nbformat") != 4:
        raise ValueError("not a notebook of format 4")
    cells = [cell for cell in content.get("cells", []) if cell["cell_type"] == "code"]
    return [cell | {"source": "".join(cell["source"]), "tags": cell["metadata"].get("tags", [])} for cell in cells]


def parameter_annotations(source: str) -> dict[str, ast.expr | None]:
    """Names and annotations of the parameters that a parameters cell assigns.

    Uses Python's own parser, because papermill's misses `int | None` and lines with a second `=`.

    Raises:
        SyntaxError: the cell is not plain Python.
    """
    annotations: dict[str, ast.expr | None] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotations[node.target.id] = node.annotation
        elif isinstance(node, ast.Assign):
            annotations |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
    return annotations


def convert_value(name: str, value: Any, annotation: ast.expr | None, from_csv: bool) -> Any:
    """Check a value against a parameter's annotation (see `parameter_annotations`), and return the value to pass.

    Text from a CSV cell is parsed as YAML first, unless the parameter accepts text.

    Raises:
        ValueError: names the parameter, the value and what is wrong with it.
    """
    types = _annotated_types(annotation)
    if from_csv and "str" not in types:
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}: {value!r} cannot be read as YAML") from error
    try:
        json.dumps(value)
    except TypeError as error:
        message = f"{name}: {value!r} cannot be passed to a notebook ({error}); quote it to pass text"
        raise ValueError(message) from error
    if types and name in ALSO_LISTS:
        types = [*types, "list"]
    # A bool is an int for Python, but not for a parameter.
    if types and not any(isinstance(value, TYPES[kind]) for kind in types if kind == "bool" or type(value) is not bool):
        actual = DESCRIPTIONS.get(type(value), f"a {type(value).__name__}")
        raise ValueError(f"{name}: {value!r} is {actual}, not {' or '.join(types)}{_type_hint(value, types)}")
    return value


def _annotated_types(annotation: ast.expr | None) -> list[str]:
    """The names in TYPES that an annotation allows; empty if there is something in it that cannot be checked."""
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return ["None"]
    if isinstance(annotation, ast.Name):
        return [annotation.id.lower()] if annotation.id.lower() in TYPES else []
    members: list[list[str]] = []
    if isinstance(annotation, ast.BinOp):
        members = [_annotated_types(annotation.left), _annotated_types(annotation.right)]
    elif isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rpartition(".")[2]
        if outer not in ("Optional", "Union"):
            return _annotated_types(annotation.value)
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        members = [_annotated_types(member) for member in inner] + ([["None"]] if outer == "Optional" else [])
    return [name for member in members for name in member] if all(members) else []


def _type_hint(value: Any, types: list[str]) -> str:
    if isinstance(value, list) and "list" not in types:
        return "; several values to try, a run each, go under grid"
    if "str" in types:
        return "; put it in quotes"
    if isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+[eE][+-]?\d+", value):
        return "; YAML needs a point and a sign in it, such as 1.0e-3"
    return ""
