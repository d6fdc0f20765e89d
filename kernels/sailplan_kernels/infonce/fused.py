"""The losses of a call with their gradients in the forward pass: never more of the scores in
memory than the budget says.

A call may hold several losses (a step's patterns). They go through the same stages side by side,
and what ranks have to tell each other is told once for all of them: everybody's vectors with what
belongs to a row, the sums of the symmetric losses' columns, and the gradients on their way home. So
a call is two collectives, three with a symmetric loss, however many losses it holds (an exchange
that passes shards by sends those beside; so do pairs by id, and tensor-parallel peers among
themselves).

The parts: vectors.py the embeddings, blocks.py who is scored against whom, positives.py the pairs,
per_row_negatives.py a row's own hard negatives, symmetric_term.py the symmetric loss's second half,
exchange_schedule.py the way over the tiles, forward_context.py what all of them read. What happens
inside a tile is an engine's (tile.py). Differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.infonce.blocks import CandidateBlock, QueryBlock
from sailplan_kernels.infonce.exchange_schedule import ExchangeSchedule
from sailplan_kernels.infonce.forward_context import ForwardContext, rows_at_once, score_budget
from sailplan_kernels.infonce.loss_inputs import LossInputs
from sailplan_kernels.infonce.masks import Candidates
from sailplan_kernels.infonce.one_tile import OneTile, Unsafe, fits
from sailplan_kernels.infonce.per_row_negatives import PerRowNegatives
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.infonce.symmetric_term import SymmetricTerm
from sailplan_kernels.tiling.tile import Engine, MaskConfig
from sailplan_kernels.tiling.vectors import Layout, Vectors, bring_home, prepare, send

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def fused_losses(
    all_inputs: Sequence[LossInputs], engine: Engine, weights: Sequence[float]
) -> tuple[Tensor, list[Found]]:
    """This rank's weighted sum (0-d, differentiable once) of the losses of one exchange.

    Of each loss, detached: its prefixes' losses [P], the positives' cosines [N] of the longest
    prefix, this rank's share of the accuracy 0-d, and the valid rows of all ranks 0-d.
    """
    given: list[Tensor] = []
    places: list[list[int]] = []
    for inputs in all_inputs:
        longest = inputs.options.prefixes[-1]
        used = [inputs.raw_queries, inputs.raw_keys, inputs.raw_hard]
        places.append(
            [_place(given, x, longest) for x in used] + [_place(given, inputs.temperature, None)]
        )
    total, *found = _Fused.apply(all_inputs, engine, weights, places, *given)
    return total, [tuple(found[4 * i : 4 * i + 4]) for i in range(len(all_inputs))]  # type: ignore[misc]


def _place(given: list[Tensor], x: Tensor, longest: int | None) -> int:
    """Where ``x``, as far as the longest prefix goes, is among the tensors of the call: every
    tensor once.
    """
    if longest is not None and x.shape[-1] != longest:
        x = x[..., :longest]
    for place, other in enumerate(given):
        if other is x or (
            longest is not None and x.numel() and x._is_view() and _same_view(x, other)
        ):
            return place
    given.append(x)
    return len(given) - 1


def _same_view(x: Tensor, other: Tensor) -> bool:
    """Whether both show the same part of the same tensor."""
    same = other._is_view() and other._base is x._base and other.shape == x.shape
    return same and other.stride() == x.stride() and other.storage_offset() == x.storage_offset()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, all_inputs, engine, weights, places, *given):
        work = _in_one_tile(all_inputs, engine, weights, places, given) or _Work(
            all_inputs, engine, weights, places, given
        )
        total, found = work.values()
        gradients = work.gradients()
        ctx.gradients = [
            x if needed else None
            for x, needed in zip(gradients, ctx.needs_input_grad[4:], strict=True)
        ]
        ctx.kinds = [(x.dtype, x.shape) for x in given]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found)
        return total, *found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        """The gradients wait in full precision, are scaled where they are and given away: no
        copy, so no second time.
        """
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "infonce: found a second backward of one call, expected one; call infonce again"
            )
        if gradient is None:
            return (None,) * (4 + len(gradients))
        if gradient.device.type != "cpu" or gradient != 1:
            # Tensors that were joined lie in one buffer still, which is scaled in one piece.
            for whole in {id(_buffer(x)): _buffer(x) for x in gradients if x is not None}.values():
                whole.mul_(gradient)
        rounded: dict[tuple[int, torch.dtype], Tensor] = {}
        scaled = [
            None if x is None else _rounded(x, dtype, rounded).view(shape)
            for x, (dtype, shape) in zip(gradients, ctx.kinds, strict=True)
        ]
        return None, None, None, None, *scaled


def _rounded(x: Tensor, dtype: torch.dtype, known: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
    """``x`` in ``dtype``; of matrices that lie in one buffer all at once."""
    if x.dtype == dtype or x.dim() < 2 or x._base is None:
        return x.to(dtype)
    key = id(x._base), dtype
    if key not in known:
        known[key] = x._base.to(dtype)
    return known[key].as_strided(x.size(), x.stride(), x.storage_offset())


class _Loss:
    """One loss at work."""

    def __init__(self, context: ForwardContext) -> None:
        self.context, options, needs = context, context.options, context.needs
        rows, keys = context.inputs.query_sizes, context.inputs.key_sizes
        self.shown = [(context.keys, context.inputs.key_notes)]
        context.keys.show(context.exchange, keys, needs.keys)
        if options.query_negatives:
            context.queries.show(context.exchange, rows, needs.queries)
            self.shown.append((context.queries, context.inputs.query_notes))
        if options.shared_hard_negatives:
            context.hard.show(context.exchange, context.inputs.hard_sizes, needs.hard)
            self.shown.append((context.hard, context.inputs.hard_notes))
        self.by_id = context.inputs.wanted is not None

    def begin(self) -> None:
        """All that needs no other rank."""
        self.positives = Positives(self.context)
        self.columns = (
            SymmetricTerm(self.context, self.positives) if self.context.options.symmetric else None
        )

    def notes(self) -> list[Tensor]:
        """What the other ranks are to know of this rank's rows and candidates."""
        told = [_layout(vectors).padded(notes) for vectors, notes in self.shown]
        told.append(self.context.inputs.row_count)
        correction = self.context.inputs.key_log_probability
        if correction is not None:
            told.append(_layout(self.context.keys).padded(correction))
        if self.columns is not None and not self.by_id:
            told += self.columns.notes()
        return told

    def learn(self, notes: list[Tensor], budget: int) -> list[Tensor]:
        """Take this loss's notes of all ranks from the list, whose rest is returned; make the
        sources and the way over the tiles.
        """
        context, inputs, symmetric = (
            self.context,
            self.context.inputs,
            self.context.options.symmetric,
        )
        candidates = []
        alone = context.exchange.world_size == 1
        for vectors, _ in self.shown:
            found = _layout(vectors).rows(notes.pop(0))
            known = alone and vectors is context.keys
            candidates.append(
                Candidates(found[:, :3], inputs.key_valid) if known else Candidates.of(found)
            )
        self.valid_rows = notes.pop(0).sum()
        correction = (
            _layout(context.keys).rows(notes.pop(0))
            if inputs.key_log_probability is not None
            else None
        )
        if self.by_id:
            self.positives.find_by_id(candidates[0])
            self.valid_rows = context.exchange.sum(self.positives.row_valid.sum())
        self.positives.weigh(self.valid_rows)
        self.positives.correct_by(correction)
        queries, anchors = self.positives.queries, self.positives.anchors
        own = context.inputs.raw_hard.shape[1] and not context.options.shared_hard_negatives
        self.hard = PerRowNegatives(context, queries) if own else None

        def rule(
            of: QueryBlock, tags: tuple[int, ...] = inputs.tags_in_use, columns: bool = False
        ) -> MaskConfig:
            return MaskConfig(
                context.prefixes, tags, columns, of.moments, one_temperature=context.one_temperature
            )

        inverse = context.same_inverse if context.one_temperature else context.inverse.new_ones
        self.sources = [
            CandidateBlock(v, c, inverse(len(c.valid)))
            for (v, _), c in zip(self.shown, candidates, strict=True)
        ]
        keys = self.sources[0]
        keys.correction = correction
        keys.blocks = [(queries, rule(queries, columns=symmetric))] + (
            [(anchors, rule(anchors))] if anchors is not None else []
        )
        for source in self.sources[1:]:
            source.blocks = [
                (
                    queries,
                    rule(queries, inputs.tags_in_use if source.vectors is context.queries else ()),
                )
            ]
        if self.columns is not None:
            self.columns.learn(keys, notes if not self.by_id else [])
            notes = notes[0 if self.by_id else 1 if inputs.diagonal else 2 :]
        self.rounds = ExchangeSchedule(context, self.sources, self.positives, self.columns, budget)
        return notes

    def gradients(self) -> None:
        """All that this rank's rows do to vectors and temperatures, once all denominators are
        known.
        """
        context, positives, queries, needs = (
            self.context,
            self.positives,
            self.positives.queries,
            self.context.needs,
        )
        self.rounds.gradients()
        if not context.any_gradient:
            return
        if not self.by_id:
            positives.make_positive_grad()
        per_row = needs.temperature and not context.one_temperature
        if per_row and queries.temperature is None:
            queries.temperature = torch.zeros_like(queries.side.inverse_temperature)
        if queries.moments and queries.moment is None:
            queries.moment = torch.zeros_like(queries.side.inverse_norm)
        if per_row:
            positives.add_temperature()
        if self.hard is not None:
            known = positives.query_coefficients
            self.hard.add_gradient(
                _joined([c.row_log_negatives for c in known]),
                _joined([c.row_negative_grad for c in known]),
            )
        positives.add_own_gradient()
        positives.anchors_home()
        if queries.moments:
            positives.add_moments()
            if needs.queries and len(context.prefixes) > 1:
                assert queries.moment is not None
                context.queries.moment[:, context.share].add_(queries.moment)

    def temperature_sums(self) -> list[tuple[Tensor, Layout]]:
        """What the owners of the keys must add up for their rows' temperatures."""
        if (
            self.columns is None
            or self.by_id
            or self.context.one_temperature
            or not self.context.needs.temperature
        ):
            return []
        return [(self.columns.temperature_sums(), _layout(self.context.keys))]

    def temperature_gradient(self, home: Tensor | None) -> Tensor | None:
        """d loss / d temperature, 0-d or [N]; home: the sums of ``temperature_sums``."""
        found = self._inverse_gradient(home)
        return (
            None
            if found is None
            else found.mul_(self.context.inverse).mul_(self.context.inverse).neg_()
        )

    def _inverse_gradient(self, home: Tensor | None) -> Tensor | None:
        """d loss / d inverse temperature."""
        context, queries = self.context, self.positives.queries
        if not context.needs.temperature:
            return None
        if context.one_temperature:
            # Every part of the loss is a function of cosine / t, so d loss / d (1 / t) is the sum
            # of G * cosine over it.
            anchors = self.positives.anchors
            if queries.moments:
                assert queries.moment is not None
                found = (
                    queries.moment.sum()
                    if anchors is None or anchors.moment is None
                    else queries.moment.sum() + anchors.moment.sum()
                )
            else:
                found = self.read
            return (
                found if context.peers.world_size == 1 else context.peers.sum(found)
            ) / context.inverse
        assert queries.temperature is not None
        if self.columns is not None:
            queries.temperature += self.columns.temperature_gradient(home)
        return context.rows_of_all_peers(queries.temperature)

    def read_temperature(self) -> None:
        """The same sum, read from <vector, its gradient> before gradients of other ranks come
        in: one prefix has no moments.
        """
        queries, context, anchors = self.positives.queries, self.context, self.positives.anchors
        if not context.needs.temperature or queries.moments or not context.one_temperature:
            return
        assert queries.gradient is not None
        found = _dots(queries.side.vectors, queries.gradient, context.rows_at_once)
        if anchors is not None and anchors.moments:
            found = found if anchors.moment is None else found + anchors.moment.sum()
        elif anchors is not None and anchors.gradient is not None:
            found = found + _dots(anchors.side.vectors, anchors.gradient, context.rows_at_once)
        self.read = found.to(context.fp)

    def values(self) -> Found:
        """See fused_losses; of this rank's and its peers' shares."""
        context, positives = self.context, self.positives
        losses = (
            positives.losses[0]
            if len(positives.losses) == 1
            else torch.stack(positives.losses).sum(0)
        )
        if self.columns is not None:
            losses = losses + self.columns.losses
        cosine, correct = (
            positives.mean_cosine(),
            positives.correct(None if self.hard is None else self.hard.top).sum(),
        )
        if context.peers.world_size > 1:
            losses, cosine, correct = (
                context.peers.sum(losses),
                context.rows_of_all_peers(cosine),
                context.peers.sum(correct),
            )
        return (
            losses,
            cosine,
            correct * context.exchange.world_size / positives.counted,
            self.valid_rows,
        )


