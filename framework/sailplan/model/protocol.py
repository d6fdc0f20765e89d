"""What the training step and the evaluation ask of an encoder, whatever is inside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.utils import _pytree

FUSED, TOKENS = "fused", "tokens"


@dataclass(frozen=True)
class Embeddings:
    """Vectors of b rows; float32 (float64 in exactness tests), not normalised: the objectives
    normalise each prefix.
    """

    fused: Tensor  # [b, D]
    by_modality: dict[str, Tensor] = field(
        default_factory=dict
    )  # modality -> [b, D], zero rows where absent; only when asked for
    # [b, t, D] of each position, and bool [b, t] which there are; only when asked for
    tokens: Tensor | None = None
    token_mask: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return all vectors by name: `fused`, the modalities', and `tokens` where there are any."""
        tokens = {} if self.tokens is None else {TOKENS: self.tokens}
        return {FUSED: self.fused, **self.by_modality, **tokens}

    def without_rows(self) -> Embeddings:
        """Return the same of no row, with their graph: what a micro-batch of 0 rows gives."""
        return _pytree.tree_map(  # type: ignore[no-any-return]
            lambda vector: None if vector is None else vector[:0], self
        )


# FSDP2 looks for the outputs that need gradients through pytree: it must see into our dataclass.
_pytree.register_dataclass(Embeddings)


class Encoder(nn.Module, ABC):
    """A module from a processor's inputs to vectors; called through __call__, so that FSDP2's
    hooks run.

    All ranks run the same parts for a view: which ones follows from its declared modalities alone.
    A micro-batch of 0 rows runs them too, as the ranks meet in their collectives.
    """

    modalities: tuple[str, ...]  # that it can encode
    dimension: int  # D
    # Whether `forward` takes `tokens=True`, and then gives the vectors of positions too
    gives_tokens = False
    compute_dtype: torch.dtype | None = (
        None  # of the computation, where it is not the parameters'; `parallelize.shard` says so
    )

    @abstractmethod
    def forward(self, inputs: Any, *, per_modality: bool = False) -> Embeddings:
        """Encode one micro-batch, EncoderInputs of the processor's own kind; per_modality adds a
        vector for each modality that the view declares.
        """

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by the names that a stage's `trainable` list uses."""
        return {"text": list(self.parameters())}

    def used_parts(self, modalities: Iterable[str]) -> set[str]:
        """Return the parts that a view of these modalities runs through."""
        return set(self.parts())

    def shard_units(self) -> list[nn.Module]:
        """Return the units of FSDP2, inner ones before those around them."""
        return repeated_layers(self)

    def checkpoint_activations(self) -> None:
        """Let every layer keep its input alone and run again in the backward pass, with the
        random numbers it had.
        """
        units = self.shard_units()
        for unit in units:
            if not any(other is not unit and other in set(unit.modules()) for other in units):
                checkpoint(unit)  # type: ignore[arg-type]


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Return the entries of every nn.ModuleList that have a forward and parameters, inner ones
    first: the layers of a model of any kind.
    """
    found: dict[nn.Module, None] = {}
    for entries in reversed([each for each in module.modules() if isinstance(each, nn.ModuleList)]):
        for layer in entries:
            if not isinstance(layer, (nn.ModuleList, nn.ModuleDict)) and any(
                True for _ in layer.parameters()
            ):
                found.setdefault(layer)
    return list(found)


def reach_backward(fused: Tensor) -> Tensor:
    """Return `fused` such that a backward goes through it also where nothing that ran is
    trainable: gradients of earlier
    micro-batches are reduced by FSDP2's hooks in a step's last backward."""
    if torch.is_grad_enabled() and not fused.requires_grad:
        return fused + torch.zeros((), dtype=fused.dtype, device=fused.device, requires_grad=True)
    return fused
