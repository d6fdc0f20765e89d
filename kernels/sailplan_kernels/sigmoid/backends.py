"""Two ways to the same sum: all scores at once under autograd, or row chunks with the gradient in the forward pass.

The chunked pass needs no logsumexp, so a chunk's scores are read once: value, both embedding gradients (6 NMD) and
the gradients of temperature and bias come out together. Collectives as in infonce/fused.py: a gather of keys and a
reduce-scatter sum of their gradient, both in the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.infonce.masks import negatives
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.products import add_product, product, rows_per_chunk, softplus
from sailplan_kernels.infonce.reference import gather_agreed


def reference_loss(problem: Problem, queries: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's loss (0-d) and its positives' cosines [N], of one prefix: the definition."""
    positive = (queries * keys[problem.positive]).sum(1)
    all_keys = gather_agreed(problem, keys, problem.key_sizes, problem.needs.keys)
    keep = negatives(problem.anchor_tags, problem.all_keys, problem.tags_in_use)
    inverse = problem.inverse_temperature
    scores = (queries @ all_keys.T) * inverse[:, None] + bias
    against = torch.where(keep, softplus(scores), 0.0).sum(1)
    losses = softplus(-(positive * inverse + bias)) + against
    return (problem.row_weight * losses).sum(), positive.detach()


def chunked_loss(problem: Problem, queries: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As reference_loss, without ever holding an N x M matrix; differentiable once."""
    return _ChunkedSigmoid.apply(problem, queries, keys, problem.inverse_temperature, bias)


class _ChunkedSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, queries: Tensor, keys: Tensor, inverse_temperature: Tensor, bias: Tensor):
        accumulate, operand, needs = queries.dtype, problem.operand_dtype, problem.needs
        small_queries, small_keys = queries.to(operand), keys.to(operand)
        all_keys = problem.exchange.gather(small_keys, problem.key_sizes)
        d_queries = torch.zeros_like(queries) if needs.queries else None
        d_all_keys = torch.zeros(all_keys.shape, dtype=accumulate, device=keys.device) if needs.keys else None
        d_own_keys = None if d_all_keys is None else d_all_keys[problem.own_keys]
        d_inverse, d_bias = torch.zeros_like(inverse_temperature), torch.zeros_like(bias)
        positives, total = torch.empty_like(inverse_temperature), bias.new_zeros(())

        step = rows_per_chunk(problem.options.memory_budget, len(all_keys), queries.shape[1], accumulate)
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            left, index = small_queries[rows], problem.positive[rows]
            right, inverse, weight = small_keys[index], inverse_temperature[rows], problem.row_weight[rows]
            positive = torch.linalg.vecdot(left.to(accumulate), right.to(accumulate))
            positives[rows] = positive
            positive_score = positive * inverse + bias
            cosine = product(left, all_keys.T, accumulate)
            keep = negatives(problem.anchor_tags[rows], problem.all_keys, problem.tags_in_use)
            scores = (cosine * inverse[:, None]).add_(bias).masked_fill_(keep.logical_not_(), -torch.inf)
            total = total + (weight * (softplus(-positive_score) + softplus(scores).sum(1))).sum()

            push = scores.sigmoid_().mul_(weight[:, None])  # d loss / d score of negatives
            pull = weight * torch.sigmoid(-positive_score)
            if needs.temperature:
                d_inverse[rows] = torch.linalg.vecdot(push, cosine) - pull * positive
            d_bias += push.sum() - pull.sum()
            pull = pull * inverse
            push = push.mul_(inverse[:, None]).to(operand)
            if d_queries is not None:
                add_product(d_queries[rows], push, all_keys)
                d_queries[rows].addcmul_(right.to(accumulate), pull[:, None], value=-1)
            if d_all_keys is not None and d_own_keys is not None:
                add_product(d_all_keys, push.T, left)
                d_own_keys.index_put_((index,), left.to(accumulate) * -pull[:, None], accumulate=True)

        d_keys = None if d_all_keys is None else problem.exchange.reduce_scatter(d_all_keys, problem.key_sizes)
        gradients = (d_queries, d_keys, d_inverse, d_bias)
        ctx.gradients = [x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)]
        ctx.mark_non_differentiable(positives)
        return total, positives

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        return None, *(None if x is None else x * gradient for x in ctx.gradients)
