"""Risks: an import circle inside the kernels package, which a move of one file would close, also
where only type checkers look.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "kernels"
PACKAGE = "sailplan_kernels"
# Rooms from low to high; a room imports from lower rooms and from itself. Files beside the rooms
# are above all of them.
ROOMS = ("arguments", "exchange", "triton_kernels", "tiling", "infonce", "sigmoid", "topk")


def modules() -> dict[str, Path]:
    """Path of each module by its name; a package is its __init__."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def used(source: str, known: set[str]) -> Iterator[str]:
    """Modules of the package that ``source`` names in imports, inside functions and under
    TYPE_CHECKING too.
    """
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "found a relative import, expected an absolute one"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def test_modules_form_no_circle() -> None:
    known = modules()
    graph = {name: set(used(path.read_text(), set(known))) - {name} for name, path in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_rooms_import_only_lower_rooms() -> None:
    known, wrong = modules(), []
    for name, path in known.items():
        own = room_of(name)
        if own is None:
            continue
        for other in sorted(set(used(path.read_text(), set(known)))):
            room = room_of(other)
            if room is None and other != PACKAGE:
                wrong.append(f"{name} imports {other}, which stands above the rooms")
            elif room is not None and ROOMS.index(room) > ROOMS.index(own):
                wrong.append(f"{name} imports {other} of a higher room")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS) - {"arguments"}  # a module


def test_the_reader_sees_all_forms() -> None:
    source = "from a.b import c\nif TYPE_CHECKING:\n    import a.d\ndef f():\n    from a import e\n"
    assert list(used(source, {"a", "a.b", "a.d", "a.e"})) == ["a.b", "a.d", "a.e"]
