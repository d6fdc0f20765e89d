"""A loss whose scores fit into the budget at once: one tile, worked through in as few operations
as there can be.

Up to some hundred rows a rank, launching an operation costs more than its arithmetic, so here all
prefixes, both directions and a row's positive and hard negatives go through each operation
together. What is computed, and what ranks tell each other, is what fused.py computes and tells:
ranks may differ in which of the two they take. Rows' and columns' softmax weights come out of
torch's softmax, which leaves a sum of exponentials as the inverse of its largest weight.

Small tensors have the prefixes last, tiles have them first. Columns of the tile [P, n, C + 1 + H]
are all ranks' keys, the row's positive (no part of any softmax: its place waits for its pull) and
the row's own hard negatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sailplan_kernels.exchange.row_split import peers_of
from sailplan_kernels.infonce.forward_context import numbers
from sailplan_kernels.infonce.loss_inputs import LossInputs
from sailplan_kernels.infonce.masks import excluded, just_below, own_keys
from sailplan_kernels.tiling.normalize import SAFE_LENGTH, project_
from sailplan_kernels.tiling.products import (
    add_product,
    of_dimensions,
    product,
    segments,
    set_product,
)
from sailplan_kernels.tiling.tile import Engine
from sailplan_kernels.tiling.torch_engine import MASKED_SCORE, TorchEngine
from sailplan_kernels.tiling.vectors import Layout

SMALLEST_SUM = 1e-300  # of exponentials, in float64: a column without negatives


class Unsafe(Exception):
    """Vectors so long or short that products of them might fail."""


def fits(inputs: LossInputs, engine: Engine, budget: int) -> bool:
    """Whether ``OneTile`` knows this kind of loss and its tile takes at most ``budget`` bytes."""
    options, exchange = inputs.options, inputs.exchange
    known = (
        isinstance(engine, TorchEngine)
        and exchange.materializes_all
        and peers_of(exchange).world_size == 1
        and inputs.diagonal
        and inputs.temperature.dim() == 0
        and inputs.key_log_probability is None
        and inputs.score_dtype == inputs.gradient_dtype
        and not (options.query_negatives or options.key_negatives or options.shared_hard_negatives)
        and options.margin_absolute is None
        and options.margin_relative is None
        and options.max_cosine is not True
    )
    n, prefixes = len(inputs.raw_queries), len(options.prefixes)
    if not known or not n:
        return False
    size, width, partners = (
        inputs.score_dtype.itemsize,
        inputs.raw_queries.shape[1],
        1 + inputs.raw_hard.shape[1],
    )
    columns = max(inputs.key_sizes) * exchange.world_size + partners
    tile = (
        n
        * columns
        * (
            (3 if options.symmetric else 2) * prefixes * size
            + (1 if options.max_cosine is None else prefixes)
        )
    )
    return (
        tile
        + 3 * n * partners * width * size
        + (n * (1 + partners) + len(inputs.raw_keys)) * width * size
        <= budget
    )


class OneTile:
    """One loss at work; ``weight``: its factor in the call's total.

    n queries, m keys, H hard negatives a row, P prefixes; C keys of all ranks.
    """

    def __init__(self, inputs: LossInputs, weight: float) -> None:
        self.inputs, self.options, self.exchange = inputs, inputs.options, inputs.exchange
        self.prefixes, self.fp, self.symmetric = (
            inputs.options.prefixes,
            inputs.score_dtype,
            inputs.options.symmetric,
        )
        longest = self.prefixes[-1]
        given = [x[..., :longest] for x in (inputs.raw_queries, inputs.raw_keys, inputs.raw_hard)]
        self.n, self.m, self.h = len(given[0]), len(given[1]), given[2].shape[1]
        self.layout = Layout(inputs.key_sizes, inputs.exchange)
        self.temperature = inputs.temperature.detach()
        self.device = self.temperature.device
        weights = tuple(weight * w for w in self.options.prefix_weights)
        self.prefix_weights = (
            None
            if all(w == 1 for w in weights)
            else numbers(weights, self.fp, self.device)[:, None]
        )
        flat = [
            x.detach() if x.dim() == 2 else x.detach().flatten(0, 1)
            for x in given
            if x.numel() or x.dim() == 2
        ]
        self.x = torch.cat(flat).to(inputs.operand_dtype)
        if any(inputs.padding):
            self.x.masked_fill_(inputs.invalid[:, None], 0.0)
        self.norms = torch.empty(
            (len(self.x), len(self.prefixes)), dtype=self.fp, device=self.device
        )
        for p, end in enumerate(self.prefixes):
            torch.linalg.vector_norm(self.x[:, :end], dim=1, dtype=self.fp, out=self.norms[:, p])
        if self.device.type == "cpu":
            length = self.norms[:, -1]
            low, high = length.aminmax()
            if (
                not (low > SAFE_LENGTH and high < 1 / SAFE_LENGTH)
                and not (
                    (length == 0) | ((length > SAFE_LENGTH) & (length < 1 / SAFE_LENGTH))
                ).all()
            ):
                raise Unsafe
        self.norms.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0)
        self._score_partners()

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and hard negatives [n, H, ...] of what there is one of each."""
        queries, keys, hard = x.split_with_sizes((self.n, self.m, self.n * self.h))
        return queries, keys, hard.view(self.n, self.h, x.shape[1])

    def _score_partners(self) -> None:
        """Cosines [n, 1 + H, P] with the positive and the own hard negatives."""
        self.queries, keys, hard = self._of(self.x)
        self.row_norms, key_norms, hard_norms = self._of(self.norms)
        partners, norms = keys[: self.n, None], key_norms[: self.n, None]
        if self.h:
            partners, norms = torch.cat([partners, hard], 1), torch.cat([norms, hard_norms], 1)
        self.partners, self.partner_norms = partners, norms
        both = partners * self.queries.to(self.fp)[:, None]
        self.cosine = torch.empty(
            (*both.shape[:2], len(self.prefixes)), dtype=self.fp, device=self.device
        )
        for p, end in enumerate(self.prefixes):
            torch.sum(both[..., :end], -1, out=self.cosine[..., p])
        self.cosine.mul_(norms).mul_(self.row_norms[:, None])

    # ---------------------------------------------------------------- what ranks tell each other
    def vectors(self) -> list[Tensor]:
        """This rank's keys and their norms."""
        return [
            self.layout.padded(self._of(self.x)[1]),
            self.layout.padded(self._of(self.norms)[1]),
        ]

    def notes(self) -> list[Tensor]:
        told = [self.layout.padded(self.inputs.key_notes), self.inputs.row_count]
        if self.symmetric:
            told.append(
                self.layout.padded(
                    torch.cat([self.cosine[:, 0], self.inputs.row_valid[:, None]], 1)
                )
            )
        return told

    def learn(self, vectors: list[Tensor], notes: list[Tensor]) -> None:
        """Everybody's, as ``vectors`` and ``notes`` of all ranks."""
        self.keys, self.key_norms = vectors
        self.valid_rows = notes[1].sum()
        counted = self.valid_rows if self.inputs.any_row else self.valid_rows.clamp_min(1)
        part = self.exchange.world_size / 2 if self.symmetric else self.exchange.world_size
        each = numbers((part,), self.fp, self.device)[0] / counted
        here = slice(self.layout.start, self.layout.start + self.n)
        if self.symmetric:
            self.all_cosines = notes[2][:, :-1]
            self.column_weight = notes[2][:, -1] * each  # [C]
            self.weight = self.column_weight[here]
        else:
            self.weight = self.inputs.row_valid * each  # [n]
        uneven = any(size != self.layout.longest for size in self.layout.sizes)
        if (
            self.inputs.plain and self.exchange.world_size == 1
        ):  # who else was given ids or masks, nobody here knows
            mask = own_keys(self.n, self.m, 0, self.device)
        else:
            rows_padded = self.symmetric and self.inputs.padding[0]
            keys_padded = uneven or self.exchange.world_size > 1 or self.inputs.padding[1]
            mask = excluded(
                self.inputs.anchor_notes,
                notes[0],
                self.inputs.tags_in_use,
                keys_padded,
                rows_padded,
            )
        self._statistics(mask)

    # ---------------------------------------------------------------- the tile
    def _statistics(self, mask: Tensor) -> None:
        """Scores, both softmaxes, and the rows' gaps between negatives and positive."""
        n, count = self.n, len(self.keys)
        columns = self.keys.T
        self.tiles = torch.empty(
            (3 if self.symmetric else 2, len(self.prefixes), n, count + 1 + self.h),
            dtype=self.fp,
            device=self.device,
        )
        logits = self.tiles[1]
        of_keys, start = logits[:, :, :count], 0
        for p, end in enumerate(self.prefixes):
            product(
                self.x[:n, start:end],
                columns[start:end],
                of_keys[p],
                None if p == 0 else of_keys[p - 1],
            )
            start = end
        highest = self.options.max_cosine
        self.row_scale = (self.row_norms / self.temperature).T[:, :, None]
        of_keys.mul_(self.key_norms.T[:, None]).mul_(
            self.row_scale if highest is None else self.row_norms.T[:, :, None]
        )
        own, of_own = self.cosine.permute(2, 0, 1), logits[:, :, count:]
        own_logits, hidden = own / self.temperature, self.inputs.hidden
        if highest is not None:
            assert isinstance(highest, tuple), "fits asks for it"
            below = just_below(highest, self.fp, self.device)[:, None, None]
            mask, hidden = mask | (of_keys > below), hidden | (own > below)
            of_keys.div_(self.temperature)
        of_keys.masked_fill_(mask, MASKED_SCORE)
        torch.where(hidden, numbers((MASKED_SCORE,), self.fp, self.device), own_logits, out=of_own)
        self.positive = own_logits[:, :, 0]  # [P, n]
        torch.softmax(logits, 2, out=self.tiles[0])
        largest, top = self.tiles[:2].amax(3)
        self.gap = torch.empty(
            (len(self.prefixes), (count if self.symmetric else 0) + n),
            dtype=self.fp,
            device=self.device,
        )
        self.above = top - self.positive
        torch.sub(self.above, largest.log(), out=self.gap[:, -n:])
        if self.symmetric:
            torch.softmax(logits, 1, out=self.tiles[2])
            top, largest = self.tiles[1:, :, :, :count].amax(2)
            self.own_sums = top.to(torch.float64).exp_().div_(largest)

    def sums(self) -> Tensor:
        """float64 [P, C] the columns' sums of exponentials, to be added to the others'."""
        return self.own_sums

    def finish_columns(self, sums: Tensor) -> None:
        """``sums`` of all ranks: the columns' gaps."""
        self.share = (
            None if self.exchange.world_size == 1 else self.own_sums / sums.clamp_min_(SMALLEST_SUM)
        )
        torch.addcdiv(
            sums.log(),
            self.all_cosines.T,
            self.temperature,
            value=-1,
            out=self.gap[:, : len(self.keys)],
        )

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See fused_losses."""
        prefixes, n, width = len(self.prefixes), self.n, self.gap.shape[1]
        shape, strides = (
            ((prefixes, 2, n), (width, len(self.keys) - self.layout.start, 1))
            if self.symmetric
            else ((prefixes, 1, n), (width, n, 1))
        )
        of_rows = self.gap.as_strided(shape, strides, self.layout.start if self.symmetric else 0)
        found = torch.empty((prefixes + 1, *shape[1:]), dtype=self.fp, device=self.device)
        torch._C._nn.softplus(of_rows, 1, 80, out=found[:prefixes])  # type: ignore[call-arg]
        # With both directions each weight is half of a row's, and the rows that are right count
        # twice.
        torch.lt(self.above[-1].expand(shape[1:]), 0, out=found[prefixes])
        sums = found.mul_(self.weight).sum((1, 2))
        score = self.cosine[:, 0, -1]
        return sums[:prefixes], score, sums[prefixes], self.valid_rows

    # ---------------------------------------------------------------- gradients
    def gradients(self) -> list[Tensor]:
        """All that this rank's rows do; what is to go home: [C, D] to the keys, with prefixes
        [C, P - 1] their moments.
        """
        n, count, keys_needed = self.n, len(self.keys), self.inputs.needs.keys
        negative_grad = self.gap.sigmoid_()
        of_rows = negative_grad[:, -n:].mul_(self.weight)
        if self.symmetric:
            negative_grad[:, :count].mul_(self.column_weight)
        if self.prefix_weights is not None:
            negative_grad.mul_(self.prefix_weights)
        weights, logits = self.tiles[0].mul_(of_rows[:, :, None]), self.tiles[1]
        positive_grad = weights[:, :, count]
        if self.symmetric:
            of_columns = negative_grad[:, :count]
            torch.add(
                of_columns[:, self.layout.start : self.layout.start + n], of_rows, out=positive_grad
            ).neg_()
            if self.share is not None:
                of_columns = torch.mul(of_columns, self.share, out=torch.empty_like(of_columns))
            weights[:, :, :count].addcmul_(self.tiles[2][:, :, :count], of_columns[:, None])
        else:
            torch.neg(of_rows, out=positive_grad)
        width = self.x.shape[1]
        # One buffer, the temperature's last: the backward pass scales it in one piece.
        self.buffer = torch.empty(len(self.x) * width + 1, dtype=self.fp, device=self.device)
        self.gradient = self.buffer[:-1].view(-1, width)
        self.moment: Tensor | None = None
        home = []
        if len(self.prefixes) > 1:
            logits[:, :, count].copy_(self.positive)
            logits.mul_(weights)
            self.moment = torch.empty_like(self.norms)
            of_queries, _, of_hard = self._of(self.moment)
            torch.sum(logits, 2, out=of_queries.T)
            if self.h:
                of_hard.permute(2, 0, 1).copy_(logits[:, :, count + 1 :])
            if keys_needed:
                home.append(
                    torch.empty((count, len(self.prefixes) - 1), dtype=self.fp, device=self.device)
                )
                torch.sum(logits[:-1, :, :count], 1, out=home[0].T)
        weights.mul_(self.row_scale)
        weights[:, :, :count].mul_(self.key_norms.T[:, None])
        weights[:, :, count:].mul_(self.partner_norms.permute(2, 0, 1))
        segments(weights)
        return self._products(weights, keys_needed) + home

    def _products(self, weights: Tensor, keys_needed: bool) -> list[Tensor]:
        count = len(self.keys)
        queries, own_keys, hard = self._of(self.gradient)
        self.of_dimensions = of_dimensions(
            weights[:, :, count:], self.prefixes
        )  # [n, 1 + H, D or 1]
        torch.sum(self.partners * self.of_dimensions, 1, out=queries)
        if self.h:
            torch.mul(self.of_dimensions[:, 1:], self.queries[:, None], out=hard)
        home = (
            own_keys
            if self.exchange.world_size == 1
            else self.gradient.new_empty(count, queries.shape[1])
        )
        start, factors = 0, weights[:, :, :count].to(self.x.dtype)
        for weight, end in zip(factors, self.prefixes, strict=True):
            add_product(queries[:, start:end], weight, self.keys[:, start:end])
            if keys_needed:
                set_product(home[:, start:end], weight.T, self.x[: self.n, start:end])
            start = end
        return [home] if keys_needed else []

    def finish(self, home: Sequence[Tensor]) -> list[Tensor | None]:
        """Of queries, keys, hard negatives and temperature; ``home``: what has come of
        ``gradients``, of this rank's keys.
        """
        n, m, (_, keys, _) = self.n, self.m, self._of(self.gradient)
        if home:
            torch.addcmul(home[0][:n], self.of_dimensions[:, 0], self.queries, out=keys[:n])
            if m > n and self.exchange.world_size > 1:
                keys[n:].copy_(home[0][n:m])
            if self.moment is not None:
                of_keys = self._of(self.moment)[1]
                torch.add(
                    home[1][:n], self.tiles[1][:-1, :, len(self.keys)].T, out=of_keys[:n, :-1]
                )
                if m > n:
                    of_keys[n:, :-1].copy_(home[1][n:m])
        elif not self.inputs.needs.keys:
            keys.zero_()
            if self.moment is not None:
                self._of(self.moment)[1].zero_()
        moment = None if self.moment is None else self.moment.T
        along = project_(self.gradient, self.x, self.norms.T, self.prefixes, moment)
        total = along[:n].sum() if moment is None else moment[:, :n].sum()
        torch.addcdiv(
            numbers((0.0,), self.fp, self.device)[0],
            total,
            self.temperature,
            value=-1,
            out=self.buffer[-1],
        )
        return [*self._of(self.gradient), self.buffer[-1]]
