"""The losses of a call with their gradients in the forward pass: never more of the scores in memory than the budget says.

A call may hold several losses (a step's patterns). They go through the same stages side by side, and what ranks have to tell
each other is told once for all of them: everybody's vectors with what belongs to a row, the sums of the symmetric losses'
columns, and the gradients on their way home. So a call is two collectives, three with a symmetric loss, however many losses it
holds (an exchange that passes shards by sends those beside; so do pairs by id, and tensor-parallel peers among themselves).

The parts: vectors.py the embeddings, sources.py who is scored against whom, positives.py the pairs, own_hard.py a row's own hard
negatives, columns.py the symmetric loss's second half, rounds.py the way over the tiles, setting.py what all of them read. What
happens inside a tile is an engine's (tile.py). Differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.infonce.columns import Columns
from sailplan_kernels.infonce.masks import Candidates
from sailplan_kernels.infonce.one_tile import OneTile, Unsafe, fits
from sailplan_kernels.infonce.own_hard import OwnHard
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.rounds import Rounds
from sailplan_kernels.infonce.setting import Setting, rows_at_once, score_budget
from sailplan_kernels.infonce.sources import Anchors, Source
from sailplan_kernels.tiling.tile import Engine, Rule
from sailplan_kernels.tiling.vectors import Layout, Vectors, bring_home, prepare, send

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def fused_losses(problems: Sequence[Problem], engine: Engine, weights: Sequence[float]) -> tuple[Tensor, list[Found]]:
    """This rank's weighted sum (0-d, differentiable once) of the losses of one exchange.

    Of each loss, detached: its prefixes' losses [P], the positives' cosines [N] of the longest prefix, this rank's share of the
    accuracy 0-d, and the valid rows of all ranks 0-d.
    """
    given: list[Tensor] = []
    places: list[list[int]] = []
    for problem in problems:
        longest = problem.options.prefixes[-1]
        used = [problem.raw_queries, problem.raw_keys, problem.raw_hard]
        places.append([_place(given, x, longest) for x in used] + [_place(given, problem.temperature, None)])
    total, *found = _Fused.apply(problems, engine, weights, places, *given)
    return total, [tuple(found[4 * i : 4 * i + 4]) for i in range(len(problems))]  # type: ignore[misc]


def _place(given: list[Tensor], x: Tensor, longest: int | None) -> int:
    """Where ``x``, as far as the longest prefix goes, is among the tensors of the call: every tensor once."""
    if longest is not None and x.shape[-1] != longest:
        x = x[..., :longest]
    for place, other in enumerate(given):
        if other is x or (longest is not None and x.numel() and x._is_view() and _same_view(x, other)):
            return place
    given.append(x)
    return len(given) - 1


def _same_view(x: Tensor, other: Tensor) -> bool:
    """Whether both show the same part of the same tensor."""
    same = other._is_view() and other._base is x._base and other.shape == x.shape
    return same and other.stride() == x.stride() and other.storage_offset() == x.storage_offset()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problems, engine, weights, places, *given):
        work = _in_one_tile(problems, engine, weights, places, given) or _Work(problems, engine, weights, places, given)
        total, found = work.values()
        gradients = work.gradients()
        ctx.gradients = [x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad[4:], strict=True)]
        ctx.kinds = [(x.dtype, x.shape) for x in given]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found)
        return total, *found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        """The gradients wait in full precision, are scaled where they are and given away: no copy, so no second time."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("infonce: found a second backward of one call, expected one; call infonce again")
        if gradient is None:
            return (None,) * (4 + len(gradients))
        if gradient.device.type != "cpu" or gradient != 1:
            # Tensors that were joined lie in one buffer still, which is scaled in one piece.
            for whole in {id(_buffer(x)): _buffer(x) for x in gradients if x is not None}.values():
                whole.mul_(gradient)
        rounded: dict[tuple[int, torch.dtype], Tensor] = {}
        scaled = [None if x is None else _rounded(x, dtype, rounded).view(shape) for x, (dtype, shape) in zip(gradients, ctx.kinds, strict=True)]
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

    def __init__(self, setting: Setting) -> None:
        self.setting, options, needs = setting, setting.options, setting.needs
        rows, keys = setting.problem.query_sizes, setting.problem.key_sizes
        self.shown = [(setting.keys, setting.problem.key_notes)]
        setting.keys.show(setting.exchange, keys, needs.keys)
        if options.query_negatives:
            setting.queries.show(setting.exchange, rows, needs.queries)
            self.shown.append((setting.queries, setting.problem.query_notes))
        if options.shared_hard_negatives:
            setting.hard.show(setting.exchange, setting.problem.hard_sizes, needs.hard)
            self.shown.append((setting.hard, setting.problem.hard_notes))
        self.by_id = setting.problem.wanted is not None

    def begin(self) -> None:
        """All that needs no other rank."""
        self.positives = Positives(self.setting)
        self.columns = Columns(self.setting, self.positives) if self.setting.options.symmetric else None

    def notes(self) -> list[Tensor]:
        """What the other ranks are to know of this rank's rows and candidates."""
        told = [_layout(vectors).padded(notes) for vectors, notes in self.shown]
        told.append(self.setting.problem.row_count)
        correction = self.setting.problem.key_log_probability
        if correction is not None:
            told.append(_layout(self.setting.keys).padded(correction))
        if self.columns is not None and not self.by_id:
            told += self.columns.notes()
        return told

    def learn(self, notes: list[Tensor], budget: int) -> list[Tensor]:
        """Take this loss's notes of all ranks from the list, whose rest is returned; make the sources and the way over the tiles."""
        setting, problem, symmetric = self.setting, self.setting.problem, self.setting.options.symmetric
        candidates = []
        alone = setting.exchange.world_size == 1
        for vectors, _ in self.shown:
            found = _layout(vectors).rows(notes.pop(0))
            known = alone and vectors is setting.keys
            candidates.append(Candidates(found[:, :3], problem.key_valid) if known else Candidates.of(found))
        self.valid_rows = notes.pop(0).sum()
        correction = _layout(setting.keys).rows(notes.pop(0)) if problem.key_log_probability is not None else None
        if self.by_id:
            self.positives.find_by_id(candidates[0])
            self.valid_rows = setting.exchange.sum(self.positives.row_valid.sum())
        self.positives.weigh(self.valid_rows)
        self.positives.correct_by(correction)
        queries, anchors = self.positives.queries, self.positives.anchors
        own = setting.problem.raw_hard.shape[1] and not setting.options.shared_hard_negatives
        self.hard = OwnHard(setting, queries) if own else None

        def rule(of: Anchors, tags: tuple[int, ...] = problem.tags_in_use, columns: bool = False) -> Rule:
            return Rule(setting.prefixes, tags, columns, of.moments, one_temperature=setting.one_temperature)

        inverse = setting.same_inverse if setting.one_temperature else setting.inverse.new_ones
        self.sources = [Source(v, c, inverse(len(c.valid))) for (v, _), c in zip(self.shown, candidates, strict=True)]
        keys = self.sources[0]
        keys.correction = correction
        keys.blocks = [(queries, rule(queries, columns=symmetric))] + ([(anchors, rule(anchors))] if anchors is not None else [])
        for source in self.sources[1:]:
            source.blocks = [(queries, rule(queries, problem.tags_in_use if source.vectors is setting.queries else ()))]
        if self.columns is not None:
            self.columns.learn(keys, notes if not self.by_id else [])
            notes = notes[0 if self.by_id else 1 if problem.diagonal else 2 :]
        self.rounds = Rounds(setting, self.sources, self.positives, self.columns, budget)
        return notes

    def gradients(self) -> None:
        """All that this rank's rows do to vectors and temperatures, once all denominators are known."""
        setting, positives, queries, needs = self.setting, self.positives, self.positives.queries, self.setting.needs
        self.rounds.gradients()
        if not setting.any_gradient:
            return
        if not self.by_id:
            positives.make_pull()
        per_row = needs.temperature and not setting.one_temperature
        if per_row and queries.temperature is None:
            queries.temperature = torch.zeros_like(queries.side.inverse_temperature)
        if queries.moments and queries.moment is None:
            queries.moment = torch.zeros_like(queries.side.inverse_norm)
        if per_row:
            positives.add_temperature()
        if self.hard is not None:
            known = positives.query_coefficients
            self.hard.add_gradient(_joined([c.row_log_negatives for c in known]), _joined([c.row_push for c in known]))
        positives.add_own_gradient()
        positives.anchors_home()
        if queries.moments:
            positives.add_moments()
            if needs.queries and len(setting.prefixes) > 1:
                assert queries.moment is not None
                setting.queries.moment[:, setting.share].add_(queries.moment)

    def temperature_sums(self) -> list[tuple[Tensor, Layout]]:
        """What the owners of the keys must add up for their rows' temperatures."""
        if self.columns is None or self.by_id or self.setting.one_temperature or not self.setting.needs.temperature:
            return []
        return [(self.columns.temperature_sums(), _layout(self.setting.keys))]

    def temperature_gradient(self, home: Tensor | None) -> Tensor | None:
        """d loss / d temperature, 0-d or [N]; home: the sums of ``temperature_sums``."""
        found = self._inverse_gradient(home)
        return None if found is None else found.mul_(self.setting.inverse).mul_(self.setting.inverse).neg_()

    def _inverse_gradient(self, home: Tensor | None) -> Tensor | None:
        """d loss / d inverse temperature."""
        setting, queries = self.setting, self.positives.queries
        if not setting.needs.temperature:
            return None
        if setting.one_temperature:
            # Every part of the loss is a function of cosine / t, so d loss / d (1 / t) is the sum of G * cosine over it.
            anchors = self.positives.anchors
            if queries.moments:
                assert queries.moment is not None
                found = queries.moment.sum() if anchors is None or anchors.moment is None else queries.moment.sum() + anchors.moment.sum()
            else:
                found = self.read
            return (found if setting.peers.world_size == 1 else setting.peers.sum(found)) / setting.inverse
        assert queries.temperature is not None
        if self.columns is not None:
            queries.temperature += self.columns.temperature_gradient(home)
        return setting.rows_of_all_peers(queries.temperature)

    def read_temperature(self) -> None:
        """The same sum, read from <vector, its gradient> before gradients of other ranks come in: one prefix has no moments."""
        queries, setting, anchors = self.positives.queries, self.setting, self.positives.anchors
        if not setting.needs.temperature or queries.moments or not setting.one_temperature:
            return
        assert queries.gradient is not None
        found = _dots(queries.side.vectors, queries.gradient, setting.rows_at_once)
        if anchors is not None and anchors.moments:
            found = found if anchors.moment is None else found + anchors.moment.sum()
        elif anchors is not None and anchors.gradient is not None:
            found = found + _dots(anchors.side.vectors, anchors.gradient, setting.rows_at_once)
        self.read = found.to(setting.fp)

    def values(self) -> Found:
        """See fused_losses; of this rank's and its peers' shares."""
        setting, positives = self.setting, self.positives
        losses = positives.losses[0] if len(positives.losses) == 1 else torch.stack(positives.losses).sum(0)
        if self.columns is not None:
            losses = losses + self.columns.losses
        cosine, correct = positives.mean_cosine(), positives.correct(None if self.hard is None else self.hard.top).sum()
        if setting.peers.world_size > 1:
            losses, cosine, correct = setting.peers.sum(losses), setting.rows_of_all_peers(cosine), setting.peers.sum(correct)
        return losses, cosine, correct * setting.exchange.world_size / positives.counted, self.valid_rows


