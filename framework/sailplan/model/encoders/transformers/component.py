"""A published model as a component: opened by transformers, with LoRA by peft, saved in its own
format.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sailplan.config.schema import Config, ParallelConfig
from sailplan.data.processor import Processor
from sailplan.model.component import EncoderComponent
from sailplan.model.encoders.transformers.config import PeftConfig, TransformersConfig
from sailplan.model.encoders.transformers.files import (
    drawn_model,
    published_model,
    reads_media_as_text,
    save_files,
)
from sailplan.model.encoders.transformers.module import TransformersEncoder, merged
from sailplan.model.encoders.transformers.processor import TransformersProcessor
from sailplan.model.encoders.transformers.sequences import SequenceProcessor
from sailplan.model.protocol import Encoder
from sailplan.runtime.process import Parallel

if TYPE_CHECKING:
    from sailplan.model.config import EncoderConfig


class Transformers(EncoderComponent):
    """A model of transformers' AutoModel."""

    model: TransformersConfig

    @property
    def gives_tokens(self) -> bool:
        return list(self.model.modalities) == ["text"]

    def processor(self, config: Config) -> Processor:
        alone = list(self.model.modalities) == ["text"]
        within = not alone and reads_media_as_text(self.model)
        kind = SequenceProcessor if within else TransformersProcessor
        return kind(self.model, config)

    def module(self, dtype: torch.dtype) -> TransformersEncoder:
        return TransformersEncoder(self.model, drawn_model(self.model), dtype=dtype)

    def build(self, parallel_config: ParallelConfig, parallel: Parallel, seed: int) -> Encoder:
        """As `EncoderComponent.build`; every rank reads the published weights whole before they
        are cut.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = (
                published_model(self.model)
                if self.model.weights == "published"
                else drawn_model(self.model)
            )
            dtype = torch.float64 if parallel_config.dtype == "float64" else torch.float32
            return TransformersEncoder(self.model, model, dtype=dtype).train()

    def check_files(self) -> None:
        self.skeleton(ParallelConfig())

    def exported(self, weights: dict[str, Tensor]) -> tuple[TransformersConfig, dict[str, Tensor]]:
        settings = replace(self.model, weights="drawn", revision=None, lora=PeftConfig())
        return settings, merged(weights, self.model.lora) if self.model.lora.rank else dict(weights)

    def write_files(self, config: Config, weights: dict[str, Tensor], out: Path) -> None:
        save_files(self.model, out)

    def placed(self, folder: Path) -> EncoderConfig:
        return replace(self.model, source=str(folder), options={}, image_processor_options={})
