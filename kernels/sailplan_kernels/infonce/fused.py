"""The loss with its gradient in the forward pass: never more of the scores in memory than the budget says.

The parts: sources.py who is scored against whom, positives.py the pairs, own_hard.py a row's own hard negatives, columns.py
the symmetric loss's second half, rounds.py the way over the tiles, setting.py what all of them read. What happens inside a
tile is an engine's (tile.py).

A cosine is <x_p, y_p> a_p b_p with inverse prefix norms a, b, so d cos / dx = y_p a_p b_p - cos a_p^2 x_p. The second term
of the shorter prefixes is taken off from sums of G * cosine ("moments"); whatever is parallel to x in the end, the longest
prefix's term above all, is taken out at once where the operand's gradient becomes that of what was given (normalize.py).

Collectives, all inside the forward, depend only on what all ranks agreed on in problem.py. Differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.infonce.columns import Columns
from sailplan_kernels.infonce.own_hard import OwnHard
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.rounds import Rounds
from sailplan_kernels.infonce.setting import Setting
from sailplan_kernels.infonce.sources import make_sources
from sailplan_kernels.infonce.tile import Engine


def fused_loss(problem: Problem, engine: Engine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P], and of the longest prefix the positives' cosines [N] and
    the rows that are right [N]. Differentiable once.
    """
    longest = problem.options.prefixes[-1]
    vectors = [x if x.shape[-1] == longest else x[..., :longest] for x in (problem.raw_queries, problem.raw_keys, problem.raw_hard)]
    return _Fused.apply(problem, engine, *vectors, problem.inverse_temperature)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, engine, queries, keys, hard, inverse_temperature):
        work = _Work(Setting(problem, engine, queries, keys, hard, inverse_temperature))
        losses, positive, correct = work.values()
        ctx.gradients = [x if needed else None for x, needed in zip(work.gradients(), ctx.needs_input_grad[2:], strict=True)]
        ctx.dtypes = [x.dtype for x in (queries, keys, hard, inverse_temperature)]
        ctx.mark_non_differentiable(losses, positive, correct)
        return (losses * work.setting.prefix_weights[:, 0]).sum(), losses, positive, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        """The gradients wait in full precision, are scaled where they are and given away: no copy, so no second time."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("infonce: found a second backward of one call, expected one; call infonce again")
        return None, None, *(None if x is None else x.mul_(gradient).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))


class _Work:
    """One forward, from the first collective to the last."""

    def __init__(self, setting: Setting) -> None:
        self.setting, options = setting, setting.options
        stream = setting.exchange.stream(setting.keys, setting.whole.key_sizes, setting.gradient_dtype)  # on its way while positives are scored
        self.positives = Positives(setting, stream)
        self.queries = self.positives.queries
        self.hard = OwnHard(setting, self.queries) if setting.hard.shape[1] and not options.shared_hard_negatives else None
        self.sources = make_sources(setting, stream, self.queries, self.positives.anchors)
        self.columns = Columns(setting, self.sources[0], self.positives) if options.symmetric else None
        Rounds(setting, self.sources, self.positives, self.columns).run()

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [P], the positives' cosines [N] and the rows that are right [N], of all shares."""
        setting, losses = self.setting, self.positives.losses()
        if self.columns is not None:
            losses = losses + self.columns.losses
        of_rows = [setting.rows_of_all_peers(x) for x in (self.positives.mean_cosine(), self.positives.correct())]
        return setting.peers.sum(losses), of_rows[0], of_rows[1]

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Those of queries, keys, hard negatives and inverse temperatures: what is not in tiles, and all come home."""
        setting, positives, queries, needs = self.setting, self.positives, self.queries, self.setting.needs
        if not setting.any_gradient:
            return (None,) * 4
        several = len(setting.prefixes) > 1
        positives.add_temperature()
        d_hard = hard_moment = None
        if self.hard is not None:
            everything = slice(0, len(setting.queries)), slice(0, len(positives.pairs.rows))
            hard_moment = self.hard.add_gradient(positives.push_of(queries, *everything)).flatten(1)
            d_hard = self.hard.gradient
        elif needs.hard:
            d_hard = torch.zeros_like(setting.hard, dtype=setting.gradient_dtype)
        if self.columns is not None and needs.temperature:
            queries.temperature += self.columns.temperature_gradient()
        keys, *others = self.sources
        if several:
            positives.add_moments(keys.moment)
        d_keys = positives.keys_home(keys.stream)
        for source in others:
            if not source.needed:
                continue
            hard = source.candidates is setting.whole.all_hard
            shape = setting.whole_hard.shape if hard else setting.whole_queries.shape
            gradient, moment = setting.own_share(source.stream.finish().view(shape)), None
            if several:
                moment = setting.home(source.moment, source.sizes).T.reshape(*shape[:-1], len(setting.prefixes))
                moment = setting.own_share(moment).movedim(-1, 0).flatten(1)
            if hard:
                d_hard, hard_moment = gradient, moment
            elif queries.gradient is not None:
                queries.gradient += gradient
                if moment is not None:
                    queries.moment += moment
        if several:
            setting.norms_gradient_(queries.gradient, setting.queries, queries.moment)
            if d_keys is not None:
                setting.norms_gradient_(d_keys, setting.keys, setting.home(keys.moment, setting.whole.key_sizes))
            if d_hard is not None and hard_moment is not None:
                setting.norms_gradient_(d_hard.flatten(0, 1), setting.hard.flatten(0, 1), hard_moment)
        found = setting.given_gradients_(queries.gradient, d_keys, d_hard)
        return *found, setting.rows_of_all_peers(queries.temperature)
