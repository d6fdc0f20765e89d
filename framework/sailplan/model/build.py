"""From the configuration to an encoder that is ready on this rank: checked, initialised, spread
over the ranks.
"""

from __future__ import annotations

import torch

from sailplan.config.schema import EncoderConfig, ParallelConfig
from sailplan.config.sharding import sharding_of
from sailplan.model.component import EncoderComponent
from sailplan.model.parallelize import compile_blocks, shard
from sailplan.model.protocol import Encoder
from sailplan.runtime.process import Parallel


def build_encoder(
    config: EncoderConfig, parallel_config: ParallelConfig, parallel: Parallel, seed: int
) -> Encoder:
    """Return the configured encoder over the ranks' groups; equal weights for a seed at every
    layout.

    parallel_config.dtype float32 or float64 is the dtype of everything; bfloat16 computes in
    bfloat16 over float32 master weights and reduces gradients in float32. Raises ConfigurationError
    for sizes that do not divide, for files that are not of the configured model, and for an
    extension that is asked for and missing.
    """
    component: EncoderComponent = config.component()
    encoder = component.build(parallel_config, parallel, seed)
    if parallel_config.activation_checkpointing == "full":
        encoder.checkpoint_activations()
    if parallel_config.compile == "blocks":
        compile_blocks(encoder, cuda_graphs=parallel_config.cuda_graphs)
    sharding, replicas = sharding_of(parallel_config, parallel.data_parallel_size, parallel.nodes)
    reshard = parallel_config.reshard_after_forward
    compute = torch.bfloat16 if parallel_config.dtype == "bfloat16" else None
    shard(
        encoder,
        parallel,
        shard=sharding != "replicate",
        replicas=replicas,
        compute_dtype=compute,
        reshard_after_forward=reshard,
    )
    return encoder
