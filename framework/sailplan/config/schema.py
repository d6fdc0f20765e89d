"""The typed configuration of a run: what every YAML file below conf/ is converted to, once, at
start.

Each component's dataclass stands beside the component, in its room's config.py, with the rules of
its settings; those between components are in `sailplan.config.rules`. Nothing below this package
sees a DictConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sailplan.checkpoint.config import CheckpointConfig
from sailplan.config.fields import Options, When
from sailplan.curriculum.config import (
    BalanceConfig,
    HardNegativeConfig,
    StageConfig,
    SubsetConfig,
    built_in_artifacts,
)
from sailplan.data.config import (
    ARTIFACT,
    DataConfig,
    DatasetConfig,
    PatternConfig,
    PatternKey,
    ViewConfig,
)
from sailplan.embed.config import StoreConfig
from sailplan.errors import ConfigurationError
from sailplan.evaluate.config import EvaluationConfig, EvaluationTask
from sailplan.model.config import (
    AudioConfig,
    EncoderConfig,
    LoraConfig,
    ModelConfig,
    SwinShape,
    TransformerShape,
    VisionConfig,
    WeightsConfig,
)
from sailplan.observe.config import TrackingConfig
from sailplan.runtime.config import ParallelConfig
from sailplan.step.config import OptimizerConfig, StageOptimizerConfig, StepConfig
from sailplan.train.config import built_in_callbacks

__all__ = [
    "ARTIFACT",
    "AudioConfig",
    "BalanceConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DatasetConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "EvaluationTask",
    "HardNegativeConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PatternConfig",
    "PatternKey",
    "StageConfig",
    "StageOptimizerConfig",
    "StepConfig",
    "StoreConfig",
    "SubsetConfig",
    "SwinShape",
    "TrackingConfig",
    "TransformerShape",
    "ViewConfig",
    "VisionConfig",
    "WeightsConfig",
]


@dataclass
class Config:
    name: str = "run"
    runs: str = "runs"  # folder of run directories
    seed: int = 0
    resume: Literal["never", "auto"] = (
        "never"  # auto: from the newest complete checkpoint of runs/<name>, else start
    )
    initialise_from: str | None = (
        # A fresh start's weights: run folder, checkpoint or exported folder; a resume does not look
        # at it
        None
    )
    # What is taken from there.
    initialise_parts: Annotated[
        list[Literal["encoder", "objectives", "temperatures"]], When("initialise_from")
    ] = field(default_factory=lambda: ["encoder"])  # type: ignore[arg-type]
    global_batch: int = 256  # rows of a step over all data-parallel ranks
    order: list[str] = field(
        default_factory=list
    )  # of stages to run; empty: all, as they are listed
    optimizer: OptimizerConfig = field(
        default_factory=OptimizerConfig
    )  # common to all stages; a stage's own values win
    stages: dict[str, StageConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    model: Any = field(
        default_factory=ModelConfig
    )  # an EncoderConfig: the settings of the encoder that it names
    objectives: dict[str, Options] = field(
        default_factory=dict
    )  # name -> {_target_: class, options}
    artifacts: dict[str, Options] = field(
        default_factory=built_in_artifacts
    )  # what stages can make at their start: as objectives
    allowed_targets: list[str] = field(
        default_factory=lambda: ["sailplan."]
    )  # module prefixes that a _target_ may have; add your own
    step: StepConfig = field(default_factory=StepConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    store: StoreConfig = field(default_factory=StoreConfig)  # of vectors on disk
    loggers: dict[str, Options] = field(default_factory=dict)  # name -> {_target_: class, options}
    callbacks: dict[str, Options] = field(
        default_factory=built_in_callbacks
    )  # name -> {_target_: class, options}, called in this order
    tracking: TrackingConfig = field(
        default_factory=TrackingConfig
    )  # of version 0.1.0; carried over to loggers

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a run that has no folder, or takes nothing from where it
        starts.
        """
        if "/" in self.name or self.name in ("", ".", "..") or not self.name.isprintable():
            raise ConfigurationError(
                f"name={self.name!r}: expected a folder name without '/' and control characters"
            )
        if self.initialise_from is not None and not self.initialise_parts:
            raise ConfigurationError(
                f"initialise_parts is empty beside initialise_from={self.initialise_from}: name "
                "some of encoder, objectives, temperatures"
            )
