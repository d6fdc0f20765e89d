"""Compiled transformer layers: eager's gradients, as one graph without a break, for
micro-batches of any size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sailplan.config.compose import compose
from sailplan.config.rules import check, check_device
from sailplan.errors import ConfigurationError
from sailplan.model.parallelize import (
    checkpoint_activations,
    compile_blocks,
    reshard,
    set_gradient_sync,
    shard,
)
from sailplan.model.testing import join_layout, random_inputs, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks


def _gradients(
    rank: int, world_size: int, tensor_parallel: int, backend: str, checkpointing: bool
) -> tuple[float, int, dict[str, int]]:
    """Text micro-batches of two sizes through two layers, first without a graph, as the gradient
    cache does.
    """
    from torch._dynamo.utils import counters

    parallel = join_layout(tensor_parallel)
    found: list[dict[str, Any]] = []
    for compiled in (False, True):
        encoder = OmniEncoder(small_config(), dtype=torch.float64, seed=1)
        names = [name for name, _ in encoder.named_parameters()]
        if checkpointing:
            checkpoint_activations(encoder)
        if compiled:
            compile_blocks(encoder, backend=backend)
        shard(encoder, parallel, shard=True)
        assert [name for name, _ in encoder.named_parameters()] == names
        batches = [
            random_inputs(("text",), rows, parallel.data_parallel_rank, tokens=tokens)
            for rows, tokens in ((4, 5), (3, 7))
        ]
        with torch.no_grad():
            for inputs in batches:
                encoder(inputs)
        for number, inputs in enumerate(batches):
            set_gradient_sync(encoder, number == len(batches) - 1)
            encoder(inputs).fused.square().sum().backward()
        reshard(encoder)
        found.append(
            {
                name: whole_tensor(p, p.grad, parallel)
                for name, p in encoder.named_parameters()
                if p.grad is not None
            }
        )
    eager, other = found
    assert eager.keys() == other.keys()
    error = max(
        float((eager[name] - other[name]).abs().max() / eager[name].abs().max().clamp(min=1e-9))
        for name in eager
    )
    return error, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def test_the_gradients_are_eagers() -> None:
    """Tensor parallel, with layers that run again, by what the compiler sees and differentiates,
    without its minutes of C++.
    """
    for error, graphs, breaks in run_ranks(_gradients, 2, 2, "aot_eager", True, timeout=300):
        assert error <= 1e-10 and graphs > 0 and not breaks, (error, graphs, breaks)


def test_what_cannot_be_is_one_line() -> None:
    for overrides, words in (
        (["parallel.compile=all"], "parallel.compile=all: expected one of none, blocks"),
        (["parallel.cuda_graphs=true"], "beside parallel.compile=none"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            check(compose(["experiment=quickstart", *overrides]), 1)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no GPU here"):
            check_device(
                compose(
                    [
                        "experiment=quickstart",
                        "parallel.compile=blocks",
                        "parallel.cuda_graphs=true",
                    ]
                )
            )
