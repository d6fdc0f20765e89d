"""Counts what a piece of work asks of the stand-in device: operations, waits of the host, uploads and collectives.

An operation is a call that starts work on the device: views and allocations start none. A wait is whatever makes the host
read a number of the device or allocate by one: `.item()`, `.tolist()`, `bool()`, copies to the CPU, `nonzero` and boolean indices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from stand_in_device import There, observers
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "resize_"}
READS = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal", "is_nonzero"}


@dataclass
class Counts:
    """Of one piece of work."""

    operations: int = 0
    waits: int = 0
    uploads: int = 0
    collectives: int = 0
    by_name: Counter[str] = field(default_factory=Counter)

    def see(self, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        name = function._schema.name.split("::")[1]
        if function.namespace == "c10d":
            self.collectives += name not in ("monitored_barrier_", "barrier")
            self.by_name[f"c10d.{name}"] += 1
            return
        if waits(function, name, args, kwargs):
            self.waits += 1
            self.by_name[f"wait {name}"] += 1
        # A detached tensor, too, is a view.
        if function.is_view or name in ALLOCATIONS or name in ("detach", "_local_scalar_dense", "_reshape_alias", "_unsafe_view"):
            return
        self.uploads += name in ("_to_copy", "copy_") and any(isinstance(x, torch.Tensor) and not isinstance(x, There) and x.dim() for x in args)
        self.operations += 1
        self.by_name[name] += 1


def waits(function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host must know what the device has computed before this call returns."""
    if name in READS:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(isinstance(x, There) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))
    if name == "_to_copy":
        return isinstance(args[0], There) and torch.device(kwargs.get("device") or args[0].device).type == "cpu"
    return name == "copy_" and isinstance(args[1], There) and not isinstance(args[0], There)


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts of everything inside, of all threads."""
    found = Counts()
    observers.append(found.see)
    try:
        yield found
    finally:
        observers.remove(found.see)
