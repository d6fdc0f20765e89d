"""Published models as parts of the encoder: the forward pass is transformers' own, a rank reads
its share, what is exported is bit-equal.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from sailplan.config.schema import ModelConfig, ParallelConfig, TransformerShape, WeightsConfig
from sailplan.errors import ConfigurationError
from sailplan.model.backbones.load import allocate, load, open_sources
from sailplan.model.build import build_encoder
from sailplan.model.count import check_weights
from sailplan.model.pooling import last_positions
from sailplan.model.testing import join_layout, packed_rows, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

SHARED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rope_theta": 5e4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
FAMILIES = ("qwen2", "qwen3")


def configured(family: str, folder: Path | None, *, causal: bool = True) -> ModelConfig:
    """The small model's configuration with the tower of a family."""
    config = small_config()
    config.vocabulary, config.embedding, config.rope_base = 96, 32, 5e4
    own = (
        {"query_key_value_bias": True}
        if family == "qwen2"
        else {"query_key_norm": True, "head_size": 16}
    )
    config.tower = TransformerShape(2, 32, 4, 2, 48, norm_epsilon=1e-5, causal=causal, **own)
    config.pooling = "last_token"
    config.weights = WeightsConfig(tower=None if folder is None else str(folder))
    return config


def reference(family: str) -> torch.nn.Module:
    torch.manual_seed(3)
    model = (
        Qwen2ForCausalLM(Qwen2Config(**SHARED))
        if family == "qwen2"
        else Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=16))
    )
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # norms start as ones and biases as zeros: a mix-up would not show
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """(family, folder in several files, the model that wrote it)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = reference(request.param)
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return request.param, folder, model


def inputs():
    ids = torch.randint(0, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    return ids, mask


def hidden_states(encoder, ids, mask):
    with torch.no_grad():
        numbers, places, rows = packed_rows(mask)
        hidden = encoder.tower(encoder.text(ids.flatten()[numbers]), rows, places)
        return (
            torch.zeros(ids.numel(), hidden.size(1))
            .index_copy(0, numbers, hidden)
            .unflatten(0, ids.shape)
        )


def loaded(rank, world, family, folder, causal):
    parallel = join_layout(world)
    config = configured(family, folder, causal=causal)
    encoder = OmniEncoder(config, seed=0, published=["tower"])
    allocate(encoder)
    (source,) = open_sources(config)
    load(source, encoder, parallel.tensor_parallel_rank, world)
    found = hidden_states(encoder, *inputs())
    whole = {
        name: whole_tensor(parameter, parameter, parallel)
        for name, parameter in encoder.named_parameters()
    }
    return found, whole, source.folder.bytes_read, source.folder.largest_read


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_hidden_states_are_those_of_transformers(published, tensor, causal):
    family, folder, model = published
    ids, mask = inputs()
    with torch.no_grad():
        if causal:
            wanted = model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        else:  # a mask of four dimensions is taken as it is
            wanted = model.model(
                input_ids=ids, attention_mask=mask[:, None, None, :].expand(-1, 1, 7, -1)
            ).last_hidden_state
    for found, *_ in run_ranks(loaded, tensor, family, folder, causal):
        torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=1e-5)
    assert wanted[mask].std() > 0.5


def test_each_tensor_parallel_rank_reads_its_own_part(published):
    family, folder, model = published
    [(_, _, alone, largest)] = run_ranks(loaded, 1, family, folder, True)
    tower = sum(p.nbytes for p in model.model.parameters())
    assert alone == tower and largest == model.model.embed_tokens.weight.nbytes
    norms = sum(p.nbytes for name, p in model.model.named_parameters() if "norm" in name)
    for _, _, read, most in run_ranks(loaded, 2, family, folder, True):
        assert read == (tower - norms) // 2 + norms  # norms are every rank's, all else is halved
        assert most == largest // 2


def built(rank, world, config):
    parallel = join_layout(world)
    encoder = build_encoder(config, ParallelConfig(tensor=world), parallel, seed=5)
    drawn = OmniEncoder(configured("qwen3", None), seed=5)
    first = dict(drawn.named_parameters())
    assert not any(parameter.is_meta for parameter in encoder.parameters())
    return {
        name: whole_tensor(first[name], parameter, parallel)
        for name, parameter in encoder.named_parameters()
    }


@pytest.mark.parametrize("published", ["qwen3"], indirect=True)
def test_a_run_starts_from_the_weights_at_any_layout(published):
    family, folder, model = published
    one, two = (
        run_ranks(built, 1, configured(family, folder))[0],
        run_ranks(built, 2, configured(family, folder))[0],
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(one["text.weight"], model.model.embed_tokens.weight)


def test_last_positions():
    values = torch.arange(24.0).view(8, 3)
    assert torch.equal(
        last_positions(values, torch.tensor([2, -1])), torch.stack([values[2], torch.zeros(3)])
    )


def damaged(folder: Path, out: Path, change) -> Path:
    """A copy of the folder as one file, after `change(tensors, config)`."""
    tensors = {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop(NORM), ["model.weights.tower", NORM, "1 missing"]),
        (
            lambda t, c: t.update({"model.layers.7.extra.weight": torch.ones(2)}),
            ["unknown tensor model.layers.7.extra.weight"],
        ),
        (lambda t, c: t.update({NORM: t[NORM].to(torch.int8)}), [NORM, "type I8", "F32, BF16"]),
        (lambda t, c: t.update({QUERY: t[QUERY][:-1].clone()}), [QUERY, "(63, 32)", "(64, 32)"]),
        (lambda t, c: c.update(hidden_size=64), ["model.tower.hidden is 32", "hidden_size 64"]),
        (
            lambda t, c: c.update(num_hidden_layers=3),
            ["model.tower.layers is 2", "num_hidden_layers 3"],
        ),
        (lambda t, c: c.update(model_type="llama"), ["model_type llama", "qwen2, qwen3"]),
        (
            lambda t, c: c.update(rope_parameters={"rope_type": "yarn", "rope_theta": 5e4}),
            ["rope_type yarn"],
        ),
    ],
)
@pytest.mark.parametrize("published", ["qwen3"], indirect=True)
def test_files_that_do_not_fit_are_one_line(published, tmp_path, change, words):
    family, folder, _ = published
    check_weights(configured(family, folder))
    with pytest.raises(ConfigurationError) as caught:
        check_weights(configured(family, damaged(folder, tmp_path / "bad", change)))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_and_a_missing_folder(published, tmp_path):
    family, folder, _ = published
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    victim = sorted(copy.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigurationError, match=f"{victim.name} is missing or broken"):
        check_weights(configured(family, copy))
    with pytest.raises(ConfigurationError, match="no such folder"):
        check_weights(configured(family, tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"model\.tower\.head_size is"):
        check_weights(configured("qwen2" if family == "qwen3" else "qwen3", folder))


def audio_config(folder: Path | None) -> ModelConfig:
    config = small_config()
    shape = TransformerShape(
        2,
        32,
        4,
        None,
        48,
        norm="layer",
        norm_epsilon=1e-5,
        activation="gelu",
        gated=False,
        bias=True,
    )
    config.audio = dataclasses.replace(
        config.audio, backbone="whisper", time_stride=2, mel_bins=6, encoder=shape
    )
    config.weights.audio = None if folder is None else str(folder)
    return config


@pytest.fixture(
    scope="module",
    params=[WhisperForConditionalGeneration, WhisperModel],
    ids=["with_head", "without_head"],
)
def whisper(request, tmp_path_factory):
    """(folder, encoder) of a Whisper that reads 24 frames."""
    torch.manual_seed(4)
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 6,
        "max_source_positions": 12,
    }
    decoder = {
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "max_target_positions": 8,
        "vocab_size": 20,
    }
    tokens = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1
    )
    whole = request.param(
        WhisperConfig(
            **sizes, **decoder, **tokens, suppress_tokens=None, begin_suppress_tokens=None
        )
    )
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("whisper")
    whole.eval().save_pretrained(folder)
    return folder, whole.get_encoder()


def sounds():
    return torch.randn(3, 24, 6, generator=torch.Generator().manual_seed(2))


def heard(rank, world, folder):
    parallel = join_layout(world)
    config = audio_config(folder)
    encoder = OmniEncoder(config, published=["audio"], share_encoders=False)
    allocate(encoder)
    (source,) = open_sources(config)
    load(source, encoder, parallel.tensor_parallel_rank, world)
    with torch.no_grad():
        hidden = encoder.audio["encoder"].tower(sounds())
    # A bias of the keys, which export drops, changes nothing: each query's scores move together.
    whole = {
        name: whole_tensor(parameter, parameter, parallel)
        for name, parameter in encoder.named_parameters()
    }
    with torch.no_grad():
        for layer in encoder.audio["encoder"].tower.blocks.block.layers:
            bias = layer.self_attention.linear_qkv.bias.view(-1, 3, 8)
            assert torch.equal(bias[:, 1], torch.zeros_like(bias[:, 1]))
            bias[:, 1] = torch.randn_like(bias[:, 1])
        moved = encoder.audio["encoder"].tower(sounds())
    vector = encoder.audio["encoder"](sounds()[:, None], torch.tensor([[True], [True], [False]]))
    vector.square().sum().backward()
    return hidden, moved, whole, source.folder.bytes_read, vector.detach()


@pytest.mark.parametrize("tensor", [1, 2])
def test_whisper_hears_as_transformers_does(whisper, tmp_path, tensor):
    folder, model = whisper
    with torch.no_grad():
        wanted = model(sounds().transpose(1, 2)).last_hidden_state
    assert wanted.std() > 0.5
    hidden, moved, _, read, vector = run_ranks(heard, tensor, folder)[0]
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-5)
    assert vector.shape == (3, 12) and bool(vector[:2].any(1).all()) and not vector[2].any()
    in_the_files = sum(
        p.nbytes for name, p in model.named_parameters() if "embed_positions" not in name
    )
    assert read == in_the_files if tensor == 1 else read < 0.75 * in_the_files


def test_whisper_files_of_another_size_are_one_line(whisper):
    folder, _ = whisper
    check_weights(audio_config(folder))
    wrong = [
        ({"mel_bins": 8}, "model.audio.mel_bins is 8.* 6"),
        ({"backbone": "own"}, "model.audio.backbone is own: expected whisper"),
    ]
    for change, words in [*wrong, ({"time_stride": 4}, "model.audio.time_stride is 4: expected 2")]:
        config = audio_config(folder)
        config.audio = dataclasses.replace(config.audio, **change)
        with pytest.raises(ConfigurationError, match=words):
            check_weights(config)
