"""From `objectives:` in the configuration to loss modules.

Each entry has a `_target_`, the class (see `config.targets`), and its options. A loss of your own:
subclass `objective.protocol.Objective`, and add your module's prefix to `allowed_targets`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from sailplan.config.fields import Options
from sailplan.config.schema import DatasetConfig, StageConfig
from sailplan.config.targets import check_options, class_at
from sailplan.errors import ConfigurationError
from sailplan.objective.protocol import Objective
from sailplan.runtime.seeds import derive

READ_BY = {"label": "multi_positive", "teacher_scores": "score_distillation"}
OF_ALL = ("matryoshka", "prefix_weights")  # options of every loss, see Objective.pay_at


def build_objectives(
    objectives: Mapping[str, Options],
    embedding: int,
    datasets: Mapping[str, DatasetConfig],
    *,
    allowed_targets: Sequence[str] = ("sailplan.",),
    seed: int = 0,
) -> nn.ModuleDict:
    """Objective name -> module.

    Initial weights depend on `seed` and the name alone: equal on all ranks.

    Raises ConfigurationError, one line, for a target that is missing, not allowed, not importable
    or no Objective, and for an option that it does not have or refuses.
    """
    built = nn.ModuleDict()
    for name, options in objectives.items():
        if "." in name:
            raise ConfigurationError(
                f"objectives.{name}: found a dot in the name, expected none; rename it"
            )
        cls = objective_class(name, options.get("_target_"), allowed_targets)
        key = f"objectives.{name}"
        # A loss that takes them itself sees to its own sizes.
        shared = () if set(OF_ALL) & set(inspect.signature(cls).parameters) else OF_ALL
        arguments = {
            option: value
            for option, value in options.items()
            if option != "_target_" and option not in shared
        }
        check_options(key, cls, arguments, ("embedding", "datasets"), also=shared)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("objective", seed, name))
            try:
                objective = cls(embedding=embedding, datasets=datasets, **arguments)
            except ConfigurationError as error:  # a constructor does not know its entry's name
                message = re.sub(r"^objectives\.\w+", key, str(error))
                raise ConfigurationError(message) from error
        if shared:
            weights = options.get("prefix_weights")
            objective.pay_at(options.get("matryoshka", cls.matryoshka), weights, key=key)
        built[name] = objective
    return built


def check_objectives(
    objectives: nn.ModuleDict,
    stages: Mapping[str, StageConfig],
    datasets: Mapping[str, DatasetConfig],
    prefixes: Sequence[int] | None = None,
    gives_tokens: bool = True,
) -> None:
    """Raise ConfigurationError where a stage names an objective that was not built, or draws a
    data set that none of its objectives has a meaning for: said before the first step, not in the
    stage's first step with that set.

    prefixes: model.prefixes; None: not looked at. gives_tokens: whether the encoder gives the
    vectors of positions.
    """
    for stage_name, stage in stages.items():
        key = f"stages.{stage_name}.objectives"
        unknown = [name for name in stage.objectives if name not in objectives]
        if unknown:
            raise ConfigurationError(
                f"{key}: found {', '.join(unknown)}, expected some of {', '.join(objectives)}"
            )
        used = [
            cast(Objective, objectives[name]) for name, weight in stage.objectives.items() if weight
        ]
        for objective in used:
            if objective.per_token and not gives_tokens:
                raise ConfigurationError(
                    f"{key}: {type(objective).__name__} scores the vectors of tokens, which this "
                    "model's encoder does not give; leave it out, or take model.encoder omni, or "
                    "transformers with modalities: [text]"
                )
            if objective.artifact is not None and objective.artifact not in stage.artifacts:
                raise ConfigurationError(
                    f"{key}: {type(objective).__name__} learns from the artifact "
                    f"{objective.artifact}: list it in stages.{stage_name}.artifacts"
                )
        if stage.hard_negatives is not None and not any(
            objective.uses_hard_negatives for objective in used
        ):
            raise ConfigurationError(
                f"stages.{stage_name}.hard_negatives: has no effect, as {', '.join(stage.objectives)} "
                "takes no mined negatives; leave it out, or add infonce"
            )
        for dataset in stage.data:
            if not any(objective.applies(datasets[dataset]) for objective in used):
                kind = datasets[dataset].kind
                raise ConfigurationError(
                    f"{key}: none of {', '.join(stage.objectives)} applies to '{dataset}' "
                    f"({kind}), expected one that does; add it"
                )

    _check_read(objectives, stages, datasets)
    for name, module in objectives.items():
        one = cast(Objective, module)
        users = [stage for stage in stages.values() if stage.objectives.get(name)]
        if users:
            one.check_use(f"objectives.{name}", users, datasets)
            if prefixes is not None:
                one.matryoshka_sizes(prefixes)


def _check_read(
    objectives: nn.ModuleDict,
    stages: Mapping[str, StageConfig],
    datasets: Mapping[str, DatasetConfig],
) -> None:
    """Raise ConfigurationError for values of records that a data set names and no loss reads."""
    read = {
        (dataset, setting)
        for stage in stages.values()
        for name, weight in stage.objectives.items()
        if weight
        for setting in cast(Objective, objectives[name]).reads
        for dataset in stage.data
    }
    for name, dataset in datasets.items():
        for setting, loss in READ_BY.items():
            value = getattr(dataset, setting)
            if value is not None and (name, setting) not in read:
                raise ConfigurationError(
                    f"data.sets.{name}.{setting}={value}: has no effect, as no stage draws '{name}' "
                    f"with an objective that reads it; leave it out, or add {loss}"
                )


def objective_class(name: str, target: object, allowed: Sequence[str]) -> type[Objective]:
    """The class that `objectives.NAME._target_` names.

    Raises ConfigurationError where it is none, or not allowed.
    """
    key = f"objectives.{name}._target_"
    if not isinstance(target, str) or not target:
        raise ConfigurationError(
            f"{key}: found {target!r}, expected a class, such as sailplan.objective.infonce.InfoNCE"
        )
    return class_at(key, target, Objective, allowed)
