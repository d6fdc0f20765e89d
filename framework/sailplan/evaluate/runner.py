"""The evaluation of a model: every task of the configuration, on all ranks, to a dictionary of
numbers.

An item is encoded once per view and evaluation, however many tasks ask for it. Held-out numbers
only ever come from held-out queries; what a task's baselines know comes from the train split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.config.rules import check_task
from sailplan.config.schema import EvaluationTask
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.scoring import Pairs, share, shared_pair_scores
from sailplan.embed.sides import StoredSide
from sailplan.errors import ConfigurationError
from sailplan.evaluate import metrics
from sailplan.evaluate.completion import set_completion_task
from sailplan.evaluate.examples import retrieval_examples
from sailplan.evaluate.next_item import next_item_task
from sailplan.evaluate.retrieval_task import RetrievalTask, index_of, prepare, query_positions
from sailplan.runtime.seeds import generator

CLUSTERED = 20_000  # rows of a clustering; of more a fixed random part


@dataclass(frozen=True)
class Evaluation:
    """Numbers per task, and example queries with their nearest candidates in the report's form."""

    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: dict[str, list[JsonObject]] = field(default_factory=dict)

    def as_dict(self, step: int, stage: str) -> JsonObject:
        """The content of evaluation/step-XXXXXXXX.json."""
        return {"step": step, "stage": stage, "tasks": self.tasks, "examples": self.examples}


class Runner:
    """Run tasks with one model state."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.embedder = Embedder(context)

    def run(
        self, name: str, task: EvaluationTask, reader: RecordReader
    ) -> tuple[dict[str, float], list[JsonObject]]:
        """One task's metrics and examples. Collective.

        Raises ConfigurationError for a task that cannot be.
        """
        check_task(self.context.config, name, task)
        if task.kind == "clustering":
            return self._clustering(name, task, reader), []
        if task.kind == "sequence":
            return next_item_task(self.embedder, name, task, reader) or set_completion_task(
                self.embedder, name, task, reader
            )
        sides = prepare(reader, task, name, self.embedder)
        return self._retrieval(task, reader, sides), retrieval_examples(task, reader, sides)

    def _retrieval(
        self, task: EvaluationTask, reader: RecordReader, sides: RetrievalTask
    ) -> dict[str, float]:
        device, queries, candidates = (
            self.context.parallel.device,
            sides.queries,
            sides.candidates,
        )
        positives = sides.positives.to(device)
        result: dict[str, float] = {}
        if "recall" in task.metrics:
            excluded = None if sides.excluded is None else sides.excluded.to(device)
            ranks = metrics.best_positive_ranks(
                queries, candidates, positives, excluded, self.embedder.exchange
            )
            result |= metrics.recall(ranks, task.recall_at)
            result |= metrics.chance(positives, len(candidates), task.recall_at)
            result["candidates"] = float(len(candidates))
        if "prefixes" in task.metrics:
            result |= self._prefixes(task, sides)
        if "auc" in task.metrics and len(positives.rows):
            result["auc"] = metrics.auc(queries, candidates, positives, self.embedder.exchange)
        if "gap" in task.metrics:
            result |= metrics.gap(queries, candidates, positives, self.embedder.exchange)
        if "bijection" in task.metrics:
            result["bijection"] = metrics.bijection(
                queries, candidates, sides.queries.ids.to(device), self.embedder.exchange
            )
        if "nmi" in task.metrics:
            rows = np.flatnonzero(sides.own >= 0)
            pairs = Pairs(torch.from_numpy(rows), torch.from_numpy(sides.own[rows]))
            if len(rows):
                result |= metrics.pair_agreement(queries, candidates, pairs, task.clusters)
        if task.reference is not None:
            found = metrics.ranking_agreement(
                queries,
                candidates,
                _References(task.reference, reader, sides),
                task.recall_at,
                sides.excluded,
                self.embedder.exchange,
            )
            result |= {
                key: value
                for key, value in found.items()
                if key.partition("@")[0].removeprefix("reference/") in task.metrics
            }
            result["reference/queries"] = found["reference/queries"]
            if not found["reference/queries"]:
                raise ConfigurationError(
                    f"evaluation.tasks with reference={task.reference}: no record of "
                    f"'{task.dataset}' has a list of candidates' ids under this key; expected some, "
                    "best first"
                )
        elif "kendall" in task.metrics or "overlap" in task.metrics:
            found = self._graded(reader, sides)
            result |= {
                metric: found[metric] for metric in ("kendall", "overlap") if metric in task.metrics
            }
        return result

    def _prefixes(self, task: EvaluationTask, sides: RetrievalTask) -> dict[str, float]:
        """What cutting the vectors costs, for each shorter Matryoshka prefix: prefix_D/recall@k,
        and prefix_D/neighbours@10, the share
        of a query's ten nearest other queries that stay its nearest."""
        excluded = (
            None if sides.excluded is None else sides.excluded.to(self.context.parallel.device)
        )
        queries, candidates = sides.queries, sides.candidates
        dimension = self.context.config.model.embedding
        result: dict[str, float] = {}
        for size in self.context.config.model.prefixes:
            if size < dimension:
                positives = sides.positives.to(self.context.parallel.device)
                ranks = metrics.best_positive_ranks(
                    queries.cut(size),
                    candidates.cut(size),
                    positives,
                    excluded,
                    self.embedder.exchange,
                )
                found = metrics.recall(ranks, task.recall_at)
                result |= {
                    f"prefix_{size}/{key}": value
                    for key, value in found.items()
                    if key.startswith("recall")
                }
                if len(queries) > 1:
                    result[f"prefix_{size}/neighbours@10"] = metrics.neighbour_overlap(
                        queries, queries.cut(size), 10, self.embedder.exchange
                    )
        return result

    def _graded(self, reader: RecordReader, sides: RetrievalTask) -> dict[str, float]:
        exchange, count = self.embedder.exchange, len(sides.queries)
        start, stop = share(count, exchange.rank, exchange.world_size)
        known = np.zeros((2, count))  # scores, and whether there is one
        for row in range(start, stop):
            score = reader.score(int(sides.queries.positions[row]))
            if score is not None and sides.own[row] >= 0:
                known[:, row] = score, 1
        device = self.context.parallel.device
        scores, graded = exchange.sum(torch.from_numpy(known).to(device)).cpu().numpy()
        rows = np.flatnonzero(graded)
        own = Pairs(torch.from_numpy(rows), torch.from_numpy(sides.own[rows]))
        cosines = shared_pair_scores(sides.queries, sides.candidates, own, exchange)
        return metrics.graded_order(cosines.cpu().numpy(), scores[rows])

    def _clustering(
        self, name: str, task: EvaluationTask, reader: RecordReader
    ) -> dict[str, float]:
        assert task.label is not None, "check_task asks for it"
        table = self.embedder.table(reader, task.query, query_positions(reader, task, name))
        side = StoredSide.of(table, self.context.parallel.device)
        if len(side) > CLUSTERED:
            chosen = np.zeros(len(side), dtype=bool)
            chosen[generator("evaluation", name).permutation(len(side))[:CLUSTERED]] = True
            side = side.where(chosen)
        labels = [reader.body(int(position)).get(task.label) for position in side.positions]
        keep = np.array([label is not None for label in labels], dtype=bool)
        if not keep.any():
            raise ConfigurationError(
                f"evaluation.tasks.{name}.label={task.label}: no record of '{task.dataset}' has "
                "this key; name one that they have"
            )
        labelled = side.where(keep)
        found = metrics.cluster_agreement(
            labelled.part(0, len(labelled)).cpu().numpy(),
            [str(labels[row]) for row in np.flatnonzero(keep)],
        )
        return {key: value for key, value in found.items() if key in ("nmi", "clusters")}


