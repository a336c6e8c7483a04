"""Parameters of notebooks: read them from the parameters cell, and check values for them by name and type."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from capkit.files import read_regular
from capkit.text import unknown_name

INJECTED = "# Parameters"  # first line of the cell that papermill injects
ALSO_LISTS = ("videos",)  # annotated as `str`, because papermill does not understand unions; a list is accepted too
TYPES: dict[str, type | tuple[type, ...]] = {
    **{"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict},
    "None": type(None),
}
EXAMPLES = {
    **{"str": '"text"', "int": "3", "float": "0.5", "bool": "true", "None": "null"},
    **{"list": '["one", "two"]', "dict": '{"name": 3}'},
}
DESCRIPTIONS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}


def check_parameters(cells: Sequence[str], namespace: dict[str, Any] | None = None) -> None:
    """Check a notebook's parameters by name and type; call it in the notebook: `check_parameters(In, globals())`.

    papermill only warns about unknown names, so a misspelt parameter would run with its default; and `-p overwrite
    false` passes the text "false", which Python takes for true. Text with one sensible meaning is converted, see
    `convert_value`.

    Args:
        cells: sources of the cells run so far, as in IPython's `In`: the parameters cell, whose lines are all annotated
            assignments, and right after it the one that papermill injects, if any.
        namespace: the notebook's variables; converted values are put back. None only checks what papermill passed, and
            refuses what would have to be converted.

    Raises:
        ValueError: names an unknown parameter, the nearest match and all parameters of the notebook; or a parameter,
            its value and what is wanted, with an example.
    """
    sources = [source for source in cells if source.strip()]
    annotations: dict[str, ast.expr | None] = {}
    passed: dict[str, Any] = {}
    for before, source in zip(["", *sources], sources, strict=False):
        if source.startswith(INJECTED):
            parameters = parameter_annotations(before)
            for name in parameter_annotations(source):
                if name not in parameters:
                    raise ValueError(unknown_name("parameter", name, parameters, "This notebook has"))
            annotations |= parameters
            passed |= _literals(source)
        elif _has_only_annotations(source):
            annotations |= parameter_annotations(source)
    values = passed if namespace is None else namespace
    for name in annotations:
        if name in values:
            converted = convert_value(name, values[name], annotations[name])
            if namespace is not None:
                namespace[name] = converted
            elif converted != values[name]:
                raise ValueError(f"{name}: {values[name]!r} must be given as {converted!r}")


def _has_only_annotations(source: str) -> bool:
    try:
        return all(isinstance(node, ast.AnnAssign) for node in ast.parse(source).body)
    except SyntaxError:  # such as a line of shell
        return False


def _literals(source: str) -> dict[str, Any]:
    """The values that a cell assigns, without those that are no literals, such as papermill's float("nan")."""
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with suppress(ValueError):
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Read the code cells of a notebook file: the sources as text, the tags in `tags`.

    nbformat is not used because importing it takes longer than everything else a batch does before its first run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a notebook of format 4.
    """
    content = json.loads(read_regular(path))
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


def convert_value(name: str, value: Any, annotation: ast.expr | None) -> Any:
    """Check a value against a parameter's annotation (see `parameter_annotations`), and return the value to pass.

    Text for a parameter that takes none is read as what it means: "no" as a bool, "3" as an int, "1e-3" as a float,
    "null" as None, YAML's `[a, b]` and `{a: 1}` as a list and a dict, any other text for a list as its only element.
    1000.0, as papermill passes `-p steps 1e3`, is an int too.

    Raises:
        ValueError: names the parameter, the value and what is wanted, with an example; also for a text that can neither
            be written nor be the name of a file.
    """
    if _is_unusable(value):
        raise ValueError(f"{name}: {value!r} has a NUL or half a character in it, which no file and no name can hold")
    types = _annotated_types(annotation)
    if not types:
        return value
    if name in ALSO_LISTS:
        types = [*types, "list"]
    converted = value
    if isinstance(value, str) and "str" not in types:
        converted = _read_text(value, types)
    if isinstance(converted, float) and "float" not in types and converted.is_integer():
        converted = int(converted)
    # A bool is an int for Python, but not for a parameter.
    kinds = [kind for kind in types if kind == "bool" or type(converted) is not bool]
    if any(isinstance(converted, TYPES[kind]) for kind in kinds):
        if isinstance(converted, list) and (of := _annotated_members(annotation)):
            return [convert_value(f"{name}[{number}]", member, of) for number, member in enumerate(converted)]
        return converted
    actual = DESCRIPTIONS.get(type(value), f"a {type(value).__name__}")
    wanted = f"{' or '.join(types)}, such as {EXAMPLES[types[0]]}"
    raise ValueError(f"{name}: {value!r} is {actual}, not {wanted}{_type_hint(value, types)}")


def _is_unusable(value: Any) -> bool:
    """Whether a text, or one in a list or a dictionary, holds a NUL or half a surrogate pair."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return any(map(_is_unusable, value))
    try:
        return isinstance(value, str) and b"\0" in os.fsencode(value)  # other lone surrogates are bytes of file names
    except UnicodeEncodeError:
        return True


def _annotated_members(annotation: ast.expr | None) -> ast.expr | None:
    """The annotation `str` of `list[str]`; None for others."""
    if not isinstance(annotation, ast.Subscript) or ast.unparse(annotation.value) not in ("list", "List"):
        return None
    return annotation.slice


def _read_text(text: str, types: Sequence[str]) -> Any:
    """What a text means for a parameter that takes no text; the text itself if it means nothing."""
    if "None" in types and text.strip().lower() in ("none", "null", "~", ""):
        return None
    if "int" in types or "float" in types:
        if "_" in text:  # 1_0, which is 10 for Python and YAML only
            return text
        for number in (int, float):
            with suppress(ValueError):
                return number(text)
    if "list" in types and not text.lstrip().startswith(("[", "{")):
        return [text]
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text
    return [value] if "list" in types and isinstance(value, dict) and "dict" not in types else value


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


def _type_hint(value: Any, types: Sequence[str]) -> str:
    if isinstance(value, list) and "list" not in types:
        return "; in a table, several values to try, a run each, go under grid"
    if "str" in types and value is not None:
        return "; to pass text, put it in quotes, or use papermill's -r in place of -p"
    return ""
