"""The omni tower as a component: its shapes are checked, its published weights loaded, its
layers fused.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sailplan.config.schema import Config, LoraConfig, ModelConfig, ParallelConfig
from sailplan.data.packing import OmniInputs, SequenceLayout, pack
from sailplan.data.processor import Processor
from sailplan.data.views import largest_inputs
from sailplan.errors import ConfigurationError
from sailplan.model.backbones.load import (
    allocate,
    check_shapes,
    load,
    open_sources,
    published_parts,
)
from sailplan.model.check import check_model
from sailplan.model.component import EncoderComponent
from sailplan.model.encoders.omni.processor import OmniProcessor
from sailplan.model.encoders.omni.published_files import (
    adapted_parts,
    check_folders,
    check_tokens,
    load_published,
    resolved,
    standing_alone,
)
from sailplan.model.fused import chosen_extension, fuse
from sailplan.model.lora import merged
from sailplan.model.parallelize import allow_sequence_parallel
from sailplan.model.tower import OmniEncoder
from sailplan.runtime.process import Parallel

TOKENIZER = "tokenizer.json"


class Omni(EncoderComponent):
    """The omni tower."""

    model: ModelConfig

    def __init__(self, model: ModelConfig) -> None:
        """Raises ConfigurationError where a published encoder is described nowhere."""
        super().__init__(resolved(model))

    @property
    def gives_tokens(self) -> bool:
        return True

    def processor(self, config: Config) -> Processor:
        return OmniProcessor(replace(config, model=self.model))

    def largest(self, config: Config, modalities: Sequence[str], rows: int) -> OmniInputs:
        inputs = largest_inputs(config.data, modalities, rows)
        return replace(
            inputs, packing=pack(inputs, SequenceLayout.planned(self.model, config.parallel))
        )

    def check_shapes(self, parallel_config: ParallelConfig) -> None:
        check_model(
            self.model, parallel_config.tensor, share_encoders=parallel_config.encoders == "share"
        )
        check_tokens(self.model)

    def check_files(self) -> None:
        for source in open_sources(self.model):
            check_shapes(source, self.skeleton(ParallelConfig()))
        check_folders(self.model)

    def check_processor(self, config: Config, processor: Processor) -> None:
        """Raises ConfigurationError where the tokenizer has ids that the model has no embedding
        for.

        It may have fewer ids, never more: a tensor-parallel embedding would answer one with zeros,
        without a word.
        """
        found: int = processor.tokenizer.vocabulary  # type: ignore[attr-defined]
        if found > self.model.vocabulary:
            raise ConfigurationError(
                f"data.tokenizer={config.data.tokenizer} has {found} tokens, but model.vocabulary "
                f"is {self.model.vocabulary}: "
                "expected at most as many; choose the tokenizer.json of the model's own folder, or "
                "set model.vocabulary"
            )

    def module(self, dtype: torch.dtype, **options: Any) -> OmniEncoder:
        return OmniEncoder(self.model, dtype=dtype, **options)

    def exported(self, weights: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
        model = standing_alone(replace(self.model, lora=LoraConfig()))
        return model, merged(weights, self.model.lora)

    def write_files(self, config: Config, weights: dict[str, Tensor], out: Path) -> None:
        tokenizer = Path(config.data.tokenizer)
        if not tokenizer.is_file():
            raise ConfigurationError(
                f"data.tokenizer={tokenizer}: no such file; an export needs the tokenizer that the "
                "run was trained with"
            )
        if tokenizer.resolve() != (out / TOKENIZER).resolve():
            shutil.copyfile(tokenizer, out / TOKENIZER)

    def skeleton(
        self, parallel_config: ParallelConfig, dtype: torch.dtype = torch.float32
    ) -> OmniEncoder:
        with torch.device("meta"):
            return self.module(dtype, share_encoders=parallel_config.encoders == "share")

    def build(self, parallel_config: ParallelConfig, parallel: Parallel, seed: int) -> OmniEncoder:
        """As `EncoderComponent.build`; parts that `model.weights` names start from published
        weights, of which each tensor-parallel
        rank reads its own part (of encoders whose rows are shared out, the whole)."""

        share = parallel_config.encoders == "share"
        check_model(self.model, parallel.tensor_parallel_size, share_encoders=share)
        extension = chosen_extension(parallel_config, parallel.device.type)
        sources = open_sources(self.model)
        adapted = [
            part for part in adapted_parts(self.model) if part in published_parts(self.model)
        ]
        module = self.module(
            torch.float64 if parallel_config.dtype == "float64" else torch.float32,
            seed=seed,
            published=[*(source.part for source in sources), *adapted],
            share_encoders=share,
            sequence_parallel=parallel_config.sequence,
        )
        if parallel_config.sequence:
            allow_sequence_parallel(seed)
        if sources or adapted:
            allocate(module)
        for part in adapted:
            load_published(self.model, part, getattr(module, part))
        for source in sources:
            load(source, module, parallel.tensor_parallel_rank, parallel.tensor_parallel_size)
        fuse(module, extension)
        return module
