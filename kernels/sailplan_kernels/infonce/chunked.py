"""Row chunks, full-precision logits, and the gradient in the forward pass: never an N x M matrix.

A chunk of rows sees its whole denominator at once, so its logsumexp, its loss and its share of every gradient come
out of one pass (6 NMD of matrix products), and backward only multiplies by the upstream gradient. The symmetric loss
first runs over the scores once more for the columns' logsumexp, merged over ranks (8 NMD). The positive never enters
the probabilities: loss = softplus(lse_neg - s_pos), and its pull has the coefficient sigmoid(lse_neg - s_pos), which
stays exact where 1 - p would cancel.

Collectives, all inside the forward: gathers of keys (and queries, hard negatives) where a term reads them; for the
columns a gather, a max, a sum and a gather; reduce-scatter sums of the gradients some rank needs. Their order depends
only on what all ranks agreed on in problem.py. Differentiable once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.infonce.columns import Columns, column_statistics
from sailplan_kernels.infonce.masks import Candidates, drop_by_score, negatives
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.products import add_product, product, rows_per_chunk


def chunked_loss(problem: Problem, queries: Tensor, keys: Tensor, hard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As reference_loss: loss (0-d), positives' cosines [N], rows that are right [N]."""
    return _ChunkedInfoNCE.apply(
        problem, queries, keys, hard, problem.inverse_temperature, problem.column_inverse_temperature
    )


class _ChunkedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, queries, keys, hard, inverse_temperature, column_inverse_temperature):
        work = _Pass(problem, queries, keys, hard, inverse_temperature, column_inverse_temperature)
        loss = work.run()
        ctx.gradients = [
            gradient if needed else None
            for gradient, needed in zip(work.finish(), ctx.needs_input_grad[1:], strict=True)
        ]
        ctx.mark_non_differentiable(work.positive, work.correct)
        return loss, work.positive, work.correct

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        return None, *(None if x is None else x * gradient for x in ctx.gradients)


class _Block:
    """Candidates of one kind for all rows, and the accumulator of their gradient (None: nobody needs it)."""

    def __init__(
        self, rows: Tensor, candidates: Candidates, gradient: Tensor | None, correction: Tensor | None = None, against_positive: bool = False
    ):
        self.rows, self.candidates, self.gradient = rows, candidates, gradient
        self.correction = correction  # [C] subtracted from the logits
        self.against_positive = against_positive  # scored against the row's positive key instead of its query


