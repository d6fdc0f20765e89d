"""A loss whose scores fit into the budget at once: one tile, worked through in as few operations
as there can be.

Up to some hundred rows a rank, launching an operation costs more than its arithmetic, so here all
prefixes, both directions and a row's positive and hard negatives go through each operation
together. What is computed, and what ranks tell each other, is what fused.py computes and tells:
ranks may differ in which of the two they take. Rows' and columns' softmax weights come out of
torch's softmax, which leaves a sum of exponentials as the inverse of its largest weight.

Columns of the tile [P, n, C + H] are all ranks' keys and the row's own hard negatives. The positive
stands among the keys: it is read there, no part of any softmax, and its place then holds its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sailplan_kernels.exchange.row_split import peers_of
from sailplan_kernels.infonce.forward_context import numbers
from sailplan_kernels.infonce.loss_inputs import LossInputs
from sailplan_kernels.infonce.masks import excluded, just_below
from sailplan_kernels.tiling.normalize import SAFE_LENGTH, project_
from sailplan_kernels.tiling.products import (
    of_dimensions,
    prefix_dots,
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
    size, width, hard = (
        inputs.score_dtype.itemsize,
        inputs.raw_queries.shape[1],
        inputs.raw_hard.shape[1],
    )
    columns = max(inputs.key_sizes) * exchange.world_size + hard
    tile = (
        n
        * columns
        * (
            (3 if options.symmetric else 2) * prefixes * size
            + (1 if options.max_cosine is None else prefixes)
        )
    )
    return (
        tile + 3 * n * hard * width * size + (n * (2 + hard) + len(inputs.raw_keys)) * width * size
        <= budget
    )


@lru_cache(maxsize=16)
def even_weights(n: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[columns + n] the weights of a lone rank's columns and rows where every row counts; without
    columns those of a loss of one direction.
    """
    each = torch.full((n,), (0.5 if columns else 1.0) / n, dtype=dtype)
    return torch.cat([each, each.new_zeros(columns - n), each] if columns else [each]).to(device)


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
        self.alone = inputs.exchange.world_size == 1
        self.n, self.m, self.h = (
            inputs.raw_queries.shape[0],
            inputs.raw_keys.shape[0],
            inputs.raw_hard.shape[1],
        )
        self.layout = Layout(inputs.key_sizes, inputs.exchange)
        self.temperature = inputs.temperature.detach()
        self.device = self.temperature.device
        weights = tuple(weight * w for w in self.options.prefix_weights)
        self.prefix_weights = (
            None
            if all(w == 1 for w in weights)
            else numbers(weights, self.fp, self.device)[:, None]
        )
        given = [inputs.raw_queries, inputs.raw_keys]
        if self.h:
            given.append(inputs.raw_hard.flatten(0, 1))
        longest = self.prefixes[-1]
        if longest != inputs.raw_queries.shape[1]:
            given = [x[:, :longest] for x in given]
        self.x = torch.cat(given).to(inputs.operand_dtype)
        if any(inputs.padding):
            self.x.masked_fill_(inputs.invalid[:, None], 0.0)
        self.queries, self.keys = self.x[: self.n], self.x[self.n : self.n + self.m]
        self._measure()

    def _measure(self) -> None:
        """Inverse lengths [P, ...] of the prefixes of all vectors."""
        self.norms = torch.empty(
            (len(self.prefixes), len(self.x)), dtype=self.fp, device=self.device
        )
        for norms, end in zip(self.norms, self.prefixes, strict=True):
            torch.linalg.vector_norm(self.x[:, :end], dim=1, dtype=self.fp, out=norms)
        safe = False
        if self.device.type == "cpu":
            low, high = self.norms.aminmax()
            safe = low.item() > SAFE_LENGTH and high.item() < 1 / SAFE_LENGTH
            length = self.norms[-1]
            if (
                not safe
                and not (
                    (length == 0) | ((length > SAFE_LENGTH) & (length < 1 / SAFE_LENGTH))
                ).all()
            ):
                raise Unsafe
        self.norms.reciprocal_()
        if not safe:
            self.norms.nan_to_num_(nan=torch.nan, posinf=0.0)
        self.row_norms, self.key_norms = (
            self.norms[:, : self.n],
            self.norms[:, self.n : self.n + self.m],
        )

    def _hard(self, x: Tensor) -> Tensor:
        """[P, n, H] of the hard negatives, from [P, n + m + n H]."""
        return x[:, self.n + self.m :].unflatten(1, (self.n, self.h))

    # ---------------------------------------------------------------- what ranks tell each other
    def vectors(self) -> list[Tensor]:
        """This rank's keys and their norms."""
        return [self.layout.padded(self.keys), self.layout.padded(self.key_norms.T)]

    def notes(self) -> list[Tensor]:
        told = [self.layout.padded(self.inputs.key_notes), self.inputs.row_count]
        if self.symmetric:
            cosine = prefix_dots(self.queries, self.keys[: self.n], self.prefixes, self.fp)
            cosine.mul_(self.row_norms).mul_(self.key_norms[:, : self.n])
            told.append(
                self.layout.padded(torch.cat([cosine.T, self.inputs.row_valid[:, None]], 1))
            )
        return told

    def learn(self, vectors: list[Tensor], notes: list[Tensor]) -> None:
        """Everybody's, as ``vectors`` and ``notes`` of all ranks."""
        self.keys, self.key_norms = vectors[0], vectors[1].T
        self.valid_rows = notes[1].sum()
        each = self._share_of_a_row()
        if self.symmetric:
            columns = notes[2][:, -1] * each
            self.positives_of_all = notes[2][:, :-1].T / self.temperature  # [P, C]
            self.weight = columns[self.layout.start : self.layout.start + self.n]
            self.weights = torch.cat([columns, self.weight])
        else:
            self.weight = self.weights = self.inputs.row_valid * each
        uneven = any(size != self.layout.longest for size in self.layout.sizes)
        self._statistics(self._excluded(notes[0], uneven or not self.alone))

    def learn_alone(self) -> None:
        """``learn`` where there is no other rank."""
        self.valid_rows = self.inputs.row_count.sum()
        columns = self.m if self.symmetric else 0
        if self.inputs.plain:
            self.weights = even_weights(self.n, columns, self.device, self.fp)
            self.weight = self.weights[-self.n :]
            self._statistics(None)
            return
        self.weight = self.weights = self.inputs.row_valid * self._share_of_a_row()
        if columns:
            beyond = self.weight.new_zeros(columns - self.n)
            self.weights = torch.cat([self.weight, beyond, self.weight])
        self._statistics(self._excluded(self.inputs.key_notes, False))

    def _share_of_a_row(self) -> Tensor:
        """0-d weight of each row that counts, in each direction."""
        counted = self.valid_rows if self.inputs.any_row else self.valid_rows.clamp_min(1)
        part = self.exchange.world_size / (2 if self.symmetric else 1)
        return numbers((part,), self.fp, self.device)[0] / counted

    def _excluded(self, notes: Tensor, keys_padded: bool) -> Tensor | None:
        """bool [n, C], see masks.py; None: no key but the own ones."""
        rows_padded, some_keys_padded = (
            self.symmetric and self.inputs.padding[0],
            keys_padded or self.inputs.padding[1],
        )
        tags = tuple(tag for tag in self.inputs.tags_in_use if tag)  # numbers: known by the place
        if not (tags or rows_padded or some_keys_padded):
            return None
        return excluded(self.inputs.anchor_notes, notes, tags, some_keys_padded, rows_padded)

    # ---------------------------------------------------------------- the tile
    def _statistics(self, mask: Tensor | None) -> None:
        """Scores, both softmaxes, and the gaps [P, columns + n] between negatives and positive;
        mask: what a row excludes beside its own key.
        """
        n, count, highest = self.n, self.keys.shape[0], self.options.max_cosine
        self.tiles = torch.empty(
            (3 if self.symmetric else 2, len(self.prefixes), n, count + self.h),
            dtype=self.fp,
            device=self.device,
        )
        logits = self.tiles[1]
        of_keys, columns, start = self._of_keys(logits), self.keys.T, 0
        for p, end in enumerate(self.prefixes):
            product(
                self.queries[:, start:end],
                columns[start:end],
                of_keys[p],
                None if p == 0 else of_keys[p - 1],
            )
            start = end
        self.row_scale = (self.row_norms / self.temperature)[:, :, None]
        of_keys.mul_(self.key_norms[:, None]).mul_(
            self.row_scale if highest is None else self.row_norms[:, :, None]
        )
        own = self._of_positives(logits)
        self.positive = own.clone()  # [P, n]
        hard = self._score_hard() if self.h else None
        if highest is not None:
            assert isinstance(highest, tuple), "fits asks for it"
            below = just_below(highest, self.fp, self.device)[:, None, None]
            similar = of_keys > below
            mask = similar if mask is None else similar.logical_or_(mask)
            self.positive.div_(self.temperature)
            of_keys.div_(self.temperature)
        if mask is not None:
            of_keys.masked_fill_(mask, MASKED_SCORE)
        own.fill_(MASKED_SCORE)
        if hard is not None:
            hidden = self.inputs.hidden[:, 1:]
            if highest is not None:
                hidden = hidden | (hard > below)
            torch.where(
                hidden,
                numbers((MASKED_SCORE,), self.fp, self.device),
                hard.div_(self.temperature),
                out=logits[:, :, count:],
            )
        self._reduce(logits)

    def _of_keys(self, tile: Tensor) -> Tensor:
        """[..., n, C] without the hard negatives."""
        return tile[..., : self.keys.shape[0]] if self.h else tile

    def _of_positives(self, tile: Tensor) -> Tensor:
        """[P, n] where rows meet their positives."""
        return self._of_keys(tile).diagonal(self.layout.start, 1, 2)

    def _score_hard(self) -> Tensor:
        """Cosines [P, n, H] with the own hard negatives."""
        self.hard = self.x[self.n + self.m :].view(self.n, self.h, -1)
        self.hard_norms = self._hard(self.norms)
        found = prefix_dots(self.hard, self.queries[:, None], self.prefixes, self.fp)
        return found.mul_(self.hard_norms).mul_(self.row_norms[:, :, None])

    def _reduce(self, logits: Tensor) -> None:
        n, start = self.n, self.layout.start
        columns = self.keys.shape[0] if self.symmetric else 0
        torch.softmax(logits, 2, out=self.tiles[0])
        largest, top = self.tiles[:2].amax(3)
        self.gap = torch.empty((len(self.prefixes), columns + n), dtype=self.fp, device=self.device)
        self.above = top - self.positive
        torch.sub(self.above, largest.log_(), out=self.gap[:, columns:])
        if not self.symmetric:
            return
        torch.softmax(logits, 1, out=self.tiles[2])
        top, largest = self._of_keys(self.tiles[1:]).amax(2)
        if self.alone:
            of_columns = torch.sub(top, largest.log_(), out=self.gap[:, :columns])
            of_columns[:, start : start + n].sub_(self.positive)
        else:
            self.own_sums = top.to(torch.float64).exp_().div_(largest)

    def sums(self) -> Tensor:
        """float64 [P, C] the columns' sums of exponentials, to be added to the others'."""
        return self.own_sums

    def finish_columns(self, sums: Tensor) -> None:
        """``sums`` of all ranks: the columns' gaps, and this rank's share of their softmax."""
        self.share = (self.own_sums / sums.clamp_min_(SMALLEST_SUM)).to(self.fp)
        torch.sub(sums.log_(), self.positives_of_all, out=self.gap[:, : -self.n])

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See fused_losses."""
        prefixes, n, width = len(self.prefixes), self.n, self.gap.shape[1]
        start = self.layout.start
        if self.symmetric:
            shape, strides = (prefixes, 2, n), (width, width - n - start, 1)
        else:
            shape, strides, start = (prefixes, 1, n), (width, n, 1), 0
        of_rows = self.gap.as_strided(shape, strides, start)
        found = torch.empty((prefixes + 1, *shape[1:]), dtype=self.fp, device=self.device)
        torch._C._nn.softplus(of_rows, 1, 80, out=found[:prefixes])  # type: ignore[call-arg]
        # With both directions each weight is half of a row's, and the rows that are right count
        # twice.
        torch.lt(self.above[-1].expand(shape[1:]), 0, out=found[prefixes])
        sums = found.mul_(self.weight).sum((1, 2))
        score = self.positive[-1] * self.temperature
        return sums[:prefixes], score, sums[prefixes], self.valid_rows

    # ---------------------------------------------------------------- gradients
    def gradients(self) -> list[Tensor]:
        """All that this rank's rows do; what is to go home: [C, D] to the keys, with prefixes
        [C, P - 1] their moments.
        """
        columns = self.gap.shape[1] - self.n
        negative_grad = self.gap.sigmoid_().mul_(self.weights)
        if self.prefix_weights is not None:
            negative_grad.mul_(self.prefix_weights)
        positive_grad = of_rows = negative_grad[:, columns:]
        weights, logits = self.tiles[0].mul_(of_rows[:, :, None]), self.tiles[1]
        if self.symmetric:
            of_columns, start = negative_grad[:, :columns], self.layout.start
            positive_grad = of_rows + of_columns[:, start : start + self.n]
            if not self.alone:
                of_columns.mul_(self.share)
            self._of_keys(weights).addcmul_(self._of_keys(self.tiles[2]), of_columns[:, None])
        own = self._of_positives(weights)
        torch.neg(positive_grad, out=own)
        # One buffer, the temperature's last: the backward pass scales it in one piece.
        width = self.x.shape[1]
        self.buffer = torch.empty(len(self.x) * width + 1, dtype=self.fp, device=self.device)
        self.gradient = self.buffer[:-1].view(-1, width)
        home = self._moments(weights, logits) if len(self.prefixes) > 1 else []
        weights.mul_(self.row_scale)
        self._of_keys(weights).mul_(self.key_norms[:, None])
        if self.h:
            weights[:, :, self.keys.shape[0] :].mul_(self.hard_norms)
        segments(weights)
        return self._products(weights) + home

    def _moments(self, weights: Tensor, logits: Tensor) -> list[Tensor]:
        """Sums [P, ...] of each vector's gradients times scores; what is to go home of it."""
        n, m, count = self.n, self.m, self.keys.shape[0]
        self._of_positives(logits).copy_(self.positive)
        logits.mul_(weights)
        self.moment = torch.empty_like(self.norms)
        torch.sum(logits, 2, out=self.moment[:, :n])
        if self.h:
            self._hard(self.moment).copy_(logits[:, :, count:])
        if not self.inputs.needs.keys:
            self.moment[:, n : n + m].zero_()
            return []
        home = torch.empty((count, len(self.prefixes) - 1), dtype=self.fp, device=self.device)
        torch.sum(self._of_keys(logits)[:-1], 1, out=home.T)
        return [home]

    def _products(self, weights: Tensor) -> list[Tensor]:
        n, m, count, needed = self.n, self.m, self.keys.shape[0], self.inputs.needs.keys
        queries, own_keys = self.gradient[:n], self.gradient[n : n + m]
        home = own_keys if self.alone else self.gradient.new_empty(count, queries.shape[1])
        factors = self._of_keys(weights)
        if self.x.dtype != self.fp:
            # What is rounded is the sum of the others, not the largest weight.
            own = self._of_positives(weights)
            self.positive_grad = of_dimensions(own, self.prefixes)
            own.zero_()
            factors = factors.to(self.x.dtype)
        start = 0
        for weight, end in zip(factors, self.prefixes, strict=True):
            set_product(queries[:, start:end], weight, self.keys[:, start:end])
            if needed:
                set_product(home[:, start:end], weight.T, self.queries[:, start:end])
            start = end
        if self.x.dtype != self.fp:
            queries.addcmul_(self.positive_grad, self.x[n : 2 * n])
            if needed:
                home[self.layout.start : self.layout.start + n].addcmul_(
                    self.positive_grad, self.queries
                )
        if self.h:
            of_hard = of_dimensions(weights[:, :, count:], self.prefixes)  # [n, H, D or 1]
            queries.add_((self.hard * of_hard).sum(1))
            torch.mul(
                of_hard,
                self.queries[:, None],
                out=self.gradient[n + m :].view(n, self.h, -1),
            )
        return [home] if needed else []

    def finish(self, home: Sequence[Tensor]) -> list[Tensor | None]:
        """Of queries, keys, hard negatives and temperature; ``home``: what has come of
        ``gradients``, of this rank's keys.
        """
        n, m, several = self.n, self.m, len(self.prefixes) > 1
        queries, keys, hard = self.gradient.split_with_sizes((n, m, n * self.h))
        if not self.inputs.needs.keys:
            keys.zero_()
        elif not self.alone:
            keys.copy_(home[0][:m])
        if several and self.inputs.needs.keys:
            self.moment[:-1, n : n + m].copy_(home[1][:m].T)
        along = project_(
            self.gradient, self.x, self.norms, self.prefixes, self.moment if several else None
        )
        total = self.moment[:, :n].sum() if several else along[:n].sum()
        torch.addcdiv(
            numbers((0.0,), self.fp, self.device)[0],
            total,
            self.temperature,
            value=-1,
            out=self.buffer[-1],
        )
        return [queries, keys, hard.view(n, self.h, -1) if self.h else hard, self.buffer[-1]]
