"""The encoder computes one thing: forward and gradients are the same at every tensor- and
data-parallel size.
"""

from __future__ import annotations

import pytest
import torch

from sailplan.model import parallelize
from sailplan.model.count import count_parameters
from sailplan.model.testing import join_layout, random_inputs, rows_of, small_config, whole_tensor
from sailplan.model.tower import PARTS, OmniEncoder
from sailplan_kernels.testing import run_ranks

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]  # (tensor, data)
# Vision runs in earlier micro-batches only, the reducing one is text: FSDP2 must still reduce the
# vision gradients.
# One row for two ranks: the second one has an empty micro-batch.
STEP = [(("vision",), 8), (("vision", "audio", "text"), 8), (("vision",), 1), (("text",), 8)]


def projections(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(
        3, rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def share(rows: int, parallel) -> tuple[int, int]:
    each = -(-rows // parallel.data_parallel_size)
    return parallel.data_parallel_rank * each, min(rows, (parallel.data_parallel_rank + 1) * each)


def run_step(model, parallel, step=STEP, per_modality=True):
    """A step of several micro-batches and one gradient reduction; returns the fused vectors of
    this rank's rows.
    """
    fused = []
    for index, (modalities, rows) in enumerate(step):
        parallelize.set_gradient_sync(model, index == len(step) - 1)
        start, stop = share(rows, parallel)
        weights = projections(rows, 100 + index)[:, start:stop]
        out = model(
            rows_of(random_inputs(modalities, rows, index), start, stop), per_modality=per_modality
        )
        loss = (out.fused * weights[0]).sum()
        if per_modality:
            loss = loss + (out.by_modality["text"] * weights[1]).sum()
            if "vision" in out.by_modality:
                loss = loss + (out.by_modality["vision"] * weights[2]).sum()
        (loss * parallel.data_parallel_size).backward()
        fused.append((start, out.fused.detach()))
    parallelize.finish_gradients(model, parallel)
    return fused


def whole_gradients(model, parallel):
    return {
        name: None if p.grad is None else whole_tensor(p, p.grad, parallel)
        for name, p in model.named_parameters()
    }


def one_step(rank, world, tensor, sharded):
    parallel = join_layout(tensor)
    model = OmniEncoder(small_config(), dtype=torch.float64, seed=1)
    weights = {name: whole_tensor(p, p, parallel) for name, p in model.named_parameters()}
    parallelize.shard(model, parallel, shard=sharded)
    fused = run_step(model, parallel)
    gradients = whole_gradients(model, parallel)
    temperature = torch.nn.Parameter(
        torch.zeros(2, dtype=torch.float64)
    )  # a plain parameter beside the sharded ones
    temperature.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    parameters = [*model.parameters(), temperature]
    norms = [parallelize.clip_gradient_norm(parameters, 0.5, parallel) for _ in range(2)]
    return weights, fused, gradients, norms


@pytest.fixture(scope="module")
def alone():
    return run_ranks(one_step, 1, 1, True)[0]


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize(("tensor", "data"), LAYOUTS[1:])
def test_forward_gradients_and_norm_equal_one_process(alone, tensor, data, sharded):
    for weights, fused, gradients, norms in run_ranks(one_step, tensor * data, tensor, sharded):
        assert all(torch.equal(weights[name], alone[0][name]) for name in alone[0]), (
            "the seed must give the same weights at every size"
        )
        for (start, part), (_, whole) in zip(fused, alone[1], strict=True):
            torch.testing.assert_close(part, whole[start : start + len(part)], rtol=0, atol=1e-12)
        for name, expected in alone[2].items():
            torch.testing.assert_close(
                gradients[name],
                expected,
                rtol=0,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        assert abs(norms[0] - alone[3][0]) <= 1e-10 * alone[3][0]
        assert norms[1] <= 0.5


def test_norm_counts_every_element_once(alone):
    squares = sum(float(gradient.square().sum()) for gradient in alone[2].values())
    assert float(alone[3][0]) == pytest.approx((squares + 25) ** 0.5, rel=1e-12)


def frozen_stages(rank, world, tensor):
    """Stage 1 trains all with text only; stage 2 the perceiver only, its last micro-batch being
    text; stage 3 all again.
    """
    parallel = join_layout(tensor)
    model = parallelize.shard(
        OmniEncoder(small_config(), dtype=torch.float64, seed=1), parallel, shard=True
    )
    found = []
    stages = [
        (PARTS, [(("text",), 4)]),
        (("perceiver",), [(("vision",), 4), (("text",), 4)]),
        (PARTS, STEP),
    ]
    for names, step in stages:
        with torch.no_grad():  # an evaluation between stages leaves parameters gathered
            model(random_inputs(("vision", "text"), 2, 50))
        parallelize.reshard(model)
        for name, parameters in model.parts().items():
            for parameter in parameters:
                parameter.requires_grad_(name in names)
        run_step(model, parallel, step, per_modality=False)
        found.append(whole_gradients(model, parallel))
        model.zero_grad()
    return found


def test_freezing_parts_between_stages():
    expected = run_ranks(frozen_stages, 1, 1)[0]
    assert expected[0]["vision.positions"] is None and expected[0]["text.weight"] is not None
    assert {
        name.split(".")[0] for name, gradient in expected[1].items() if gradient is not None
    } == {"perceiver"}
    assert all(gradient is not None for gradient in expected[2].values())
    for found in run_ranks(frozen_stages, 2, 1):
        for stage, reference in zip(found, expected, strict=True):
            for name, gradient in reference.items():
                assert (stage[name] is None) == (gradient is None), name
                if gradient is not None:
                    torch.testing.assert_close(stage[name], gradient, rtol=0, atol=1e-10)


def test_the_count_is_of_the_whole_model_at_any_layout(alone):
    def count(rank, world):
        join_layout(2)
        return count_parameters(small_config())

    for counts in run_ranks(count, 2):
        assert counts["total"] == sum(weight.numel() for weight in alone[0].values())


def count_reductions(rank, world):
    parallel = join_layout(1)
    model = parallelize.shard(
        OmniEncoder(small_config(), dtype=torch.float64), parallel, shard=True
    )
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as internals

    calls = {"reduce": 0, "gather": 0}
    reduce, gather = internals.foreach_reduce, internals.foreach_all_gather

    def counted(name, function):
        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return call

    internals.foreach_reduce, internals.foreach_all_gather = (
        counted("reduce", reduce),
        counted("gather", gather),
    )
    run_step(model, parallel, STEP * 2, per_modality=False)
    return calls


def test_a_step_gathers_and_reduces_each_unit_once():
    units = 6  # 2 + 1 + 1 + 1 layers and the rest
    for calls in run_ranks(count_reductions, 2):
        assert calls == {"reduce": units, "gather": units}


def mixed_precision(rank, world):
    parallel = join_layout(1)
    exact = OmniEncoder(small_config(), dtype=torch.float32, seed=1)
    inputs = random_inputs(("vision", "audio", "text"), 4, 3, dtype=torch.float32)
    expected = exact(inputs).fused.detach()
    model = parallelize.shard(
        OmniEncoder(small_config(), dtype=torch.float32, seed=1),
        parallel,
        shard=True,
        compute_dtype=torch.bfloat16,
    )
    out = model(inputs).fused
    out.square().sum().backward()
    return (
        float((out.detach() - expected).norm() / expected.norm()),
        out.dtype,
        {p.dtype for p in model.parameters()},
        {p.grad.dtype for p in model.parameters()},
    )


def test_bfloat16_computation_keeps_float32_parameters_and_gradients():
    for error, out, parameters, gradients in run_ranks(mixed_precision, 2):
        assert 1e-5 < error < 0.03
        assert {out} == parameters == gradients == {torch.float32}


def hybrid_step(rank, world):
    parallel = join_layout(1)
    model = parallelize.shard(
        OmniEncoder(small_config(), dtype=torch.float64, seed=1), parallel, shard=True, replicas=2
    )
    held = sum(p.to_local().numel() for p in model.parameters())
    run_step(model, parallel)
    gradients = whole_gradients(model, parallel)
    return held, gradients, parallelize.clip_gradient_norm(model.parameters(), 1e9, parallel)


def test_hybrid_sharding_holds_half_on_each_of_four_ranks_and_has_the_same_gradients(alone):
    whole = sum(weight.numel() for weight in alone[0].values())
    norm = sum(float(gradient.square().sum()) for gradient in alone[2].values()) ** 0.5
    found = run_ranks(hybrid_step, 4)
    assert [held for held, _, _ in found[:2]] == [held for held, _, _ in found[2:]] and found[0][
        0
    ] + found[1][0] == whole
    for _, gradients, found_norm in found:
        assert float(found_norm) == pytest.approx(norm, rel=1e-10)
        for name, expected in alone[2].items():
            torch.testing.assert_close(
                gradients[name],
                expected,
                rtol=0,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )
