"""Where the numbers that a rank holds lie in the whole tensor, as torch's distributed checkpoint
asks for it.

A parameter is cut twice: tensor parallelism cuts it along one dimension (and a gated feed-forward's
first matrix as two stacked halves, each cut alone), then FSDP2 cuts the result along the first
dimension. The checkpoint knows neither: it holds whole tensors, and each rank says which blocks of
them it writes or reads.
Ranks that hold the same block say the same, and torch writes it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sailplan.runtime.process import Parallel


@dataclass(frozen=True)
class Block:
    """A run of rows of the local tensor and the place of its first element in the whole tensor."""

    start: int  # first local row
    rows: int
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Shape of the whole tensor and this rank's blocks of it."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


def local(tensor: Tensor) -> Tensor:
    """The numbers this rank holds, without gradient; shares memory with `tensor`."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layout_of(parameter: Tensor, parallel: Parallel) -> Layout:
    """The layout of a parameter that carries megatron-core's tensor-parallel notes, sharded by
    FSDP2 or not.

    Raises ValueError where FSDP2 cuts a dimension other than the first.
    """
    shape = list(parameter.shape)  # of the tensor-parallel part; FSDP2's cut does not show in it
    start, rows = 0, shape[0] if shape else 1
    if isinstance(parameter, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if list(sizes[1:]) != shape[1:]:
            raise ValueError(
                f"a parameter of shape {tuple(shape)} is sharded as {parameter.placements}: only "
                "the first dimension can be"
            )
        start, rows = offsets[0], sizes[0]
    if not shape:
        return Layout((), (Block(0, 1, ()),))
    split = (
        getattr(parameter, "partition_dim", -1)
        if getattr(parameter, "tensor_model_parallel", False)
        else -1
    )
    rank, size = (
        (parallel.tensor_parallel_rank, parallel.tensor_parallel_size) if split >= 0 else (0, 1)
    )
    whole = list(shape)
    if split >= 0:
        whole[split] *= size
    if split != 0:
        offset = [0] * len(shape)
        offset[0] = start
        if split > 0:
            offset[split] = rank * shape[split]
        blocks = [Block(0, rows, tuple(offset))] if rows else []
    else:
        # The part is `halves` pieces, one of each stacked matrix; piece k starts at row k * whole /
        # halves + rank * piece.
        halves = max(getattr(parameter, "partition_stride", 1), 1)
        piece = shape[0] // halves
        blocks = []
        for half in range(halves):
            first, last = max(start, half * piece), min(start + rows, (half + 1) * piece)
            if first < last:
                row = half * (whole[0] // halves) + rank * piece + (first - half * piece)
                blocks.append(Block(first - start, last - first, (row, *[0] * (len(shape) - 1))))
    return Layout(tuple(whole), tuple(blocks))


class WholeTensorView(torch.Tensor):
    """This rank's blocks of a whole tensor, in the form that torch's distributed checkpoint
    reads and fills.

    A tensor subclass because the loader asks for one; its `size()` is the whole tensor's.
    """

    layout_of_whole: Layout
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, layout: Layout) -> WholeTensorView:
        view = torch.Tensor._make_subclass(cls, held)
        view.held, view.layout_of_whole = held, layout
        return view

    def size(self, dim: int | None = None) -> torch.Size | int:  # type: ignore[override]
        shape = self.shape_of_whole
        return shape if dim is None else shape[dim]

    @property
    def shape_of_whole(self) -> torch.Size:
        return torch.Size(self.layout_of_whole.shape)

    def blocks(self) -> list[tuple[ChunkStorageMetadata, Tensor]]:
        """This rank's blocks: where each lies in the whole tensor, and its numbers, which share
        memory with the model's.
        """
        return [
            (self._chunk(block), self._block_tensor(block)) for block in self.layout_of_whole.blocks
        ]

    def _block_tensor(self, block: Block) -> Tensor:
        return self.held.narrow(0, block.start, block.rows) if self.held.dim() else self.held

    def _chunk(self, block: Block) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(
            offsets=torch.Size(block.offset), sizes=self._block_tensor(block).shape
        )

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.held)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(block.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self._chunk(block), properties=properties, size=self.shape_of_whole
                ),
            )
            for block in self.layout_of_whole.blocks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(block) for block in self.layout_of_whole.blocks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for block in self.layout_of_whole.blocks:
            if index.offset is None or tuple(index.offset) == block.offset:
                return self._block_tensor(block)
        raise ValueError(f"{index.fqn}: this rank holds no block at {index.offset}")
