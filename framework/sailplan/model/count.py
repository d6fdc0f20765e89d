"""How large a model is before it is built: the parameters of each part.

The model is laid out on the meta device, so a billion parameters cost no memory and a second of
time.
"""

from __future__ import annotations

import torch
from torch import nn

from sailplan.config.schema import EncoderConfig, ParallelConfig
from sailplan.model.blocks import process_groups
from sailplan.model.component import EncoderComponent
from sailplan.model.protocol import Encoder


def build_on_meta(
    config: EncoderConfig, *, dtype: torch.dtype = torch.float32, share_encoders: bool = True
) -> Encoder:
    """Return the model's shapes without its numbers; share_encoders: as parallel.encoders."""
    component: EncoderComponent = config.component()
    return component.skeleton(
        ParallelConfig(encoders="share" if share_encoders else "tensor"), dtype
    )


def check_weights(config: EncoderConfig) -> None:
    """Raise ConfigurationError where published weights do not fit the configured model.

    Reads headers only and needs no process group, so that every rank can refuse before any group is
    formed.
    """
    component: EncoderComponent = config.component()
    component.check_files()


def _split_sizes(model: Encoder, part: str) -> tuple[int, int]:
    """(elements that tensor parallelism cuts, elements that every tensor-parallel rank holds
    whole), of the whole model.
    """
    groups = process_groups()
    size = groups.tp.size() if groups.tp is not None else 1

    def is_cut(parameter: nn.Parameter) -> bool:
        # The note is set where weights are drawn, so it is there on the meta device too.
        return bool(getattr(parameter, "tensor_model_parallel", False))

    parameters = model.parts()[part]
    cut = sum(parameter.numel() * size for parameter in parameters if is_cut(parameter))
    return cut, sum(parameter.numel() for parameter in parameters if not is_cut(parameter))


def count_parameters(config: EncoderConfig) -> dict[str, int]:
    """Return the parameters of each part, and "total"; the same in a world of any layout.

    Raises ConfigurationError where the model cannot be built.
    """
    model = build_on_meta(config)
    counts = {part: sum(_split_sizes(model, part)) for part in model.parts()}
    return counts | {"total": sum(counts.values())}
