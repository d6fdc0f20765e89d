"""Risks: a recording that reaches a published model otherwise than its own feature extractor makes
it, a vector that depends on the rows beside it, chunks that the extractor would crop by chance.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from torch import Tensor

from sailplan.config.schema import Config, DataConfig, ViewConfig
from sailplan.data.processor import ViewRow
from sailplan.data.record import NamedInputs
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.encoders.transformers.processor import RECORDINGS, TransformersProcessor
from sailplan.model.encoders.two_towers import TwoTowersConfig

STACK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SHORT = 0.25  # seconds of a chunk, where the model lets us choose
VIEW = ViewConfig(modalities=["audio"])


def whisper(folder: Path) -> float:
    transformers.WhisperConfig(
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=50,
        encoder_layerdrop=0.5,
        apply_spec_augment=True,
    ).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return 1.0


def clap(folder: Path) -> float:
    audio = {
        "window_size": 4,
        "num_mel_bins": 16,
        "spec_size": 64,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "hidden_size": 16,
        "projection_dim": 16,
        "depths": [2, 2],
        "num_attention_heads": [2, 2],
        "patch_embeds_hidden_size": 8,
        "num_hidden_layers": 2,
        "enable_fusion": True,
    }
    text = STACK | {"vocab_size": 40, "intermediate_size": 24, "pad_token_id": 0}
    transformers.ClapConfig(
        text_config=text, audio_config=audio, projection_dim=16
    ).save_pretrained(folder)
    transformers.ClapFeatureExtractor(feature_size=16, max_length_s=1).save_pretrained(folder)
    return 1.0


def spectrogram_transformer(folder: Path) -> float:
    transformers.ASTConfig(
        **STACK, intermediate_size=24, max_length=64, num_mel_bins=16, patch_size=8
    ).save_pretrained(folder)
    transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(folder)
    return 0.5


def wav2vec2(folder: Path, norm: str = "layer") -> float:
    transformers.Wav2Vec2Config(
        **STACK,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_kernel=[10, 3],
        conv_stride=[8, 4],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        layerdrop=0.5,
    ).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(
        folder
    )
    return SHORT


MODELS = {"whisper": whisper, "clap": clap, "ast": spectrogram_transformer, "wav2vec2": wav2vec2}


def sound(seconds: float, rate: int, seed: int = 0) -> tuple[np.ndarray, bytes]:
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return samples.astype(np.float32), file.getvalue()


def opened(
    folder: Path, seconds: float, chunks: int = 2
) -> tuple[TransformersConfig, TransformersProcessor]:
    settings = TransformersConfig(
        source=str(folder), modalities=["audio"], embedding=16, prefixes=[16], weights="drawn"
    )
    data = DataConfig(audio_chunk_seconds=seconds, audio_chunks=chunks)
    return settings, TransformersProcessor(settings, Config(model=settings, data=data))


def row(processor: TransformersProcessor, content: bytes, source: Any = None) -> ViewRow:
    return ViewRow(1, audio=processor.sound("one", content, source, 0.0))


def published(settings: TransformersConfig, kind: str, given: dict[str, Any]) -> Tensor:
    """Return the vector that transformers' own model has for what its extractor made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModel.from_config(
            transformers.AutoConfig.from_pretrained(settings.source)
        ).eval()
    if kind == "clap":
        given |= {"is_longer": torch.zeros(1, 1, dtype=torch.bool)}
        found = model.get_audio_features(**given)
        return getattr(found, "pooler_output", found)
    model = model.get_encoder() if kind == "whisper" else model
    return model(**given).last_hidden_state.mean(1)


@pytest.mark.parametrize("kind", MODELS)
def test_vectors_are_the_models_own_and_depend_on_no_other_row(tmp_path: Path, kind: str) -> None:
    seconds = MODELS[kind](tmp_path)
    settings, processor = opened(tmp_path, seconds)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    samples, content = sound(0.6 * seconds, extractor.sampling_rate)
    _, longer = sound(1.7 * seconds, extractor.sampling_rate, 1)
    short, long = row(processor, content), row(processor, longer)
    assert short.audio is not None and long.audio is not None
    assert (len(short.audio), len(long.audio)) == (1, 2)
    given = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    own = given[extractor.model_input_names[0]]
    got = short.audio[..., : own.size(-1)] if kind == "wav2vec2" else short.audio
    torch.testing.assert_close(got, own, rtol=0, atol=1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = settings.component().module(torch.float32).eval()
    with torch.no_grad():
        exact = published(settings, kind, {extractor.model_input_names[0]: own})
        alone = encoder(processor.batch([short], [[]], VIEW)).fused
        batch = encoder(processor.batch([long, short, ViewRow()], [[]] * 3, VIEW)).fused
    torch.testing.assert_close(alone, exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(batch[1:2], alone, rtol=0, atol=2e-5)
    assert batch[2].abs().max() == 0 and float(batch[0].norm()) > 0


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_nothing_is_drawn_that_a_replay_would_draw_otherwise(tmp_path: Path, kind: str) -> None:
    """Layers left out and times masked come from numpy's generator in transformers."""
    MODELS[kind](tmp_path)
    settings, processor = opened(tmp_path, SHORT)
    encoder = settings.component().module(torch.float32).train()
    inputs, found = processor.largest(["audio"], 3), []
    for seed in (0, 1):
        np.random.seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # as the replay of a micro-batch does
            found.append(encoder(inputs).fused)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert isinstance(inputs, NamedInputs) and inputs.named[RECORDINGS].shape[:2] == (3, 2)


def test_a_long_recording_begins_where_its_seed_says(tmp_path: Path) -> None:
    wav2vec2(tmp_path, "group")
    _, processor = opened(tmp_path, SHORT)
    _, content = sound(2.0, 16000)
    one, same, other, first = (
        processor.sound("one", content, source, 0.0)
        for source in (random.Random(1), random.Random(1), random.Random(2), None)
    )
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, first)
    inputs = processor.batch([ViewRow(1, audio=one)], [[]], VIEW)
    assert set(inputs.named) == {RECORDINGS, "audio_present"}  # no mask where its files have none


def test_chunks_that_would_be_cropped_are_refused(tmp_path: Path) -> None:
    clap(tmp_path)
    with pytest.raises(ConfigurationError, match=r"audio_chunk_seconds=2.0.*at most 1,"):
        opened(tmp_path, 2.0)


def test_an_extractor_of_features_of_any_number_is_refused(tmp_path: Path) -> None:
    wav2vec2(tmp_path)
    transformers.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8).save_pretrained(
        tmp_path
    )
    _, processor = opened(tmp_path, SHORT)
    with pytest.raises(ConfigurationError, match="SeamlessM4TFeatureExtractor"):
        processor.largest(["audio"], 1)


def test_a_sound_tower_stands_beside_text_and_pictures() -> None:
    tower = TransformersConfig(source="somewhere")
    three = TwoTowersConfig(text=tower, vision=tower, audio=tower)
    assert three.part_names()[:3] == ("text", "vision", "audio")
    assert TwoTowersConfig(text=tower, audio=tower).towers == ("text", "audio")
    with pytest.raises(ConfigurationError, match="model has audio: expected two or more"):
        TwoTowersConfig(audio=tower).validate("model")
