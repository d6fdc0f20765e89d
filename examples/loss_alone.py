"""The fused InfoNCE without the framework: its loss and gradients beside plain torch's.

python examples/loss_alone.py
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, normalize

from sailplan_kernels import infonce


def main() -> None:
    """Compare both on 512 pairs, and print the largest difference of a gradient."""
    torch.manual_seed(0)
    queries, keys = (torch.randn(512, 64, requires_grad=True) for _ in range(2))
    temperature = torch.tensor(0.05)
    fused = infonce(queries, keys, temperature).loss  # it normalises its rows itself
    gradients = torch.autograd.grad(fused, (queries, keys))
    scores = normalize(queries, dim=1) @ normalize(keys, dim=1).T
    plain = cross_entropy(scores / temperature, torch.arange(512))
    expected = torch.autograd.grad(plain, (queries, keys))
    worst = max(
        float((one - other).abs().max()) for one, other in zip(gradients, expected, strict=True)
    )
    print(
        f"loss {fused.item():.6f}, plain torch {plain.item():.6f}; largest difference of a "
        f"gradient {worst:.1e}"
    )


if __name__ == "__main__":
    main()
