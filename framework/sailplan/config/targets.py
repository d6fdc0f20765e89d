"""Classes that a configuration names by their path: `_target_` of a loss, an encoder, whatever
else may come from outside.

Only classes below an allowed module prefix are imported, as a configuration file should not be able
to run whatever is installed. (Hydra's own instantiate would do, but prints its errors over several
lines and turns dataclasses into dicts.)
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from sailplan.errors import ConfigurationError

Base = TypeVar("Base")


def class_at(key: str, target: str, base: type[Base], allowed: Sequence[str] | None) -> type[Base]:
    """Return the subclass of `base` that a path means.

    key: of the setting, with which messages begin. allowed: prefixes that the path may have; None:
    any. Raises ConfigurationError for a path that is not allowed, not importable or no such class.
    """
    if allowed is not None and not any(target.startswith(prefix) for prefix in allowed):
        raise ConfigurationError(
            f"{key}={target}: expected a class below {', '.join(allowed)}; add your module to "
            "allowed_targets"
        )
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{key}={target}: expected an importable class; {str(error).splitlines()[0]}"
        ) from error
    if not inspect.isclass(found) or not issubclass(found, base):
        raise ConfigurationError(
            f"{key}={target}: expected a subclass of {base.__module__}.{base.__name__}"
        )
    return found


def check_options(
    key: str,
    cls: type,
    options: Mapping[str, object],
    supplied: Collection[str],
    also: Collection[str] = (),
) -> None:
    """Raise ConfigurationError for an option that a class's constructor does not take, or misses.

    key: dotted key of the options. supplied: arguments that the program gives itself. also:
    options that somebody else reads.
    """
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [parameter for parameter in parameters if parameter not in supplied]
    for option in options:
        if option not in (*known, *also):
            close = difflib.get_close_matches(option, [*known, *also], n=1)
            hint = (
                f"did you mean '{close[0]}'?"
                if close
                else f"expected one of: {', '.join([*known, *also]) or 'none'}"
            )
            raise ConfigurationError(f"{key}.{option}: {cls.__name__} has no such option; {hint}")
    missing = [
        parameter
        for parameter in known
        if parameter not in options and parameters[parameter].default is inspect.Parameter.empty
    ]
    if missing:
        raise ConfigurationError(
            f"{key}.{missing[0]}: missing, expected by {cls.__name__}; give it a value"
        )
