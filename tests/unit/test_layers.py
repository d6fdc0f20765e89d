"""Risks: an import that goes up the layers, a cycle between packages, and the few rules that
keep parts exchangeable.

The layers, low to high, are those of the architecture: a package imports from lower layers and from
its own layer only, and neither packages of one layer nor modules of one package form a cycle.
Imports are read from the syntax tree, also those inside functions and those under `if
TYPE_CHECKING:`.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAILPLAN = ROOT / "framework" / "sailplan"
KERNELS = ROOT / "kernels" / "sailplan_kernels"
LAYERS: list[set[str]] = [
    {"errors"},
    {"runtime", "config"},
    {"data", "model", "objective"},
    {"ingest"},
    {"step", "checkpoint"},
    {"embed", "parity"},
    {"curriculum"},
    {"train", "evaluate", "export", "observe", "preflight"},
    {"cli"},
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
ENTRIES = {"__init__", "__main__"}  # the package's own files, above all layers


def imported(path: Path) -> Iterator[str]:
    """Absolute names that a module imports: "a.b" of `import a.b`, "a.b.c" of `from a.b import
    c`.
    """
    package = path.relative_to(path.parents[_depth(path)]).with_suffix("").parts[:-1]

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))


def _depth(path: Path) -> int:
    """How many folders up from the module the source root lies."""
    root = ROOT / ("kernels" if KERNELS in path.parents else "framework")
    return len(path.relative_to(root).parts) - 1


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def owner(path: Path) -> str:
    """The package directly below sailplan that a module belongs to (or the module's own name).

    A room's config.py belongs to the configuration: it stands beside its component and imports
    nothing of it.
    """
    parts = path.relative_to(SAILPLAN).with_suffix("").parts
    return "config" if parts[1:] == ("config",) else parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def packages_used(path: Path) -> set[str]:
    used = [name.split(".")[1:] for name in imported(path) if name.startswith("sailplan.")]
    names = {"config" if name[1:2] == ["config"] else name[0] for name in used}
    return names & set(LEVEL)


def test_every_package_has_a_layer() -> None:
    found = {owner(path) for path in modules(SAILPLAN)} - ENTRIES
    assert found <= set(LEVEL), f"give these a place in the layers: {sorted(found - set(LEVEL))}"


def test_imports_only_go_down() -> None:
    wrong = [
        f"{name_of(path)} (layer {LEVEL[owner(path)]}) imports sailplan.{used} (layer "
        f"{LEVEL[used]})"
        for path in modules(SAILPLAN)
        if owner(path) in LEVEL
        for used in sorted(packages_used(path))
        if LEVEL[used] > LEVEL[owner(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_of_one_layer_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules(SAILPLAN):
        if owner(path) in LEVEL:
            graph.setdefault(owner(path), set()).update(packages_used(path) - {owner(path)})
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"packages import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", [SAILPLAN, KERNELS], ids=lambda path: path.name)
def test_modules_form_no_cycle(package: Path) -> None:
    names = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in modules(package)
    }

    def module(name: str) -> str | None:
        """Return the module that an imported name is, or is in."""
        return (
            name
            if name in names
            else parent
            if (parent := name.rpartition(".")[0]) in names
            else None
        )

    graph = {
        name: {found for each in imported(path) if (found := module(each)) is not None} - {name}
        for name, path in names.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_kernels_are_useful_alone() -> None:
    allowed = {"sailplan_kernels", "torch", "triton", "__future__", *sys.stdlib_module_names}
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in modules(KERNELS)
        for name in imported(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_framework_uses_kernels_and_they_never_use_it() -> None:
    assert not [
        name_of(path)
        for path in modules(KERNELS)
        if any(name.split(".")[0] == "sailplan" for name in imported(path))
    ]


def test_no_objective_knows_the_process_groups() -> None:
    wrong = [
        name_of(path)
        for path in modules(SAILPLAN / "objective")
        if any(name.startswith("torch.distributed") for name in imported(path))
    ]
    assert not wrong, f"an objective is handed an exchange instead: {wrong}"


def test_the_model_starts_no_processes_and_asks_for_no_mesh() -> None:
    """Towers know nothing of ranks; what shards them from outside knows only the record of
    groups that it is handed.
    """
    around = {"build", "component", "parallelize", "testing"}
    groups = {
        "sailplan.runtime.process.Parallel",
        "sailplan.runtime.groups.group_of",
        "sailplan.runtime.groups.form_groups",
    }
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in modules(SAILPLAN / "model")
        for name in imported(path)
        if name.startswith("sailplan.runtime") and not (name in groups and path.stem in around)
    ]
    assert not wrong, "\n".join(wrong)


def test_training_names_no_loss_model_or_data_set() -> None:
    concrete = {f"sailplan.objective.{path.stem}" for path in modules(SAILPLAN / "objective")} - {
        f"sailplan.objective.{general}"
        for general in ("__init__", "backends", "operands", "protocol", "registry", "temperature")
    }
    data_sets = {path.parent.name for path in (ROOT / "data" / "quickstart").glob("*/*.tar")}
    wrong = []
    for path in modules(SAILPLAN / "train"):
        wrong += [
            f"{name_of(path)} imports {name}"
            for name in imported(path)
            if any(name == loss or name.startswith(f"{loss}.") for loss in concrete)
        ]
        wrong += [
            f"{name_of(path)} imports {name}"
            for name in imported(path)
            if name.startswith("sailplan.model.tower")
        ]
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        wrong += [
            f"{name_of(path)} names the data set {name!r}" for name in sorted(strings & data_sets)
        ]
    assert not wrong, "\n".join(wrong)


def test_only_runtime_and_observe_ask_for_rank_zero() -> None:
    """Elsewhere every rank does the same; who writes is decided by a null object or by the store
    that writes.
    """
    allowed = {"runtime", "observe", "checkpoint"}
    wrong = []
    for path in modules(SAILPLAN):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if owner(path) not in allowed and isinstance(node, ast.Compare):
                left = ast.unparse(node.left)
                if (left == "rank" or left.endswith(".rank")) and ast.unparse(
                    node.comparators[0]
                ) == "0":
                    wrong.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_imports_sees_all_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "KERNELS", tmp_path / "kernels" / "sailplan_kernels")
    path = tmp_path / "framework" / "sailplan" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..model import g\n"
        "if TYPE_CHECKING:\n    import k\ndef function():\n    from h.i import j\n"
    )
    assert list(imported(path)) == [
        "a.b",
        "d.e",
        "sailplan.data.f",
        "sailplan.model.g",
        "k",
        "h.i.j",
    ]
