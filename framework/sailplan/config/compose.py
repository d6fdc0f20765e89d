"""From YAML files and command-line overrides to one typed `Config`, in one place.

Hydra only composes (its run folders, working-directory changes and logging stay off, because they differ
per rank); the result is checked against the dataclasses of `schema` and converted once. Nothing below this
package ever sees a DictConfig.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sailplan.config.schema import Config, OptimizerConfig, StageConfig
from sailplan.errors import ConfigurationError

# Fields that say *what* is trained, in which order: a resumed run must have the same ones.
IDENTITY = ("seed", "global_batch", "order", "stages", "data", "model", "objectives")
_NOT_IDENTITY = (("data", "workers"), ("data", "prefetch"), ("data", "cache"), ("data", "root"), ("data", "tokenizer"), ("model", "weights"))


def _common_optimizer() -> OptimizerConfig:
    """Each setting of a stage's optimizer is the common one, unless the stage names its own."""
    return OptimizerConfig(**{field.name: f"${{optimizer.{field.name}}}" for field in fields(OptimizerConfig)})  # type: ignore[arg-type]


@dataclass
class _StageSchema(StageConfig):
    optimizer: OptimizerConfig = field(default_factory=_common_optimizer)


@dataclass
class _Schema(Config):
    stages: dict[str, _StageSchema] = field(default_factory=dict)  # type: ignore[assignment]


ConfigStore.instance().store(name="schema", node=_Schema)


def configuration_folder() -> Path:
    """The folder of YAML groups: $SAILPLAN_CONF, else ./conf, else the conf/ beside the installed source tree."""
    named = os.environ.get("SAILPLAN_CONF")
    if named:
        if not Path(named).is_dir():
            raise ConfigurationError(f"SAILPLAN_CONF={named}: no such folder; point it at the folder that holds config.yaml")
        return Path(named).resolve()
    for candidate in (Path.cwd() / "conf", Path(__file__).resolve().parents[3] / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigurationError("no conf/config.yaml in this folder or beside the source tree: run from the repository, or set SAILPLAN_CONF")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).split("Config search path")[0].splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause).strip():
        lines.append(str(cause).strip().splitlines()[0])
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "To append")))


def _nearest_key(key: str, node: Any) -> str:
    """'; did you mean X?' for a key that is nearly one of a dataclass's fields, else the list of them."""
    if not is_dataclass(node):
        return ""
    names = [field.name for field in fields(node)]
    close = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of: {', '.join(names)}"


def _type_at(path: list[str]) -> Any:
    """The dataclass that holds the last key of a dotted path, as far as the schema tells it."""
    current: Any = Config
    names = iter(path[:-1])
    for name in names:
        hint = get_type_hints(current).get(name) if is_dataclass(current) else None
        current = next((option for option in reversed([hint, *get_args(hint)]) if is_dataclass(option)), None)
        if get_origin(hint) is dict:
            next(names, None)  # the key of an entry, such as a stage's name
    return current


def compose(overrides: list[str]) -> Config:
    """Composes conf/config.yaml with Hydra overrides and returns the typed configuration.

    Raises ConfigurationError (one line) for an unknown key or group, a wrong type or a missing value.
    """
    folder = configuration_folder()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            raw = hydra_compose(config_name="config", overrides=overrides)
    except HydraException as error:
        raise ConfigurationError(_explain(error)) from error
    return typed(raw)


def _explain(error: HydraException) -> str:
    message = _one_line(error)
    marker = "Could not override '"
    if marker in message:
        path = message.split(marker, 1)[1].split("'", 1)[0].split(".")
        holder = _type_at(path)
        if is_dataclass(holder) and path[-1] in [one.name for one in fields(holder)]:
            return f"{'.'.join(path)}: the value has a key that is not there yet; add it with +{'.'.join(path)}.KEY=value"
        return f"unknown key '{'.'.join(path)}'{_nearest_key(path[-1], _type_at(path))}"
    return message


def typed(raw: DictConfig) -> Config:
    """Checks types and keys against the schema, resolves interpolations, converts to dataclasses."""
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_Schema), raw))
    except ConfigKeyError as error:
        path = str(getattr(error, "full_key", "") or "").split(".")
        raise ConfigurationError(f"unknown key '{'.'.join(path)}'{_nearest_key(path[-1], _type_at(path))}") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigurationError((f"{key}: " if key else "") + _one_line(error)) from error
    assert isinstance(result, Config)
    return result


def as_dict(config: Config) -> dict[str, Any]:
    return asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The typed configuration of a saved run (config.yaml, or a checkpoint's copy)."""
    return typed(OmegaConf.create(values))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def identity(config: Config) -> dict[str, Any]:
    """The part that a resume must not change."""
    values = {name: as_dict(config)[name] for name in IDENTITY}
    for outer, inner in _NOT_IDENTITY:
        values[outer].pop(inner, None)
    return values


def config_hash(config: Config) -> str:
    """16 hex digits of SHA-256 over the identity."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def identity_difference(saved: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """One line per leaf that differs: 'key: saved -> now'."""
    lines = []
    for key in sorted(set(saved) | set(now)):
        name = f"{path}.{key}" if path else str(key)
        before, after = saved.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += identity_difference(before, after, name)
        elif before != after:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def changed(config: Config, overrides: list[str]) -> Config:
    """A saved run's configuration with some leaf keys changed (key=value)."""
    if not overrides:
        return config
    values = OmegaConf.create(as_dict(config))
    try:
        for override in overrides:
            key, _, value = override.partition("=")
            OmegaConf.update(values, key.lstrip("+"), OmegaConf.from_dotlist([f"value={value}"]).value, force_add=override.startswith("+"))
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{override}: {_one_line(error)}") from error
    return typed(values)
