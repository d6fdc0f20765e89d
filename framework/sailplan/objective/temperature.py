"""Learnable temperatures: one for every pattern of every data set.

Each starts from its data set's `temperature` (0.05 unless configured) and is learned as a
logarithm, so that steps are relative. It is used clamped to [0.005, 1]; `clamp_` brings the
parameter itself back after an optimizer step, because a parameter beyond the bound would get no
gradient and never return.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sailplan.config.fields import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from sailplan.config.schema import DatasetConfig, PatternKey
from sailplan.errors import ConfigurationError


class Temperatures(nn.Module):
    """Hold a log-temperature (0-d float32 parameter) for each pattern of each data set."""

    def __init__(self, datasets: Mapping[str, DatasetConfig]) -> None:
        super().__init__()
        self.logarithms = nn.ParameterDict()
        for dataset, config in datasets.items():
            for pattern in config.patterns:
                self.logarithms[str(PatternKey(dataset, pattern))] = nn.Parameter(
                    torch.tensor(math.log(config.temperature))
                )

    def get(self, key: PatternKey) -> Tensor:
        """Return the temperature in use, a 0-d tensor with gradient.

        Raises ConfigurationError for an unknown pattern.
        """
        name = str(key)
        if name not in self.logarithms:
            raise ConfigurationError(
                f"temperature of '{name}': no such data set and pattern, expected one of "
                f"{', '.join(self.logarithms)}"
            )
        return (
            self.logarithms[name]
            .clamp(math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE))
            .exp()
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings every parameter back into the bounds; called after each optimizer step."""
        # Rounding the bound to float32 may fall just outside it, where the gradient would be zero.
        inside = 1e-6
        logarithms = [logarithm.data for logarithm in self.logarithms.values()]
        if logarithms:
            torch._foreach_clamp_min_(logarithms, math.log(LOWEST_TEMPERATURE) + inside)
            torch._foreach_clamp_max_(logarithms, math.log(HIGHEST_TEMPERATURE) - inside)

    @torch.no_grad()
    def packed(self) -> Tensor:
        """The temperatures in use, float64 [n] on the device, in the order of `keys`."""
        if not self.logarithms:
            return torch.zeros(0, dtype=torch.float64)
        return (
            torch.stack(list(self.logarithms.values()))
            .double()
            .exp()
            .clamp(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        )

    @property
    def keys(self) -> list[PatternKey]:
        """Return the pattern of each temperature."""
        return [PatternKey.parse(name) for name in self.logarithms]

    def values(self) -> dict[PatternKey, float]:
        """Return the temperatures in use; one transfer for all."""
        return dict(zip(self.keys, self.packed().tolist(), strict=True))
