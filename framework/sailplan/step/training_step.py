"""One training step, from a rank's rows to moved weights.

Encode (gradient cache, A) -> losses on the embeddings (B) -> encoder gradients (C) with one
reduction -> the small parameters' gradients in one message -> norm and clipping -> guard ->
optimizer. The step is exact: at any number of ranks, tensor-parallel size and micro-batch size the
gradients are those of the full batch in one process.

The host waits for the device once, before the optimizer: one transfer brings the verdict of the
guard, what the ranks wish (to stop, to save), loss, norm, metrics and temperatures.

A mixed step has several batches, each of one data set; its loss is their mean weighted by the rows
of all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sailplan.config.schema import Config, PatternKey
from sailplan.data.negatives import MatchThreshold
from sailplan.data.record import StepBatch
from sailplan.errors import ConfigurationError
from sailplan.model.parallelize import clip_gradient_norm, finish_gradients, reshard
from sailplan.objective.backends import described
from sailplan.objective.protocol import EncodedStep, Objective, ObjectiveContext
from sailplan.objective.temperature import Temperatures, score_parameters
from sailplan.runtime.process import Parallel
from sailplan.runtime.seeds import derive, seed_torch
from sailplan.runtime.transfer import to_device
from sailplan.step import same_data
from sailplan.step.gradient_cache import GradientCache
from sailplan.step.guards import FiniteGuard, Suspect
from sailplan.step.kept_graphs import KeptGraphs
from sailplan.step.optimizer import clear_gradients
from sailplan.step.reduction import Averaged, average_gradients
from sailplan_kernels.exchange import Exchange

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class StepResult:
    """What a step did; numbers are the full batch's (averaged over data-parallel ranks)."""

    loss: float  # weighted sum of the objectives
    losses: dict[str, float]  # objective name -> its unweighted loss
    metrics: dict[str, float]  # "OBJECTIVE/DATASET/METRIC" -> value
    temperatures: dict[str, float]  # group of patterns -> what the step used
    grad_norm: float  # before clipping, over all parameters
    skipped: bool  # the guard kept the optimizer from stepping
    suspects: list[Suspect]  # this rank's records that a skipped step names
    guilty: bool  # they have vectors that are not finite, on some rank
    wishes: list[bool]  # for each wish, whether any rank of the world had it
    seconds: dict[str, float]  # phase -> wall seconds: encode, loss, backward, update
    backends: dict[str, str] = field(
        default_factory=dict
    )  # objective name -> "BACKEND DTYPE" that its scores went through
    replayed: int = 0  # micro-batches that went backward


@dataclass
class _Losses:
    total: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    ran: dict[str, set[str]] = field(
        default_factory=dict
    )  # objective name -> "BACKEND DTYPE" of its calls


