"""The optimizer and its parameter groups; what a stage trains.

`optimizer._target_` names its class: AdamW, another one of torch or apex, or one below
`allowed_targets`. Matrices decay; norms, biases and other vectors do not; temperatures have a
learning rate of their own and do not decay. Sharded parameters (DTensor) and plain ones never share
a group, because a fused update refuses the mix. Each group carries `name` and `peak_learning_rate`,
so that a schedule is one number: `set_learning_rate`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sailplan.config.fields import Options
from sailplan.config.schema import Config, OptimizerConfig, StageOptimizerConfig
from sailplan.config.targets import check_options, class_at
from sailplan.errors import ConfigurationError
from sailplan.model.parallelize import reshard
from sailplan.model.protocol import Encoder
from sailplan.objective.temperature import score_parameters
from sailplan.step.config import ADAMW
from sailplan.step.schedules import build_schedule

TARGET = "optimizer._target_"
PACKAGES = (
    "torch.optim.",
    "apex.optimizers.",
)  # whose optimizers are allowed without being named in allowed_targets
# A setting -> the constructor's argument that it becomes. The program gives these, so they are no
# options.
ARGUMENTS = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "betas": "betas",
    "epsilon": "eps",
}
FUSED_BY_DEFAULT = (torch.optim.Adam, torch.optim.AdamW)
PROBE = (64, 48)  # of a matrix: state that is smaller than its parameter shows


def optimizer_class(
    config: OptimizerConfig, allowed: Sequence[str] | None = None
) -> type[torch.optim.Optimizer]:
    """Return the class that `optimizer._target_` names.

    allowed: prefixes that the path may have besides those of torch's and apex's optimizers; None:
    any. Raises ConfigurationError for a path that is not allowed or no Optimizer, a package that is
    not installed, an option that the class does not have, and a setting other than its default that
    the class has no use for.
    """
    target = config._target_
    package = target.partition(".")[0]
    if (
        (allowed is None or target.startswith((*allowed, *PACKAGES)))
        and package == "apex"
        and importlib.util.find_spec(package) is None
    ):
        raise ConfigurationError(
            f"{TARGET}={target}: the package apex is not installed; install NVIDIA's apex with its "
            f"CUDA extensions, or take {ADAMW}"
        )
    cls = class_at(
        TARGET, target, torch.optim.Optimizer, None if allowed is None else (*allowed, *PACKAGES)
    )
    check_options("optimizer.options", cls, config.options, ("self", "params", *ARGUMENTS.values()))
    _check_settings("optimizer", cls, config)
    return cls


def check_optimizer(config: Config) -> None:
    """Raise ConfigurationError for an optimizer or a schedule that no step could use: before the
    run.
    """
    cls = optimizer_class(config.optimizer, config.allowed_targets)
    optimizer_state_size(config.optimizer, config.allowed_targets)
    for name in config.order:
        settings = config.stages[name].optimizer
        _check_settings(f"stages.{name}.optimizer", cls, settings)
        build_schedule(f"stages.{name}.optimizer.schedule", settings, config.allowed_targets)


def _check_settings(key: str, cls: type, settings: StageOptimizerConfig) -> None:
    """Raise ConfigurationError for a setting that would have no effect."""
    taken, default = inspect.signature(cls).parameters, StageOptimizerConfig()
    if "lr" not in taken:
        raise ConfigurationError(
            f"{TARGET}={cls.__name__}: its constructor takes no lr, expected one; a schedule sets "
            "it at every step"
        )
    for name, argument in ARGUMENTS.items():
        value = getattr(settings, name)
        if argument not in taken and value != getattr(default, name):
            raise ConfigurationError(
                f"{key}.{name}={value}: {cls.__name__} has no {argument}, so it would have no "
                "effect; leave it out"
            )


def optimizer_state_size(config: OptimizerConfig, allowed: Sequence[str] | None = None) -> float:
    """Return the elements of state that the optimizer keeps for each element of a matrix: 2 of
    AdamW, 0 or 1 of SGD.

    One step on a small matrix shows it; 2 for classes that cannot step on a CPU. Raises
    ConfigurationError for state that no checkpoint can hold: tensors of another shape than their
    parameter.
    """
    parameter = nn.Parameter(torch.zeros(PROBE))
    optimizer = _build(optimizer_class(config, allowed), [{"params": [parameter]}], config)
    parameter.grad = torch.ones(PROBE)
    try:
        optimizer.step()
    except (RuntimeError, AssertionError):  # kernels of a GPU
        return 2.0
    kept = {
        kind: value
        for kind, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and value.numel() > 1
    }
    for kind, value in kept.items():
        if value.shape != parameter.shape:
            raise ConfigurationError(
                f"{TARGET}={config._target_}: its state '{kind}' has the shape {list(value.shape)} "
                f"beside a parameter of {list(PROBE)}, "
                "expected the parameter's, which a checkpoint can cut for any number of ranks; "
                "choose another optimizer"
            )
    return float(len(kept))


def build_optimizer(
    encoder: nn.Module,
    objectives: nn.Module,
    temperatures: nn.Module,
    config: OptimizerConfig,
    allowed: Sequence[str] | None = None,
) -> torch.optim.Optimizer:
    """Return the configured optimizer over all parameters, frozen ones included; AdamW is
    Loshchilov & Hutter's, arXiv 1711.05101.

    Call it after the encoder was sharded. Groups, empty ones left out: encoder_decay,
    encoder_no_decay, objectives_decay, objectives_no_decay, temperatures (also those that lie in a
    loss). A frozen parameter has no
    gradient and is not touched, not even by decay. allowed: prefixes that the class's path may
    have; None: any. Raises ConfigurationError where the class refuses groups or options.
    """
    reshard(encoder)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    learned = _learned_numbers(objectives, temperatures)
    for prefix, module in (("encoder", encoder), ("objectives", objectives)):
        for parameter in module.parameters():
            if id(parameter) in learned:
                continue
            name = f"{prefix}_decay" if parameter.ndim >= 2 else f"{prefix}_no_decay"
            groups.setdefault((name, isinstance(parameter, DTensor)), []).append(parameter)
    groups[("temperatures", False)] = list(learned.values())
    cls = optimizer_class(config, allowed)
    if cls.__module__.startswith("apex.") and any(sharded for _, sharded in groups):
        raise ConfigurationError(
            f"{TARGET}={config._target_}: apex updates whole parameters only; set "
            f"parallel.sharding=replicate, or take {ADAMW}"
        )
    optimizer = _build(
        cls,
        [
            {"params": members, "name": name, "peak_learning_rate": 0.0}
            for (name, _), members in groups.items()
            if members
        ],
        config,
    )
    configure(optimizer, config)
    return optimizer


def _learned_numbers(objectives: nn.Module, temperatures: nn.Module) -> dict[int, nn.Parameter]:
    """Temperatures and the like, those inside of losses too, by identity."""
    modules = [temperatures, *score_parameters(objectives)]
    return {id(parameter): parameter for module in modules for parameter in module.parameters()}


def _build(
    cls: type[torch.optim.Optimizer], groups: list[dict[str, object]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    options: Options = (
        {"fused": True} | config.options if issubclass(cls, FUSED_BY_DEFAULT) else config.options
    )
    try:
        return cls(groups, lr=config.learning_rate, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{TARGET}={config._target_}: it refuses the parameter groups or optimizer.options "
            f"({reason}); change these"
        ) from error


def configure(optimizer: torch.optim.Optimizer, config: StageOptimizerConfig) -> None:
    """Give the groups a stage's settings, at their peak learning rates; the state (moments)
    stays.
    """
    for group in optimizer.param_groups:
        peak = (
            config.temperature_learning_rate
            if group["name"] == "temperatures"
            else config.learning_rate
        )
        group["peak_learning_rate"] = group["lr"] = peak
        decays = group["name"].endswith("_decay") and not group["name"].endswith("_no_decay")
        settings = {
            "weight_decay": config.weight_decay if decays else 0.0,
            "betas": (config.betas[0], config.betas[1]),
            "eps": config.epsilon,
        }
        group.update(
            {name: value for name, value in settings.items() if name in optimizer.defaults}
        )


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Drop all gradients; `zero_grad` of optimizers outside of torch does not take the same
    arguments.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set every group's learning rate to `scale` times its peak
    (step.schedules.learning_rate_scale).
    """
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak_learning_rate"]


