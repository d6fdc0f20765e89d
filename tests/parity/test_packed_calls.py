"""What a packed micro-batch calls: as many tokens through the linear layers as there are, no
mask, cumulative lengths on a GPU.

torch's varlen_attn runs on GPUs alone. Here a function with its arguments stands in for it: it
checks them and computes the exact result from the cumulative lengths.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from sailplan.config.compose import compose
from sailplan.config.schema import StageConfig
from sailplan.data.collate import Collator
from sailplan.data.datasets import open_datasets
from sailplan.data.packing import OmniInputs, SequenceLayout, pack
from sailplan.data.plan import Plan
from sailplan.model import attention
from sailplan.model.parallelize import checkpoint_activations, compile_blocks
from sailplan.model.testing import join_layout, random_inputs, small_config
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = ("text", "vision", "audio")


def real_tokens(inputs: OmniInputs, latents: int) -> int:
    count = int(inputs.token_mask.sum())
    if "vision" in inputs.modalities:
        count += latents * int(inputs.image_mask.any(1).sum())
    return count + (int(inputs.audio_mask.any(1).sum()) if "audio" in inputs.modalities else 0)


def _tokens_of_real_tables(rank: int, world_size: int) -> list[tuple[str, str, int, int, int]]:
    """(data set, view, tokens through the tower's linear layers, real ones, tokens of the padded
    rows) of a step's first rank of two.
    """
    join_layout(1)
    config = compose(
        [
            "experiment=quickstart",
            "global_batch=64",
            "step.micro_batch=32",
            f"data.root={ROOT / 'data/quickstart'}",
        ]
    )
    encoder = OmniEncoder(config.model, seed=1)
    given: list[int] = []
    for module in encoder.tower.modules():
        if isinstance(module, ColumnParallelLinear):
            module.register_forward_pre_hook(
                lambda _, inputs: given.append(inputs[0].shape[:-1].numel())
            )
    layers = 2 * config.model.tower.layers
    attend, found = F.scaled_dot_product_attention, []

    def without_a_mask(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        assert attn_mask is None
        return attend(query, key, value, None, *rest, **options)

    readers, stage = open_datasets(config, names=["icon_choices", "icons"]), StageConfig(steps=1)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", without_a_mask)
        for name in ("icon_choices", "icons"):
            plan = Plan(config, "check", stage, {name: 1.0}, readers)
            (batch,) = Collator(config, stage, plan, readers, 0, 2).batches(0)
            for view, rows in batch.views.items():
                for inputs in rows.micro_batches:
                    assert (
                        inputs.packing is not None
                        and inputs.packing.layout
                        == SequenceLayout.planned(config.model, config.parallel)
                    )
                    given.clear()
                    encoder(inputs, per_modality=True)
                    assert len(given) == layers and len(set(given)) == 1
                    latents = config.model.vision.latents
                    padded = inputs.token_ids.numel() + inputs.rows * (
                        latents * ("vision" in inputs.modalities) + ("audio" in inputs.modalities)
                    )
                    found.append((name, view, given[0], real_tokens(inputs, latents), padded))
    return found


def test_as_many_tokens_as_there_are_and_no_mask() -> None:
    (found,) = run_ranks(_tokens_of_real_tables, 1)
    assert {name for name, *_ in found} == {"icon_choices", "icons"}
    for name, view, through, real, _ in found:
        assert through <= 1.03 * real, (name, view, through, real)
    assert sum(padded for *_, padded in found) > 1.2 * sum(
        real for *_, real, _ in found
    )  # else nothing was shown


def exact(calls: list[tuple[Any, ...]], knows_groups: bool = True) -> Any:
    """Stands in for varlen_attn of torch 2.12 and later, or of 2.11, which has no enable_gqa."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            assert query.dtype == key.dtype == value.dtype == torch.bfloat16
            assert (
                cu_seq_q is cu_seq_k
                and cu_seq_q.dtype == torch.int32
                and cu_seq_q.device == query.device
            )
            assert (
                type(max_q) is int
                and max_q == max_k == int(cu_seq_q.diff().max())
                and int(cu_seq_q[-1]) == len(query)
            )
            assert (query.size(1) == key.size(1)) == (not enable_gqa) and query.stride(
                -1
            ) == key.stride(-1) == 1
            calls.append((query.size(1), key.size(1), window_size, len(cu_seq_q) - 1))
        lengths = torch.stack([torch.ones_like(cu_seq_q[1:]), cu_seq_q.diff()], 1).long()
        seed = torch.zeros((), dtype=torch.int64)
        return torch.ops.sailplan.attention_by_length(
            query, key, value, lengths, seed, window_size == (-1, 0), 0.0
        )

    if knows_groups:
        return varlen_attn
    return lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1): (
        varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)
    )


