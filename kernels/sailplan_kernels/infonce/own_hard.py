"""A row's own hard negatives: [n, H] scores that are nobody else's, part of its denominator without being a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.setting import Setting, cut
from sailplan_kernels.infonce.sources import Anchors
from sailplan_kernels.tiling.products import of_dimensions, prefix_dots, segments


class OwnHard:
    """Their logsumexp goes into the queries' at once; the gradient follows when the denominators are complete."""

    def __init__(self, setting: Setting, queries: Anchors) -> None:
        self.setting, self.queries, problem = setting, queries, setting.problem
        n, h = problem.hard_valid.shape
        self.rows = slice(setting.share.start * h, setting.share.stop * h)
        self.hard = setting.hard.operand.unflatten(0, (n, h))[setting.share]
        self.norm = setting.hard.norms.unflatten(1, (n, h))[:, setting.share]
        dots = [prefix_dots(queries.side.vectors[rows, None], self.hard[rows], setting.prefixes, setting.fp) for rows in self._blocks()]
        self.cosine = (dots[0] if len(dots) == 1 else torch.cat(dots, 1)).mul_(queries.side.inverse_norm[:, :, None]).mul_(self.norm)
        self.logits = self.cosine * queries.side.inverse_temperature[:, None]
        if problem.padding[2]:
            self.logits.masked_fill_(~problem.hard_valid[setting.share], -torch.inf)
        if queries.side.limit is not None:
            self.logits.masked_fill_(self.cosine > queries.side.limit[:, :, None], -torch.inf)
        queries.more = self.logits.to(torch.float64).logsumexp(2)
        self.top = self.logits.amax(2)  # [P, n]

    def _blocks(self) -> list[slice]:
        return cut(0, len(self.hard), max(1, self.setting.rows_at_once // self.hard.shape[1])) or [slice(0, 0)]

    def add_gradient(self, log_negatives: Tensor, push: Tensor) -> None:
        """To the queries' and its own; log_negatives (finite), push [P, n]: of the queries' whole denominators."""
        setting, queries, needs = self.setting, self.queries, self.setting.needs
        share = self.logits.sub_(log_negatives[:, :, None]).exp_().mul_(push[:, :, None])
        if needs.temperature and not setting.one_temperature:
            assert queries.temperature is not None
            queries.temperature += (share * self.cosine).sum((0, 2))
        share *= queries.side.inverse_temperature[:, None]
        if queries.moments:
            moment = share * self.cosine
            assert queries.moment is not None
            queries.moment += moment.sum(2)
            if needs.hard and len(setting.prefixes) > 1:
                setting.hard.moment[:, self.rows].add_(moment.flatten(1))
        share.mul_(queries.side.inverse_norm[:, :, None]).mul_(self.norm)
        share = segments(share).to(setting.gradient_dtype)
        own = setting.hard.gradient[self.rows].view(self.hard.shape) if needs.hard else None
        for rows in self._blocks():
            weights = of_dimensions(share[:, rows], setting.prefixes)
            if queries.gradient is not None:
                queries.gradient[rows].add_((weights * self.hard[rows]).sum(1))
            if own is not None:
                own[rows].addcmul_(weights, queries.side.vectors[rows, None])
