"""Encoders by name: what `model.encoder` means.

A registered name is a file or folder of `sailplan.model.encoders` that says `@encoder(NAME)` above
the dataclass of its settings; anything with a dot is the path of such a dataclass elsewhere, below
`allowed_targets`. A YAML file may say `_target_` for it, as objectives do. Nothing else in the
program knows which encoders there are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sailplan.config.fields import JsonObject
from sailplan.config.targets import class_at
from sailplan.errors import ConfigurationError
from sailplan.model.config import EncoderConfig

Settings = TypeVar("Settings", bound=type[EncoderConfig])
HOME = "sailplan.model.encoders"
TARGET = "_target_"
_REGISTERED: dict[str, type[EncoderConfig]] = {}


def encoder(name: str) -> Callable[[Settings], Settings]:
    """Register the dataclass of an encoder's settings under the name that `model.encoder` gives."""

    def register(cls: Settings) -> Settings:
        _REGISTERED[name] = cls
        return cls

    return register


def encoder_names() -> list[str]:
    """Return the names of the encoders that come with the package."""
    folder = Path(__file__).resolve().parents[1] / "model" / "encoders"
    return sorted(found.name for found in pkgutil.iter_modules([str(folder)]))


def encoder_config(name: object, allowed: Sequence[str] | None = None) -> type[EncoderConfig]:
    """Return the dataclass that a name or a class's path means; allowed: prefixes that a path
    may have, None: any.

    Raises ConfigurationError for a name that is unknown, and a path that is not allowed, not
    importable or no EncoderConfig.
    """
    known = encoder_names()
    if not isinstance(name, str) or ("." not in name and name not in known):
        raise ConfigurationError(
            f"model.encoder={name}: expected one of {', '.join(known)}, or the path of your own "
            "class; choose one"
        )
    if "." not in name:
        importlib.import_module(f"{HOME}.{name}")
        return _REGISTERED[name]
    return class_at(f"model.{TARGET}", name, EncoderConfig, allowed)


def chosen(
    model: Mapping[str, object] | None, allowed: Sequence[str] | None = None
) -> tuple[type[EncoderConfig], JsonObject]:
    """Return the dataclass that the values of `model` are for, and these with `_target_` as
    `encoder`.
    """
    values = {
        "encoder" if key == TARGET else str(key): value for key, value in (model or {}).items()
    }
    return encoder_config(values.get("encoder", EncoderConfig.encoder), allowed), values
