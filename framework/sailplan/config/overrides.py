"""Single values set on the command line: `key=value`, `+key=value`, `~key`, on top of the files
that Hydra composed.

Which files are composed is Hydra's business (`experiment=quickstart`, `stage@stages.hard=clean`).
Any other key is a value and is set here, as if it stood in one more file, because Hydra cannot make
an entry of a typed mapping (a new stage, a section that was null), takes any key behind a `+`, and
tells what it does not find in terms of classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError

MODEL = "model"  # whose keys are known when its encoder is (compose.typed)
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, [A, B]",
    dict: "entries, {NAME: VALUE}",
}


def parse(lines: Sequence[str]) -> list[Override]:
    """The command line's settings. Raises ConfigurationError naming the one that cannot be read."""
    parser, found = OverridesParser.create(), []
    for line in lines:
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"{line}: cannot be read ({reason}); expected key=value, with quotes round a value "
                "such as 'a: b' or \"x,y\""
            ) from error
        if override.is_sweep_override():
            key = line.partition("=")[0]
            raise ConfigurationError(
                f"{line}: found several values, expected one; a list is written {key}=[A,B]; train "
                "--multirun makes a run for each value"
            )
        found.append(override)
    return found


def is_value(override: Override, groups: Collection[str]) -> bool:
    """Whether it sets a value, rather than choosing a file of one of the groups or a setting of
    Hydra's own.
    """
    key = override.key_or_group
    return (
        override.package is None
        and "/" not in key
        and key not in groups
        and key.partition(".")[0] != "hydra"
    )


def apply(config: DictConfig, override: Override) -> None:
    """Set, adds or deletes one value in place. Raises ConfigurationError naming the key."""
    line, path = str(override.input_line), override.key_or_group.split(".")
    absent = _first_absent(config, path)
    if override.is_delete():
        if absent is not None:
            raise ConfigurationError(f"{line}: {_unknown(config, path, absent)}")
        if not _is_mapping(hint_at(path[:-1])):
            raise ConfigurationError(
                f"{line}: a setting cannot be deleted, only an entry such as ~stages.NAME; set it "
                "to another value, or to null"
            )
        with open_dict(config):
            del OmegaConf.select(config, ".".join(path[:-1]))[path[-1]]
        return
    adds = override.is_add() or override.is_force_add()
    if absent is not None and not adds and path[0] != MODEL and _is_mapping(hint_at(path[:absent])):
        raise ConfigurationError(
            f"{line}: {_unknown(config, path, absent)}; or add it with +{line}"
        )
    OmegaConf.set_struct(
        config, None
    )  # Hydra's lock off: mappings take new entries, while dataclasses keep to their keys
    try:
        value = {path[-1]: override.value()}
        for name in reversed(path[:-1]):
            value = {name: value}
        config.merge_with(OmegaConf.create(value))
    except OmegaConfBaseException as error:
        raise ConfigurationError(explain_value(error, line, path)) from error


def explain_value(
    error: OmegaConfBaseException, where: str = "", path: Sequence[str] = (), model: object = None
) -> str:
    """One line for a key that the schema does not have, or a value of another type than it has.

    where: the setting or the file that it was found in; path: of the setting, for an error that
    does not tell its key; model: the dataclass of `model`'s keys.
    """
    key = str(getattr(error, "full_key", None) or "") or ".".join(path)
    prefix = f"{where}: " if where else ""
    if isinstance(error, ConfigKeyError):
        *above, name = key.split(".")
        return f"{prefix}unknown key '{key}'{nearest(name, _names(hint_at(above, model)))}"
    kind, reason = _words(hint_at(key.split("."), model)), str(error).strip().splitlines()[0]
    if isinstance(error, ValidationError) and kind:
        reason = f"expected {kind}" if path else f"{reason}; expected {kind}"
    return prefix + (reason if key == ".".join(path) else f"{key}: {reason}")


def nearest(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' for a name that is nearly a known one, else the list of these, ''
    where there are none.
    """
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; expected one of: {', '.join(known)}" if known else ""


def hint_at(path: Sequence[str], model: object = None) -> object:
    """The schema's type of a dotted key, without its `| None`; None where it has no such key."""
    hint: object = Config
    for name in path:
        keys = (
            get_type_hints(hint)
            if is_dataclass(hint)
            else {name: get_args(hint)[1]}
            if get_origin(hint) is dict
            else {}
        )
        hint = keys.get(name)
        others = [option for option in get_args(hint) if option is not NoneType]
        hint = others[0] if len(others) < len(get_args(hint)) else hint
        hint = model if hint is Any and name == MODEL else hint
    return hint


# ---------------------------------------------------------------- parts
def _names(hint: object) -> list[str]:
    return [field.name for field in fields(hint)] if is_dataclass(hint) else []


def _is_mapping(hint: object) -> bool:
    """Whether keys below are names of one's own: a mapping, or a value that the schema does not
    look into.
    """
    return hint in (None, Any) or get_origin(hint) is dict


def _words(hint: object) -> str:
    if is_dataclass(hint):
        return f"{{KEY: VALUE}} with some of: {', '.join(_names(hint))}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return WORDS.get(cast(type, get_origin(hint) or hint), "")


def _first_absent(config: DictConfig, path: Sequence[str]) -> int | None:
    """Place of the first name of a dotted key that is not there; None where all are."""
    node: object = config
    for place, name in enumerate(path):
        if not isinstance(node, DictConfig) or name not in node:
            return place
        node = node[name]
    return None


def _unknown(config: DictConfig, path: Sequence[str], place: int) -> str:
    """What is not there, and what is beside it."""
    above = ".".join(path[:place])
    holder = OmegaConf.select(config, above) if above else config
    known = [str(name) for name in holder] if isinstance(holder, DictConfig) else []
    return f"{above or 'the configuration'} has no '{path[place]}'{nearest(path[place], known)}"