def _in_one_tile(
    all_inputs: Sequence[LossInputs],
    engine: Engine,
    weights: Sequence[float],
    places: list[list[int]],
    given: Sequence[Tensor],
) -> _OneTiles | None:
    """The losses at work in one tile each, where all of them fit, and no vectors are given to
    several (which would travel twice).
    """
    vectors = [place for where in places for place in where[:3]]
    if len(set(vectors)) < len(vectors) or not all(
        fits(inputs, engine, inputs.options.one_tile_budget // len(all_inputs))
        for inputs in all_inputs
    ):
        return None
    try:
        return _OneTiles(
            [OneTile(inputs, weight) for inputs, weight in zip(all_inputs, weights, strict=True)],
            places,
            len(given),
        )
    except Unsafe:
        return None


class _OneTiles:
    """Losses of one tile each, with the collectives of ``_Work``."""

    def __init__(self, losses: list[OneTile], places: list[list[int]], given: int) -> None:
        self.losses, self.places, self.given, self.exchange = (
            losses,
            places,
            given,
            losses[0].exchange,
        )
        if self.exchange.world_size == 1:
            for loss in losses:
                loss.learn_alone()
            return
        told = [loss.notes() for loss in losses]
        everyone = iter(
            self.exchange.gather_parts(
                [x for loss in losses for x in loss.vectors()]
                + [x for notes in told for x in notes]
            ).wait()
        )
        vectors = [[next(everyone), next(everyone)] for _ in losses]
        for loss, of_keys, notes in zip(losses, vectors, told, strict=True):
            loss.learn(of_keys, [next(everyone) for _ in notes])
        symmetric = [loss for loss in losses if loss.symmetric]
        for loss, sums in zip(
            symmetric, summed([loss.sums() for loss in symmetric], self.exchange.sum), strict=True
        ):
            loss.finish_columns(sums)

    def values(self) -> tuple[Tensor, list[Tensor]]:
        found = [loss.values() for loss in self.losses]
        sums = [
            losses if loss.prefix_weights is None else losses * loss.prefix_weights[:, 0]
            for loss, (losses, *_) in zip(self.losses, found, strict=True)
        ]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum(), [
            x for one in found for x in one
        ]

    def gradients(self) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * self.given
        needs = self.losses[0].inputs.needs
        if not (needs.queries or needs.keys or needs.hard or needs.temperature):
            return found
        parts = [loss.gradients() for loss in self.losses]
        flat = [x for of_loss in parts for x in of_loss]
        home = iter(self.exchange.reduce_scatter_parts(flat) if flat else [])
        for loss, where, of_loss in zip(self.losses, self.places, parts, strict=True):
            *vectors, temperature = loss.finish([next(home) for _ in of_loss])
            for place, x in zip(where[:3], vectors, strict=True):
                found[place] = x
            before = found[where[3]]
            found[where[3]] = (
                temperature if before is None or temperature is None else before + temperature
            )
        return found


def summed(sums: list[Tensor], of_all: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``sums`` over everybody who holds rows: one collective."""
    if not sums:
        return []
    flat = sums[0].flatten() if len(sums) == 1 else torch.cat([x.flatten() for x in sums])
    return [
        part.view(x.shape)
        for part, x in zip(of_all(flat).split([x.numel() for x in sums]), sums, strict=True)
    ]


class _Work:
    """All losses of a call, from the first collective to the last."""

    def __init__(
        self,
        all_inputs: Sequence[LossInputs],
        engine: Engine,
        weights: Sequence[float],
        places: list[list[int]],
        given: Sequence[Tensor],
    ) -> None:
        self.exchange, self.given, self.places = all_inputs[0].exchange, given, places
        known: dict[tuple[object, ...], Vectors] = {}
        self.vectors: dict[int, list[Vectors]] = {}  # by place
        settings = []
        for number, (inputs, weight, where) in enumerate(
            zip(all_inputs, weights, places, strict=True)
        ):
            mine = []
            masks = (inputs.query_valid, inputs.key_valid, inputs.hard_valid.flatten())
            for role, (place, valid, padding) in enumerate(
                zip(where, masks, inputs.padding, strict=False)
            ):
                # A stream that passes by carries the gradient of one round: there every reader has
                # a stream of its own.
                reader = None if self.exchange.materializes_all else (number, role)
                kind = (place, inputs.options.prefixes, inputs.score_dtype, reader)
                mask = valid if padding else None
                if kind in known:
                    known[kind].also_invalid(mask)
                else:
                    x = given[place].flatten(0, -2)
                    known[kind] = Vectors(
                        x,
                        mask,
                        inputs.options.prefixes,
                        inputs.score_dtype,
                        inputs.operand_dtype,
                        inputs.gradient_dtype,
                    )
                    self.vectors.setdefault(place, []).append(known[kind])
                known[kind].uses += 1
                mine.append(known[kind])
            queries, keys, hard = mine
            settings.append(ForwardContext(inputs, engine, queries, keys, hard, weight))
        self.losses = [_Loss(context) for context in settings]
        self.groups = prepare(
            list(known.values()),
            min(p.options.memory_budget for p in all_inputs),
            min(rows_at_once(p) for p in all_inputs),
        )
        for loss in self.losses:
            loss.begin()
        self.shown = [v for v in known.values() if v.layout is not None]
        sent = send(self.exchange, self.shown, [x for loss in self.losses for x in loss.notes()])
        notes = list(sent.arrive())
        for loss in self.losses:
            notes = loss.learn(notes, score_budget(loss.context.inputs) // len(all_inputs))
        for loss in self.losses:
            loss.rounds.statistics()
        self._merge_columns()
        for loss in self.losses:
            loss.rounds.complete()

    def _merge_columns(self) -> None:
        """The columns' sums of exponentials, of all ranks and of all losses: one collective."""
        columns = [loss.columns for loss in self.losses if loss.columns is not None]
        if not columns:
            return
        context, sums = columns[0].context, [each.sums() for each in columns]
        for each, x in zip(
            columns, sums if context.alone else summed(sums, context.sum_of_all), strict=True
        ):
            each.finish_statistics(x)

    def values(self) -> tuple[Tensor, list[Tensor]]:
        found = [loss.values() for loss in self.losses]
        sums = [
            (losses * loss.context.prefix_weights[:, 0]).sum()
            for loss, (losses, *_) in zip(self.losses, found, strict=True)
        ]
        total = (
            sums[0]
            if len(sums) == 1
            else torch.stack(
                [x.to(torch.promote_types(sums[0].dtype, x.dtype)) for x in sums]
            ).sum()
        )
        return total, [x for one in found for x in one]

    def gradients(self) -> list[Tensor | None]:
        """Of everything given: what is not in tiles, and all come home."""
        if not any(loss.context.any_gradient for loss in self.losses):
            return [None] * len(self.given)
        for loss in self.losses:
            loss.gradients()
            loss.read_temperature()
        sums = [loss.temperature_sums() for loss in self.losses]
        home = iter(bring_home(self.exchange, self.shown, [x for of_loss in sums for x in of_loss]))
        for group in self.groups:
            group.finish(self.losses[0].context.peers)
        found: list[Tensor | None] = [None] * len(self.given)
        for loss, where, of_loss in zip(self.losses, self.places, sums, strict=True):
            temperature = loss.temperature_gradient(next(home) if of_loss else None)
            if temperature is not None:
                before = found[where[3]]
                found[where[3]] = (
                    temperature if before is None or temperature is None else before + temperature
                )
        for place, several in self.vectors.items():
            of_place = [v.gradient for v in several if v.group.gradient is not None]
            if of_place:
                found[place] = of_place[0] if len(of_place) == 1 else torch.stack(of_place).sum(0)
        return found


def _buffer(x: Tensor) -> Tensor:
    """What ``x`` is a part of."""
    return x if x._base is None else x._base


def _layout(vectors: Vectors) -> Layout:
    assert vectors.layout is not None
    return vectors.layout


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _dots(a: Tensor, b: Tensor, at_once: int) -> Tensor:
    """0-d sum of the products of all entries."""
    parts = [
        (x.to(y.dtype) * y).sum() for x, y in zip(a.split(at_once), b.split(at_once), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
