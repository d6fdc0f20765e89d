"""TransformerEngine's norms and core attention in our blocks.

A stand-in with its functions' arguments (as in the sources of 2.18 and of the main branch of August
2026), written in plain torch, checks what we hand over and what we make of what comes back; it says
nothing about the real kernels. Those are compared in tests/unit/model/test_fused.py, where they and
a GPU are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sailplan.config.compose import compose
from sailplan.config.rules import check
from sailplan.config.schema import ModelConfig, ParallelConfig, TransformerShape
from sailplan.errors import ConfigurationError
from sailplan.model import fused
from sailplan.model.blocks import Blocks, rotary_angles
from sailplan.model.fused import chosen_extension, extensions, fuse
from sailplan.model.parallelize import checkpoint_activations
from sailplan.model.testing import join_layout, packed_rows, random_inputs, small_config
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

FILES = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": """
import math
import torch

CALLS = []

class DotProductAttention(torch.nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal",
        window_size=None, bottom_right_diagonal=None, sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None,
        layer_number=None, attention_type="self", cp_group=None, cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p",
        softmax_scale=None, softmax_type="vanilla", return_max_logit=False, name=None,
    ):
        super().__init__()
        assert tp_size == 1 and attention_type == "self" and window_size is None and softmax_type == "vanilla"
        self.heads, self.size, self.groups, self.dropout = num_attention_heads, kv_channels, num_gqa_groups, attention_dropout
        self.format, self.mask_type = qkv_format, attn_mask_type

    def get_extra_state(self):
        return torch.zeros(1)  # what must not come into our checkpoints

    def forward(
        self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None,
        cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None,
        window_size=None, bottom_right_diagonal=None, checkpoint_core_attention=False, core_attention_bias_type="no_bias",
        core_attention_bias=None, alibi_slopes=None, fast_zero_fill=True, inference_params=None, pad_between_seqs=None,
        fp8_output=False, num_splits=1,
    ):
        qkv_format, mask_type = qkv_format or self.format, attn_mask_type or self.mask_type
        assert mask_type in ("no_mask", "padding", "causal", "padding_causal"), mask_type
        assert attention_mask is None and query_layer.dtype == key_layer.dtype == value_layer.dtype
        assert query_layer.shape[-2:] == (self.heads, self.size) and key_layer.shape[-2:] == (self.groups, self.size)
        assert self.training or not torch.is_grad_enabled()  # in evaluation it saves nothing
        CALLS.append((qkv_format, mask_type))
        causal = "causal" in mask_type
        if qkv_format == "thd":
            assert query_layer.dim() == 3 and "padding" in mask_type and cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
            assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(query_layer) and torch.equal(cu_seqlens_q, cu_seqlens_kv)
            lengths = cu_seqlens_q.diff().tolist()
            assert 0 < min(lengths) and max(lengths) <= max_seqlen_q == max_seqlen_kv
            parts = zip(*(part.split(lengths) for part in (query_layer, key_layer, value_layer)))
            return torch.cat([self.one(*part, causal) for part in parts]).flatten(1)
        assert qkv_format == "bshd" and query_layer.dim() == 4 and "padding" not in mask_type
        rows = [self.one(*part, causal) for part in zip(query_layer, key_layer, value_layer)]
        return torch.stack(rows).flatten(2)

    def one(self, query, key, value, causal):
        key, value = (part.repeat_interleave(self.heads // self.groups, 1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(self.size)
        if causal:
            scores = scores + torch.full(scores.shape[1:], -torch.inf, dtype=scores.dtype).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
""",
    "transformer_engine/pytorch/constants.py": """
import torch
import transformer_engine_torch as tex

TE_DType = {torch.float32: tex.DType.kFloat32, torch.half: tex.DType.kFloat16, torch.bfloat16: tex.DType.kBFloat16}
""",
    "transformer_engine_torch.py": """
import enum
import torch

CALLS = []

class DType(enum.Enum):
    kFloat32, kFloat16, kBFloat16 = 4, 5, 6

def _given(kind, input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    assert input.dim() == 2 and input.is_contiguous() and input.dtype == weight.dtype
    assert ln_out is None and quantizer is None and isinstance(otype, DType) and sm_margin == 0 and zero_centered_gamma is False
    CALLS.append(kind)

def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    _given("rms", input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma)
    rsigma = (input.float().square().mean(1) + eps).rsqrt()
    return [(input.float() * rsigma[:, None] * weight.float()).to(input.dtype), None, rsigma]

def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    dz_, x_, gamma_, r = dz.float(), x.float(), gamma.float(), rsigma[:, None]
    wide = dz_ * gamma_
    dx = r * (wide - x_ * r.square() * (wide * x_).mean(1, keepdim=True))
    return [dx.to(x.dtype), (dz_ * x_ * r).sum(0).to(gamma.dtype)]

def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    _given("layer", input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma)
    mu = input.float().mean(1)
    centred = input.float() - mu[:, None]
    rsigma = (centred.square().mean(1) + eps).rsqrt()
    return [(centred * rsigma[:, None] * weight.float() + bias.float()).to(input.dtype), mu, rsigma]

def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
    dz_, normal = dz.float(), (x.float() - mu[:, None]) * rsigma[:, None]
    wide = dz_ * gamma.float()
    dx = rsigma[:, None] * (wide - wide.mean(1, keepdim=True) - normal * (wide * normal).mean(1, keepdim=True))
    return [dx.to(x.dtype), (dz_ * normal).sum(0).to(gamma.dtype), dz_.sum(0).to(gamma.dtype)]
""",
}


def _write(folder: Path, version: str = "2.18.0") -> Path:
    metadata = {
        f"transformer_engine-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n"
    }
    for name, text in {**FILES, **metadata}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]


here = extensions()["TransformerEngine"] is not None
needs_none_here = pytest.mark.skipif(
    here, reason="TransformerEngine is installed here: tests/unit/model/test_fused.py compares it"
)


def _config() -> ModelConfig:
    """Causal with fewer key/value heads, LayerNorm and RMSNorm, norms of heads."""
    config = small_config()
    config.tower.causal = True
    config.vision.encoder = TransformerShape(
        1, 16, 4, None, 24, norm="layer", gated=False, activation="gelu", bias=True
    )
    return config


def _run(encoder: OmniEncoder) -> dict[str, torch.Tensor]:
    """The vectors of rows with gaps and of full ones, and the gradients."""
    found = {}
    for absent in (True, False):
        inputs = random_inputs(
            ("text", "vision", "audio"), 6, 3, dtype=torch.float32, absent=absent
        )
        vectors = encoder(inputs, per_modality=True)
        (vectors.fused.square().sum() + vectors.by_modality["text"].pow(3).sum()).backward()
        found[f"vectors, absent={absent}"] = vectors.fused.detach()
    return found | {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def _both_ways(
    rank: int, world_size: int, folder: Path, tensor_parallel: int, checkpointing: bool
) -> tuple[float, Any, Any]:
    with _importable(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fused, "ATTENTION_DTYPES", (torch.float32,)
        )  # so that what is compared is exact
        join_layout(tensor_parallel)
        found, names = [], []
        for extension in ("none", "transformer_engine"):
            encoder = OmniEncoder(_config(), seed=1)
            fuse(encoder, extension)
            if checkpointing:
                checkpoint_activations(encoder)
            names.append(
                (list(encoder.state_dict()), [name for name, _ in encoder.named_modules()])
            )
            found.append(_run(encoder))
        assert names[0] == names[1]
        own, other = found
        assert own.keys() == other.keys()
        error = max(
            float((own[name] - other[name]).abs().max() / own[name].abs().max().clamp(min=1e-6))
            for name in own
        )
        pytorch, kernels = (
            importlib.import_module(name)
            for name in ("transformer_engine.pytorch", "transformer_engine_torch")
        )
        return error, set(pytorch.CALLS), set(kernels.CALLS)


@needs_none_here
@pytest.mark.parametrize(("tensor_parallel", "checkpointing"), [(1, False), (2, True)])
def test_a_small_model_is_the_same_with_a_stand_in(
    tmp_path: Path, tensor_parallel: int, checkpointing: bool
) -> None:
    for error, attention, norms in run_ranks(
        _both_ways, tensor_parallel, _write(tmp_path), tensor_parallel, checkpointing
    ):
        assert error <= 2e-5, error
        assert attention == {
            ("bshd", "no_mask"),
            ("bshd", "causal"),
            ("thd", "padding"),
            ("thd", "padding_causal"),
        }
        assert norms == {"rms", "layer"}


def _in_bfloat16(rank: int, world_size: int, folder: Path) -> tuple[float, int]:
    """Without a change of what goes to the extension: bfloat16 does, also where no gradient is
    wanted; float64 does not.
    """
    with _importable(folder):
        join_layout(1)
        calls = importlib.import_module("transformer_engine.pytorch").CALLS
        outputs = []
        for extension in ("none", "transformer_engine"):
            blocks = Blocks(TransformerShape(2, 16, 4, 2, 24), torch.bfloat16, 10000.0)
            with torch.no_grad():
                for number, parameter in enumerate(blocks.parameters()):
                    parameter.copy_(
                        torch.randn(
                            parameter.shape, generator=torch.Generator().manual_seed(number)
                        )
                        / 4
                    )
            fuse(blocks.eval(), extension)
            keep = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
            hidden = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(9)).bfloat16()
            with torch.no_grad():
                numbers, places, rows = packed_rows(keep)
                outputs.append(
                    blocks(
                        hidden.flatten(0, 1)[numbers], rows, rotary_angles(places, 4, 10000.0)
                    ).float()
                )
        seen = len(calls)
        wide = Blocks(TransformerShape(1, 16, 4, 2, 24), torch.float64, 10000.0)
        fuse(wide, "transformer_engine")
        wide(torch.randn(2, 4, 16, dtype=torch.float64)).sum().backward()
        assert len(calls) == seen
        return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()), seen


@needs_none_here
def test_bfloat16_goes_to_it_and_float64_does_not(tmp_path: Path) -> None:
    ((error, calls),) = run_ranks(_in_bfloat16, 1, _write(tmp_path))
    assert error <= 0.03 and calls == 2, (error, calls)


@needs_none_here
def test_what_is_chosen(tmp_path: Path) -> None:
    def choose(fused: str, device: str = "cuda", compile: str = "none") -> str:
        return chosen_extension(ParallelConfig(fused=fused, compile=compile), device)

    assert extensions()["TransformerEngine"] is None and choose("none") == "none"
    with pytest.raises(
        ConfigurationError,
        match=r"parallel.fused=transformer_engine, but TransformerEngine is not installed.*expected NVIDIA's.*set auto",
    ):
        choose("transformer_engine")
    with _importable(_write(tmp_path / "new")):
        assert extensions()["TransformerEngine"] == "2.18.0"
        assert (
            choose("transformer_engine") == "transformer_engine"
            and choose("auto") == "transformer_engine"
        )
        assert choose("auto", "cpu") == "none" and choose("auto", compile="blocks") == "none"
        with pytest.raises(
            ConfigurationError, match=r"parallel.fused=transformer_engine, but the device is a CPU"
        ):
            choose("transformer_engine", "cpu")
    with _importable(_write(tmp_path / "old", "1.13.0")):
        assert choose("auto") == ("none" if extensions()["apex"] is None else "apex")
        with pytest.raises(
            ConfigurationError, match=r"found TransformerEngine 1.13.0, older than 2.0"
        ):
            choose("transformer_engine")


def test_it_is_not_compiled() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"parallel.fused=transformer_engine beside parallel.compile=blocks",
    ):
        check(
            compose(
                [
                    "experiment=quickstart",
                    "parallel.fused=transformer_engine",
                    "parallel.compile=blocks",
                ]
            ),
            1,
        )
