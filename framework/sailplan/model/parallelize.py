"""Data parallelism put onto a model from outside: the model's own code knows nothing of it.

Tensor parallelism is inside megatron-core's layers. Over the data-parallel group, FSDP2 shards
every parameter's first dimension (or keeps whole copies, or several copies that are each cut), one
unit per transformer layer (an encoder's `shard_units`) and one for the rest, and averages gradients
over the ranks. Parameters stay gathered from the first forward of a step to its last backward, so a
step of many micro-batches gathers once and reduces once; or they are resharded after each forward
(ZeRO-3), for models that do not fit otherwise.

While parameters are gathered, `model.parameters()` gives short-lived whole tensors: call `reshard`
before touching parameters (optimizer set-up, saving, freezing) after a forward without a backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from sailplan.model.backbones.clap import WindowBlock
from sailplan.model.encoders.omni.published import PublishedPart
from sailplan.model.protocol import Encoder, repeated_layers
from sailplan.runtime.groups import group_of
from sailplan.runtime.process import Parallel

# What megatron-core (and blocks.HeadNorm) notes on a parameter; fully_shard makes new parameters
# without the notes.
TENSOR_PARALLEL_NOTES = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "tensor_parallel_partial",
)


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """Every layer of a stack, CLAP's and published ones included, keeps its input alone and runs
    again in the backward pass, with the random numbers it had; in place.

    Memory of a micro-batch's graph: one [b, s, h] a layer instead of all that the layer saves;
    time: one more forward of the layers. Parameters' names stay. Call it before `shard`, so that a
    repeated layer finds its parameters gathered.
    """
    for module in [*layers_of(model), *_window_blocks(model)]:
        checkpoint(module)  # type: ignore[arg-type]
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer layers, and the innermost repeated layers of published encoders."""
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for part in model.modules():
        if isinstance(part, PublishedPart):
            repeated = set(repeated_layers(part))
            layers += [
                layer
                for layer in repeated_layers(part)
                if not repeated & (set(layer.modules()) - {layer})
            ]
    return layers


def _window_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, WindowBlock)]


def allow_sequence_parallel(seed: int) -> None:
    """Registers the random state that megatron-core's sequence-parallel stacks fork on a GPU;
    nothing draws from it, as they have no dropout.
    """
    tracker = get_cuda_rng_tracker()
    if "model-parallel-rng" not in tracker.get_states():
        tracker.add("model-parallel-rng", seed)


def compile_blocks(
    model: nn.Module, *, backend: str = "inductor", cuda_graphs: bool = False
) -> nn.Module:
    """Every transformer layer's forward, and the backward that belongs to it, as one compiled
    graph; in place.

    Layers of one shape share their graphs, so a deep stack compiles as fast as a shallow one; the
    first micro-batches of a new shape wait for it, and a second token width makes the graphs good
    for any. What surrounds a layer (FSDP2's gathering, repeated layers, its name) is not compiled
    and stays as it is. A layer that cannot be compiled whole raises.

    cuda_graphs: GPU only: replay each graph's kernels as one launch, recorded once for each exact
    shape. Not tried on a GPU yet.
    """
    import torch._dynamo  # seconds, so only where it is wanted

    # Graphs are counted for the code of a layer, whatever its shape: four stacks, with and without
    # a mask and a gradient.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    mode = "reduce-overhead" if cuda_graphs else None
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear):
            # Its backward starts the sum over tensor-parallel ranks and waits for it later, which
            # no graph can hold; without this the same sum is a step of its own.
            module.allreduce_dgrad = False
        if isinstance(module, TransformerLayer):
            module.forward = torch.compile(
                module.forward, backend=backend, mode=mode, fullgraph=True
            )
    return model


