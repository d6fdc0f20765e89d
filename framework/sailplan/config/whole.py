"""What a component's rules may ask of the configuration that it is a part of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sailplan.curriculum.config import StageConfig
from sailplan.data.config import DataConfig
from sailplan.evaluate.config import EvaluationConfig
from sailplan.runtime.config import ParallelConfig


class WholeConfig(Protocol):
    """`config.schema.Config`, which cannot be imported here: it is made of the components'."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def initialise_from(self) -> str | None: ...
    @property
    def order(self) -> Sequence[str]: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def stages(self) -> Mapping[str, StageConfig]: ...
