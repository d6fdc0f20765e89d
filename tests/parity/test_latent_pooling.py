"""Latent-attention pooling is the formula that it says, and with a Whisper encoder beside it the
same at every layout.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sailplan.config.schema import TransformerShape
from sailplan.errors import ConfigurationError
from sailplan.model import parallelize
from sailplan.model.check import check_model
from sailplan.model.pooling import LatentAttention
from sailplan.model.testing import join_layout, random_inputs, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

EVERYTHING = ("vision", "audio", "text")


def configured():
    config = small_config()
    config.pooling, config.pooling_latents, config.pooling_heads = "latent_attention", 5, 2
    shape = TransformerShape(
        1,
        16,
        4,
        None,
        24,
        norm="layer",
        norm_epsilon=1e-5,
        activation="gelu",
        gated=False,
        bias=True,
    )
    config.audio = dataclasses.replace(
        config.audio, backbone="whisper", time_stride=2, encoder=shape
    )
    return config


def test_it_is_the_formula():
    torch.manual_seed(0)
    module = LatentAttention(8, 3, 2, torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    hidden = torch.randn(2, 4, 8, dtype=torch.float64)

    def norm(layer, x):
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt() * layer.weight + layer.bias

    keys, values = (norm(module.latent_norm, module.latents) @ module.key_value.weight.T).chunk(
        2, -1
    )
    for row in hidden.flatten(0, 1):
        query = module.query.weight @ norm(module.norm, row)
        heads = [
            ((keys[:, part] @ query[part]) / 2).softmax(0) @ values[:, part]
            for part in (slice(0, 4), slice(4, 8))
        ]
        middle = row + module.output.weight @ torch.cat(heads)
        wanted = middle + module.mlp[2](
            torch.nn.functional.gelu(module.mlp[0](norm(module.mlp_norm, middle)))
        )
        torch.testing.assert_close(module(row[None])[0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        module(hidden.flatten(0, 1))[6], module(hidden[1, 2:3])[0], rtol=0, atol=1e-12
    )


def one_step(rank, world, tensor):
    parallel = join_layout(tensor)
    encoder = parallelize.shard(
        OmniEncoder(configured(), dtype=torch.float64, seed=1), parallel, shard=True
    )
    rows = 4 // parallel.data_parallel_size
    start = parallel.data_parallel_rank * rows
    inputs = random_inputs(EVERYTHING, 4, 3)
    changes = {
        f.name: getattr(inputs, f.name)[start : start + rows]
        for f in dataclasses.fields(inputs)
        if isinstance(getattr(inputs, f.name), torch.Tensor)
    }
    found = encoder(dataclasses.replace(inputs, **changes), per_modality=True)
    weights = torch.randn(
        3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )[:, start : start + rows]
    loss = (
        torch.stack([found.fused, found.by_modality["vision"], found.by_modality["text"]]) * weights
    ).sum()
    (loss * parallel.data_parallel_size).backward()
    parallelize.finish_gradients(encoder, parallel)
    gradients = {name: whole_tensor(p, p.grad, parallel) for name, p in encoder.named_parameters()}
    return start, found.fused.detach(), gradients


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 2)])
def test_vectors_and_gradients_are_the_same_at_every_layout(tensor, data):
    [(_, whole, expected)] = run_ranks(one_step, 1, 1)
    latents = expected["tower.pooling.latents"]
    assert latents.abs().amax(1).min() > 0 and whole.abs().amax(1).min() > 0
    for start, part, gradients in run_ranks(one_step, tensor * data, tensor):
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


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("pooling_heads", 3, "pooling_heads is 3.*hidden=16"),
        ("pooling_latents", 0, "pooling_latents=0"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(key, value, words):
    config = configured()
    setattr(config, key, value)
    with pytest.raises(ConfigurationError, match=words):
        check_model(config, 1)
