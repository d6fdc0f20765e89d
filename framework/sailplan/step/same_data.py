"""Whether all ranks drew the same step, asked in the message that every step sends anyway.

A sum over ranks can tell whether W numbers are equal: by the inequality of Cauchy and Schwarz, W
times the sum of their squares is the square of their sum only then. The step's digest travels as
three numbers of 20 bits with their squares, whose sums are exact in float64 up to 8,192 ranks.
Every rank gets the same sums, so all know, in this step and before the optimizer moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch.distributed as dist

from sailplan.errors import BadDataError
from sailplan.runtime.environment import host_name
from sailplan.runtime.process import Parallel

PARTS, BITS = 3, 20


def moments(stage: str, step: int, digests: Sequence[str]) -> list[float]:
    """Return the numbers to be summed over ranks: parts of a hash of what is trained on, and
    their squares.
    """
    text = "\0".join([stage, str(step), *digests])
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    parts = [word >> (BITS * part) & (1 << BITS) - 1 for part in range(PARTS)]
    return [float(part) for part in parts] + [float(part * part) for part in parts]


def equal(sums: Sequence[float], ranks: int) -> bool:
    """Return whether all ranks gave the same `moments`, of which these are the sums."""
    return all(
        ranks * int(squares) == int(total) ** 2
        for total, squares in zip(sums[:PARTS], sums[PARTS:], strict=True)
    )


def difference(parallel: Parallel, stage: str, step: int, digests: Sequence[str]) -> BadDataError:
    """Return the error that names the ranks whose records differ from most others'.

    A collective, once `equal` said no.
    """
    everyone: list[tuple[str, str]] = [("", "")] * parallel.world_size
    dist.all_gather_object(everyone, ("+".join(dict.fromkeys(digests)), host_name()))
    found = [digest for digest, _ in everyone]
    common = max(dict.fromkeys(found), key=found.count)
    others = [
        f"{rank} ({host}): {digest}"
        for rank, (digest, host) in enumerate(everyone)
        if digest != common
    ]
    named = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return BadDataError(
        f"stage {stage}, its step {step + 1}: ranks drew other records, or are at another step: "
        f"data digest {common} on most, but on rank {named}; "
        "nothing was learned from it: give all nodes the same shards and the same code, then "
        "resume=auto"
    )
