"""Configuration of evaluation: its tasks, and when they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from sailplan.config.fields import Count, Size, When
from sailplan.errors import ConfigurationError

Metric = Literal["recall", "prefixes", "auc", "gap", "bijection", "kendall", "overlap", "nmi"]
RANKING = ("retrieval", "classification")  # kinds that compare two views of items
WITH_TARGET = (*RANKING, "sequence")
# Kind -> the metrics that it computes.
COMPUTED: dict[str, tuple[Metric, ...]] = {"clustering": ("nmi",), "sequence": ("recall", "nmi")}


@dataclass
class EvaluationTask:
    """One evaluation: queries of a view against targets of a view."""

    dataset: str = ""
    kind: Literal["retrieval", "classification", "clustering", "sequence"] = "retrieval"
    query: str = ""
    target: Annotated[str, When("kind", WITH_TARGET)] = ""
    split: str = "held_out"  # which records are the queries
    # split: the same records' targets; all: every record of the catalogue
    candidates: Annotated[Literal["split", "all"], When("kind", WITH_TARGET)] = "split"
    # E.g. held_out_tags: take the query's text from here
    query_text: Annotated[str | None, When("kind", RANKING)] = None
    metrics: list[Metric] = field(default_factory=lambda: ["recall"])  # type: ignore[arg-type]
    recall_at: list[Size] = field(default_factory=lambda: [1, 10, 25, 50, 100])
    limit: Size | None = None
    # Nmi of a retrieval: clusters of queries and targets together, at most one for four pairs
    clusters: Size = 64
    # The records' key of a ranking to agree with (kendall, overlap): ids of candidates, best first
    reference: str | None = None
    # The record's key that holds the label, e.g. subgroup
    label: Annotated[str | None, When("kind", ("clustering",))] = None

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a clustering or a ranking that has nothing to compare
        with.
        """
        if self.reference is not None and self.kind not in RANKING:
            raise ConfigurationError(
                f"{path}.reference={self.reference}: kind {self.kind} ranks no candidates for it; "
                "expected kind: retrieval"
            )
        if self.reference is not None and not {"kendall", "overlap"} & set(self.metrics):
            raise ConfigurationError(
                f"{path}.reference={self.reference} beside metrics {', '.join(self.metrics)}: add "
                "kendall or overlap, or leave it out"
            )
        if self.kind == "clustering" and self.label is None:
            raise ConfigurationError(
                f"{path}.label is empty: expected the key of the records that holds the label, "
                "such as subgroup"
            )

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for metrics that its kind does not compute, and settings of
        metrics that it has not.
        """
        computed = COMPUTED.get(self.kind)
        unread = [name for name in self.metrics if computed is not None and name not in computed]
        if unread and self.metrics != ["recall"]:
            raise ConfigurationError(
                f"{path}.metrics={self.metrics}: kind {self.kind} computes no {', '.join(unread)}; "
                f"expected {', '.join(computed or ())}"
            )
        defaults = EvaluationTask()
        if self.clusters != defaults.clusters and (
            "nmi" not in self.metrics or self.kind == "clustering"
        ):
            raise ConfigurationError(
                f"{path}.clusters={self.clusters}: has no effect without nmi of a retrieval; add "
                "that metric, or leave it out"
            )
        ranked = {"recall", "prefixes", "kendall", "overlap"} & set(self.metrics)
        if self.recall_at != defaults.recall_at and (
            self.kind == "clustering" or not (ranked or self.kind == "sequence")
        ):
            raise ConfigurationError(
                f"{path}.recall_at={self.recall_at}: has no effect without recall; add that "
                "metric, or leave it out"
            )


@dataclass
class EvaluationConfig:
    batch: Size = 256
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
    at_start: bool = False  # before the first step, for the report's baselines
    at_stage_end: bool = True
    every_steps: Count = 0
    benchmark: list[str] = field(
        default_factory=list
    )  # tasks whose data are the balancing's and stage II's targets

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a benchmark that names no task."""
        for name in self.benchmark:
            if name not in self.tasks:
                raise ConfigurationError(
                    f"{path}.benchmark={name}: expected one of {', '.join(self.tasks)}"
                )
