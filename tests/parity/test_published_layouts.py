"""CLAP, with fusion and without, the image towers of Qwen3-VL and SigLIP2 naflex, and encoders of
transformers compute one thing at every tensor- and data-parallel size, and a checkpoint keeps CLAP's
statistics.
"""

from __future__ import annotations

import pytest
import torch

from sailplan.checkpoint import loading, store
from sailplan.model import parallelize
from sailplan.model.testing import (
    join_layout,
    published_config,
    published_inputs,
    rows_of,
    whole_tensor,
)
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

KINDS = ("qwen_clap", "naflex_fusion", "siglip_whisper")
CHANGED = {  # parameters whose gradients are not near zero
    "qwen_clap": (
        "vision.deepstack_mergers.1.mlp.linear_fc2.weight",
        "vision.positions",
        "vision.embedding.weight",
        "audio.encoder.tower.layers.1.bias_table",
    ),
    "naflex_fusion": (
        "vision.positions",
        "vision.embedding.weight",
        "audio.encoder.tower.crops.weight",
        "audio.encoder.tower.fusion.everywhere.4.shift",
    ),
    "siglip_whisper": (
        "vision.model.embeddings.patch_embedding.weight",
        "vision.model.embeddings.position_embedding.weight",
        "vision.model.encoder.layers.1.mlp.fc2.weight",
        "vision.model.post_layernorm.bias",
    ),
}


def model_of(kind, seed, dtype=torch.float64):
    model = OmniEncoder(published_config(kind), dtype=dtype, seed=seed)
    tower = model.audio["encoder"].tower
    if kind != "siglip_whisper":
        tower.bin_mean.copy_(torch.arange(6) - 2.0 + seed)
        tower.bin_variance.fill_(1)  # the inputs are of that size
    return model


def one_step(rank, world, tensor, folder, kind):
    parallel = join_layout(tensor)
    encoder = parallelize.shard(model_of(kind, 1), parallel, shard=True)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=True)
    rows = 4 // parallel.data_parallel_size
    start = parallel.data_parallel_rank * rows
    found = encoder(rows_of(published_inputs(kind, 4), start, start + rows), per_modality=True)
    weights = torch.randn(
        3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )[:, start : start + rows]
    loss = (
        torch.stack([found.fused, found.by_modality["vision"], found.by_modality["text"]]) * weights
    ).sum()
    (loss * parallel.data_parallel_size).backward()
    parallelize.finish_gradients(encoder, parallel)
    gradients = {name: whole_tensor(p, p.grad, parallel) for name, p in encoder.named_parameters()}
    store.save(folder, model=encoder, optimizer=optimizer, extra={"step": 1}, parallel=parallel)
    kept = {name: whole_tensor(p, p, parallel) for name, p in encoder.named_parameters()}
    statistics = dict(encoder.named_buffers()).get("audio.encoder.tower.bin_mean")
    with torch.no_grad():
        for tensor in (*encoder.parameters(), *([] if statistics is None else [statistics])):
            tensor.zero_()
    loading.load(folder, model=encoder, optimizer=optimizer, parallel=parallel)
    for name, parameter in encoder.named_parameters():
        assert torch.equal(whole_tensor(parameter, parameter, parallel), kept[name]), name
    if statistics is not None:
        assert torch.equal(statistics, torch.arange(6, dtype=torch.float64) - 1)
    return start, found.fused.detach(), gradients


@pytest.mark.parametrize(
    ("kind", "tensor", "data"),
    [
        ("qwen_clap", 2, 1),
        ("qwen_clap", 2, 2),
        ("naflex_fusion", 2, 2),
        ("siglip_whisper", 2, 1),
        ("siglip_whisper", 2, 2),
    ],
)
def test_vectors_and_gradients_are_the_same_at_every_layout(kind, tensor, data, tmp_path):
    [(_, whole, expected)] = run_ranks(one_step, 1, 1, store.folder_of(tmp_path / "one", 1), kind)
    for name in CHANGED[kind]:
        assert expected[name].abs().max() > 1e-6, name
    for start, part, gradients in run_ranks(
        one_step, tensor * data, tensor, store.folder_of(tmp_path / "many", 1), kind
    ):
        torch.testing.assert_close(part, whole[start : start + len(part)], rtol=0, atol=1e-12)
        assert gradients.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(
                gradients[name],
                wanted,
                rtol=0,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def in_bfloat16(rank, world, kind, checkpointed):
    parallel = join_layout(1)
    inputs = published_inputs(kind, 2, dtype=torch.float32, absent=False)
    with torch.no_grad():
        wanted = model_of(kind, 1, torch.float32)(inputs).fused
    encoder = model_of(kind, 1, torch.float32)
    if checkpointed:
        parallelize.checkpoint_activations(encoder)
    encoder = parallelize.shard(encoder, parallel, shard=True, compute_dtype=torch.bfloat16)
    found = encoder(inputs).fused
    found.square().sum().backward()
    assert all(
        buffer.dtype == torch.float32 for buffer in encoder.buffers() if buffer.is_floating_point()
    )
    return (
        wanted,
        found.detach(),
        all(
            bool(parameter.grad.full_tensor().isfinite().all())
            for parameter in encoder.parameters()
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_bfloat16_computation_is_near(kind, checkpointed):
    [(wanted, found, finite)] = run_ranks(in_bfloat16, 1, kind, checkpointed)
    assert finite and found.dtype == torch.float32
    cosines = torch.nn.functional.cosine_similarity(wanted, found)
    assert cosines.min() > 0.999 and not torch.equal(wanted, found)
