"""From YAML files and command-line overrides to one typed `Config`, in one place.

Hydra only composes (its run folders, working-directory changes and logging stay off, because they
differ per rank); the result is checked against the dataclasses of `schema` and converted once.
Nothing below this package ever sees a DictConfig.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sailplan.config.components import build, fill, schema_of
from sailplan.config.encoders import chosen
from sailplan.config.fields import JsonObject
from sailplan.config.overrides import apply, explain_value, is_value, nearest, parse
from sailplan.config.schema import (
    CheckpointConfig,
    Config,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
    TrackingConfig,
)
from sailplan.config.words import plain_words
from sailplan.errors import ConfigurationError

# Fields that say *what* is trained, in which order: a resumed run must have the same ones.
IDENTITY = ("seed", "global_batch", "order", "stages", "data", "model", "objectives")
# Groups whose files are entries -> the key that a file's `# @package` line should name.
PACKAGES = {
    "data": "data.sets.{name}",
    "objective": "objectives.{name}",
    "logger": "loggers.{name}",
    "artifact": "artifacts.{name}",
    "callback": "callbacks.{name}",
    "experiment": "_global_",
}
_NOT_IDENTITY = (
    ("data", "workers"),
    ("data", "prefetch"),
    ("data", "cache"),
    ("data", "stream"),
    ("data", "empty_steps"),
    ("data", "root"),
    ("data", "tokenizer"),
    ("model", "weights"),
)
FORMER_LANES = 8  # data.plan.STREAMS; a run of version 0.1.0 with other lanes has another order
# What may differ from node to node.
_NODES_OWN = (
    ("data", "cache"),
    ("data", "stream"),
    ("data", "root"),
    ("data", "tokenizer"),
    ("parallel", "threads"),
)


@dataclass
class _Schema(schema_of(Config)):  # type: ignore[misc]
    """What Hydra composes: an encoder's settings are checked when it is known which encoder it
    is, and a list of callbacks replaces the built-in one.
    """

    model: Any = None
    callbacks: dict[str, JsonObject] = field(default_factory=dict)  # those of the group alone


ConfigStore.instance().store(name="schema", node=_Schema)
# A file of these groups may begin with `defaults: [schema@_here_, _self_]`: every key with its
# default.
TYPED_GROUPS = {
    "stage": StageConfig,
    "data": DatasetConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "evaluation": EvaluationConfig,
}
for _group, _section in TYPED_GROUPS.items():
    ConfigStore.instance().store(group=_group, name="schema", node=schema_of(_section))


def _folders() -> list[Path]:
    """Return where groups are looked for, in this order: $SAILPLAN_CONF, else ./conf; then the
    package's own.

    A project of its own needs to hold its own files only.
    """
    named = os.environ.get("SAILPLAN_CONF")
    if named and not Path(named).is_dir():
        raise ConfigurationError(
            f"SAILPLAN_CONF={named}: no such folder; point it at a folder of configuration groups, "
            "such as conf"
        )
    places = (
        Path(named) if named else Path.cwd() / "conf",
        Path(__file__).resolve().parents[1] / "conf",
    )
    return list(dict.fromkeys(folder.resolve() for folder in places if folder.is_dir()))


def own_folder() -> Path:
    """Return the folder of the user's own configuration files: $SAILPLAN_CONF, else ./conf,
    which need not be there yet.
    """
    return Path(os.environ.get("SAILPLAN_CONF") or "conf")


class _Folders(SearchPathPlugin):
    """Tells Hydra to look through all the folders, as it takes one by itself."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in _folders()[1:]:
            search_path.append("sailplan", f"file://{folder}")


Plugins.instance().register(_Folders)


