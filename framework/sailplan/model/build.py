"""From the configuration to an encoder that is ready on this rank: checked, initialised, spread over the ranks."""

from __future__ import annotations

import torch
from torch import nn

from sailplan.config.schema import ModelConfig, ParallelConfig
from sailplan.config.sharding import sharding_of
from sailplan.model.backbones.load import allocate, load, open_sources
from sailplan.model.check import check_model
from sailplan.model.fused import chosen_extension, fuse
from sailplan.model.parallelize import allow_sequence_parallel, checkpoint_activations, compile_blocks, shard
from sailplan.model.tower import OmniEncoder
from sailplan.runtime.process import Parallel


def build_encoder(config: ModelConfig, parallel_config: ParallelConfig, parallel: Parallel, seed: int) -> nn.Module:
    """The omni tower over the data-parallel and tensor-parallel groups; equal weights for a seed at every layout.

    parallel_config.dtype float32 or float64 is the dtype of everything; bfloat16 computes in bfloat16 over float32
    master weights and reduces gradients in float32. Parts that `model.weights` names start from published weights, of
    which each tensor-parallel rank reads its own part (of encoders whose rows are shared out, the whole). Raises
    ConfigurationError for sizes that do not divide, for files that are not of the configured model, and for an extension
    that is asked for and missing.
    """
    share = parallel_config.encoders == "share"
    check_model(config, parallel.tensor_parallel_size, share_encoders=share)
    extension = chosen_extension(parallel_config, parallel.device.type)
    sources = open_sources(config)
    dtype = torch.float64 if parallel_config.dtype == "float64" else torch.float32
    compute = torch.bfloat16 if parallel_config.dtype == "bfloat16" else None
    encoder = OmniEncoder(
        config,
        dtype=dtype,
        seed=seed,
        published=[source.part for source in sources],
        share_encoders=share,
        sequence_parallel=parallel_config.sequence,
    )
    if parallel_config.sequence:
        allow_sequence_parallel(seed)
    for source in sources:
        allocate(encoder)
        load(source, encoder, parallel.tensor_parallel_rank, parallel.tensor_parallel_size)
    fuse(encoder, extension)
    if parallel_config.activation_checkpointing == "full":
        checkpoint_activations(encoder)
    if parallel_config.compile == "blocks":
        compile_blocks(encoder, cuda_graphs=parallel_config.cuda_graphs)
    sharding, replicas = sharding_of(parallel_config, parallel.data_parallel_size, parallel.nodes)
    reshard = parallel_config.reshard_after_forward
    return shard(encoder, parallel, shard=sharding != "replicate", replicas=replicas, compute_dtype=compute, reshard_after_forward=reshard)
