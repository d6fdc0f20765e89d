"""Pictures and sounds: formats, broken bytes, and augmentation that depends on the row alone."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

from sailplan.config.schema import DataConfig, DatasetConfig, ViewConfig
from sailplan.data import audio, image
from sailplan.data.record import Item
from sailplan.data.testing import png, wav
from sailplan.data.views import ViewDecoder


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_formats_and_modes_become_the_same_square(kind: str, mode: str) -> None:
    picture = Image.new("RGB", (40, 20), (204, 51, 51)).convert(mode)
    stored = (
        picture.convert("RGB") if (mode, kind) == ("P", "JPEG") else picture
    )  # JPEG has no palettes
    pixels = image.squared(image.pixels_of(encoded(stored, kind)), 16)
    expected = np.array(picture.convert("RGB"))[0, 0].astype(int)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    assert np.abs(pixels[:, 8, 8].numpy().astype(int) - expected).max() < 12


def test_transparent_parts_become_white() -> None:
    assert (image.pixels_of(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG")) == 255).all()


@pytest.mark.parametrize("content", [b"", b"not a picture", png(1)[:200]])
def test_broken_pictures_are_value_errors(content: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        image.pixels_of(content)


def test_pictures_and_sounds_reach_the_device_as_they_were_decoded(shards: Path) -> None:
    """A frame of 224 x 224 is 151 kB, not 602; and a few numbers say how its row is augmented."""
    decoder = ViewDecoder(
        DataConfig(tokenizer=str(shards / "tokenizer.json"), image_size=224, frames=2)
    )
    view, media = (
        ViewConfig(modalities=["vision", "audio"]),
        {"images": (png(1, 32), png(2, 32)), "audio": wav(1)},
    )
    for seed, strength, table in ((None, 0.5, None), (1, 0.0, None), (1, 0.5, (3, 10))):
        items = [Item(id="a", **media), Item(id="b"), Item(id="c", images=(png(3, 32),))]
        rows = [
            decoder.row(item, view, DatasetConfig(image_augmentation=strength), seed)
            for item in items
        ]
        inputs = decoder.batch(rows, [[]] * 3, view)
        assert inputs.images is not None and inputs.audio is not None
        assert (inputs.images.dtype, inputs.audio.dtype) == (torch.uint8, torch.float16)
        assert inputs.images[0, 0].nbytes == 3 * 224 * 224 == 150_528
        assert (
            None if inputs.image_augmentation is None else inputs.image_augmentation.shape
        ) == table
    assert torch.equal(inputs.image_augmentation[1], torch.tensor(image.IDENTITY))  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", None), ("FLAC", None), ("OGG", "OPUS"), ("OGG", "VORBIS")]
)
def test_a_tone_lands_in_its_mel_bin_in_every_format(kind: str, subtype: str | None) -> None:
    rate, tone = 16000, 1000.0
    samples = 0.3 * np.sin(2 * np.pi * tone * np.arange(rate) / rate)
    file = io.BytesIO()
    soundfile.write(file, np.stack([samples, samples], 1), rate, format=kind, subtype=subtype)
    mono = audio.decode(file.getvalue(), 8000)
    assert mono.dtype == np.float32 and abs(len(mono) - 8000) < 50
    mel = audio.log_mel(audio.chunks(mono, 8000, 1), 8000, 32)
    assert mel.shape == (1, 100, 32)
    top = 2595 * np.log10(1 + 4000 / 700)
    centre = 2595 * np.log10(1 + tone / 700) / top * 33 - 1
    assert abs(int(mel[0, 20:80].mean(0).argmax()) - centre) <= 1


def test_mel_filters_are_the_htk_definition() -> None:
    filters = audio.mel_filters(8, 129, 8000)
    assert filters.shape == (129, 8) and filters.min() == 0 and filters.max() <= 1
    inner = filters[(np.arange(129) * 4000 / 128 > 250) & (np.arange(129) * 4000 / 128 < 3000)]
    assert torch.allclose(inner.sum(1), torch.ones(len(inner)), atol=1e-5), (
        "neighbouring triangles add up to 1"
    )


@pytest.mark.parametrize("bins", [80, 128])
def test_whispers_spectrogram_is_that_of_transformers(bins: int) -> None:
    random_numbers, time = np.random.default_rng(0), np.arange(48000) / 16000
    waves = np.stack(
        [
            np.sin(2 * np.pi * (200 + 900 * time) * time),
            random_numbers.standard_normal(48000) * time,
            np.zeros(48000),
        ]
    ).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=3)
    wanted = extractor(
        list(waves), sampling_rate=16000, return_tensors="pt"
    ).input_features.transpose(1, 2)
    found = audio.whisper_log_mel(waves, bins)
    assert found.shape == (3, 300, bins) and wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.7])
def test_whispers_spectrogram_reaches_the_model_padded_as_transformers_pads(
    shards: Path, seconds: float
) -> None:
    config = DataConfig(
        tokenizer=str(shards / "tokenizer.json"),
        audio_chunk_seconds=1.0,
        audio_chunks=1,
        mel_bins=80,
        spectrogram="whisper",
    )
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, round(16000 * seconds)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV", subtype="FLOAT")
    row = ViewDecoder(config).row(
        Item(id="one", audio=file.getvalue()), ViewConfig(modalities=["audio"]), DatasetConfig()
    )
    assert row.audio is not None
    found = row.audio.float()
    wanted = WhisperFeatureExtractor(chunk_length=1)(
        samples, sampling_rate=16000, return_tensors="pt"
    ).input_features.transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)  # kept in float16


def clap_features(samples: np.ndarray) -> torch.Tensor:
    """transformers' spectrogram of the published front end: a long sound cut at random, a short
    one repeated whole and padded.
    """
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad", max_length_s=1)
    return (
        extractor(list(samples), sampling_rate=48000, return_tensors="pt")
        .input_features[:, 0]
        .float()
    )


def test_claps_spectrogram_is_that_of_transformers() -> None:
    random_numbers, time = np.random.default_rng(0), np.arange(48000) / 48000
    waves = np.stack(
        [
            np.sin(2 * np.pi * (200 + 9000 * time) * time),
            random_numbers.standard_normal(48000) * time,
            np.zeros(48000),
        ]
    ).astype(np.float32)
    found, wanted = audio.clap_log_mel(waves, 64), clap_features(waves)
    assert found.shape == (3, 101, 64) and wanted.std() > 20 and wanted[2].eq(-100).all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)  # decibels


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_claps_spectrogram_reaches_the_model_repeated_and_padded_as_transformers_does(
    shards: Path, seconds: float
) -> None:
    options = {"audio_chunk_seconds": 1.0, "audio_chunks": 1, "mel_bins": 64, "audio_rate": 48000}
    decoder = ViewDecoder(
        DataConfig(tokenizer=str(shards / "tokenizer.json"), spectrogram="clap", **options)
    )
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, round(48000 * seconds)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, 48000, format="WAV", subtype="FLOAT")
    view = ViewConfig(modalities=["audio"])
    row = decoder.row(Item(id="one", audio=file.getvalue()), view, DatasetConfig())
    inputs = decoder.batch([row, row], decoder.tokens([row, row], view), view)
    assert inputs.audio is not None and inputs.audio.shape == (2, 1, 101, 64)
    torch.testing.assert_close(
        inputs.audio[0].float(), clap_features(samples[None]), rtol=0, atol=0.04
    )  # kept in float16


def fusion_features(samples: np.ndarray) -> tuple[torch.Tensor, bool]:
    """transformers' four spectrograms of a recording with fusion, of chunks of a second, and
    whether it is longer than one.
    """
    extractor = ClapFeatureExtractor(truncation="fusion", padding="repeatpad", max_length_s=1)
    two = extractor(
        [samples, np.ones(96000)], sampling_rate=48000, return_tensors="pt"
    )  # alone, a short one would be called longer
    return two["input_features"][0].float(), bool(two["is_longer"][0])


@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.005, 1.02, 1.7, 4.2])
def test_claps_fusion_reaches_the_model_as_transformers_makes_it(
    shards: Path, seconds: float
) -> None:
    options = {"audio_chunk_seconds": 1.0, "audio_chunks": 1, "mel_bins": 64, "audio_rate": 48000}
    decoder = ViewDecoder(
        DataConfig(tokenizer=str(shards / "tokenizer.json"), spectrogram="clap_fusion", **options)
    )
    time = np.arange(round(48000 * seconds)) / 48000
    samples = (
        0.5
        * np.sin(2 * np.pi * (200 + 2000 * time) * time)
        * np.random.default_rng(1).uniform(0.5, 1, len(time))
    ).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, 48000, format="WAV", subtype="FLOAT")
    view, item = ViewConfig(modalities=["audio"]), Item(id="one", audio=file.getvalue())
    rows = [decoder.row(item, view, DatasetConfig(), seed) for seed in (None, 1, 1, 2, 3)]
    inputs = decoder.batch([*rows, decoder.row(None, view, DatasetConfig())], [[]] * 6, view)
    wanted, longer = fusion_features(samples)
    assert (
        inputs.audio is not None
        and inputs.audio_mask is not None
        and inputs.audio.shape == (6, 4, 101, 64)
    )
    assert inputs.audio_mask.tolist() == [[True, longer, longer, longer]] * 5 + [[False] * 4]
    torch.testing.assert_close(
        inputs.audio[:5, 0].float(), wanted[None, 0].expand(5, -1, -1), rtol=0, atol=0.04
    )  # kept in float16
    places = (len(samples) // 480 + 1) - 101 + 1
    assert longer == (places > 1)
    if longer:
        # The crops are parts of the recording's spectrogram, each from its third, drawn from the
        # row's seed.
        whole = audio.clap_fusion_log_mel(samples[None], 64)[0]
        heard = inputs.audio[:5, 1:].float()
        crops = torch.stack([whole[start : start + 101] for start in range(places)])
        begins = torch.stack(
            [(crops - crop).abs().amax((1, 2)).argmin() for crop in heard.flatten(0, 1)]
        ).view(5, 3)
        torch.testing.assert_close(crops[begins], heard, rtol=0, atol=0.04)
        thirds = [part.tolist() or [0] for part in np.array_split(np.arange(places), 3)]
        assert all(
            int(begin) in thirds[column] for row in begins for column, begin in enumerate(row)
        )
        assert torch.equal(begins[1], begins[2]) and begins[0].tolist() == [
            third[len(third) // 2] for third in thirds
        ]
        if seconds > 4:
            assert not torch.equal(begins[1], begins[3]) and not torch.equal(begins[3], begins[4])
        drawn = (
            (wanted[1:, None] - crops).abs().amax((2, 3)).amin(1)
        )  # transformers' own crops are parts of it too
        assert drawn.max() < 1e-3


def test_masked_bands_of_claps_spectrogram_are_in_its_middle() -> None:
    mel = torch.randn(2, 101, 64) - 70
    changed = audio.augment(mel, random.Random(1), 1.0, audio.SPECTROGRAMS["clap"])
    assert changed.eq(audio.CLAP_MIDDLE).any() and not changed.eq(0).any()
    kept = changed[changed != audio.CLAP_MIDDLE]
    assert bool((kept.mean() + 70).abs() < 6.5) and changed.shape == mel.shape


def test_short_sounds_are_repeated_whole_and_long_ones_cut_into_chunks() -> None:
    short = np.arange(1, 4, dtype=np.float32)
    assert audio.chunks(short, 8, 2).tolist() == [[1, 2, 3, 1, 2, 3, 0, 0]]
    long = np.arange(20, dtype=np.float32)
    assert audio.chunks(long, 8, 3).tolist() == [
        list(range(8)),
        list(range(8, 16)),
        [16, 17, 18, 19, 0, 0, 0, 0],
    ]
    assert audio.chunks(long, 8, 1).tolist() == [list(range(8))]
    starts = {int(audio.chunks(long, 8, 2, random.Random(seed))[0, 0]) for seed in range(40)}
    assert starts == {0, 1, 2, 3, 4}, "training starts anywhere"


@pytest.mark.parametrize("content", [b"", b"not a sound", wav(1)[:30]])
def test_broken_sounds_are_value_errors(content: bytes) -> None:
    with pytest.raises(ValueError, match="audio"):
        audio.decode(content, 8000)


@pytest.mark.parametrize(("place", "value"), [(24, 1325408064), (24, 3)])
def test_a_header_with_an_impossible_rate_is_a_bad_sound_and_takes_no_memory(
    place: int, value: int
) -> None:
    content = bytearray(wav(1))
    content[place : place + 4] = value.to_bytes(4, "little")
    with pytest.raises(ValueError, match="broken header"):
        audio.decode(bytes(content), 8000)


def test_a_header_that_tells_hours_in_a_few_bytes_is_a_bad_sound_and_takes_no_memory() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(4000, dtype=np.float32), 8000, format="FLAC")
    content = bytearray(file.getvalue())
    content[21] |= (
        # The 36 bits of the number of samples start in the lower half of this byte of STREAMINFO
        0x0F
    )
    with pytest.raises(ValueError, match="broken header"):
        audio.decode(bytes(content), 8000)


def test_sound_augmentation_is_a_function_of_its_seed_and_leaves_the_original() -> None:
    mel = audio.log_mel(audio.chunks(audio.decode(wav(1), 8000), 8000, 1), 8000, 16)
    kept = mel.clone()
    first, again, other = (audio.augment(mel, random.Random(seed), 1.0) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(mel, kept)
    assert torch.equal(audio.augment(mel, random.Random(3), 0.0), mel)