@contextmanager
def hydra_session() -> Iterator[Hydra]:
    """Yield Hydra with the configuration's folders as its search path."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(_folders()[0]), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra


def compose(overrides: Sequence[str]) -> Config:
    """Compose config.yaml with command-line overrides and returns the typed configuration.

    Raises ConfigurationError (one line) for an unknown key or group, a wrong type or a missing
    value.
    """
    folders = _folders()
    if not any((folder / "config.yaml").is_file() for folder in folders):
        raise ConfigurationError(
            "no conf/config.yaml in this folder or beside the source tree: run from the "
            "repository, or set SAILPLAN_CONF"
        )
    groups, settings = _groups(folders), parse(overrides)
    files = [str(one.input_line) for one in settings if not is_value(one, groups)]
    try:
        with plain_words(), hydra_session():
            raw = hydra_compose(config_name="config", overrides=files)
    except HydraException as error:
        raise ConfigurationError(_explain(error, folders)) from error
    except (
        AssertionError
    ) as error:  # Hydra's own check of the order speaks only of overrides with one value
        raise ConfigurationError(
            f"{' '.join(files)}: a defaults list is out of order; `override` entries come behind "
            "all others, before _self_"
        ) from error
    except yaml.MarkedYAMLError as error:
        place = (
            ""
            if error.problem_mark is None
            else f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: "
        )
        raise ConfigurationError(f"{place}not YAML ({error.problem}); correct the file") from error
    for setting in settings:
        if is_value(setting, groups):
            apply(raw, setting)
    config = typed(raw)
    config.data.lanes = None
    return config


def _groups(folders: Sequence[Path]) -> set[str]:
    return {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}


def _explain(error: HydraException, folders: Sequence[Path]) -> str:
    """One line for what Hydra could not compose."""
    message = " ".join(
        line.strip()
        for line in str(error).split("Config search path")[0].splitlines()
        if line.strip()
    )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = sorted(
            {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
        )
        return (
            f"no file {group}/{name}.yaml in {' or '.join(map(str, folders))}{nearest(name, known)}"
        )
    cause, place = error.__cause__ or error.__context__, re.match(r"In '([^']+)'", message)
    if place and (missing := _missing_package(place[1], folders)):
        return missing
    return (
        explain_value(cause, f"{place[1]}.yaml" if place else "")
        if isinstance(cause, OmegaConfBaseException)
        else message
    )


def _missing_package(chosen: str, folders: Sequence[Path]) -> str:
    """Return one line for a file GROUP/NAME of a group of entries that does not say below which
    key it belongs; '' for others.
    """
    group, _, name = chosen.partition("/")
    path = next((path for folder in folders if (path := folder / f"{chosen}.yaml").is_file()), None)
    if group not in PACKAGES or path is None or "@package" in path.read_text(encoding="utf-8"):
        return ""
    return f"{path}: its first line is no package, expected '# @package {PACKAGES[group].format(name=name)}'; add it, so that its keys come below that one"


def choices(group: str) -> dict[str, Path]:
    """Return the files of a configuration group by name, those of the project's own folder
    first; {} for no group.
    """
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted((folder / group).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def is_file_choice(line: str) -> bool:
    """Return whether an override chooses a file of a group, or a setting of Hydra's own, rather
    than setting a value.
    """
    return not is_value(parse([line])[0], _groups(_folders()))


def groups() -> list[str]:
    """Return the names of the configuration groups."""
    return sorted(_groups(_folders()))


def typed(raw: DictConfig) -> Config:
    """Return the configuration after checking types, keys and each component's rules, with
    interpolations resolved.
    """
    settings: Any = None
    try:
        whole = OmegaConf.merge(OmegaConf.structured(_Schema), raw)
        given, allowed = (
            OmegaConf.to_container(whole.model) if whole.model else {},
            list(whole.allowed_targets),
        )
        settings, named = chosen(given, allowed)  # type: ignore[arg-type]
        # Hydra's lock off: a file may fill a mapping of the model, dataclasses keep to their keys
        OmegaConf.set_struct(whole, None)  # type: ignore[arg-type]
        whole.model = OmegaConf.structured(schema_of(settings))  # type: ignore[arg-type]
        values = OmegaConf.to_container(
            OmegaConf.merge(whole, {"model": named}), resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        raise ConfigurationError(explain_value(error, model=settings)) from error
    assert isinstance(values, dict)
    found = {str(key): value for key, value in values.items()} | {
        "model": fill(settings, values["model"])
    }
    config = build(Config, found | {"order": found["order"] or list(found["stages"])})
    config.loggers, config.tracking = config.tracking.carried_over(config.loggers), TrackingConfig()
    return config


def as_dict(config: Config) -> JsonObject:
    return asdict(config)


def from_dict(values: dict[str, object]) -> Config:
    """Return the typed configuration of a saved run (config.yaml, or a checkpoint's copy)."""
    return typed(OmegaConf.create(values))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def identity(config: Config) -> JsonObject:
    """The part that a resume must not change."""
    every = as_dict(config)
    values = {name: every[name] for name in IDENTITY}
    values["optimizer"] = {
        name: every["optimizer"][name] for name in ("_target_", "options")
    }  # stages have the rest
    made = {name for stage in config.stages.values() for name in stage.artifacts}
    values["artifacts"] = {
        name: options for name, options in every["artifacts"].items() if name in made
    }
    for outer, inner in _NOT_IDENTITY:
        values[outer].pop(inner, None)
    if values["data"]["lanes"] in (None, FORMER_LANES):
        values["data"].pop("lanes")
    return values


def shared_settings(config: Config) -> JsonObject:
    """Return the settings that all ranks must have: all but the places of files and threads,
    which are a node's own.
    """
    values = as_dict(config)
    for outer, inner in _NODES_OWN:
        values[outer].pop(inner, None)
    for dataset in values["data"]["sets"].values():
        dataset.pop("shards", None)  # what they hold is compared when they are opened
    return values


def config_hash(config: Config) -> str:
    """16 hex digits of SHA-256 over the identity."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def identity_difference(
    saved: dict[str, object], now: dict[str, object], path: str = ""
) -> list[str]:
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


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """A saved run's configuration with some values changed (key=value, +key=value, ~key).

    Raises ConfigurationError as `compose`.
    """
    if not overrides:
        return config
    values = OmegaConf.merge(OmegaConf.structured(_Schema), as_dict(config))
    assert isinstance(values, DictConfig)
    groups = _groups(_folders())
    for setting in parse(overrides):
        if not is_value(setting, groups):
            raise ConfigurationError(
                f"{setting.input_line}: a run keeps the files it was started with; change single "
                "values, such as evaluation.batch=64"
            )
        apply(values, setting)
    return typed(values)
