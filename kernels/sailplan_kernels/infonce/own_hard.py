"""A row's own hard negatives: [n, H] scores that are nobody else's, part of its denominator without being a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.normalize import inverse_norms
from sailplan_kernels.infonce.products import prefix_dots
from sailplan_kernels.infonce.setting import Setting, cut, finite
from sailplan_kernels.infonce.sources import Anchors


class OwnHard:
    """Statistics go into the queries' at once; the gradient follows when the denominators are complete."""

    def __init__(self, setting: Setting, queries: Anchors) -> None:
        self.setting, self.queries = setting, queries
        hard, prefixes, shape = setting.hard, setting.prefixes, (len(setting.prefixes), *setting.hard.shape[:2])
        self.gradient = torch.zeros_like(hard, dtype=setting.gradient_dtype) if setting.needs.hard else None
        self.norm = inverse_norms(hard.flatten(0, 1), prefixes, setting.fp).view(shape)
        self.cosine = setting.query_norm[:, :, None] * self.norm
        for rows in self._blocks():
            self.cosine[:, rows] *= prefix_dots(setting.queries[rows, None], hard[rows], prefixes, setting.fp)
        keep = setting.problem.hard_valid.expand(shape)
        if queries.side.limit is not None:
            keep = keep & (self.cosine <= queries.side.limit[:, :, None])
        self.logits = (self.cosine * setting.inverse[:, None]).masked_fill(~keep, -torch.inf)
        queries.top = self.logits.amax(2)
        queries.total = (self.logits - finite(queries.top)[:, :, None]).exp().sum(2)

    def _blocks(self) -> list[slice]:
        return cut(0, len(self.setting.queries), max(1, self.setting.rows_at_once // self.setting.hard.shape[1]))

    def add_gradient(self, push: Tensor) -> Tensor:
        """To the queries' and its own; push [P, n] d loss / d log_negatives. Returns sums of G * cosine, [P, n, H]."""
        setting, queries = self.setting, self.queries
        share = (self.logits - finite(queries.log_negatives(slice(None)))[:, :, None]).exp_() * push[:, :, None]
        if setting.needs.temperature:
            queries.temperature += (share * self.cosine).sum((0, 2))
        share *= setting.inverse[:, None]
        moment = share * self.cosine
        queries.moment += moment.sum(2)
        share = share * setting.query_norm[:, :, None] * self.norm
        for rows in self._blocks():
            first = 0
            for s, end in enumerate(setting.prefixes):
                weight = share[s:, rows].sum(0)[:, :, None].to(setting.gradient_dtype)
                if queries.gradient is not None:
                    queries.gradient[rows, first:end] += (weight * setting.hard[rows, :, first:end]).sum(1)
                if self.gradient is not None:
                    self.gradient[rows, :, first:end] = weight * setting.queries[rows, None, first:end]
                first = end
        return moment
