"""Kernels of NVIDIA's extensions in the place of torch's, where they are installed; nothing needs them.

apex's fused norms read our own weights, so that names, checkpoints and exports stay what they are. TransformerEngine is looked
for and reported, but its layers are not used: they keep weights under other names, and a state of their own beside them.

The package that the public index calls `apex` is another program. NVIDIA's is known by its compiled extensions, which are
looked for first, and the package is imported only where they are there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import partial
from typing import Any

from torch import Tensor, nn

from sailplan.model.blocks import CenteredNorm, Norm


def extensions() -> dict[str, str | None]:
    """Version of apex and TransformerEngine, None where one is missing or cannot be imported."""
    return {
        "apex": _version("apex") if importlib.util.find_spec("fused_layer_norm_cuda") and _imports("apex.normalization.fused_layer_norm") else None,
        "TransformerEngine": _version("transformer_engine") if _imports("transformer_engine.pytorch") else None,
    }


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # an extension built for another torch fails in many ways; all mean that it cannot be used
        return False
    return True


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def fuse_norms(model: nn.Module) -> bool:
    """Lets the blocks' norms run apex's kernels, in place; False, and nothing changed, where apex is not installed."""
    if extensions()["apex"] is None:
        return False
    apex: Any = importlib.import_module("apex.normalization.fused_layer_norm")
    for module in model.modules():
        if isinstance(module, Norm):
            module.forward = partial(_rms, apex, module)  # type: ignore[method-assign]
        elif isinstance(module, CenteredNorm):
            module.forward = partial(_layer, apex, module)  # type: ignore[method-assign]
    return True


def _rms(apex: Any, norm: nn.RMSNorm, hidden: Tensor) -> Tensor:
    return apex.fused_rms_norm_affine(hidden, norm.weight, norm.normalized_shape, norm.eps)


def _layer(apex: Any, norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    return apex.fused_layer_norm_affine(hidden, norm.weight, norm.bias, norm.normalized_shape, norm.eps)
