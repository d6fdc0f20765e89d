"""A row's own hard negatives: [n, H] scores that are nobody else's, part of its denominator
without being a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.blocks import QueryBlock
from sailplan_kernels.infonce.forward_context import ForwardContext, cut
from sailplan_kernels.tiling.products import of_dimensions, prefix_dots, segments


class PerRowNegatives:
    """Their logsumexp goes into the queries' at once; the gradient follows when the denominators
    are complete.
    """

    def __init__(self, context: ForwardContext, queries: QueryBlock) -> None:
        self.context, self.queries, inputs = context, queries, context.inputs
        n, h = inputs.hard_valid.shape
        self.rows = slice(context.share.start * h, context.share.stop * h)
        self.hard = context.hard.operand.unflatten(0, (n, h))[context.share]
        self.norm = context.hard.norms.unflatten(1, (n, h))[:, context.share]
        dots = [
            prefix_dots(
                queries.side.vectors[rows, None], self.hard[rows], context.prefixes, context.fp
            )
            for rows in self._blocks()
        ]
        self.cosine = (
            (dots[0] if len(dots) == 1 else torch.cat(dots, 1))
            .mul_(queries.side.inverse_norm[:, :, None])
            .mul_(self.norm)
        )
        self.logits = self.cosine * queries.side.inverse_temperature[:, None]
        if inputs.padding[2]:
            self.logits.masked_fill_(~inputs.hard_valid[context.share], -torch.inf)
        if queries.side.max_cosine is not None:
            self.logits.masked_fill_(self.cosine > queries.side.max_cosine[:, :, None], -torch.inf)
        queries.more = self.logits.to(torch.float64).logsumexp(2)
        self.top = self.logits.amax(2)  # [P, n]

    def _blocks(self) -> list[slice]:
        return cut(0, len(self.hard), max(1, self.context.rows_at_once // self.hard.shape[1])) or [
            slice(0, 0)
        ]

    def add_gradient(self, log_negatives: Tensor, negative_grad: Tensor) -> None:
        """To the queries' and its own; log_negatives (finite), push [P, n]: of the queries'
        whole denominators.
        """
        context, queries, needs = self.context, self.queries, self.context.needs
        share = self.logits.sub_(log_negatives[:, :, None]).exp_().mul_(negative_grad[:, :, None])
        if needs.temperature and not context.one_temperature:
            assert queries.temperature is not None
            queries.temperature += (share * self.cosine).sum((0, 2))
        share *= queries.side.inverse_temperature[:, None]
        if queries.moments:
            moment = share * self.cosine
            assert queries.moment is not None
            queries.moment += moment.sum(2)
            if needs.hard and len(context.prefixes) > 1:
                context.hard.moment[:, self.rows].add_(moment.flatten(1))
        share.mul_(queries.side.inverse_norm[:, :, None]).mul_(self.norm)
        share = segments(share).to(context.gradient_dtype)
        own = context.hard.gradient[self.rows].view(self.hard.shape) if needs.hard else None
        for rows in self._blocks():
            weights = of_dimensions(share[:, rows], context.prefixes)
            if queries.gradient is not None:
                queries.gradient[rows].add_((weights * self.hard[rows]).sum(1))
            if own is not None:
                own[rows].addcmul_(weights, queries.side.vectors[rows, None])
