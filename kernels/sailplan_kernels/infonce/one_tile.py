"""A loss whose scores fit into the budget at once: one tile, worked through in as few operations
as there can be.

Up to some hundred rows a rank, launching an operation costs more than its arithmetic, so here all
prefixes, both directions and a row's positive and hard negatives go through each operation
together. What is computed, and what ranks tell each other, is what fused.py computes and tells:
ranks may differ in which of the two they take. Rows' and columns' softmax weights come out of
torch's softmax, which leaves a sum of exponentials as the inverse of its largest weight.

Columns of the tile [P, n, C + partners] are all ranks' keys. A row's partners are its positive and
its own hard negatives, multiplied one by one. Without hard negatives, and where products are not
rounded, it has none: the positive is read among the keys, and its place there then holds its
gradient.
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
    add_product,
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
        self.apart = self.h > 0 or inputs.operand_dtype != self.fp
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
        if self.apart:
            self._score_partners()

    def _measure(self) -> None:
        """Inverse lengths [P, ...] of the prefixes of all vectors."""
        self.norms = torch.empty(
            (len(self.x), len(self.prefixes)), dtype=self.fp, device=self.device
        ).T  # a vector's lie side by side: they travel with it
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

    def _score_partners(self) -> None:
        """Cosines [P, n, 1 + H] with the positive and the own hard negatives."""
        self.partners, self.partner_norms = (
            self.keys[: self.n, None],
            self.key_norms[:, : self.n, None],
        )
        if self.h:
            hard = self.x[self.n + self.m :].view(self.n, self.h, -1)
            self.partners = torch.cat([self.partners, hard], 1)
            self.partner_norms = torch.cat([self.partner_norms, self._hard(self.norms)], 2)
        both = self.partners * self.queries.to(self.fp)[:, None]
        self.cosine = torch.empty(
            (len(self.prefixes), *both.shape[:2]), dtype=self.fp, device=self.device
        )
        for cosine, end in zip(self.cosine, self.prefixes, strict=True):
            torch.sum(both[..., :end], -1, out=cosine)
        self.cosine.mul_(self.partner_norms).mul_(self.row_norms[:, :, None])

    # ---------------------------------------------------------------- what ranks tell each other
    def vectors(self) -> list[Tensor]:
        """This rank's keys and their norms."""
        return [self.layout.padded(self.keys), self.layout.padded(self.key_norms.T)]

    def notes(self) -> list[Tensor]:
        told = [self.layout.padded(self.inputs.key_notes), self.inputs.row_count]
        if self.symmetric:
            if self.apart:
                cosine = self.cosine[:, :, 0]
            else:
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
            self.cosines_of_all = notes[2][:, :-1].T  # [P, C]
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
        """bool [n, C], see masks.py; None: no key but the row's own."""
        rows_padded, some_keys_padded = (
            self.symmetric and self.inputs.padding[0],
            keys_padded or self.inputs.padding[1],
        )
        tags = self.inputs.tags_in_use
        if not (any(tags) or rows_padded or some_keys_padded):
            return None
        return excluded(self.inputs.anchor_notes, notes, tags, some_keys_padded, rows_padded)

    # ---------------------------------------------------------------- the tile
    def _statistics(self, mask: Tensor | None) -> None:
        """Scores, both softmaxes, and the gaps [P, columns + n] between negatives and positive;
        mask: what a row excludes; None: its own key.
        """
        n, count, highest, only_own = (
            self.n,
            self.keys.shape[0],
            self.options.max_cosine,
            mask is None,
        )
        self.tiles = torch.empty(
            (3 if self.symmetric else 2, len(self.prefixes), n, count + self.beside),
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
        at_own_keys = of_keys.diagonal(self.layout.start, 1, 2)
        own = self.cosine / self.temperature if self.apart else at_own_keys.clone()[:, :, None]
        hidden = self.inputs.hidden
        if highest is not None:
            assert isinstance(highest, tuple), "fits asks for it"
            below = just_below(highest, self.fp, self.device)[:, None, None]
            similar = of_keys > below
            mask = similar if mask is None else similar.logical_or_(mask)
            of_keys.div_(self.temperature)
            if self.apart:
                hidden = hidden | (self.cosine > below)
            else:
                own.div_(self.temperature)
        if mask is not None:
            of_keys.masked_fill_(mask, MASKED_SCORE)
        if only_own:
            at_own_keys.fill_(MASKED_SCORE)
        if self.apart:
            nothing = numbers((MASKED_SCORE,), self.fp, self.device)
            torch.where(hidden, nothing, own, out=logits[:, :, count:])
        self.positive = own[:, :, 0]  # [P, n]
        self._reduce(logits)

    @property
    def beside(self) -> int:
        """Columns of the tile beside those of the keys."""
        return 1 + self.h if self.apart else 0

    def _of_keys(self, tile: Tensor) -> Tensor:
        """[..., n, C] without the partners."""
        return tile[..., : self.keys.shape[0]] if self.apart else tile

    def _of_positives(self, tile: Tensor) -> Tensor:
        """[P, n] where a row has its positive."""
        if self.apart:
            return tile[:, :, self.keys.shape[0]]
        return tile.diagonal(self.layout.start, 1, 2)

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
        self.share = self.own_sums / sums.clamp_min_(SMALLEST_SUM)
        torch.addcdiv(
            sums.log_(),
            self.cosines_of_all,
            self.temperature,
            value=-1,
            out=self.gap[:, : -self.n],
        )

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
        score = self.cosine[-1, :, 0] if self.apart else self.positive[-1] * self.temperature
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
        torch.neg(positive_grad, out=self._of_positives(weights))
        # One buffer, the temperature's last: the backward pass scales it in one piece.
        width = self.x.shape[1]
        self.buffer = torch.empty(len(self.x) * width + 1, dtype=self.fp, device=self.device)
        self.gradient = self.buffer[:-1].view(-1, width)
        home = self._moments(weights, logits) if len(self.prefixes) > 1 else []
        weights.mul_(self.row_scale)
        self._of_keys(weights).mul_(self.key_norms[:, None])
        if self.apart:
            weights[:, :, self.keys.shape[0] :].mul_(self.partner_norms)
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
            self._hard(self.moment).copy_(logits[:, :, count + 1 :])
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
        add = set_product
        if self.apart:
            self.of_dimensions = of_dimensions(
                weights[:, :, count:], self.prefixes
            )  # [n, 1 + H, D or 1]
            torch.sum(self.partners * self.of_dimensions, 1, out=queries)
            add = add_product
        if self.h:
            of_hard = self.gradient[n + m :].view(n, self.h, -1)
            torch.mul(self.of_dimensions[:, 1:], self.queries[:, None], out=of_hard)
        start, factors = 0, self._of_keys(weights).to(self.x.dtype)
        for weight, end in zip(factors, self.prefixes, strict=True):
            add(queries[:, start:end], weight, self.keys[:, start:end])
            if needed:
                set_product(home[:, start:end], weight.T, self.queries[:, start:end])
            start = end
        return [home] if needed else []

    def _keys_home(self, keys: Tensor, home: Tensor) -> None:
        """What came home, and what the rows do to their positives."""
        n, m = self.n, self.m
        if self.apart:
            of_positives = self.of_dimensions[:, 0]
            torch.addcmul(home[:n], of_positives, self.queries, out=keys[:n])
        done = n if self.apart else 0
        if not self.alone and m > done:
            keys[done:].copy_(home[done:m])

    def _moments_home(self, moment: Tensor, home: Tensor) -> None:
        n, done = self.n, 0
        if self.apart:
            of_positives = self._of_positives(self.tiles[1])[:-1]
            torch.add(home[:, :n], of_positives, out=moment[:, :n])
            done = n
        if self.m > done:
            moment[:, done:].copy_(home[:, done:])

    def finish(self, home: Sequence[Tensor]) -> list[Tensor | None]:
        """Of queries, keys, hard negatives and temperature; ``home``: what has come of
        ``gradients``, of this rank's keys.
        """
        n, m, several = self.n, self.m, len(self.prefixes) > 1
        queries, keys, hard = self.gradient.split_with_sizes((n, m, n * self.h))
        if not self.inputs.needs.keys:
            keys.zero_()
        else:
            self._keys_home(keys, home[0])
            if several:
                self._moments_home(self.moment[:-1, n : n + m], home[1][:m].T)
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
