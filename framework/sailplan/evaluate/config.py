"""Configuration of evaluation: its tasks, and when they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sailplan.config.fields import Count, Size
from sailplan.errors import ConfigurationError

Metric = Literal["recall", "prefixes", "auc", "gap", "bijection", "kendall", "overlap", "nmi"]


@dataclass
class EvaluationTask:
    """One evaluation: queries of a view against targets of a view."""

    dataset: str = ""
    kind: Literal["retrieval", "classification", "clustering", "sequence"] = "retrieval"
    query: str = ""
    target: str = ""
    split: str = "held_out"  # which records are the queries
    candidates: Literal["split", "all"] = (
        "split"  # split: the same records' targets; all: every record of the catalogue
    )
    query_text: str | None = None  # e.g. held_out_tags: take the query's text from here
    metrics: list[Metric] = field(default_factory=lambda: ["recall"])  # type: ignore[arg-type]
    recall_at: list[Size] = field(default_factory=lambda: [1, 10, 25, 50, 100])
    limit: Size | None = None
    # Nmi of a retrieval: clusters of queries and targets together, at most one for four pairs
    clusters: Size = 64
    reference: str | None = (
        # The records' key of a ranking to agree with (kendall, overlap): ids of candidates, best
        # first
        None
    )
    label: str | None = None  # clustering: the record's key that holds the label (e.g. subgroup)

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a clustering or a ranking that has nothing to compare
        with.
        """
        if self.reference is not None and self.kind not in ("retrieval", "classification"):
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


@dataclass
class EvaluationConfig:
    batch: Size = 256
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
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