def set_trainable(
    encoder: nn.Module, objectives: nn.Module, temperatures: nn.Module, parts: Sequence[str]
) -> None:
    """Let only the named parts have gradients: all, objectives, temperatures, or parts of the
    encoder (`encoder.parts()`).

    May be called at any time between steps, also on a sharded encoder. Raises ConfigurationError
    for an unknown part.
    """
    # FSDP2 copies the flag from the sharded to the gathered parameter when it gathers: gathered
    # ones must go first.
    reshard(encoder)
    own = cast(Encoder, encoder).parts()
    unknown = [part for part in parts if part not in ("all", "objectives", "temperatures", *own)]
    if unknown or not parts:
        found = ", ".join(unknown) or "nothing"
        raise ConfigurationError(
            f"stages.*.trainable: found {found}, expected some of all, {', '.join(own)}, "
            "objectives, temperatures"
        )
    learned = _learned_numbers(objectives, temperatures)
    chosen = {name: list(parameters) for name, parameters in own.items()}
    chosen |= {
        "objectives": [one for one in objectives.parameters() if id(one) not in learned],
        "temperatures": list(learned.values()),
    }
    for name, parameters in chosen.items():
        for parameter in parameters:
            parameter.requires_grad_("all" in parts or name in parts)
            if not parameter.requires_grad:
                parameter.grad = None
