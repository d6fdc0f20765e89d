"""From the hidden states of a sequence to one vector: means, the last position, and a mean after latent attention.

Shape legend: b rows, s positions, h hidden, l latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.model.blocks import initial_deviation

POOLINGS = ("tanh_mean", "mean", "last_token", "latent_attention")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [b, s, h] over the positions where bool [b, s] is True; zeros where there is none."""
    weight = mask.to(values.dtype)
    return torch.einsum("bsh,bs->bh", values, weight) / weight.sum(1, keepdim=True).clamp(min=1)


def last_position(values: Tensor, mask: Tensor) -> Tensor:
    """[b, s, h] at the last position where bool [b, s] is True; zeros where there is none."""
    places = torch.arange(mask.size(1), device=mask.device)
    last = torch.where(mask, places, -1).amax(1)
    chosen = values[torch.arange(len(values), device=mask.device), last.clamp(min=0)]
    return chosen * (last >= 0)[:, None].to(values.dtype)


class LatentAttention(nn.Module):
    """Hidden states that look themselves up in a learned dictionary (NV-Embed, arXiv 2405.17428, section 3.1).

    x' = x + attention(queries norm(x), keys and values norm(latents)), y = x' + W2 gelu(W1 norm(x')); the mean over
    the positions follows. With the residual paths and norms of the published implementation, and the paper's
    feed-forward of two matrices. Every position is changed alone, so any mask may be pooled afterwards.

    Tensor-parallel ranks hold whole copies: their inputs and gradients are the same, so nothing is exchanged.
    """

    def __init__(self, hidden: int, latents: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, hidden))
        self.norm, self.latent_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key_value = nn.Linear(hidden, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=initial_deviation(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] to [b, s, h]."""
        rows = hidden.size(0)
        query = self.query(self.norm(hidden)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        both = self.key_value(self.latent_norm(self.latents)).unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        key, value = both[:, None].expand(-1, rows, -1, -1, -1)
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + self.output(found)
        return hidden + self.mlp(self.mlp_norm(hidden))
