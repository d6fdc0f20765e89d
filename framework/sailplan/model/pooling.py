"""From the hidden states of a sequence to one vector: means, the last position, and a mean after
latent attention.

Shape legend: b rows, s positions of a row, p of all rows packed, h hidden, l latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.model.blocks import initial_deviation


def row_means(
    values: Tensor, chosen: Tensor | None, counts: Tensor, offsets: Tensor, slot: Tensor
) -> Tensor:
    """Means of packed [p, h] over each row's chosen positions, [b, h]; zeros where there is none.

    chosen: bool [p], None: all. counts [b]: how many they are, by row. offsets [b + 1] and slot
    [b]: of `data.packing`. Sums run over each row in order, so that they are the same every time.
    """
    values = values if chosen is None else values * chosen.to(values.dtype)[:, None]
    sums = torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True).index_select(
        0, slot
    )
    return sums / counts.clamp(min=1).to(values.dtype)[:, None]


def unpacked_rows(
    values: Tensor, offsets: Tensor, slot: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Packed [p, h] as [b, longest, h], zeros behind a row's positions, and bool [b, longest]
    where these are. offsets and slot as of `row_means`.
    """
    first, after = offsets[:-1].index_select(0, slot), offsets[1:].index_select(0, slot)
    places = first[:, None] + torch.arange(longest, device=values.device)
    present = places < after[:, None]
    found = values.index_select(0, torch.where(present, places, 0).flatten())
    rows = found.unflatten(0, present.shape)
    return rows * present[..., None].to(values.dtype), present


def last_positions(values: Tensor, last: Tensor) -> Tensor:
    """Packed [p, h] at each row's last position [b]; zeros where it is -1."""
    return values.index_select(0, last.clamp(min=0)) * (last >= 0).to(values.dtype)[:, None]


class LatentAttention(nn.Module):
    """Hidden states that look themselves up in a learned dictionary (NV-Embed, arXiv 2405.17428,
    section 3.1).

    x' = x + attention(queries norm(x), keys and values norm(latents)), y = x' + W2 gelu(W1
    norm(x')); the mean over the positions follows. With the residual paths and norms of the
    published implementation, and the paper's feed-forward of two matrices. Every position is
    changed alone, so any mask may be pooled afterwards.

    Tensor-parallel ranks hold whole copies: their inputs and gradients are the same, so nothing is
    exchanged.
    """

    def __init__(self, hidden: int, latents: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, hidden))
        self.norm, self.latent_norm, self.mlp_norm = (
            nn.LayerNorm(hidden),
            nn.LayerNorm(hidden),
            nn.LayerNorm(hidden),
        )
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key_value = nn.Linear(hidden, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=initial_deviation(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[p, h] to [p, h]."""
        query = self.query(self.norm(hidden)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        key, value = (
            self.key_value(self.latent_norm(self.latents))
            .unflatten(-1, (2, self.heads, -1))
            .permute(1, 2, 0, 3)
        )
        found = (
            F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
            .transpose(0, 1)
            .flatten(1)
        )
        hidden = hidden + self.output(found)
        return hidden + self.mlp(self.mlp_norm(hidden))
