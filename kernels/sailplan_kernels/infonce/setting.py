"""What all parts of one forward read: this rank's share of the rows, the vectors as operands, and how shares come together.

Where peers hold the same rows (exchange/row_split.py) each does its share of them against all candidates. What is a row's
own is gathered from the peers in the end; what belongs to keys and columns is summed over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.exchange.row_split import peers_of, shares
from sailplan_kernels.infonce.normalize import inverse_norms, normalized_gradient_, operand
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.tile import Engine

FEWEST_ROWS = 16  # that are looked at together, whatever the budget


class Setting:
    """N queries of this rank, n of them its share; M keys; H hard negatives a row; C keys of all ranks."""

    def __init__(self, problem: Problem, engine: Engine, queries: Tensor, keys: Tensor, hard: Tensor, inverse_temperature: Tensor) -> None:
        self.engine, self.exchange, self.peers = engine, problem.exchange, peers_of(problem.exchange)
        self.share_sizes, share = shares(len(queries), self.peers)
        self.whole, self.problem = problem, problem.share(share)
        self.options, self.needs, self.prefixes = problem.options, problem.needs, problem.options.prefixes
        self.fp, self.gradient_dtype = problem.row_weight.dtype, problem.gradient_dtype
        size = torch.finfo(self.fp).bits // 8
        self.budget = problem.options.memory_budget * 4 // size  # engines count bytes of float32 scores
        # Rows whose vectors are copied together (gathered, multiplied): a few such copies stay below the budget.
        self.rows_at_once = max(FEWEST_ROWS, problem.options.memory_budget // (8 * size * queries.shape[1]))
        self.given = [(queries, problem.query_valid), (keys, problem.key_valid), (hard.flatten(0, 1), problem.hard_valid.flatten())]
        operands = [operand(x, valid, problem.operand_dtype, self.rows_at_once) for x, valid in self.given]
        (self.whole_queries, self.keys, flat_hard), self.copied = zip(*operands, strict=True)
        self.whole_hard = flat_hard.view(hard.shape)
        self.queries, self.hard = self.whole_queries[share], self.whole_hard[share]
        self.query_norm = inverse_norms(self.queries, self.prefixes, self.fp)
        self.inverse = inverse_temperature.detach()[share].contiguous()
        self.prefix_weights = problem.row_weight.new_tensor(self.options.prefix_weights)[:, None]

    @property
    def any_gradient(self) -> bool:
        return self.needs.queries or self.needs.keys or self.needs.hard or self.needs.temperature

    @property
    def all_keys(self) -> int:
        return sum(self.problem.key_sizes)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.fp, device=self.queries.device)

    def sum_of_all(self, x: Tensor) -> Tensor:
        """Over everybody who holds rows."""
        return self.exchange.sum(self.peers.sum(x))

    def max_of_all(self, x: Tensor) -> Tensor:
        """Over everybody who holds rows."""
        return self.exchange.max(self.peers.max(x))

    def rows_of_all_peers(self, x: Tensor) -> Tensor:
        """[N, ...] the rows [n, ...] of all shares."""
        return self.peers.gather(x.contiguous(), self.share_sizes)

    def own_share(self, x: Tensor) -> Tensor:
        """[n, ...] this rank's rows of the sum over peers of [N, ...]."""
        return self.peers.reduce_scatter(x.contiguous(), self.share_sizes)

    def home(self, moment: Tensor, sizes: list[int]) -> Tensor:
        """[P, own] sums over ranks of [P, all]."""
        return self.exchange.reduce_scatter(moment.T.contiguous(), sizes).T.contiguous()

    def norms_gradient_(self, gradient: Tensor | None, x: Tensor, moment: Tensor) -> None:
        """Minus x_p * inverse_norm^2 * moment [P, n], of all prefixes but the longest, each on its own dimensions."""
        if gradient is None:
            return
        share, first = (inverse_norms(x, self.prefixes, self.fp).square() * moment)[:-1], 0
        for s, end in enumerate(self.prefixes[:-1]):
            gradient[:, first:end].addcmul_(x[:, first:end].to(gradient.dtype), share[s:].sum(0)[:, None].to(gradient.dtype), value=-1)
            first = end

    def given_gradients_(self, queries: Tensor | None, keys: Tensor | None, hard: Tensor | None) -> tuple[Tensor | None, ...]:
        """[N, D], [M, D], [N, H, D] of what was given, of all shares: those of the operands [n, ...], partial sums [M, D], finished in place."""
        queries, hard = (None if x is None else self.rows_of_all_peers(x) for x in (queries, hard))
        if keys is not None and self.peers.world_size > 1:
            keys = self.peers.sum(keys)
        flat = None if hard is None else hard.flatten(0, 1)
        for gradient, (x, valid), copied in zip((queries, keys, flat), self.given, self.copied, strict=True):
            if gradient is not None:
                normalized_gradient_(gradient, x, valid, copied, self.rows_at_once)
        return queries, keys, hard


def finite(x: Tensor) -> Tensor:
    """Minus infinity, the maximum or logsumexp of nothing, as 0, so that differences stay defined."""
    return torch.where(x.isinf(), 0.0, x)


def cut(start: int, stop: int, step: int) -> list[slice]:
    """Consecutive parts of ``step``, the last shorter."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
