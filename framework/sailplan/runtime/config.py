"""Configuration of the ranks: how the world is cut, where parameters lie, what ranks compute in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from sailplan.config.fields import Count, Positive, Size, When
from sailplan.errors import ConfigurationError

Dtype = Literal["float32", "bfloat16", "float64"]


@dataclass
class ParallelConfig:
    tensor: Size = 1  # tensor-parallel size; data-parallel size = world size / tensor
    # At tensor > 1, on GPUs: the tower's ranks hold a part of the positions each between its
    # matrices
    sequence: bool = False
    # At tensor > 1: share: whole on every peer, each encodes a part of the rows; tensor: cut like
    # the tower.
    encoders: Literal["share", "tensor"] = "share"
    # shard: FSDP2 over all data-parallel ranks; hybrid: over a part of them, `replicas` times;
    # replicate: whole copies; auto: hybrid with one copy a node where there are several nodes, else
    # shard.
    sharding: Literal["auto", "shard", "hybrid", "replicate"] = "auto"
    # Copies of the parameters; each is cut over data-parallel size / replicas ranks
    replicas: Annotated[int, When("sharding", ("hybrid",))] = 2
    # ZeRO-3: parameters are gathered for each layer's forward and backward alone, and gradients
    # reduced after every micro-batch: least memory, most messages. False: gathered once a step,
    # reduced once a step.
    reshard_after_forward: bool = False
    # How ranks show each other their negatives, in training and mining: ring: least memory; grid:
    # many nodes; symmetric_memory: all-gather by CUDA's copy engines on one node, which no GPU has
    # run.
    exchange: Literal["all_gather", "ring", "grid", "symmetric_memory"] = "all_gather"
    dtype: Dtype = "float32"  # what the encoder computes in
    # full: transformer layers keep their inputs alone and run again in the backward pass
    activation_checkpointing: Literal["none", "full"] = "none"
    compile: Literal["none", "blocks"] = "none"  # blocks: torch.compile of each transformer layer
    # Kernels of NVIDIA's extensions in the blocks, which no GPU has run: apex: norms;
    # transformer_engine: norms, and core attention in bfloat16; auto: on a GPU, without `compile`,
    # TransformerEngine's or else apex's where it is installed.
    fused: Literal["none", "auto", "apex", "transformer_engine"] = "none"
    # With compile=blocks, on GPUs: kernels of a layer replayed in one launch; not tried on a GPU
    # yet
    cuda_graphs: bool = False
    timeout_seconds: Positive = (
        600.0  # without progress on any rank, in any phase: then all leave with 70
    )
    threads: Count = 0  # torch threads per rank on CPU; 0: cores / local ranks

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for settings that exclude each other at any number of ranks."""
        if self.fused not in ("none", "auto") and self.compile != "none":
            raise ConfigurationError(
                f"{path}.fused={self.fused} beside {path}.compile={self.compile}: expected one of "
                "the two, as no compiler "
                f"looks into the extension's kernels; set {path}.fused=none, or {path}.compile=none"
            )
        if self.cuda_graphs and self.compile != "blocks":
            raise ConfigurationError(
                f"{path}.cuda_graphs is on beside {path}.compile=none: expected blocks, what the "
                "graphs are recorded of; set it"
            )

    def check_world(self, world_size: int) -> None:
        """Raise ConfigurationError where a world of so many ranks cannot be cut into these
        groups.
        """
        if world_size % self.tensor:
            raise ConfigurationError(
                f"parallel.tensor={self.tensor} does not divide the world of {world_size} "
                "processes: use a divisor, or start another number of processes"
            )
        data_parallel = world_size // self.tensor
        if self.sharding == "hybrid" and (self.replicas < 1 or data_parallel % self.replicas):
            allowed = ", ".join(
                str(size) for size in range(1, data_parallel + 1) if data_parallel % size == 0
            )
            raise ConfigurationError(
                f"parallel.replicas={self.replicas} does not divide the data-parallel size "
                f"{data_parallel}: expected one of {allowed}"
            )
