"""Low-rank updates: gradients do not depend on the layout, the frozen matrices stay, and merging
gives the same vectors.
"""

from __future__ import annotations

import pytest
import torch

from sailplan.config.schema import LoraConfig
from sailplan.model import parallelize
from sailplan.model.lora import is_lora, merged
from sailplan.model.testing import join_layout, random_inputs, rows_of, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

MODALITIES = ("vision", "audio", "text")


def configured(targets=("all",), rank=2, vision="own"):
    config = small_config(vision=vision)
    config.lora = LoraConfig(rank, 8.0, list(targets), ["tower", "vision", "perceiver", "audio"])
    return config


def stir(model, parallel):
    """Gives the zero factors values, the same at every layout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".lora.b"):
                whole = torch.randn(
                    whole_tensor(parameter, parameter, parallel).shape,
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(len(name)),
                )
                if getattr(parameter, "tensor_model_parallel", False):
                    halves, size, rank = (
                        parameter.partition_stride,
                        parallel.tensor_parallel_size,
                        parallel.tensor_parallel_rank,
                    )
                    whole = torch.cat([half.chunk(size)[rank] for half in whole.chunk(halves)])
                parameter.copy_(whole)


def trained(rank, world, tensor, vision):
    parallel = join_layout(tensor)
    model = OmniEncoder(configured(vision=vision), dtype=torch.float64, seed=1)
    stir(model, parallel)
    parallelize.shard(model, parallel, shard=True)
    for name, parameters in model.parts().items():
        for parameter in parameters:
            parameter.requires_grad_(name == "lora")
    inputs = random_inputs(MODALITIES, 4, 0)
    each = 4 // parallel.data_parallel_size
    start = parallel.data_parallel_rank * each
    weights = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))[
        start : start + each
    ]
    out = model(rows_of(inputs, start, start + each))
    ((out.fused * weights).sum() * parallel.data_parallel_size).backward()
    parallelize.finish_gradients(model, parallel)
    norm = parallelize.clip_gradient_norm(model.parameters(), 1e9, parallel)
    return (
        start,
        out.fused.detach(),
        {
            name: None if p.grad is None else whole_tensor(p, p.grad, parallel)
            for name, p in model.named_parameters()
        },
        norm,
    )


@pytest.mark.parametrize(
    ("tensor", "data", "vision", "matrices"),
    [(2, 1, "own", 4), (1, 2, "own", 4), (2, 2, "own", 4), (2, 2, "published", 12)],
)
def test_gradients_are_those_of_one_process(tensor, data, vision, matrices):
    [(_, fused, wanted, norm)] = run_ranks(trained, 1, 1, vision)
    factors = [name for name in wanted if is_lora(name)]
    assert len(factors) == 2 * (4 * 4 + matrices) and all(
        wanted[name].abs().max() > 0 for name in factors
    )  # 5 layers of 4 matrices; of a published picture encoder 2 of 6
    assert all((gradient is None) == (not is_lora(name)) for name, gradient in wanted.items())
    for start, part, gradients, found in run_ranks(trained, tensor * data, tensor, vision):
        torch.testing.assert_close(part, fused[start : start + len(part)], rtol=0, atol=1e-12)
        for name in factors:
            torch.testing.assert_close(
                gradients[name],
                wanted[name],
                rtol=0,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        assert abs(found - norm) <= 1e-10 * norm


def fresh_and_merged(rank, world, targets, vision):
    parallel = join_layout(1)
    inputs = random_inputs(MODALITIES, 3, 0)
    with torch.no_grad():
        plain = OmniEncoder(configured(rank=0, vision=vision), dtype=torch.float64, seed=1)(
            inputs
        ).fused
        model = OmniEncoder(configured(targets, vision=vision), dtype=torch.float64, seed=1)
        fresh = model(inputs).fused
        names = {name.split(".")[-3] for name, _ in model.named_parameters() if is_lora(name)}
        stir(model, parallel)
        changed = model(inputs).fused
        whole = OmniEncoder(configured(rank=0, vision=vision), dtype=torch.float64, seed=2)
        whole.load_state_dict(merged(model.state_dict(), configured(targets).lora))
        return plain, fresh, changed, whole(inputs).fused, names


@pytest.mark.parametrize(
    ("vision", "targets", "expected"),
    [
        ("own", ["attention"], {"linear_qkv", "linear_proj"}),
        ("own", ["mlp"], {"linear_fc1", "linear_fc2"}),
        ("own", ["all"], {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}),
        (
            "published",
            ["all"],
            {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
            | {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        ),
    ],
)
def test_a_fresh_update_changes_nothing_and_a_merged_one_everything_alike(
    vision, targets, expected
):
    plain, fresh, changed, whole, names = run_ranks(fresh_and_merged, 1, targets, vision)[0]
    assert torch.equal(plain, fresh) and names == expected
    assert not torch.allclose(changed, fresh)
    torch.testing.assert_close(whole, changed, rtol=0, atol=1e-12)
