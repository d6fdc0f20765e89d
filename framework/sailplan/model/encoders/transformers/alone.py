"""What becomes of any published model before it encodes: its encoder alone, nothing drawn at
random, statistics that stay.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


C = TypeVar("C")
# Layers left out and times masked are drawn from numpy's generator, so that a replay would draw
# others, and ranks would meet in different layers.
NOT_DRAWN = {"apply_spec_augment": False, "layerdrop": 0.0, "encoder_layerdrop": 0.0}


def without_draws(config: C) -> C:
    """Return a model's configuration, changed in place: no layer is left out, no time masked."""
    for name, value in NOT_DRAWN.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the encoder of an encoder-decoder, else the model."""
    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    return model.get_encoder() if seq2seq and not hasattr(model, "get_text_features") else model


def encoder_alone(model: PreTrainedModel) -> nn.Module:
    """Return the encoder of an encoder-decoder, else the model; scalars become buffers, as FSDP2
    shards none (the temperature is the objective's).
    """
    alone = encoder_of(model)
    for name, parameter in list(alone.named_parameters()):
        if parameter.ndim == 0:
            owner, _, own = name.rpartition(".")
            module = alone.get_submodule(owner)
            delattr(module, own)
            module.register_buffer(own, parameter.detach())
    config: PreTrainedConfig = alone.config  # type: ignore[assignment]
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return alone


def keep_statistics(model: nn.Module) -> None:
    """Let every batch norm normalise by its published statistics, in training too, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.forward = MethodType(_by_kept_statistics, module)  # type: ignore[method-assign]


def _by_kept_statistics(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Return x normalised by the published statistics, in training too, in their dtype.

    Those of a micro-batch would make a row's vector depend on how rows are cut, and a replay would
    count them twice.
    """
    assert norm.running_mean is not None
    kept = norm.running_mean.dtype  # float32 where x and the weights are bfloat16
    weight, bias = (None if one is None else one.to(kept) for one in (norm.weight, norm.bias))
    return F.batch_norm(
        x.to(kept), norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps
    ).to(x.dtype)
