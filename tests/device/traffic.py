"""What passes between host and stand-in device: bytes up, copies that a GPU's host would wait
for, and uploads still alive.

A copy down waits unless it is non-blocking, and so does a copy up; so does every operation whose
answer Python reads or whose result has a size that depends on the data.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from stand_in_device import There
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "bincount",
}


class Traffic(TorchDispatchMode):
    """Counts inside a `with` block, entered after `stand_in_device()`; waits in what a function
    of a name in `leave_out` calls are not
    counted, nor are uploads outside of functions named `uploads_in`."""

    def __init__(self, *leave_out: str, uploads_in: str = "") -> None:
        super().__init__()
        self.leave_out, self.uploads_in = leave_out, uploads_in
        self.waits: Counter[str] = Counter()
        self.uploaded = 0  # bytes
        self.alive = 0  # bytes of uploads whose memory is held
        self.most_alive = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(kind not in (There, Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        result = function(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, There) for x in given)
        if name in ("_to_copy", "copy_"):
            target, source = (args[0], args[1]) if name == "copy_" else (result, args[0])
            blocking = not (
                kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            )
            if isinstance(target, There) != isinstance(source, There) and (
                source.dim() or not isinstance(target, There)
            ):
                self._wait(f"{name} {'up' if isinstance(target, There) else 'down'}", blocking)
                if isinstance(target, There):
                    self._upload(target.inner)
        elif there:
            by_mask = name.startswith("index") and any(
                x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor)
            )
            sized = name == "repeat_interleave" and kwargs.get("output_size") is None
            self._wait(name, name in READS or by_mask or sized)
        return result

    def _wait(self, name: str, waits: bool) -> None:
        if waits and not self._inside(self.leave_out):
            self.waits[name] += 1

    def _inside(self, names: Collection[str]) -> bool:
        # Backward passes run in threads of autograd's own, on behalf of the main thread, which
        # waits in the call.
        frames = [sys._getframe(2), sys._current_frames()[threading.main_thread().ident]]  # type: ignore[index]
        while frames:
            frame = frames.pop()
            if frame.f_code.co_name in names:
                return True
            if frame.f_back is not None:
                frames.append(frame.f_back)
        return False

    def _upload(self, inner: Tensor) -> None:
        if self.uploads_in and not self._inside((self.uploads_in,)):
            return
        size = inner.nbytes
        self.uploaded += size
        self.alive += size
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(inner.untyped_storage(), self._freed, size)

    def _freed(self, size: int) -> None:
        self.alive -= size
