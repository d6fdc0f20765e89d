"""What a checkpoint holds of a model and its optimizer, by parameter name.

Optimizer state is filed under the parameter's name and kind ("exp_avg", ...) and laid out like the
parameter, so it follows the parameter to any other layout; scalars (the step count) go with the
small data.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sailplan.checkpoint.layout import WholeTensorView, layout_of, local
from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.model.parallelize import reshard
from sailplan.runtime.process import Parallel

Scalars = dict[str, dict[str, float]]  # parameter name -> kind -> value
ModelState = dict[str, WholeTensorView]
GROUP = "group:"  # before the name of a parameter group among the scalars


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sharded as the ranks keep them between steps."""
    reshard(model)
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }


def model_state(model: nn.Module, parallel: Parallel) -> ModelState:
    """Views of the model's tensors under the keys "model.NAME"; loading into them changes the
    model.
    """
    return {
        f"model.{name}": WholeTensorView(local(value), layout_of(value, parallel))
        for name, value in model_tensors(model).items()
    }


def named_optimizer_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in `model`.

    Raises ConfigurationError for a parameter that is not the model's (the model was sharded after
    the optimizer was made).
    """
    reshard(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ConfigurationError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the "
                    "model does not have: make the optimizer after sharding"
                )
            found[names[id(parameter)]] = parameter
    return found


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[ModelState, Scalars]:
    """Views "optimizer.KIND.NAME" of the state that is shaped like its parameter, and the
    scalars.
    """
    tensors: ModelState = {}
    scalars: Scalars = {}
    for name, parameter in named_optimizer_parameters(model, optimizer).items():
        layout = layout_of(parameter, parallel)
        for kind, value in optimizer.state.get(parameter, {}).items():
            if kind != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"optimizer.{kind}.{name}"] = WholeTensorView(local(value), layout)
            else:
                scalars.setdefault(name, {})[kind] = float(value)
    for group in optimizer.param_groups:
        if progress := {kind: float(group[kind]) for kind in _group_state(optimizer, group)}:
            scalars[f"{GROUP}{group.get('name', '')}"] = progress
    return tensors, scalars


def _group_state(optimizer: torch.optim.Optimizer, group: dict[str, object]) -> list[str]:
    """Names of the numbers that an optimizer counts in its groups (apex's step count): what is
    no option and not ours.
    """
    ours = {*optimizer.defaults, "params", "param_names", "name", "peak_learning_rate"}
    return [
        kind
        for kind, value in group.items()
        if kind not in ours and isinstance(value, int | float | Tensor)
    ]


def fresh_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel,
    scalars: Scalars,
    saved: Iterable[str],
) -> ModelState:
    """Give the optimizer empty state for every entry of the checkpoint and returns the views to
    be filled.

    scalars: the checkpoint's scalars; saved: keys of its tensors. State of parameters that the
    checkpoint has none for (they were never trained) is dropped. Parameters of the checkpoint that
    the optimizer does not hold are left out.
    """
    parameters = named_optimizer_parameters(model, optimizer)
    options = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    kinds: dict[str, list[str]] = {}
    for key in saved:
        prefix, _, rest = key.partition(".")
        kind, _, name = rest.partition(".")
        if prefix == "optimizer" and name in parameters:
            kinds.setdefault(name, []).append(kind)
    views: ModelState = {}
    for name, parameter in parameters.items():
        optimizer.state.pop(parameter, None)
        if name not in kinds:
            continue
        state: JsonObject = {}
        layout = layout_of(parameter, parallel)
        for kind, value in scalars.get(name, {}).items():
            group = options[id(parameter)]
            on_device = bool(group.get("fused")) or bool(group.get("capturable"))
            state[kind] = torch.tensor(
                value, dtype=torch.float32, device=parallel.device if on_device else "cpu"
            )
        for kind in kinds[name]:
            state[kind] = torch.zeros_like(
                parameter, requires_grad=False, memory_format=torch.preserve_format
            )
            views[f"optimizer.{kind}.{name}"] = WholeTensorView(local(state[kind]), layout)
        optimizer.state[parameter] = state
    for group in optimizer.param_groups:
        for kind, value in scalars.get(f"{GROUP}{group.get('name', '')}", {}).items():
            group[kind] = int(value) if value.is_integer() else value
    return views
