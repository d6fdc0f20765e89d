"""Learned numbers that scores are made with: temperatures, and the bias of the sigmoid loss.

A number belongs to a group of patterns: each pattern of each data set is a group of its own, or all
patterns that match the same modalities (`by`). A temperature starts from its data set's
`temperature` (0.05 unless configured) and is learned as a logarithm, so that steps are relative. It
is used clamped to [0.005, 1]; `clamp_` brings the parameter itself back after an optimizer step,
because a parameter beyond the bound would get no gradient and never return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sailplan.config.fields import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from sailplan.config.schema import DatasetConfig, PatternKey, ViewConfig
from sailplan.data.config import MODALITIES, Grouping
from sailplan.errors import ConfigurationError


def group_of(datasets: Mapping[str, DatasetConfig], key: PatternKey, by: Grouping) -> str:
    """Return the name of a pattern's group: "DATASET/PATTERN", or "text_to_text+vision"."""
    if by == "pattern":
        return str(key)
    dataset = datasets[key.dataset]
    pattern = dataset.patterns[key.pattern]

    def shown(view: ViewConfig) -> str:
        return "+".join(modality for modality in MODALITIES if modality in view.modalities)

    return f"{shown(dataset.views[pattern.query])}_to_{shown(dataset.views[pattern.target])}"


class ScoreParameters(nn.Module):
    """Base of learned numbers of groups of patterns, 0-d float32 parameters.

    They learn at `optimizer.temperature_learning_rate` without decay and are trained as
    `temperatures`, wherever in a model they lie.
    """

    def __init__(
        self,
        datasets: Mapping[str, DatasetConfig],
        by: Grouping,
        start: Callable[[DatasetConfig], float],
    ) -> None:
        """Start every group's number at `start` of its data sets.

        Raises ConfigurationError where the data sets of a group start differently.
        """
        super().__init__()
        self.groups = {
            key: group_of(datasets, key, by)
            for key in (
                PatternKey(name, pattern)
                for name, dataset in datasets.items()
                for pattern in dataset.patterns
            )
        }
        first: dict[str, PatternKey] = {}
        for key, group in self.groups.items():
            other = first.setdefault(group, key)
            found, expected = start(datasets[key.dataset]), start(datasets[other.dataset])
            if found != expected:
                raise ConfigurationError(
                    f"data.sets.{key.dataset}.temperature={found}: data.temperature_by={by} gives "
                    f"'{key}' and '{other}' one temperature, '{group}', which cannot start at "
                    f"{expected} too; set both alike, or data.temperature_by=pattern"
                )
        self._starts = {group: start(datasets[key.dataset]) for group, key in first.items()}

    def group(self, key: PatternKey) -> str:
        """Return the name of a pattern's group. Raises ConfigurationError for an unknown pattern."""
        if key not in self.groups:
            raise ConfigurationError(
                f"temperature of '{key}': no such data set and pattern, expected one of "
                f"{', '.join(map(str, self.groups))}"
            )
        return self.groups[key]

    def clamp_(self) -> None:
        """Bring every parameter back into its bounds; called after each optimizer step."""


class Temperatures(ScoreParameters):
    """Hold a log-temperature for each group.

    by: pattern or modality. start: of all; None: of each its data set's `temperature`.
    """

    def __init__(
        self,
        datasets: Mapping[str, DatasetConfig],
        by: Grouping = "pattern",
        start: float | None = None,
    ) -> None:
        super().__init__(
            datasets, by, lambda dataset: dataset.temperature if start is None else start
        )
        self.logarithms = nn.ParameterDict()
        for group, value in self._starts.items():
            self.logarithms[group] = nn.Parameter(torch.tensor(math.log(value)))

    def get(self, key: PatternKey) -> Tensor:
        """Return the temperature in use, a 0-d tensor with gradient.

        Raises ConfigurationError for an unknown pattern.
        """
        return (
            self.logarithms[self.group(key)]
            .clamp(math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE))
            .exp()
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        # Rounding the bound to float32 may fall just outside it, where the gradient would be zero.
        inside = 1e-6
        logarithms = [logarithm.data for logarithm in self.logarithms.values()]
        if logarithms:
            torch._foreach_clamp_min_(logarithms, math.log(LOWEST_TEMPERATURE) + inside)
            torch._foreach_clamp_max_(logarithms, math.log(HIGHEST_TEMPERATURE) - inside)

    @torch.no_grad()
    def packed(self) -> Tensor:
        """Return the temperatures in use, float64 [n] on the device, in the order of `names`."""
        if not self.logarithms:
            return torch.zeros(0, dtype=torch.float64)
        return (
            torch.stack(list(self.logarithms.values()))
            .double()
            .exp()
            .clamp(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        )

    @property
    def names(self) -> list[str]:
        """Return the group of each temperature."""
        return list(self.logarithms)

    def values(self) -> dict[str, float]:
        """Return the temperatures in use by group; one transfer for all."""
        return dict(zip(self.names, self.packed().tolist(), strict=True))


class Biases(ScoreParameters):
    """Hold a number for each group that is added to scores; `start`: of all."""

    def __init__(self, datasets: Mapping[str, DatasetConfig], by: Grouping, start: float) -> None:
        super().__init__(datasets, by, lambda dataset: start)
        self.biases = nn.ParameterDict()
        for group, value in self._starts.items():
            self.biases[group] = nn.Parameter(torch.tensor(value))

    def get(self, key: PatternKey) -> Tensor:
        """Return the bias, a 0-d parameter. Raises ConfigurationError for an unknown pattern."""
        return self.biases[self.group(key)]


def score_parameters(*modules: nn.Module) -> Iterator[ScoreParameters]:
    """Yield the learned numbers that lie in the modules, those of losses among them."""
    for module in modules:
        yield from (found for found in module.modules() if isinstance(found, ScoreParameters))
