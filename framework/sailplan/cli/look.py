"""Looking at the configuration without running anything: `sailplan list`, `--cfg job` and
`--info`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sailplan.config.compose import choices, compose, groups, hydra_session, is_file_choice, to_yaml
from sailplan.config.overrides import nearest
from sailplan.errors import ConfigurationError


def list_choices(names: Sequence[str]) -> None:
    """Print the files of the named groups (none: of all) with what the first comment of each says.

    Raises ConfigurationError for a name that is no group.
    """
    known = groups()
    for name in names:
        if name not in known:
            raise ConfigurationError(f"list {name}: no such group{nearest(name, known)}")
    table = Table("choose with", "what it is", box=None, pad_edge=False)
    for group in names or known:
        for name, path in choices(group).items():
            table.add_row(f"{group}={name}", summary(path))
    console = Console(soft_wrap=True)
    if console.is_terminal:
        console.print(table)
    else:  # for grep and scripts: a line each, whole
        for group in names or known:
            for name, path in choices(group).items():
                print(f"{group}={name}\t{summary(path)}")


def summary(path: Path) -> str:
    """Return the first sentence of a YAML file's opening comment, '' if it has none."""
    lines = (
        line for line in path.read_text(encoding="utf-8").splitlines() if "@package" not in line
    )
    comment = " ".join(
        line.lstrip("# ").strip() for line in takewhile(lambda line: line.startswith("#"), lines)
    )
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def show_config(overrides: Sequence[str]) -> None:
    """Print the whole configuration of a run as YAML, every value resolved: what `config.yaml`
    of its run folder will hold.
    """
    print(to_yaml(compose(overrides)), end="")


def show_info(kind: str, overrides: Sequence[str]) -> None:
    """Print what Hydra knows about the composition: its defaults list, search path, plugins or
    configuration.
    """
    compose(overrides)  # says in one line what Hydra would say in many
    with hydra_session() as hydra:
        hydra.show_info(kind, "config", [line for line in overrides if is_file_choice(line)])