def _by_cumulative_lengths(
    rank: int, world_size: int, causal: bool, knows_groups: bool, checkpointing: bool
) -> tuple[float, float, list[tuple[Any, ...]]]:
    """Distance of vectors and gradients to those of the same bfloat16 encoder without
    varlen_attn, and its calls.
    """
    join_layout(world_size)
    config = small_config()
    config.tower = dataclasses.replace(config.tower, causal=causal, head_size=8)
    inputs = random_inputs(EVERYTHING, 6, 3, dtype=torch.float32)
    calls: list[tuple[Any, ...]] = []
    found = []
    for varlen in (False, True):
        encoder = OmniEncoder(config, dtype=torch.bfloat16, seed=1)
        if checkpointing:
            checkpoint_activations(encoder)
        with pytest.MonkeyPatch.context() as patch:
            if varlen:
                patch.setattr(attention, "VARLEN_DEVICES", ("cpu",))
                patch.setattr(attention, "_VARLEN", [(exact(calls, knows_groups), knows_groups)])
            vectors = encoder(
                dataclasses.replace(inputs, packing=pack(inputs, encoder.layout)), per_modality=True
            )
            (vectors.fused.sum() + vectors.by_modality["text"].square().sum()).backward()
        gradients = torch.cat(
            [p.grad.float().flatten() for p in encoder.parameters() if p.grad is not None]
        )
        found.append((vectors.fused.detach(), gradients))
    (vectors, gradients), (others, other_gradients) = found
    return (
        float((vectors - others).norm() / vectors.norm()),
        float((gradients - other_gradients).norm() / gradients.norm()),
        calls,
    )


@pytest.mark.parametrize(
    ("tensor", "causal", "knows_groups", "checkpointing"),
    [(1, False, True, False), (1, True, False, False), (2, True, True, True)],
)
def test_half_precision_on_a_gpu_goes_by_cumulative_lengths(
    tensor: int, causal: bool, knows_groups: bool, checkpointing: bool
) -> None:
    for vectors, gradients, calls in run_ranks(
        _by_cumulative_lengths, tensor, causal, knows_groups, checkpointing
    ):
        assert vectors <= 0.01 and gradients <= 0.02, (vectors, gradients)
        heads = 4 // tensor
        tower = (heads, heads // 2 if knows_groups else heads, (-1, 0) if causal else (-1, -1))
        assert {call[:3] for call in calls if call[3] <= 6} >= {tower}, calls
        assert len(calls) >= 2 * (2 if checkpointing else 1)


def _compiled(rank: int, world_size: int) -> tuple[float, dict[str, int], int]:
    """A compiled bfloat16 encoder whose layers call by cumulative lengths, on micro-batches of
    four sizes.
    """
    from torch._dynamo.utils import counters

    join_layout(1)
    config = small_config()
    config.tower = dataclasses.replace(config.tower, head_size=8)
    batches = [
        random_inputs(("text",), rows, rows, tokens=tokens)
        for rows, tokens in ((4, 5), (3, 7), (6, 9), (8, 4))
    ]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "VARLEN_DEVICES", ("cpu",))
        patch.setattr(attention, "_VARLEN", [(exact([]), True)])
        for compiled in (False, True):
            encoder = OmniEncoder(config, dtype=torch.bfloat16, seed=1)
            if compiled:
                compile_blocks(encoder, backend="aot_eager")
            for inputs in batches:
                encoder(inputs).fused.square().sum().backward()
            found.append(
                torch.cat(
                    [p.grad.float().flatten() for p in encoder.parameters() if p.grad is not None]
                )
            )
    return (
        float((found[0] - found[1]).norm() / found[0].norm()),
        dict(counters["graph_break"]),
        counters["stats"]["unique_graphs"],
    )


def test_compiled_layers_hold_the_call_whatever_the_lengths() -> None:
    ((error, breaks, graphs),) = run_ranks(_compiled, 1, timeout=300)
    assert error <= 0.02 and not breaks and graphs <= 4, (error, breaks, graphs)


def _compiled_by_length(rank: int, world_size: int, dropout: float) -> float:
    """The opaque operation's gradients against plain autograd's, with dropout under the same
    seed.
    """
    torch.manual_seed(3)
    query, key, value = (
        torch.randn(26, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    lengths, seed, runs = torch.tensor([[3, 2], [4, 5]]), torch.tensor(11), ((3, 2), (4, 5))
    weights = torch.randn(26, 4, 4, dtype=torch.float64)
    found = []
    for opaque in (False, True):
        if opaque:
            context = torch.ops.sailplan.attention_by_length(
                query, key, value, lengths, seed, True, dropout
            )
        else:
            torch.manual_seed(11)
            context = attention.by_length(query, key, value, runs, True, dropout)
        found.append(
            [context, *torch.autograd.grad((context * weights).sum(), (query, key, value))]
        )
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_opaque_operation_is_the_plain_one(dropout: float) -> None:
    assert run_ranks(_compiled_by_length, 1, dropout)[0] <= 1e-12
