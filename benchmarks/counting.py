"""Count what a piece of training asks of its device: operations, host waits, uploads,
collectives, FLOP.

Everything is counted at torch's dispatcher, below autograd and below our code, so that a count does
not depend on how the code is written. Tensors lie on the stand-in device of tests/device, which a
machine without a GPU has too: what is counted there is what eager CUDA would be asked for, with two
exceptions that the tables name. A fused attention counts as the operations that it is made of, and
a kernel of Triton's does not run there at all.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "device"))

import stand_in_device as device  # noqa: E402

aten = torch.ops.aten
COPIES = {"_to_copy", "copy_"}
# Answers whose size depends on the data, or that Python reads: the host waits for the device.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
    "histc",
}
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
    "record_stream",
    "is_same_size",
    "lift_fresh",
    "_local_scalar_dense",
    "is_pinned",
}


@dataclass
class Counts:
    """Of one rank.

    Bytes of a collective: those of the whole message (an all-gather's result, a reduce-scatter's
    input).
    """

    operations: int = 0
    waits: int = 0
    uploads: int = 0
    uploaded_bytes: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    collectives_of_one: int = 0  # in a group of this rank alone: nothing travels
    flop: int = 0
    names: Counter[str] = field(default_factory=Counter)
    waited: Counter[str] = field(default_factory=Counter)

    def table(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


class Counting(TorchDispatchMode):
    """Counts inside a ``with`` block; enter it after ``stand_in_device()``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(kind not in (device.There, Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a DTensor comes back with what it holds
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace in ("c10d", "_c10d_functional"):
            self._collective(function, args, result)
        else:
            self._operation(function, args, kwargs, result)
        return result

    def _operation(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        counts, name = self.counts, function.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in given if isinstance(x, device.There)]
        made = any(isinstance(x, device.There) for x in tree_leaves(result))
        if not there and not made:
            return
        here = [x for x in given if not isinstance(x, device.There)]
        if name in COPIES and here:
            self._copy(function, args, kwargs, made or isinstance(args[0], device.There))
            return
        if name in COPIES and not made:
            waits = not kwargs.get("non_blocking")
            counts.waits += waits
            counts.waited[name] += waits
            counts.operations += 1
            return
        masks = name.startswith("index") and any(
            x.dtype in (torch.bool, torch.uint8)
            for x in tree_leaves(args[1])
            if isinstance(x, Tensor)
        )
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if (
            name in WAITS
            or (masks and name in ("index", "index_put", "index_put_", "_index_put_impl_"))
            or sized
        ):
            counts.waits += 1
            counts.waited[name] += 1
        if name.startswith("index"):  # positions that lie on the host travel first
            for x in here:
                if x.dim():
                    self._upload(x)
        if name in NO_KERNEL or _is_view(function):
            return
        counts.operations += 1
        counts.names[name] += 1
        formula = flop_registry.get(getattr(aten, name.rstrip("_"), None))  # of addmm_ as of addmm
        if formula is not None:
            plain = [
                x for x in args if not isinstance(x, torch.dtype)
            ]  # a product in another dtype has one among its matrices
            counts.flop += int(formula(*plain, **kwargs, out_val=result))

    def _copy(self, function: Any, args: Any, kwargs: Any, up: bool) -> None:
        """Between host and device."""
        if up:
            self._upload(args[1] if function.overloadpacket is aten.copy_ else args[0])
            return
        waits = not kwargs.get("non_blocking")
        self.counts.operations += 1
        self.counts.waits += waits
        self.counts.waited[function.overloadpacket.__name__] += waits

    def _upload(self, source: Tensor) -> None:
        self.counts.uploads += 1
        self.counts.uploaded_bytes += source.numel() * source.element_size()

    def _collective(self, function: Any, args: Any, result: Any) -> None:
        sizes, group = [], None
        for argument in args:
            tensors = [x for x in tree_leaves(argument) if isinstance(x, Tensor)]
            if tensors:
                sizes.append(sum(x.numel() * x.element_size() for x in tensors))
            elif "ProcessGroup" in str(getattr(argument, "_type", lambda: "")()):
                group = dist.ProcessGroup.unbox(argument)
        if group is not None and group.size() == 1:
            self.counts.collectives_of_one += 1
            return
        self.counts.collectives += 1
        self.counts.collective_bytes += max(sizes, default=0)
        self.counts.names[f"c10d.{function.overloadpacket.__name__}"] += 1


def _is_view(function: Any) -> bool:
    """Whether every answer shares its memory with an argument and nothing is written."""
    returns = function._schema.returns
    return bool(returns) and all(
        x.alias_info is not None and not x.alias_info.is_write for x in returns
    )
