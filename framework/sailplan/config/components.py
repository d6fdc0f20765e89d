"""Typed configuration of components: Hydra's schema from a dataclass, the dataclass from Hydra's
values, and its rules.

A component's configuration is a dataclass beside the component. Its annotations say what a setting
may hold (`Literal`, the ranges of `config.fields`), and a method `validate(path)`, where it has
one, says which settings do not fit together. Whatever builds a configuration validates it, so that
no command can accept what another refuses. `When` and a method `check_effects(path)` say where a
setting would have no effect.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from sailplan.config.fields import Range, When
from sailplan.errors import ConfigurationError

Component = TypeVar("Component")
INHERITS = "inherits"  # a field's metadata: the dotted key whose values are this section's defaults


@cache
def schema_of(cls: type) -> type:
    """Return the dataclass that OmegaConf checks types with: `cls` without Literals and ranges,
    which it does not know.
    """
    hints = get_type_hints(cls, include_extras=True)
    return make_dataclass(
        cls.__name__,
        [
            (one.name, _plain(hints[one.name]), _default(one, hints[one.name]))
            for one in fields(cls)
        ],
    )


def build(cls: type[Component], values: Mapping[str, object]) -> Component:
    """Return a validated `cls` made from plain values, of which every key is one of its fields."""
    made = fill(cls, values)
    validate(made)
    return made


def fill(cls: type[Component], values: Mapping[str, object]) -> Component:
    """Return `cls` as `build` does, to be validated with what it belongs to."""
    return cast(Component, _build(cls, values))


def validate(component: object, path: str = "") -> None:
    """Raise ConfigurationError at the first setting that may not be what it is.

    path: dotted key of the component, with which messages begin. Ranges and Literals of the whole
    tree come first, so that rules between settings need not ask for them again.
    """
    _check(type(component), component, path)
    _rules(component, path)


def check_effects(component: object, path: str = "") -> None:
    """Raise ConfigurationError at the first setting that was changed and that nothing would read.

    For runs that are to start: what an older version saved may hold such a setting. A component's
    method `check_effects(path)`, where it has one, says what `When` cannot.
    """
    if is_dataclass(component):
        _switched_off(component, path)
        for one in fields(component):
            check_effects(getattr(component, one.name), join(path, one.name))
        if hasattr(component, "check_effects"):
            component.check_effects(path)
    elif isinstance(component, dict):
        for key, entry in component.items():
            check_effects(entry, join(path, key))


def join(path: str, name: object) -> str:
    """Return the dotted key of an entry below `path`."""
    return f"{path}.{name}" if path else str(name)


# ---------------------------------------------------------------- schema
def _plain(hint: object) -> object:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin is Literal:
        return type(arguments[0])
    if origin in (Union, types.UnionType):
        return Union[tuple(_plain(option) for option in arguments)]  # noqa: UP007
    if origin in (list, dict):
        return origin[tuple(_plain(one) for one in arguments)]
    return schema_of(hint) if isinstance(hint, type) and is_dataclass(hint) else hint


def _default(one: Field[object], hint: object) -> object:
    source = one.metadata.get(INHERITS)
    if source is not None and isinstance(hint, type):
        inherited = schema_of(hint)
        return field(
            default_factory=lambda: inherited(
                **{name.name: f"${{{source}.{name.name}}}" for name in fields(hint)}
            )
        )
    if one.default is not MISSING:
        return field(default=one.default)
    factory: Any = one.default_factory
    return field(default_factory=lambda: _as_schema(factory()))


def _as_schema(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return schema_of(type(value))(
            **{one.name: _as_schema(getattr(value, one.name)) for one in fields(value)}
        )
    if isinstance(value, dict):
        return {key: _as_schema(entry) for key, entry in value.items()}
    return value


# ---------------------------------------------------------------- values
def _build(hint: object, value: object) -> object:
    hint = _section(hint)
    if is_dataclass(hint) and isinstance(value, Mapping):
        hints = get_type_hints(hint, include_extras=True)
        return hint(**{str(name): _build(hints[str(name)], entry) for name, entry in value.items()})  # type: ignore[operator]
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return {key: _build(get_args(hint)[1], entry) for key, entry in value.items()}
    return value


def _section(hint: object) -> object:
    """The dataclass of `Section | None`, of Annotated what is annotated, else the hint."""
    if get_origin(hint) is Annotated:
        return _section(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return next((option for option in get_args(hint) if is_dataclass(option)), hint)
    return hint


# ---------------------------------------------------------------- rules
def _check(
    hint: object, value: Any, path: str, ranges: tuple[Range, ...] = (), words: tuple[str, ...] = ()
) -> None:
    if is_dataclass(value):
        hint = type(value)  # of an encoder, whose settings are below Any
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        _check(
            arguments[0],
            value,
            path,
            (*ranges, *(one for one in arguments[1:] if isinstance(one, Range))),
            words,
        )
    elif origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return
        allowed = tuple(
            word
            for option in arguments
            if get_origin(option) is Literal
            for word in get_args(option)
        )
        if value not in allowed:
            rest = [
                option
                for option in arguments
                if option is not types.NoneType and get_origin(option) is not Literal
            ]
            if not rest:
                raise ConfigurationError(
                    f"{path}={value}: expected one of {', '.join(map(str, allowed))}"
                )
            _check(rest[0], value, path, ranges, allowed)
    elif origin is Literal:
        if value not in arguments:
            raise ConfigurationError(
                f"{path}={value}: expected one of {', '.join(map(str, arguments))}"
            )
    elif is_dataclass(hint):
        for name, inner in get_type_hints(hint, include_extras=True).items():
            _check(inner, getattr(value, name), join(path, name))
    elif origin in (list, dict):
        for key, entry in value.items() if origin is dict else enumerate(value):
            _check(arguments[-1], entry, join(path, key))
    else:
        for one in ranges:
            if isinstance(value, str) or not (math.isfinite(value) and one.fits(value)):
                beside = "".join(f", or {word}" for word in words)
                raise ConfigurationError(f"{path}={value}: expected a number {one.words}{beside}")


def _rules(value: object, path: str) -> None:
    if is_dataclass(value):
        for one in fields(value):
            _rules(getattr(value, one.name), join(path, one.name))
        if hasattr(value, "validate"):
            value.validate(path)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _rules(entry, join(path, key))


def _switched_off(value: Any, path: str) -> None:
    """Raise ConfigurationError for a setting that nothing reads, as the one beside it is set."""
    of: type = type(value)
    defaults = {one.name: _default_of(one) for one in fields(of)}
    for name, when in _conditions(of):
        found, switch = getattr(value, name), getattr(value, when.name)
        fits = switch in when.values if when.values else switch != defaults[when.name]
        if not fits and found != defaults[name]:
            allowed = " or ".join(map(str, when.values)) or "another value"
            raise ConfigurationError(
                f"{join(path, name)}={found}: has no effect with {join(path, when.name)}={switch}; "
                f"leave it out, or set {when.name} to {allowed}"
            )


@cache
def _conditions(cls: type) -> list[tuple[str, When]]:
    hints = get_type_hints(cls, include_extras=True)
    return [
        (one.name, extra)
        for one in fields(cls)
        for extra in getattr(hints[one.name], "__metadata__", ())
        if isinstance(extra, When)
    ]


def _default_of(one: Field[object]) -> object:
    factory: Any = one.default_factory
    return one.default if factory is MISSING else factory()
