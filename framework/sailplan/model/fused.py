"""Kernels of NVIDIA's extensions in the place of torch's, where they are installed; nothing
needs them.

What is taken from them reads our own weights or has none, so that names, checkpoints and exports
stay what they are:

    apex                the blocks' norms (fused_rms_norm_affine, fused_layer_norm_affine)
    TransformerEngine   the blocks' norms (rmsnorm_fwd, layernorm_fwd and their backwards, which its
    own layers call)
                        and core attention in bfloat16 (DotProductAttention, which has no
                        parameters)

TransformerEngine's linear layers are not used: they keep weights under other names, with a state of
their own beside them.
Packed rows of several lengths go through its attention in its format "thd", by cumulative lengths,
and those of one length in "bshd". Its fused attention takes the former from sm_90 on; an older GPU
needs flash-attn beside it.

The arguments are those of TransformerEngine 2.0 to 2.18, and of its main branch of August 2026
(2.20.0.dev0), as their sources have them. No GPU has run any of this yet.

The package that the public index calls `apex` is another program. NVIDIA's is known by its compiled
extensions, which are looked for first, and the package is imported only where they are there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from sailplan.config.schema import ParallelConfig
from sailplan.errors import ConfigurationError
from sailplan.model.attention import PackedAttention, Sequences
from sailplan.model.blocks import CenteredNorm, Norm

FUSED_OPS = {
    "none": "torch's own kernels",
    "apex": "norms by apex",
    "transformer_engine": "norms and, in bfloat16, core attention by TransformerEngine",
}
NAMES = {"apex": "apex", "transformer_engine": "TransformerEngine"}
OLDEST = 2  # major version of TransformerEngine whose functions have these arguments
ATTENTION_DTYPES = (torch.bfloat16, torch.float16)  # its fused attention knows no others


def extensions() -> dict[str, str | None]:
    """Version of apex and TransformerEngine, None where one is missing or cannot be imported."""
    return {
        "apex": _version("apex")
        if importlib.util.find_spec("fused_layer_norm_cuda")
        and _imports("apex.normalization.fused_layer_norm")
        else None,
        "TransformerEngine": _version("transformer_engine")
        if _imports("transformer_engine.pytorch")
        else None,
    }


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (
        Exception
    ):  # an extension built for another torch fails in many ways; all mean that it cannot be used
        return False
    return True


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def chosen_extension(config: ParallelConfig, device_type: str) -> str:
    """Which of FUSED_OPS the blocks run on such a device: what `parallel.fused` asks for, or
    with auto the most that is there.

    Raises ConfigurationError where the one that is asked for cannot be used.
    """
    if config.fused == "none" or (
        config.fused == "auto" and (device_type != "cuda" or config.compile != "none")
    ):
        return "none"
    versions = extensions()
    if config.fused == "auto":
        return next(
            (name for name in ("transformer_engine", "apex") if _obstacle(name, versions) is None),
            "none",
        )
    obstacle = (
        "the device is a CPU, and its kernels need a GPU"
        if device_type != "cuda"
        else _obstacle(config.fused, versions)
    )
    if obstacle is not None:
        raise ConfigurationError(
            f"parallel.fused={config.fused}, but {obstacle}: expected NVIDIA's "
            f"{NAMES[config.fused]}, which its PyTorch image has; "
            "use that image, or set auto (what is there) or none"
        )
    return config.fused


def _obstacle(name: str, versions: dict[str, str | None]) -> str | None:
    version = versions[NAMES[name]]
    if version is None:
        return f"{NAMES[name]} is not installed, or cannot be imported"
    major = version.split(".")[0]
    if name == "transformer_engine" and not (major.isdigit() and int(major) >= OLDEST):
        return f"found TransformerEngine {version}, older than {OLDEST}.0"
    return None


def fuse(model: nn.Module, extension: str) -> None:
    """Lets the blocks run the kernels of `extension` (one of FUSED_OPS, and installed), in
    place; names and parameters stay.
    """
    if extension == "apex":
        fuse_norms(model)
    elif extension == "transformer_engine":
        engine = Engine.load()
        for module in model.modules():
            if isinstance(module, (Norm, CenteredNorm)):
                module.forward = partial(_engine_norm, engine, module)  # type: ignore[method-assign]
            elif isinstance(module, PackedAttention):
                # Not a child of the module: it would bring a state of its own into checkpoints.
                module.attend = partial(_engine_attention, engine.attention_of(module), module)  # type: ignore[method-assign]


def fuse_norms(model: nn.Module) -> bool:
    """Lets the blocks' norms run apex's kernels, in place; False, and nothing changed, where
    apex is not installed.
    """
    if extensions()["apex"] is None:
        return False
    apex = importlib.import_module("apex.normalization.fused_layer_norm")
    for module in model.modules():
        if isinstance(module, Norm):
            module.forward = partial(_apex_rms, apex, module)  # type: ignore[method-assign]
        elif isinstance(module, CenteredNorm):
            module.forward = partial(_apex_layer, apex, module)  # type: ignore[method-assign]
    return True


def _apex_rms(apex: ModuleType, norm: nn.RMSNorm, hidden: Tensor) -> Tensor:
    return apex.fused_rms_norm_affine(hidden, norm.weight, norm.normalized_shape, norm.eps)


def _apex_layer(apex: ModuleType, norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    return apex.fused_layer_norm_affine(
        hidden, norm.weight, norm.bias, norm.normalized_shape, norm.eps
    )


class Engine(NamedTuple):
    """The parts of TransformerEngine that are used."""

    attention: type[nn.Module]  # the class DotProductAttention
    kernels: ModuleType  # its compiled functions
    dtypes: dict[torch.dtype, object]  # what they call the types

    @classmethod
    def load(cls) -> Engine:
        pytorch = importlib.import_module(
            "transformer_engine.pytorch"
        )  # first: it loads the compiled functions
        constants = importlib.import_module("transformer_engine.pytorch.constants")
        return cls(
            pytorch.DotProductAttention,
            importlib.import_module("transformer_engine_torch"),
            constants.TE_DType,
        )

    def attention_of(self, module: PackedAttention) -> nn.Module:
        """Its core attention over the heads that this tensor-parallel rank has."""
        config = module.config
        ranks = config.tensor_model_parallel_size
        return self.attention(
            config.num_attention_heads // ranks,
            config.kv_channels,
            num_gqa_groups=config.num_query_groups // ranks,
            attention_dropout=module.dropout,
            qkv_format="bshd",
            attn_mask_type="no_mask",
        )


class _EngineNorm(torch.autograd.Function):
    """RMSNorm, or with a bias LayerNorm, of [n, h] by TransformerEngine's kernels."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        engine: Engine,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
    ) -> Tensor:
        # The arguments that are None or 0 or False: where to write, a quantizer, multiprocessors to
        # leave free, a gain that counts from 0.
        kind = engine.dtypes[hidden.dtype]
        if bias is None:
            output, _, factor = engine.kernels.rmsnorm_fwd(
                hidden, weight, epsilon, None, None, kind, 0, False
            )
            ctx.save_for_backward(hidden, weight, factor)
        else:
            output, mean, factor = engine.kernels.layernorm_fwd(
                hidden, weight, bias, epsilon, None, None, kind, 0, False
            )
            ctx.save_for_backward(hidden, weight, factor, mean)
        ctx.kernels = engine.kernels  # type: ignore[attr-defined]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, factor, *mean = ctx.saved_tensors  # type: ignore[attr-defined]
        kernels: ModuleType = ctx.kernels  # type: ignore[attr-defined]
        if not mean:
            of_hidden, of_weight = kernels.rmsnorm_bwd(
                gradient.contiguous(), hidden, factor, weight, 0, False
            )
            return None, of_hidden, of_weight, None, None
        of_hidden, of_weight, of_bias = kernels.layernorm_bwd(
            gradient.contiguous(), hidden, mean[0], factor, weight, 0, False
        )
        return None, of_hidden, of_weight, of_bias, None


