"""A device that is not the CPU, on a machine that has none: numbers lie in CPU memory, tensors
say that they are elsewhere.

An operation that is given tensors here and there fails, as it would on CUDA; so does a tensor made
on the wrong side and then used with the others. That finds the mistakes which a run on a CPU alone
cannot show. It says nothing about time, CUDA's kernels and streams, NCCL, the memory that FSDP2
frees (these tensors have no storage) or checkpoints (whose views are a tensor subclass too).

Importing it registers the device "standin" for the whole process: only for tests in a process of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import megatron.core.utils
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Order:
    """A stream or an event where everything happens in the order of the calls."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, *_: Any) -> _Order:
        return self

    def _nothing(self, *_: Any) -> None: ...

    record = wait = wait_event = wait_stream = synchronize = _nothing


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of torch.standin."""

    Stream = Event = _Order

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, *_: Any) -> _Order:
        return _Order()

    def stream(self, _: _Order) -> AbstractContextManager[None]:
        return nullcontext()


backend_registration._setup_privateuseone_for_python_backend("standin", backend_module=_Module())
DEVICE = torch.device("standin", 0)


def _without_set_data(held: Tensor, requires_grad: bool) -> Tensor:
    """megatron-core's way to forget that a tensor is a view gives another tensor its storage,
    which these do not have.
    """
    out = held.detach()
    out.requires_grad = requires_grad
    return out


megatron.core.utils._kernel_make_viewless_tensor = _without_set_data
_fsdp_param.free_storage = _fsdp_param.alloc_storage = lambda *_: None

aten = torch.ops.aten
BETWEEN_DEVICES = (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default)
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
)  # of a tensor there, indices may be here


class There(Tensor):
    """A tensor on the device; ``inner`` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, types, args, kwargs or {})


def _run(function: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if any(kind not in (There, Tensor, torch.nn.Parameter) for kind in types):
        return NotImplemented  # DTensor's turn first: it comes back with what it holds
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    if there and function not in BETWEEN_DEVICES:
        meeting = (
            tree_leaves((args[0], args[2:]))
            if function in INDEXING and isinstance(args[0], There)
            else tensors
        )
        if any(isinstance(x, Tensor) and not isinstance(x, There) and x.dim() for x in meeting):
            raise RuntimeError(
                f"{function}: found tensors on {DEVICE} and on the CPU, expected all on one device"
            )
    wanted = kwargs.get("device")
    if (
        function is aten.mm.dtype
    ):  # accumulates and answers in a wider type, which the CPU does not offer
        return There(args[0].inner.to(args[2]) @ args[1].inner.to(args[2]))
    if function is aten.addmm.dtype_out:
        total = kwargs["out"].inner
        wide = [x.inner.to(args[3]) for x in args[:3]]
        total.copy_(torch.addmm(*wide, beta=kwargs.get("beta", 1), alpha=kwargs.get("alpha", 1)))
        return kwargs["out"]
    result = function(
        *_here(args),
        **{**_here(kwargs), **({} if wanted is None else {"device": torch.device("cpu")})},
    )
    if function is aten._local_scalar_dense.default:
        return result
    if function is aten.copy_.default:
        return args[0]
    goes_there = there if wanted is None else torch.device(wanted).type == DEVICE.type

    def outer(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, There):
            return x
        same = next(
            (one for one in tensors if isinstance(one, There) and one.inner is x), None
        )  # changed in place
        return same if same is not None else There(x) if goes_there else x

    return tree_map(outer, result)


def _here(values: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, There) else x, values)


class _Operations(TorchDispatchMode):
    """Operations that make tensors have none to dispatch on."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, types, args, kwargs or {})


class _Python(TorchFunctionMode):
    """Functions that build tensors from Python's numbers, or the other way, below what an
    operation sees.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if (
            function in (torch.tensor, torch.as_tensor)
            and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type
        ):
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if name == "new_tensor" and isinstance(args[0], There):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        if name == "tolist" and isinstance(args[0], There):
            return args[0].cpu().tolist()
        return function(*args, **kwargs)


def serve(group: dist.ProcessGroup) -> None:
    """Lets a gloo group exchange the device's tensors by all of torch's ways."""
    group._register_backend(
        DEVICE, dist.ProcessGroup.BackendType.GLOO, group._get_backend(torch.device("cpu"))
    )


@contextmanager
def stand_in_device() -> Iterator[torch.device]:
    """Inside, tensors can be made on the device and moved to it."""
    with _Operations(), _Python():
        yield DEVICE
