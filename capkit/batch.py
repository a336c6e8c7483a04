"""Notebooks as programs: what papermill passes them is checked, because papermill itself only warns."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence

INJECTED = "# Parameters"  # papermill's first line of the cell that it injects


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
        known = _assigned(before)
        for name in _assigned(source):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown parameter {name!r}; {hint}This notebook has: {', '.join(known)}")


def _assigned(source: str) -> list[str]:
    statements = ast.parse(source).body
    targets = [node.target for node in statements if isinstance(node, ast.AnnAssign)]
    targets += [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]
