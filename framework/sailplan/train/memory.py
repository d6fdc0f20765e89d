"""A rank's memory in a training step, measured without memory: one micro-batch runs forward and
backward on the meta device.

The model that is run is the one that will be trained, in its compute dtype, with its activation
checkpointing and its part of a tensor-parallel group (a group without processes stands in for it).
Every tensor that the step would hold is counted while it would be held, so no formula has to follow
the model's code. What sharding makes of parameters, gradients and the optimizer's state is
arithmetic.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sailplan.config.schema import Config
from sailplan.config.sharding import sharding_of
from sailplan.data.record import EncoderInputs
from sailplan.model.component import EncoderComponent
from sailplan.runtime.groups import form_groups, leave_groups
from sailplan.step.kept_graphs import SavedBytes
from sailplan.step.optimizer import optimizer_state_size

aten = torch.ops.aten
MICRO_BATCHES_HELD = 2  # one that computes, one on its way (step.upload)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank. What the losses need for a moment comes on top."""

    parameters: int
    gathered: int  # whole copies of cut parameters, or of parameters in the compute dtype
    gradients: int
    optimizer: int
    activations: int  # of the graphs that are held at once, at the backward's peak
    inputs: int

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gathered
            + self.gradients
            + self.optimizer
            + self.activations
            + self.inputs
        )


class LiveBytes(TorchDispatchMode):
    """The memory of all tensors that operations make inside the block, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """Tensors that are there before: what is made as a view of them, or is one of them, is
        not counted.
        """
        self._seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._seen:
            self._seen.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention without stored scores, as the kernels of CPU and GPU compute it; the meta device
    alone would choose to store them.

    Put in the function's place, as a mode would not reach layers that are repeated in the backward
    pass.
    """
    former = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad:  # stores them everywhere
            return former(query, key, value, attn_mask, **options)
        if options.get("enable_gqa"):
            key, value = (
                part.repeat_interleave(query.size(1) // key.size(1), 1) for part in (key, value)
            )
        causal = options.get("is_causal", False)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=attn_mask
        )[0]

    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = former  # type: ignore[assignment]


@contextmanager
def _tensor_parallel_world(size: int) -> Iterator[None]:
    """A process group of `size` whose other members do not exist, where there is no group; its
    messages carry nothing.
    """
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    form_groups(size, torch.device("cpu"))
    try:
        yield
    finally:
        leave_groups()


@dataclass(frozen=True)
class _View:
    """Bytes of one micro-batch of a view."""

    peak: int  # more than parameters and gradients, at the backward's worst moment
    graph: int  # what a kept graph holds
    inputs: int


def _view(encoder: nn.Module, inputs: EncoderInputs) -> _View:
    inputs = inputs.to("meta")
    held = inputs.tensors()
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live, saved = LiveBytes(), SavedBytes(encoder)
    live.leave_out(
        [
            *held,
            *encoder.parameters(),
            *(parameter.grad for parameter in encoder.parameters() if parameter.grad is not None),
        ]
    )
    with _fused_attention(), live, saved_tensors_hooks(saved.note, lambda tensor: tensor):
        encoder(inputs).fused.sum().backward()
    return _View(live.most, saved.total, sum(x.nbytes for x in held))


def estimate_memory(
    config: Config,
    modalities: Sequence[tuple[str, ...]],
    *,
    world_size: int,
    nodes: int = 1,
    rank_rows: int,
) -> MemoryEstimate:
    """Memory of a rank of a world, in the stage and view that need most.

    modalities: of each view that is encoded. rank_rows: rows that a rank encodes in a step. With P
    the parameters that a tensor-parallel rank sees, S the ranks that share a copy of them, b and c
    the bytes of an element of a parameter and of the computation: parameters b P / S; gathered c P
    from a step's first forward to its last backward, or with `parallel.reshard_after_forward` those
    of the largest unit and of the layer that is fetched meanwhile; gradients b P while they are
    summed over micro-batches and b P / S when reduced, or b P / S and a unit's; optimizer n b P /
    S, n the state that its class keeps for an element (2 of AdamW). `step.kept_graphs` auto counts
    as one: what it keeps besides is free memory.
    """
    tensor = config.parallel.tensor
    data_parallel = world_size // tensor
    _, copies = sharding_of(config.parallel, data_parallel, nodes)
    double = config.parallel.dtype == "float64"
    width, compute_dtype = 8 if double else 4, getattr(torch, config.parallel.dtype)
    rows = min(config.step.micro_batch, rank_rows)
    with _tensor_parallel_world(tensor):
        component: EncoderComponent = config.model.component()
        encoder = component.skeleton(config.parallel, compute_dtype).to(
            "meta"
        )  # tables made of numbers too
        if config.parallel.activation_checkpointing == "full":
            encoder.checkpoint_activations()
        views = [
            _view(encoder, component.largest(config, each, rows)) for each in _largest(modalities)
        ]
        seen = sum(parameter.numel() for parameter in encoder.parameters())
        layers = [sum(p.numel() for p in module.parameters()) for module in encoder.shard_units()]
    worst = max(views, key=lambda view: view.peak)
    number = config.step.kept_graphs
    kept = (
        1
        if isinstance(number, str)
        else math.ceil(rank_rows / rows)
        if number < 0
        else max(1, number)
    )
    held = math.ceil(seen * copies / data_parallel)
    unit = max([seen - sum(layers), *layers])
    wrapped = data_parallel > 1 or compute_dtype == torch.bfloat16
    resharded = wrapped and config.parallel.reshard_after_forward
    whole = unit + max(layers, default=0) if resharded else seen
    return MemoryEstimate(
        parameters=width * held,
        gathered=compute_dtype.itemsize * whole if wrapped else 0,
        gradients=width * (held + (whole if resharded else seen)) if wrapped else width * seen,
        optimizer=math.ceil(
            optimizer_state_size(config.optimizer, config.allowed_targets) * width * held
        ),
        activations=worst.peak + (min(kept, math.ceil(rank_rows / rows)) - 1) * worst.graph,
        inputs=MICRO_BATCHES_HELD * max(view.inputs for view in views),
    )


def _largest(modalities: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those that are no part of another."""
    distinct = list({frozenset(each): each for each in modalities}.values())
    return [each for each in distinct if not any(set(each) < set(other) for other in distinct)]
