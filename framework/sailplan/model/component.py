"""An encoder as one component: its configuration, its processor, its module, and how these are
checked and built.

A new one is one file: a dataclass of its settings below `model.config.EncoderConfig`, whose
`component` gives a subclass of `EncoderComponent`, which makes a `Processor` and an `Encoder`.
`_target_` in a YAML file of conf/model chooses the dataclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sailplan.config.schema import Config, ParallelConfig
from sailplan.data.processor import Processor
from sailplan.data.record import EncoderInputs
from sailplan.model.protocol import Encoder
from sailplan.runtime.process import Parallel

if TYPE_CHECKING:
    from sailplan.model.config import EncoderConfig


class EncoderComponent(ABC):
    """What the program asks of an encoder's kind. model: its typed configuration."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def gives_tokens(self) -> bool:
        """Whether its encoder gives the vectors of positions (see `Encoder.gives_tokens`)."""
        return False

    @abstractmethod
    def processor(self, config: Config) -> Processor:
        """Return what turns items into this encoder's inputs."""

    @abstractmethod
    def module(self, dtype: torch.dtype) -> Encoder:
        """Return the encoder with drawn weights; called under the run's seed, or on the meta
        device.
        """

    def largest(self, config: Config, modalities: Sequence[str], rows: int) -> EncoderInputs:
        """Return the largest micro-batch of a view, on the CPU (see `Processor.largest`)."""
        return self.processor(config).largest(modalities, rows)

    def check_shapes(self, parallel_config: ParallelConfig) -> None:  # noqa: B027  nothing to check by default
        """Raise ConfigurationError for shapes that cannot be built; reads no file."""

    def check_files(self) -> None:  # noqa: B027
        """Raise ConfigurationError where published weights are missing or of another shape;
        needs no process group.
        """

    def check_processor(self, config: Config, processor: Processor) -> None:  # noqa: B027
        """Raise ConfigurationError where the processor does not fit the model."""

    def skeleton(
        self, parallel_config: ParallelConfig, dtype: torch.dtype = torch.float32
    ) -> Encoder:
        """Return the module's shapes without its numbers, on the meta device."""
        with torch.device("meta"):
            return self.module(dtype)

    def build(self, parallel_config: ParallelConfig, parallel: Parallel, seed: int) -> Encoder:
        """Return the encoder on the CPU, not yet sharded; its weights are a function of the
        configuration and the seed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.module(
                torch.float64 if parallel_config.dtype == "float64" else torch.float32
            )

    def exported(self, weights: dict[str, Tensor]) -> tuple[EncoderConfig, dict[str, Tensor]]:
        """Return the settings and the encoder's whole tensors of a folder that stands alone:
        low-rank updates merged.
        """
        return self.model, weights

    def write_files(self, config: Config, weights: dict[str, Tensor], out: Path) -> None:  # noqa: B027
        """Write beside an export's weights what its processor needs, the tokenizer included.

        weights: those that are exported.

        Raises ConfigurationError for a missing file.
        """

    def placed(self, folder: Path) -> EncoderConfig:
        """Return the settings with which an exported folder is opened."""
        return self.model
