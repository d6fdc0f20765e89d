"""What all parts of one loss read: this rank's share of the rows, the vectors as operands, and
how shares come together.

Where peers hold the same rows (exchange/row_split.py) each does its share of them against all
candidates; what every peer has found is summed in the end. Shapes: N queries of this rank, n of
them its share; M keys; H hard negatives a row; C keys of all ranks; P prefixes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sailplan_kernels.exchange.row_split import peers_of, shares
from sailplan_kernels.infonce.loss_inputs import LossInputs
from sailplan_kernels.tiling.tile import EMPTY, Engine
from sailplan_kernels.tiling.vectors import Vectors

FEWEST_ROWS = 16  # that are looked at together, whatever the budget


class ForwardContext:
    """One loss of a call; ``weight``: its factor in the call's total."""

    def __init__(
        self,
        inputs: LossInputs,
        engine: Engine,
        queries: Vectors,
        keys: Vectors,
        hard: Vectors,
        weight: float,
    ) -> None:
        self.inputs, self.engine, self.exchange, self.peers = (
            inputs,
            engine,
            inputs.exchange,
            peers_of(inputs.exchange),
        )
        self.queries, self.keys, self.hard, self.weight = queries, keys, hard, weight
        self.options, self.needs, self.prefixes = (
            inputs.options,
            inputs.needs,
            inputs.options.prefixes,
        )
        self.share_sizes, self.share = shares(len(inputs.raw_queries), self.peers)
        self.fp, self.gradient_dtype = inputs.score_dtype, inputs.gradient_dtype
        self.budget, self.rows_at_once = score_budget(inputs), rows_at_once(inputs)
        self.device = inputs.raw_queries.device
        self.inverse = inputs.inverse_temperature.detach()  # 0-d or [N]
        self._same: Tensor | None = None
        self.prefix_weights = numbers(
            tuple(weight * w for w in self.options.prefix_weights), self.fp, self.device
        )[:, None]  # [P, 1]

    @property
    def rows(self) -> int:
        """Of this rank's share."""
        return self.share.stop - self.share.start

    @property
    def one_temperature(self) -> bool:
        """Whether all rows, of all ranks, have the same."""
        return self.inverse.dim() == 0

    @property
    def any_gradient(self) -> bool:
        return self.needs.queries or self.needs.keys or self.needs.hard or self.needs.temperature

    @property
    def alone(self) -> bool:
        """Whether nobody else holds rows."""
        return self.exchange.world_size == 1 and self.peers.world_size == 1

    def inverse_of_rows(self) -> Tensor:
        """[n], contiguous."""
        return (
            self.same_inverse(self.rows)
            if self.one_temperature
            else self.inverse[self.share].contiguous()
        )

    def same_inverse(self, count: int) -> Tensor:
        """[count] the one inverse temperature, contiguous: a part of the same tensor for all who
        ask.
        """
        if self._same is None:
            inputs = self.inputs
            most = max(
                max(sizes) for sizes in (inputs.query_sizes, inputs.key_sizes, inputs.hard_sizes)
            )
            self._same = self.inverse.expand(most * self.exchange.world_size).contiguous()
        return self._same[:count]

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.fp, device=self.device)

    def sum_of_all(self, x: Tensor) -> Tensor:
        """Over everybody who holds rows."""
        x = x if self.peers.world_size == 1 else self.peers.sum(x)
        return x if self.exchange.world_size == 1 else self.exchange.sum(x)

    def max_of_all(self, x: Tensor) -> Tensor:
        """Over everybody who holds rows."""
        x = x if self.peers.world_size == 1 else self.peers.max(x)
        return x if self.exchange.world_size == 1 else self.exchange.max(x)

    def rows_of_all_peers(self, x: Tensor) -> Tensor:
        """[N, ...] the rows [n, ...] of all shares."""
        return self.peers.gather(x.contiguous(), self.share_sizes)


def score_budget(inputs: LossInputs) -> int:
    """Engines count bytes of float32 scores."""
    return inputs.options.memory_budget * 4 // (torch.finfo(inputs.score_dtype).bits // 8)


def rows_at_once(inputs: LossInputs) -> int:
    """Rows whose vectors are copied together (gathered, multiplied): a few such copies stay
    below the budget.
    """
    size = torch.finfo(inputs.score_dtype).bits // 8
    return max(
        FEWEST_ROWS, inputs.options.memory_budget // (8 * size * inputs.raw_queries.shape[1])
    )


@lru_cache(maxsize=256)
def numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len] constants, uploaded once for all calls."""
    return torch.tensor(values, dtype=dtype).to(device)


def finite(x: Tensor) -> Tensor:
    """Minus infinity, the logsumexp of nothing, as 0."""
    return x.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)


def comparable(x: Tensor) -> Tensor:
    """Minus infinity as a number below every logit, so that differences stay defined."""
    return x.clamp_min(EMPTY)


def cut(start: int, stop: int, step: int) -> list[slice]:
    """Consecutive parts of ``step``, the last shorter."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
