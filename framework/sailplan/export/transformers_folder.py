"""A trained published model as a folder of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sailplan.config.schema import Config
from sailplan.model.encoders.transformers.config import TransformersConfig


def write_transformers(config: Config, model: TransformersConfig, weights: Mapping[str, Tensor], out: Path) -> list[dict[str, str]]:
    raise NotImplementedError