def shard(
    model: nn.Module,
    parallel: Parallel,
    *,
    shard: bool,
    replicas: int = 1,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = False,
) -> nn.Module:
    """Moves `model` to the rank's device and spreads it over the data-parallel group, in place;
    returns it.

    shard: True cuts every parameter over the data-parallel ranks. False keeps whole copies and only
    averages
    gradients: the same machinery over a mesh of (data-parallel size) x 1, so that both run one
    path.
    replicas: hybrid sharding where above 1: so many copies, each cut over neighbouring
    data-parallel ranks (those of a node, where there are as many copies as nodes); gradients are
    averaged over both. A divisor of the data-parallel size.
    compute_dtype: None computes in the parameters' dtype; bfloat16 over float32 parameters gathers
    and computes in bfloat16 and reduces gradients in float32 (the optimizer then updates float32
    parameters).
    reshard_after_forward: ZeRO-3 (Rajbhandari et al., arXiv 1910.02054): a layer's parameters are
    whole while it runs, forward or backward, and gradients are reduced after every backward; see
    `set_gradient_sync`.

    On one data-parallel rank that computes in the parameters' dtype there is nothing to spread: the
    model stays as it is, without FSDP2's second copy of the parameters and without its hooks.

    Create the optimizer afterwards: the parameters are replaced by sharded ones.
    """
    notes = {
        name: {key: getattr(p, key) for key in TENSOR_PARALLEL_NOTES if hasattr(p, key)}
        for name, p in model.named_parameters()
    }
    model.to(parallel.device)
    if isinstance(model, Encoder):
        model.compute_dtype = compute_dtype
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=next(model.parameters()).dtype,
            cast_forward_inputs=False,
        )
    if parallel.data_parallel_size > 1 or compute_dtype is not None:
        mesh = _mesh(parallel, replicas if shard else parallel.data_parallel_size)
        for unit in shard_units(model):
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy
            )
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
        model.reduces_every_backward = reshard_after_forward  # type: ignore[assignment]
    for (
        name,
        parameter,
    ) in (
        model.named_parameters()
    ):  # a move to another device can make new parameters, as sharding does
        for key, value in notes[name].items():
            setattr(parameter, key, value)
    if compute_dtype is not None:
        _accumulate_gradients_in(model, policy.reduce_dtype)
    return model