class _Pass:
    """The working state of one forward: operands, accumulators, and the loop over row chunks."""

    def __init__(self, problem, queries, keys, hard, inverse_temperature, column_inverse_temperature):
        self.problem, self.options, self.needs = problem, problem.options, problem.needs
        self.exchange, self.accumulate = problem.exchange, queries.dtype
        # Normalised in full precision, rounded once.
        self.queries, self.keys = queries.to(problem.operand_dtype), keys.to(problem.operand_dtype)
        self.hard = hard.to(problem.operand_dtype)
        self.inverse_temperature, self.column_inverse = inverse_temperature, column_inverse_temperature
        self.weight = problem.row_weight / 2 if self.options.symmetric else problem.row_weight
        self.d_queries = self._zeros(queries) if self.needs.queries else None
        self.d_hard = torch.zeros_like(hard) if self.needs.hard else None
        self.d_inverse = torch.zeros_like(inverse_temperature)
        self.correct = torch.zeros_like(problem.row_valid)
        self.positive = torch.empty_like(inverse_temperature)
        self._gather_blocks()
        self.columns: Columns | None = None

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.accumulate, device=like.device)

    def _gather_blocks(self) -> None:
        problem, options = self.problem, self.options
        all_keys = self.exchange.gather(self.keys, problem.key_sizes)
        self.d_all_keys = self._zeros(all_keys) if self.needs.keys else None
        self.blocks = [_Block(all_keys, problem.all_keys, self.d_all_keys, problem.key_correction)]
        self.d_all_queries = self.d_all_hard = None
        if options.query_negatives:
            all_queries = self.exchange.gather(self.queries, problem.query_sizes)
            self.d_all_queries = self._zeros(all_queries) if self.needs.queries else None
            self.blocks.append(_Block(all_queries, problem.all_queries, self.d_all_queries))
        if options.key_negatives:
            self.blocks.append(_Block(all_keys, problem.all_keys, self.d_all_keys, problem.key_correction, against_positive=True))
        if options.shared_hard_negatives:
            all_hard = self.exchange.gather(self.hard.flatten(0, 1), problem.hard_sizes)
            self.d_all_hard = self._zeros(all_hard) if self.needs.hard else None
            self.blocks.append(_Block(all_hard, problem.all_hard, self.d_all_hard))
        # This rank's keys inside the gathered gradient, so that the pull of positives lands there directly.
        self.d_own_keys = None if self.d_all_keys is None else self.d_all_keys[problem.own_keys]
        self.own_hard = self.hard[:, :0] if options.shared_hard_negatives else self.hard

    def run(self) -> Tensor:
        """All chunks; the loss."""
        width = sum(len(block.rows) for block in self.blocks) + self.own_hard.shape[1]
        step = rows_per_chunk(self.options.memory_budget, width, self.queries.shape[1], self.accumulate)
        chunks = [slice(start, start + step) for start in range(0, len(self.queries), step)]
        for rows in chunks:
            left, pulled = self.queries[rows], self.keys[self.problem.positive[rows]]
            self.positive[rows] = torch.linalg.vecdot(left.to(self.accumulate), pulled.to(self.accumulate))
        total = self.weight.new_zeros(())
        if self.options.symmetric:
            self.columns = column_statistics(
                self.problem, self.queries, self.blocks[0].rows, self.positive, self.weight, self.column_inverse, chunks
            )
            total = total + self.columns.loss
        for rows in chunks:
            total = total + self._chunk(rows)
        return total

    def _chunk(self, rows: slice) -> Tensor:
        problem, options = self.problem, self.options
        left, positive_key = self.queries[rows], self.keys[problem.positive[rows]]
        inverse, positive, weight = self.inverse_temperature[rows], self.positive[rows], self.weight[rows]
        tags = problem.anchor_tags[rows]

        cosines, scores, column_mask = [], [], positive.new_empty(0, dtype=torch.bool)
        for block in self.blocks:
            cosine = product(positive_key if block.against_positive else left, block.rows.T, self.accumulate)
            keep = negatives(tags, block.candidates, problem.tags_in_use)
            if self.columns is not None and block is self.blocks[0]:
                column_mask = self.columns.mask(keep, problem.query_valid[rows], cosine)
            drop_by_score(keep, cosine, positive, options)
            cosines.append(cosine)
            score = cosine * inverse[:, None]
            if block.correction is not None:
                score -= block.correction
            scores.append(score.masked_fill_(keep.logical_not_(), -torch.inf))
        if self.own_hard.shape[1]:
            own = self.own_hard[rows]
            cosine = product(own, left[:, :, None], self.accumulate)[..., 0]
            keep = problem.hard_valid[rows].clone()
            drop_by_score(keep, cosine, positive, options)
            cosines.append(cosine)
            scores.append((cosine * inverse[:, None]).masked_fill_(keep.logical_not_(), -torch.inf))

        top = torch.stack([score.amax(1) for score in scores if score.shape[1]], 1).amax(1)
        shift = torch.where(top.isinf(), 0.0, top)
        exponentials = [score.sub_(shift[:, None]).exp_() for score in scores]
        total = torch.stack([e.sum(1) for e in exponentials], 1).sum(1)
        own_score = positive * inverse - problem.positive_correction[rows]
        gap = total.log() + shift - own_score  # lse of the negatives - positive; -inf without negatives
        loss = (weight * -F.logsigmoid(-gap)).sum()
        self.correct[rows] = problem.row_valid[rows] & (top < own_score)

        push = weight * torch.sigmoid(gap)
        share = push / torch.where(total > 0, total, 1.0)
        if self.needs.temperature:
            # <probability, cosine - positive's cosine>, a row at a time.
            moment = sum(torch.linalg.vecdot(e, cosine) for e, cosine in zip(exponentials, cosines, strict=True))
            self.d_inverse[rows] = share * moment - push * positive
        weights = [e.mul_((share * inverse)[:, None]) for e in exponentials]  # d loss / d cosine
        pull = push * inverse
        if self.columns is not None:
            pull = pull + self.columns.add_gradient(weights[0], cosines[0], column_mask, rows, self.needs.temperature)
        self._accumulate(rows, left, positive_key, weights, pull)
        return loss

    def _accumulate(self, rows: slice, left: Tensor, positive_key: Tensor, weights: list[Tensor], pull: Tensor) -> None:
        """Turn d loss / d cosine of a chunk into gradients of the embeddings."""
        index = (self.problem.positive[rows],)
        d_left = None if self.d_queries is None else self.d_queries[rows]
        for block, weight in zip(self.blocks, weights, strict=False):
            half = weight.to(left.dtype)
            if block.gradient is not None:
                add_product(block.gradient, half.T, positive_key if block.against_positive else left)
            if block.against_positive and self.d_own_keys is not None:
                self.d_own_keys.index_put_(index, product(half, block.rows, self.accumulate), accumulate=True)
            elif not block.against_positive and d_left is not None:
                add_product(d_left, half, block.rows)
        if d_left is not None:
            d_left.addcmul_(positive_key.to(self.accumulate), pull[:, None], value=-1)
        if self.d_own_keys is not None:
            self.d_own_keys.index_put_(index, left.to(self.accumulate) * -pull[:, None], accumulate=True)
        if self.own_hard.shape[1]:
            if d_left is not None:
                d_left += product(weights[-1][:, None].to(left.dtype), self.own_hard[rows], self.accumulate)[:, 0]
            if self.d_hard is not None:
                torch.mul(weights[-1][:, :, None], left[:, None].to(self.accumulate), out=self.d_hard[rows])

    def finish(self) -> tuple[Tensor | None, ...]:
        """Bring the gathered gradients home: those of queries, keys, hard negatives and both inverse temperatures."""
        problem, exchange = self.problem, self.exchange
        d_keys = None
        if self.d_all_keys is not None:
            d_keys = exchange.reduce_scatter(self.d_all_keys, problem.key_sizes)
        if self.d_all_queries is not None:
            self.d_queries += exchange.reduce_scatter(self.d_all_queries, problem.query_sizes)
        if self.d_all_hard is not None:
            self.d_hard = exchange.reduce_scatter(self.d_all_hard, problem.hard_sizes).view(self.hard.shape)
        d_column = None
        if self.columns is not None and self.needs.temperature:
            d_column = self.columns.inverse_temperature_gradient(exchange, problem.key_sizes)
        return self.d_queries, d_keys, self.d_hard, self.d_inverse, d_column
