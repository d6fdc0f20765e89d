"""Completion of the command line by argcomplete: commands and flags from the parser, settings
from the configuration.

`eval "$(register-python-argcomplete sailplan)"` in a shell's start-up file turns it on (bash and
zsh).
"""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import is_dataclass
from typing import get_type_hints


def complete(parser: ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end the process; return at once in any other
    process.
    """
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options="long")


def overrides(prefix: str, **_: object) -> list[str]:
    """Return what may follow `prefix`: GROUP=FILE of the configuration groups, and KEY= of the
    settings one level deeper.
    """
    from sailplan.config.compose import choices, groups
    from sailplan.config.overrides import hint_at

    mark = prefix[: len(prefix) - len(prefix.lstrip("+~"))]
    key, equals, _value = prefix[len(mark) :].partition("=")
    if equals:
        return [f"{mark}{key}={name}" for name in choices(key)]
    *above, _last = key.split(".")
    hint = hint_at(above)
    below = list(get_type_hints(hint)) if is_dataclass(hint) else []
    sections = {name for name in below if is_dataclass(hint_at([*above, name]))}
    found = [".".join([*above, name]) + ("." if name in sections else "=") for name in below]
    return [mark + one for one in [*found, *(f"{group}=" for group in groups() if not above)]]
