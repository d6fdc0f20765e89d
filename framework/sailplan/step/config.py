"""Configuration of the step: how its rows are cut and dealt, which graphs stay, what updates the
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sailplan.config.fields import (
    Count,
    CountOrAll,
    NotNegative,
    Options,
    Positive,
    ShareBelowOne,
    Size,
)

Backend = Literal["auto", "reference", "chunked", "triton"]


@dataclass
class StepConfig:
    micro_batch: Size = 128  # rows encoded at once, at most
    # Positions of the tower's sequence encoded at once, at most: prompt and text tokens, visual
    # tokens, and the encoders' work on pictures and sound in positions that cost as much. A longer
    # row is encoded alone. 0: micro-batches are cut by rows alone.
    token_budget: Count = 0
    # Which rank encodes which rows: length: so that their costs balance; lanes: whole lanes, read
    # in long sequences.
    dealing: Literal["length", "lanes"] = "length"
    # Micro-batches, counted from the last, whose graph is kept instead of replayed: a number, or
    # auto (as many as fit into the memory that the first step of a stage and its data sets leaves
    # free, at least one).
    kept_graphs: CountOrAll | Literal["auto"] = "auto"
    backend: Backend = "auto"  # of sailplan_kernels


WARMUP_COSINE = "sailplan.step.schedules.WarmupCosine"
ADAMW = "torch.optim.AdamW"


@dataclass
class StageOptimizerConfig:
    """What a stage may set for itself: rates, decay, moments, and how the rates go down."""

    learning_rate: NotNegative = 1e-3
    final_learning_rate: NotNegative = 1e-4  # where the schedule ends
    warmup_steps: Count = 20
    weight_decay: NotNegative = 1e-4
    betas: list[ShareBelowOne] = field(
        default_factory=lambda: [0.9, 0.98]
    )  # of optimizers that have betas
    epsilon: Positive = 1e-8  # of optimizers that have an eps
    clip_norm: Positive = 1.0
    temperature_learning_rate: NotNegative = 1e-3
    # {_target_: a class below step.schedules.Schedule, its options}
    schedule: Options = field(default_factory=lambda: {"_target_": WARMUP_COSINE})


@dataclass
class OptimizerConfig(StageOptimizerConfig):
    """The run's optimizer.

    One object updates all stages, so its class and options are the run's alone.
    """

    _target_: str = ADAMW  # a class below torch.optim.Optimizer
    options: Options = field(default_factory=dict)  # of its constructor, such as {momentum: 0.9}