def _in_one_tile(
    problems: Sequence[Problem], engine: Engine, weights: Sequence[float], places: list[list[int]], given: Sequence[Tensor]
) -> _OneTiles | None:
    """The losses at work in one tile each, where all of them fit, and no vectors are given to several (which would travel twice)."""
    vectors = [place for where in places for place in where[:3]]
    if len(set(vectors)) < len(vectors) or not all(fits(problem, engine, problem.options.one_tile_budget // len(problems)) for problem in problems):
        return None
    try:
        return _OneTiles([OneTile(problem, weight) for problem, weight in zip(problems, weights, strict=True)], places, len(given))
    except Unsafe:
        return None


class _OneTiles:
    """Losses of one tile each, with the collectives of ``_Work``."""

    def __init__(self, losses: list[OneTile], places: list[list[int]], given: int) -> None:
        self.losses, self.places, self.given, self.exchange = losses, places, given, losses[0].exchange
        told = [loss.notes() for loss in losses]
        everyone = iter(self.exchange.gather_parts([x for loss in losses for x in loss.vectors()] + [x for notes in told for x in notes]).wait())
        vectors = [[next(everyone), next(everyone)] for _ in losses]
        for loss, of_keys, notes in zip(losses, vectors, told, strict=True):
            loss.learn(of_keys, [next(everyone) for _ in notes])
        symmetric = [loss for loss in losses if loss.symmetric]
        for loss, sums in zip(symmetric, summed([loss.sums() for loss in symmetric], self.exchange.sum), strict=True):
            loss.finish_columns(sums)

    def values(self) -> tuple[Tensor, list[Tensor]]:
        found = [loss.values() for loss in self.losses]
        sums = [losses if loss.prefix_weights is None else losses * loss.prefix_weights[:, 0] for loss, (losses, *_) in zip(self.losses, found, strict=True)]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum(), [x for one in found for x in one]

    def gradients(self) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * self.given
        needs = self.losses[0].problem.needs
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
            found[where[3]] = temperature if before is None or temperature is None else before + temperature
        return found


def summed(sums: list[Tensor], of_all: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``sums`` over everybody who holds rows: one collective."""
    if not sums:
        return []
    flat = sums[0].flatten() if len(sums) == 1 else torch.cat([x.flatten() for x in sums])
    return [part.view(x.shape) for part, x in zip(of_all(flat).split([x.numel() for x in sums]), sums, strict=True)]


class _Work:
    """All losses of a call, from the first collective to the last."""

    def __init__(self, problems: Sequence[Problem], engine: Engine, weights: Sequence[float], places: list[list[int]], given: Sequence[Tensor]) -> None:
        self.exchange, self.given, self.places = problems[0].exchange, given, places
        known: dict[tuple[Any, ...], Vectors] = {}
        self.vectors: dict[int, list[Vectors]] = {}  # by place
        settings = []
        for number, (problem, weight, where) in enumerate(zip(problems, weights, places, strict=True)):
            mine = []
            masks = (problem.query_valid, problem.key_valid, problem.hard_valid.flatten())
            for role, (place, valid, padding) in enumerate(zip(where, masks, problem.padding, strict=False)):
                # A stream that passes by carries the gradient of one round: there every reader has a stream of its own.
                reader = None if self.exchange.whole else (number, role)
                kind = (place, problem.options.prefixes, problem.score_dtype, reader)
                mask = valid if padding else None
                if kind in known:
                    known[kind].also_invalid(mask)
                else:
                    x = given[place].flatten(0, -2)
                    known[kind] = Vectors(x, mask, problem.options.prefixes, problem.score_dtype, problem.operand_dtype, problem.gradient_dtype)
                    self.vectors.setdefault(place, []).append(known[kind])
                known[kind].uses += 1
                mine.append(known[kind])
            queries, keys, hard = mine
            settings.append(Setting(problem, engine, queries, keys, hard, weight))
        self.losses = [_Loss(setting) for setting in settings]
        self.groups = prepare(list(known.values()), min(p.options.memory_budget for p in problems), min(rows_at_once(p) for p in problems))
        for loss in self.losses:
            loss.begin()
        self.shown = [v for v in known.values() if v.layout is not None]
        sent = send(self.exchange, self.shown, [x for loss in self.losses for x in loss.notes()])
        notes = list(sent.arrive())
        for loss in self.losses:
            notes = loss.learn(notes, score_budget(loss.setting.problem) // len(problems))
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
        setting, sums = columns[0].setting, [each.sums() for each in columns]
        for each, x in zip(columns, sums if setting.alone else summed(sums, setting.sum_of_all), strict=True):
            each.finish_statistics(x)

    def values(self) -> tuple[Tensor, list[Tensor]]:
        found = [loss.values() for loss in self.losses]
        sums = [(losses * loss.setting.prefix_weights[:, 0]).sum() for loss, (losses, *_) in zip(self.losses, found, strict=True)]
        total = sums[0] if len(sums) == 1 else torch.stack([x.to(torch.promote_types(sums[0].dtype, x.dtype)) for x in sums]).sum()
        return total, [x for one in found for x in one]

    def gradients(self) -> list[Tensor | None]:
        """Of everything given: what is not in tiles, and all come home."""
        if not any(loss.setting.any_gradient for loss in self.losses):
            return [None] * len(self.given)
        for loss in self.losses:
            loss.gradients()
            loss.read_temperature()
        sums = [loss.temperature_sums() for loss in self.losses]
        home = iter(bring_home(self.exchange, self.shown, [x for of_loss in sums for x in of_loss]))
        for group in self.groups:
            group.finish(self.losses[0].setting.peers)
        found: list[Tensor | None] = [None] * len(self.given)
        for loss, where, of_loss in zip(self.losses, self.places, sums, strict=True):
            temperature = loss.temperature_gradient(next(home) if of_loss else None)
            if temperature is not None:
                before = found[where[3]]
                found[where[3]] = temperature if before is None or temperature is None else before + temperature
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
    parts = [(x.to(y.dtype) * y).sum() for x, y in zip(a.split(at_once), b.split(at_once), strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
