"""Layers that run again in the backward pass: the same gradients, with dropout, tensor
parallelism and the gradient cache; fewer saved bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from sailplan.config.schema import ModelConfig, ParallelConfig, SwinShape
from sailplan.model.backbones.clap import WindowBlock
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout, random_inputs, small_config, whole_tensor
from sailplan.parity.layouts import cached_step, compare, gathered_gradients, relative_errors
from sailplan.parity.testing import WEIGHTS
from sailplan_kernels.testing import run_ranks


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "sharding"), [(2, 1, "replicate"), (4, 2, "shard")]
)
def test_the_gradients_are_the_full_batchs(
    world_size: int, tensor_parallel: int, sharding: str
) -> None:
    for row in compare(
        world_size, tensor_parallel, ((2, 1),), checkpointing=True, sharding=sharding
    ):
        assert row.error <= 1e-10, row


def _dropout(rank: int, world_size: int, tensor_parallel: int) -> float:
    parallel = join_layout(tensor_parallel)
    gradients = []
    for checkpointing in (False, True):
        step, _ = cached_step(parallel, 2, 3, WEIGHTS, dropout=0.3, checkpointing=checkpointing)
        gradients.append(gathered_gradients(step, parallel))
    return max(relative_errors(gradients[1], gradients[0]).values())


def test_a_repeated_layer_drops_the_same_units() -> None:
    assert max(run_ranks(_dropout, 2, 2)) <= 1e-10


def _with_clap() -> ModelConfig:
    config = small_config()
    swin = SwinShape(
        layers=[2, 2], heads=[2, 2], hidden=16, feed_forward=4, window=4, patch=4, image=32
    )
    config.audio = dataclasses.replace(config.audio, backbone="clap", mel_bins=16, swin=swin)
    return config


def _saved(rank: int, world_size: int, tensor_parallel: int, clap: bool) -> dict[str, Any]:
    """Bytes that are kept of one encoder call for the backward pass, each storage once, the
    parameters' names, and the gradients.
    """
    config = _with_clap() if clap else small_config()
    found: dict[str, Any] = {}
    parallel = join_layout(tensor_parallel)
    for kind in ("none", "full"):
        encoder = build_encoder(
            config,
            ParallelConfig(tensor=tensor_parallel, activation_checkpointing=kind),
            parallel,
            seed=1,
        )
        inputs = random_inputs(("text", "vision", "audio"), 32, 1, dtype=torch.float32)
        if clap:
            inputs.audio = (
                torch.randn(32, 2, 50, 16, generator=torch.Generator().manual_seed(1)) * 20 - 40
            )
        with torch.no_grad():
            encoder(inputs)  # gathers the parameters
        parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:  # noqa: B023  # called within this round
                kept[storage.data_ptr()] = storage  # noqa: B023
            return tensor

        def keep_inputs(
            layer: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
        ) -> None:
            """A layer that runs again holds its inputs besides what autograd saves."""
            for value in (*arguments, *named.values()):
                if isinstance(value, torch.Tensor):
                    keep(value)

        for module in encoder.modules():
            if isinstance(module, (TransformerLayer, WindowBlock)):
                module.register_forward_pre_hook(keep_inputs, with_kwargs=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = encoder(inputs).fused.square().sum()
        found[kind] = sum(storage.nbytes() for storage in kept.values())
        found[f"{kind} names"] = [name for name, _ in encoder.named_parameters()]
        kept.clear()
        loss.backward()
        found[f"{kind} gradients"] = {
            name: whole_tensor(p, p.grad, parallel)
            for name, p in encoder.named_parameters()
            if p.grad is not None
        }
    return found


@pytest.mark.parametrize("clap", [False, True], ids=["own", "clap"])
@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(1, 1), (2, 2)])
def test_less_is_saved_and_names_and_gradients_stay(
    world_size: int, tensor_parallel: int, clap: bool
) -> None:
    for found in run_ranks(_saved, world_size, tensor_parallel, clap):
        assert found["full gradients"].keys() == found["none gradients"].keys()
        for name, gradient in found["none gradients"].items():
            torch.testing.assert_close(
                found["full gradients"][name], gradient, rtol=1e-5, atol=1e-6, msg=name
            )
        assert 0 < found["full"] < 0.6 * found["none"], (found["full"], found["none"])
        assert found["full names"] == found["none names"]