def _engine_norm(engine: Engine, norm: Norm | CenteredNorm, hidden: Tensor) -> Tensor:
    if hidden.dtype not in engine.dtypes or hidden.dtype != norm.weight.dtype:  # float64
        return type(norm).forward(norm, hidden)  # type: ignore[arg-type]
    bias = norm.bias if isinstance(norm, CenteredNorm) else None
    flat = hidden.contiguous().view(-1, hidden.size(-1))
    return _EngineNorm.apply(engine, flat, norm.weight, bias, norm.eps).view(hidden.shape)  # type: ignore[no-untyped-call]


def _engine_attention(
    attention: nn.Module,
    module: PackedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequences,
    causal: bool,
) -> Tensor:
    """`PackedAttention.attend`, [p, heads * d]."""
    if query.dtype not in ATTENTION_DTYPES:
        return PackedAttention.attend(module, query, key, value, rows, causal)
    # In evaluation its attention keeps nothing for a backward pass, which may follow all the same.
    attention.train(module.training or (torch.is_grad_enabled() and not module.dropout))
    if rows.equal:
        query, key, value = (part.unflatten(0, (-1, rows.longest)) for part in (query, key, value))
        return attention(
            query, key, value, qkv_format="bshd", attn_mask_type="causal" if causal else "no_mask"
        ).flatten(0, 1)
    return attention(
        query,
        key,
        value,
        qkv_format="thd",
        cu_seqlens_q=rows.ends,
        cu_seqlens_kv=rows.ends,
        max_seqlen_q=rows.longest,
        max_seqlen_kv=rows.longest,
        attn_mask_type="padding_causal" if causal else "padding",
    )
