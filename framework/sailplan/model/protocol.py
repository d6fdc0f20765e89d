"""What the training step and the evaluation ask of an encoder, whatever is inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sailplan.data.record import EncoderInputs


@dataclass
class Embeddings:
    """Vectors of b rows; float32 (float64 in exactness tests), not normalised: the objectives normalise each prefix."""

    fused: Tensor  # [b, D]
    vision: Tensor | None = None  # [b, D] pooled over the vision positions; only when asked for
    text: Tensor | None = None  # [b, D] pooled over the item's own text positions; only when asked for


class Encoder(Protocol):
    """An nn.Module; called through __call__ so that FSDP2's hooks run."""

    def __call__(self, inputs: EncoderInputs, *, per_modality: bool = False) -> Embeddings: ...