def _below(prefix: str, values: Mapping[str, Number]) -> dict[str, Number]:
    """The values whose names begin so, under the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


class TrainingStep:
    """Runs steps with one encoder, its objectives and their optimizer.

    exchange: over the data-parallel group. max_skips: steps in
    a row that the guard may skip before the run ends.
    """

    def __init__(
        self,
        encoder: nn.Module,
        objectives: nn.ModuleDict,
        temperatures: Temperatures,
        optimizer: torch.optim.Optimizer,
        config: Config,
        parallel: Parallel,
        exchange: Exchange,
        *,
        max_skips: int = 10,
    ) -> None:
        self.encoder = encoder
        self.objectives = objectives
        self.temperatures = temperatures
        self.optimizer = optimizer
        self.config = config
        self.parallel = parallel
        self.exchange = exchange
        self.cache = GradientCache(encoder, KeptGraphs(config.step.kept_graphs, encoder, parallel))
        self.guard = FiniteGuard(parallel, max_skips)

    def run(
        self,
        batches: Sequence[StepBatch],
        weights: Mapping[str, float],
        *,
        step: int,
        stage: str,
        thresholds: Mapping[PatternKey, MatchThreshold] | None = None,
        clip_norm: float = 1.0,
        wishes: Callable[[], Sequence[bool]] = tuple,
    ) -> StepResult:
        """One step.

        A collective over the world: all ranks call it with the same step and data sets.

        batches: this rank's rows, one data set each. weights: objective name -> weight, of the
        stage. thresholds: lambda* of patterns, for masking in-batch negatives. Learning rates are
        the caller's business.
        wishes: called once, late in the step: what this rank wants all to know; the same number on
        all ranks.

        Raises ConfigurationError for no batch, an unknown objective, or a data set that no
        objective of the stage can use; BadDataError on all ranks where some drew other records than
        the rest, before anything moves; SailplanError after too many skipped steps in a row.
        """
        seconds: dict[str, float] = {}
        averaged, encoded, replayed, backends = self._gradients(
            batches, weights, step, stage, thresholds, seconds
        )
        began = time.perf_counter()
        loss = averaged.values[averaged.names.index("total")]
        digest = same_data.moments(stage, step, [batch.digest for batch in batches])
        shared = to_device(
            torch.tensor([0.0, *digest, *wishes()], dtype=torch.float64), self.parallel.device
        )
        shared[0] = ~loss.isfinite()
        grad_norm = clip_gradient_norm(self._parameters(), clip_norm, self.parallel, also=shared)
        parts = [
            grad_norm.view(1),
            shared,
            averaged.used,
            averaged.values,
            self.temperatures.packed(),
        ]
        # The step's one wait for the device: everything that the host wants to know, in one
        # transfer.
        numbers = iter(
            torch.cat([part.to(self.parallel.device, torch.float64) for part in parts]).tolist()
        )
        norm, diverged, *told = islice(numbers, 1 + shared.numel())
        if not same_data.equal(told[: len(digest)], self.parallel.world_size):
            raise same_data.difference(
                self.parallel, stage, step, [batch.digest for batch in batches]
            )
        wanted = told[len(digest) :]
        averaged.drop_unused(list(islice(numbers, averaged.used.numel())))
        values = dict(zip(averaged.names, numbers, strict=False))
        temperatures = dict(zip(self.temperatures.names, numbers, strict=True))
        suspects: list[Suspect] = []
        guilty = False
        finite = self.guard.allows(math.isfinite(norm) and not diverged)
        if finite:
            self.optimizer.step()
            for learned in score_parameters(self.objectives, self.temperatures):
                learned.clamp_()
        else:
            suspects, guilty = self.guard.suspects(batches, encoded)
        clear_gradients(self.optimizer)
        seconds["update"] = time.perf_counter() - began
        return StepResult(
            loss=values["total"],
            losses=_below("loss/", values),
            metrics=_below("metric/", values),
            temperatures=temperatures,
            grad_norm=norm,
            skipped=not finite,
            suspects=suspects,
            guilty=guilty,
            wishes=[bool(wish) for wish in wanted],
            seconds=seconds,
            backends=backends,
            replayed=replayed,
        )

    def gradients(
        self,
        batches: Sequence[StepBatch],
        weights: Mapping[str, float],
        *,
        step: int,
        stage: str,
        thresholds: Mapping[PatternKey, MatchThreshold] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], list[EncodedStep], int]:
        """The step up to the full-batch gradients in `.grad`.

        Returns (loss, losses, metrics, encoded batches, micro-batches run backward); numbers are
        0-d tensors on the device.
        """
        averaged, encoded, replayed, _ = self._gradients(
            batches, weights, step, stage, thresholds, {} if seconds is None else seconds
        )
        averaged.drop_unused(averaged.used.tolist())
        values = averaged.named()
        return (
            values["total"],
            _below("loss/", values),
            _below("metric/", values),
            encoded,
            replayed,
        )

    def _gradients(
        self,
        batches: Sequence[StepBatch],
        weights: Mapping[str, float],
        step: int,
        stage: str,
        thresholds: Mapping[PatternKey, MatchThreshold] | None,
        seconds: dict[str, float],
    ) -> tuple[Averaged, list[EncodedStep], int, dict[str, str]]:
        applied = self._applied(batches, weights)
        devices = [self.parallel.device] if self.parallel.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            began = time.perf_counter()
            place = (self.config.seed, stage, step, self.parallel.data_parallel_rank)
            used = [[self._objective(name) for name in names] for names in applied]
            encoded = self.cache.encode(
                batches,
                [any(each.per_modality for each in some) for some in used],
                [any(each.per_token for each in some) for some in used],
                self.parallel.device,
                place,
            )
            seconds["encode"] = time.perf_counter() - began

            began = time.perf_counter()
            # Dropout inside an objective: as the encoder's, a function of the place in the run.
            seed_torch(derive(*place, "objectives"), self.parallel.device)
            found = self._loss_stage(batches, encoded, applied, weights, dict(thresholds or {}))
            encoded = [one.detach() for one in encoded]
            seconds["loss"] = time.perf_counter() - began

            began = time.perf_counter()
            replayed = self.cache.backward()
            # The last backward does it, where there was one; with gathered parameters the
            # optimizer's would be hidden.
            reshard(self.encoder)
            finish_gradients(self.encoder, self.parallel)
            averaged = average_gradients(
                self._replicated(), found.values | {"total": found.total}, self.parallel
            )
            seconds["backward"] = time.perf_counter() - began
        return (
            averaged,
            encoded,
            replayed,
            {name: " + ".join(sorted(ran)) for name, ran in found.ran.items()},
        )

    def _applied(
        self, batches: Sequence[StepBatch], weights: Mapping[str, float]
    ) -> list[list[str]]:
        """For each batch, the names of the objectives with a weight that have a meaning for its
        data set.
        """
        if not batches:
            raise ConfigurationError(
                "training step: found no batch, expected at least one; look at the stage's data "
                "weights"
            )
        unknown = [name for name in weights if name not in self.objectives]
        if unknown:
            raise ConfigurationError(
                f"stages.*.objectives: found {', '.join(unknown)}, expected some of "
                f"{', '.join(self.objectives)}"
            )
        applied = []
        for batch in batches:
            dataset = self.config.data.sets[batch.dataset]
            names = [
                name
                for name in sorted(weights)
                if weights[name] and self._objective(name).applies(dataset)
            ]
            if not names:
                raise ConfigurationError(
                    f"stages.*.objectives: none of {', '.join(weights)} applies to "
                    f"'{batch.dataset}' ({dataset.kind}), expected one that does; add it"
                )
            applied.append(names)
        return applied

    def _loss_stage(
        self,
        batches: Sequence[StepBatch],
        encoded: Sequence[EncodedStep],
        applied: Sequence[Sequence[str]],
        weights: Mapping[str, float],
        thresholds: dict[PatternKey, MatchThreshold],
    ) -> _Losses:
        """The losses, and their gradients in the leaves of `encoded` and in the small
        parameters.
        """
        found = self._losses(batches, encoded, applied, weights, thresholds)
        if found.total.requires_grad:
            found.total.backward()
        # Their graph holds the embeddings once more, and what the losses saved; the replay needs
        # neither.
        found.total = found.total.detach()
        return found

    def _losses(
        self,
        batches: Sequence[StepBatch],
        encoded: Sequence[EncodedStep],
        applied: Sequence[Sequence[str]],
        weights: Mapping[str, float],
        thresholds: dict[PatternKey, MatchThreshold],
    ) -> _Losses:
        context = ObjectiveContext(
            datasets=self.config.data.sets,
            exchange=self.exchange,
            temperatures=self.temperatures,
            prefixes=tuple(self.config.model.prefixes),
            backend=self.config.step.backend,
            thresholds=thresholds,
            compute_dtype=getattr(torch, self.config.parallel.dtype),
        )
        found = _Losses(next(iter(encoded[0].views.values())).fused.new_zeros(()))
        shares = self._shares(batches).to(found.total.dtype)
        for batch, views, names, share in zip(batches, encoded, applied, shares, strict=True):
            for name in names:
                context.ran.clear()
                output = self._objective(name)(views, context)
                found.ran.setdefault(name, set()).update(
                    context.ran or {described("torch", output.loss.dtype)}
                )
                found.total = found.total + weights[name] * share * output.loss
                key = f"loss/{name}"
                found.values[key] = found.values.get(key, 0.0) + share * output.loss.detach()
                for metric, value in output.metrics.items():
                    found.values[f"metric/{name}/{batch.dataset}/{metric}"] = value
        return found

    def _shares(self, batches: Sequence[StepBatch]) -> Tensor:
        """Each batch's part of the step's rows, of all data-parallel ranks [batches]: ranks may
        hold different mixes.

        One all-reduce of as many numbers as there are batches; none for a single one.
        """
        if len(batches) == 1:
            return torch.ones(1, device=self.parallel.device)
        rows = to_device(
            torch.tensor([len(batch.record_ids) for batch in batches], dtype=torch.float64),
            self.parallel.device,
        )
        if self.parallel.data_parallel_size > 1:
            dist.all_reduce(rows, group=self.parallel.data_parallel_group)
        return rows / rows.sum().clamp(min=1)

    def _objective(self, name: str) -> Objective:
        objective = self.objectives[name]
        assert isinstance(objective, Objective)
        return objective

    def _replicated(self) -> list[nn.Parameter]:
        modules = (self.objectives, self.temperatures)
        return [
            parameter
            for module in modules
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def _parameters(self) -> list[nn.Parameter]:
        return [
            *self.encoder.parameters(),
            *self.objectives.parameters(),
            *self.temperatures.parameters(),
        ]
