"""Configuration of a stage: its data, losses and trainable parts, and what it makes for itself
at its start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from sailplan.config.components import INHERITS
from sailplan.config.fields import (
    Count,
    NotNegative,
    Options,
    Positive,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Size,
    When,
)
from sailplan.errors import ConfigurationError
from sailplan.step.config import StageOptimizerConfig

ROOM = "sailplan.curriculum.artifacts"


def built_in_artifacts() -> dict[str, Options]:
    """Return the artifacts that every run can make: name -> {_target_: class}."""
    return {
        name: {"_target_": f"{ROOM}.{cls}"}
        for name, cls in (
            ("interests", "Interests"),
            ("teachers", "Teachers"),
            ("co_occurrence", "CoOccurrence"),
        )
    }


@dataclass
class SubsetConfig:
    """Records that a stage keeps: those nearest to the benchmark sets, and those whose own pair
    looks clean.
    """

    nearest: ShareAboveZero | None = (
        None  # fraction of each data set's records kept by similarity to the benchmark's centroids
    )
    drop_noisy: ShareBelowOne | None = (
        None  # fraction of pairs with the lowest own score that is dropped
    )
    sets: list[str] = field(default_factory=list)  # empty: every set of the stage

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for a subset that keeps everything."""
        if self.nearest is None and self.drop_noisy is None:
            raise ConfigurationError(
                f"{path} keeps every record: expected nearest or drop_noisy; set one of them, or "
                "leave the subset out"
            )


@dataclass
class HardNegativeConfig:
    """Dynamic hard negatives (recipe 2.1)."""

    per_query: Size = 4
    sample: Size = 2048  # N at which lambda* is fitted (F1's optimum depends on N)
    refresh_steps: Count = 0  # 0: only at the stage's start
    patterns: dict[str, list[str]] = field(
        default_factory=dict
    )  # data set -> pattern names; empty: first pattern of each set
    mask_in_batch: bool = True  # drop in-batch negatives at or above lambda*
    # What `sailplan mine` wrote is taken at the stage's start, instead of mining then
    from_folder: str | None = None


@dataclass
class BalanceConfig:
    """Adaptive multi-source balancing (recipe 2.2)."""

    sample: Size = 1024  # records per set
    clusters: Size = 16
    epsilon: Positive = 0.05
    iterations: Size = 100
    # How often a set's sample is drawn again from itself and clustered anew: the scores' mean, and
    # their standard error.
    bootstrap: Size = 16
    temperature: Positive = 8.0  # of the softmax, in units of temperature_unit
    # standard_error: of a score, so that sets that cannot be told apart get equal weights, and at
    # least 0.0125, so that more samples do not let one set take all; cosine: as it is; spread: the
    # scores' own standard deviation, which makes differences of any size equally strong
    temperature_unit: Literal["standard_error", "cosine", "spread"] = "standard_error"
    floor: ShareBelowOne = (
        0.1  # share of the steps that is dealt by the fixed weights, so that no set vanishes
    )
    weights: Literal["similarity", "uniform", "size", "sqrt_size"] = (
        "similarity"  # the others look at no vector
    )
    # Run folder, checkpoint or exported folder whose weights embed the samples; None: the run's own
    # as they are at the stage's start, which say nothing before they have learned something
    initialise_from: Annotated[str | None, When("weights", ("similarity",))] = None

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for an error that is not measured."""
        if (
            self.weights == "similarity"
            and self.temperature_unit == "standard_error"
            and self.bootstrap < 2
        ):
            raise ConfigurationError(
                f"{path}.bootstrap={self.bootstrap}: expected at least 2 with "
                "temperature_unit=standard_error"
            )


@dataclass
class StageConfig:
    steps: Size = 100
    global_batch: int | None = None  # rows of a step over all data-parallel ranks; None: the run's
    data: dict[str, Positive] = field(
        default_factory=dict
    )  # data set -> weight (fixed weights, or floor shares under `balance`)
    balance: BalanceConfig | None = (
        None  # weights from the balancing algorithm instead of `data`'s values
    )
    mixed_fraction: Share = (
        0.0  # share of steps whose batch mixes data sets in homogeneous sub-batches
    )
    # Rows of a sub-batch, all of one data set that is drawn for it; 0: a quarter of the batch. Sub-
    # batches of one set are contrasted with each other. Where 8 divides the batch, a multiple of 8.
    mixed_rows: Annotated[Count, When("mixed_fraction")] = 0
    patterns: dict[str, list[str]] = field(
        default_factory=dict
    )  # data set -> patterns used; missing: all
    objectives: dict[str, NotNegative] = field(default_factory=dict)  # objective name -> weight
    trainable: list[str] = field(
        default_factory=lambda: ["all"]
    )  # all | parts of the encoder | objectives | temperatures
    subset: SubsetConfig | None = None
    hard_negatives: HardNegativeConfig | None = None
    artifacts: list[str] = field(
        default_factory=list
    )  # names of `artifacts` that are made at the stage's start, in this order
    # Settings that a stage does not name are the run's.
    optimizer: StageOptimizerConfig = field(
        default_factory=StageOptimizerConfig, metadata={INHERITS: "optimizer"}
    )

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for a mixture of one data set, and negatives of patterns that
        the stage does not train.
        """
        if self.mixed_fraction and len(self.data) == 1:
            raise ConfigurationError(
                f"{path}.mixed_fraction={self.mixed_fraction}: has no effect on the one data set "
                f"{next(iter(self.data))}; leave it out, or add another to {path}.data"
            )
        mined = self.hard_negatives.patterns if self.hard_negatives is not None else {}
        for dataset, patterns in mined.items():
            trained = self.patterns.get(dataset) or patterns
            unused = [name for name in patterns if name not in trained]
            if unused:
                raise ConfigurationError(
                    f"{path}.hard_negatives.patterns.{dataset}={patterns}: {', '.join(unused)} is "
                    f"not trained, as {path}.patterns.{dataset} is {', '.join(trained)}; leave it "
                    "out there, or add it here"
                )