class _References:
    """Candidates of each query in the order that its record's ranking gives, best first, read when
    they are asked for; those that are no candidates are left out.
    """

    def __init__(self, key: str, reader: RecordReader, sides: RetrievalTask) -> None:
        self._key, self._reader, self._sides = key, reader, sides

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        names = self._reader.body(int(self._sides.queries.positions[row])).get(self._key)
        found = [self._candidate(name) for name in names] if isinstance(names, list) else []
        wanted = np.array([-1 if place is None else place for place in found], dtype=np.int64)
        places = index_of(self._sides.candidates.positions, wanted)
        return np.array(list(dict.fromkeys(places[places >= 0].tolist())), dtype=np.int64)

    def _candidate(self, name: object) -> int | None:
        """Position of an id of a ranking in the set that candidates come from."""
        if self._reader.catalogue is not None:
            return self._reader.find_item(name)
        return self._reader.find(str(name))


def evaluate(context: RunContext, only: Sequence[str] | None = None) -> Evaluation:
    """Run all tasks of `evaluation.tasks`, or those named in `only`; every rank gets the same
    result. Collective.

    An objective of the context that represents histories does so here. The encoder's training mode
    comes back as it was. Raises ConfigurationError for a task that cannot be.
    """
    config, runner, result = context.config, Runner(context), Evaluation()
    for name in only if only is not None else list(config.evaluation.tasks):
        if name not in config.evaluation.tasks:
            raise ConfigurationError(
                f"evaluation.tasks has no '{name}'; expected one of "
                f"{', '.join(config.evaluation.tasks) or 'none'}"
            )
        task = config.evaluation.tasks[name]
        result.tasks[name], examples = runner.run(name, task, context.readers[task.dataset])
        if examples:
            result.examples[name] = examples
    runner.embedder.close()
    return result