def shard_units(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are units of their own: what an encoder says, else its layers."""
    if isinstance(model, Encoder):
        return model.shard_units()
    return layers_of(model)


def _accumulate_gradients_in(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Has autograd add up the gradients of gathered parameters in `dtype` from the first on, and
    gathers each unit once to say so.

    FSDP2 by itself keeps the last backward's gradients in the parameters' dtype and the sum of
    earlier ones in the dtype of the reduction, and refuses a unit that has both: parts that only
    one micro-batch ran, beside parts that more did. It also asks units that have never been
    gathered in this process for their gradients. With one dtype from the start, and every unit
    gathered once, neither can arise, whatever runs, is frozen or is resumed; nor is a sum ever
    formed in `compute_dtype`.
    """
    for module in _sharded_modules(model):
        module.unshard()
        for parameter in cast(nn.Module, module).parameters():
            if not isinstance(parameter, DTensor):  # of this unit: other units are not gathered
                parameter.grad_dtype = dtype
        module.reshard()


def _mesh(parallel: Parallel, replicas: int) -> DeviceMesh:
    """The data-parallel ranks as (copies) x (ranks that share a copy), or in one dimension where
    there is one copy.

    Raises ValueError where `replicas` does not divide the data-parallel size.
    """
    kind, size = parallel.device.type, parallel.data_parallel_size
    if replicas < 1 or size % replicas:
        raise ValueError(
            f"replicas={replicas}: expected a divisor of the data-parallel size {size}"
        )
    if replicas == 1:
        return DeviceMesh.from_group(parallel.data_parallel_group, kind)
    mesh = torch.tensor(dist.get_process_group_ranks(parallel.data_parallel_group)).view(
        replicas, -1
    )
    copies = mesh[:, parallel.data_parallel_rank % mesh.size(1)].tolist()
    cut = mesh[parallel.data_parallel_rank // mesh.size(1)].tolist()
    groups = [
        parallel.data_parallel_group if len(ranks) == size else group_of(ranks)
        for ranks in (copies, cut)
    ]
    return DeviceMesh.from_group(groups, kind, mesh=mesh, mesh_dim_names=("replicate", "shard"))


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Whether the backward passes that follow reduce gradients over the data-parallel group.

    Switch it on for a step's last backward only: that one reduces everything gathered so far, also
    of parts that only earlier micro-batches ran, and cuts the parameters into shards again. The
    last backward must go through the model, with the modalities of any micro-batch; if nothing that
    ran in it is trainable, it still reduces.
    A model whose parameters are resharded after each forward reduces in every backward, as a sum of
    whole gradients would take the memory that was saved.
    """
    on = on or bool(getattr(model, "reduces_every_backward", False))
    for module in _sharded_modules(model):
        module.set_requires_gradient_sync(on, recurse=False)
        module.set_reshard_after_backward(on, recurse=False)


def reshard(model: nn.Module) -> None:
    """Frees gathered parameters, so that `model.parameters()` are the sharded ones (no-op where
    they are).

    Needed before `requires_grad` is changed: FSDP2 copies it from the sharded parameter when it
    gathers.
    """
    for module in _sharded_modules(model):
        module.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def finish_gradients(model: nn.Module, parallel: Parallel) -> None:
    """Sums over the tensor-parallel group the gradients of which each rank has a part: those of
    the query and key norms, whose one weight serves heads on all ranks, and those of encoders whose
    rows the ranks share out. In the gradients' own dtype (float32, where bfloat16 computes), in
    flat messages; nothing where there are no such parameters.

    All other replicated parameters get whole gradients from megatron-core's backward. Call it once,
    after the step's last backward.
    """
    if parallel.tensor_parallel_size == 1:
        return
    gradients = [
        _local(p.grad)
        for p in model.parameters()
        if getattr(p, "tensor_parallel_partial", False) and p.grad is not None
    ]
    for message in _messages(gradients):
        flat = torch.cat([gradient.flatten() for gradient in message])
        dist.all_reduce(flat, group=parallel.tensor_parallel_group)
        for gradient, part in zip(message, flat.split([g.numel() for g in message]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _messages(gradients: Iterable[Tensor], limit: int = 2**26) -> Iterator[list[Tensor]]:
    """The gradients in order, in groups of one dtype and, as far as single ones allow, at most
    `limit` elements: a message's buffer is a copy.
    """
    message: list[Tensor] = []
    for gradient in gradients:
        if message and (
            gradient.dtype != message[0].dtype
            or sum(each.numel() for each in message) + gradient.numel() > limit
        ):
            yield message
            message = []
        message.append(gradient)
    if message:
        yield message


def _counted_here(parameter: Tensor, parallel: Parallel) -> bool:
    """Whether this rank is the one that counts its piece of the gradient: each element is
    counted once in the world.
    """
    if (
        not getattr(parameter, "tensor_model_parallel", False)
        and parallel.tensor_parallel_rank != 0
    ):
        return False
    if not isinstance(parameter, DTensor):
        return parallel.data_parallel_rank == 0
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return all(
        index == 0
        for index, placement in zip(coordinate, parameter.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def clip_gradient_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    parallel: Parallel,
    also: Tensor | None = None,
) -> Tensor:
    """Scales gradients so that their common 2-norm is at most `max_norm`; returns the norm
    before, a 0-d float64 tensor.

    The parameters may mix sharded and plain ones, and tensor-parallel and replicated ones: each
    element of the whole model counts once. Every rank calls it with the same list and gets the same
    norm; one all-reduce of one number, with `also` (float64 [n]), which is summed over the world in
    the same message, in place. A few launches, however many parameters there are, and no wait. A
    norm that is not finite leaves NaN or inf in the gradients: check it before the optimizer steps.
    """
    counted: dict[torch.dtype, list[Tensor]] = {}
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient = _local(parameter.grad)
        gradients.setdefault(gradient.dtype, []).append(gradient)
        if _counted_here(parameter, parallel):
            counted.setdefault(gradient.dtype, []).append(gradient)
    message = torch.zeros(
        1 if also is None else 1 + also.numel(), dtype=torch.float64, device=parallel.device
    )
    for dtype, tensors in counted.items():
        norms = torch._foreach_norm(tensors, 2.0, dtype=torch.promote_types(dtype, torch.float32))
        message[0] += torch.stack(norms).double().square().sum()
    if also is not None:
        message[1:] = also
    dist.all_reduce(message)
    if also is not None:
        also.copy_(message[1:])
    norm = message[0].sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for dtype, tensors in gradients.items():
        torch._foreach_mul_(tensors, scale.to(dtype))
    return norm
