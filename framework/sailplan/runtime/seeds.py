"""Named seeds: every random choice draws from a generator whose seed is a pure function of
*what* is drawn.

A seed made from (run seed, stage, step, row id) is the same on any rank, worker and restart, so no
generator state needs saving.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

INTEGERS = (int, np.integer)


def derive(*parts: int | str) -> int:
    """A stable 63-bit seed from any sequence of integers and strings (SHA-256 of their
    unambiguous encoding).
    """
    text = "\x1f".join([f"{'i' if isinstance(part, INTEGERS) else 's'}{part}" for part in parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator seeded by `derive(*parts)`."""
    return np.random.Generator(np.random.Philox(derive(*parts)))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds torch's global generators of the CPU and of `device`, as torch.manual_seed does for
    every device that there could be.

    That takes longer than a small micro-batch's kernels where CUDA was not started: each call notes
    the stack from which it came.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(seed)
