"""The rooms of the package: who imports whom, lazily too, and what type checkers see."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

import capkit

PACKAGE = ROOT / "capkit"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FACADE = "capkit"  # imports every room, each when one of its names is first used


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree):
    """Modules and names of all imports, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "capkit":
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def test_no_modules_import_each_other_in_a_circle():
    # A module's package is imported with it, but a room's __init__ only hands on what its modules define.
    graph = {
        name: {found for found in imports(tree) if found not in (FACADE, name) and not name.startswith(f"{found}.")}
        for name, tree in MODULES.items()
        if name != FACADE
    }
    assert sum(map(len, graph.values())) > 100
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") > 1])
def test_rooms_are_entered_through_their_door(name):
    """Across rooms, names come from the room, not from a module in it; a part of `cogvlm2` may be taken as a whole."""
    room = name.split(".")[1]
    own_doors = {f"capkit.{room}", "capkit.cogvlm2.loading"}
    for found in imports(MODULES[name]):
        is_other_room = found.count(".") > 1 and found.split(".")[1] != room
        assert not is_other_room or found in own_doors, f"{name} imports {found}"


def test_generate_is_called_in_captioning_only():
    callers = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "generate"
    }
    assert callers == {"capkit.captioning.generate", "capkit.benchmark.models"}  # the latter is the plain baseline


@pytest.mark.parametrize("name", [f"capkit.{room}" for room in ROOMS])
def test_doors_only_hand_on(name):
    body = MODULES[name].body
    assert ast.get_docstring(MODULES[name])
    allowed = (ast.ImportFrom, ast.Assign)
    assert all(isinstance(node, allowed) for node in body[1:])


def test_type_checkers_see_the_public_names():
    (block,) = [
        node
        for node in MODULES[FACADE].body
        if isinstance(node, ast.If)
        and "TYPE_CHECKING" in ast.dump(node.test)
        and not isinstance(node.test, ast.UnaryOp)
    ]
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == set(capkit.__all__) - {"__version__"}
    assert all(getattr(capkit, name) is not None for name in capkit.__all__)


def test_no_module_is_too_long():
    lengths = {
        name: len(Path(ROOT, *name.split(".")).with_suffix(".py").read_text().splitlines())
        for name in MODULES
        if Path(ROOT, *name.split(".")).with_suffix(".py").is_file()
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}
