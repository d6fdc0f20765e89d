"""The code inside an exported omni folder: the definitions that a template needs, gathered from
the package's own sources.

A template (`export/standalone/`) imports from the package like any module. `bundle` writes it as
one file that imports nothing of the package: each name that it uses from there comes with its
source, and so on from name to name, read from the syntax trees; nothing is run. What megatron-core
does in training the template defines itself, under the same name, and takes the place of the
package's. So an export computes with the very lines that trained, and there is no second model.
"""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STANDALONE = "sailplan.export.standalone"
OMNI = (
    "configuration",
    "modeling",
    "processing",
    "sentence",
)  # templates; NAME becomes NAME_sailplan.py
PUBLISHED = ("published",)
FILES = (*OMNI, *PUBLISHED)
OPTIONAL = ("PIL", "soundfile", "scipy")  # needed for pictures and sound alone
# Methods that a class of a template takes from one of the package.
GRAFTS = {
    "OmniTower": (
        "sailplan.model.tower",
        "OmniEncoder",
        ("forward", "_encode", "_read_out", "_see", "_hear"),
    ),
    "Rows": (
        "sailplan.model.encoders.transformers.processor",
        "TransformersProcessor",
        ("_picture_shape", "_stacked", "_heard", "_texts"),
    ),
    "Sequences": (
        "sailplan.model.encoders.transformers.sequences",
        "SequenceProcessor",
        ("_sequences", "_written", "_around", "_mark"),
    ),
    "Sounds": (
        "sailplan.model.encoders.transformers.recordings",
        "Recordings",
        (
            *("shape", "stacked", "masked", "lengths"),
            *("_cut", "_extracted", "_padding"),
        ),
    ),
    "PublishedTower": (
        "sailplan.model.encoders.transformers.module",
        "TransformersEncoder",
        (
            "encode",
            "_sequences",
            "_text",
            "_media",
            "_input_name",
            "_about_sound",
            "_features",
            "_pooled",
            "_read_out",
        ),
    ),
}
Key = tuple[str, str]  # module, name of a top-level definition


@dataclass(frozen=True)
class _Module:
    """A source file: its definitions by name, and where its imported names come from."""

    name: str
    source: str = ""
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None, str]] = field(
        default_factory=dict
    )  # name here -> (module, name there, statement)


@cache
def _read(name: str) -> _Module:
    path = ROOT.joinpath(*name.split("."))
    module = _Module(
        name,
        (
            path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        ).read_text(encoding="utf-8"),
    )
    for node in ast.parse(module.source).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                shown = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                module.imports[alias.asname or alias.name] = (
                    str(node.module),
                    alias.name,
                    f"from {node.module} import {shown}",
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                shown = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                module.imports[alias.asname or alias.name.split(".")[0]] = (
                    alias.name,
                    None,
                    f"import {shown}",
                )
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            module.definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        module.definitions[part.id] = node
    return module


def bundle(template: str) -> str:
    """Return the source of one file of an exported folder. template: one of FILES.

    Raises ValueError where two definitions of one name would meet, or a name has no source.
    """
    home = _read(f"{STANDALONE}.{template}")
    taken: dict[str, Key] = {}  # name -> where its definition lies
    order: list[tuple[Key, str]] = []
    imports: set[str] = set()
    optional: dict[str, str] = {}  # statement -> the name that it brings

    def visit(module: _Module, name: str) -> None:
        if name in home.definitions:
            module = home  # a template's own definition takes the place of the package's
        if name not in module.definitions:
            if name in module.imports:
                follow(module, name)
            return
        key = (module.name, name)
        if name in taken:
            if taken[name] != key:
                raise ValueError(
                    f"{template}: {name} is defined in {taken[name][0]} and in {module.name}; "
                    "rename one of them"
                )
            return
        node = module.definitions[name]
        for other, where in module.definitions.items():
            if where is node:
                taken[other] = (module.name, other)
        methods = _grafted(name) if module is home else []
        for used in _names(node):
            visit(module, used)
        text = _source(module, node)
        for owner, method in methods:
            for used in _names(method):
                visit(owner, used)
            text += "\n\n" + _source(owner, method)
        order.append((key, text))

    def follow(module: _Module, name: str) -> None:
        origin, there, statement = module.imports[name]
        package = origin.split(".")[0]
        if origin.startswith(f"{STANDALONE}.") and origin.rsplit(".", 1)[1] in FILES:
            imports.add(f"from .{origin.rsplit('.', 1)[1]}_sailplan import {there}")
        elif package == "sailplan":
            assert there is not None
            visit(_read(origin), there)
        elif package in OPTIONAL:
            optional[statement] = name
        elif package == "megatron":
            raise ValueError(
                f"{template}: {module.name} needs {name} of megatron-core; define it in the "
                "template"
            )
        elif package != "__future__":
            imports.add(statement)

    for name in home.definitions:
        visit(home, name)
    return _written(home, imports, optional, [text for _, text in order])


def _grafted(name: str) -> list[tuple[_Module, ast.stmt]]:
    if name not in GRAFTS:
        return []
    origin, owner, methods = GRAFTS[name]
    module = _read(origin)
    body = module.definitions[owner].body  # type: ignore[attr-defined]
    return [
        (module, node)
        for node in body
        if isinstance(node, ast.FunctionDef) and node.name in methods
    ]


def _names(node: ast.AST) -> list[str]:
    """Return the names that a definition uses, in order, without the builtin ones."""
    found = [
        part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and part.id != "_" and not hasattr(builtins, part.id)
    ]
    return list(dict.fromkeys(found))


def _source(module: _Module, node: ast.stmt) -> str:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    lines = module.source.splitlines()
    while first > 1 and lines[first - 2].startswith("#"):  # the comment above a definition
        first -= 1
    return "\n".join(lines[first - 1 : node.end_lineno])


def _written(home: _Module, imports: set[str], optional: dict[str, str], texts: list[str]) -> str:
    description = ast.get_docstring(ast.parse(home.source), clean=False)
    guarded = [
        f"try:\n    {line}\nexcept ImportError:\n    {name} = None  # needed for pictures or sound "
        "alone"
        for line, name in sorted(optional.items())
    ]
    head = [
        f'"""{description}"""\n\n# Written by `sailplan export`; licence of the code: '
        "Apache-2.0.\nfrom __future__ import annotations\n"
    ]
    return (
        "\n".join(
            [*head, *sorted(imports), *guarded, *(f"\n\n{text}" for text in dict.fromkeys(texts))]
        )
        + "\n"
    )
