"""Risks: media that are shown otherwise than a viewer shows them, or that end a run, or are
taken for what they are not.
"""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from sailplan.config.schema import DataConfig, DatasetConfig, ViewConfig
from sailplan.data import audio, image, video
from sailplan.data.index import ShardIndex
from sailplan.data.kinds import ENDINGS
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.record import Item
from sailplan.data.testing import png, tar_bytes, wav, write_shards
from sailplan.data.views import ViewDecoder

RAMP = np.outer(np.linspace(0.2, 1, 24), np.linspace(0, 1, 36))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def grey(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.repeat(values[None].astype(np.uint8), 3, axis=0))


@pytest.mark.parametrize(
    "kind",
    [
        "GIF",
        "BMP",
        "TIFF",
        "AVIF",
        "JPEG2000",
        "PPM",
        "ICO",
        "PCX",
        "DDS",
        "SGI",
        "MPO",
        "WEBP",
        "PNG",
        "JPEG",
        "QOI",
    ],
)
def test_every_usual_format_is_read_by_its_content(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    picture = Image.new("RGB", (48, 32), (220, 20, 20))
    pixels = image.pixels_of(encoded(picture, kind)).float()
    assert (
        pixels.shape[0] == 3
        and (pixels.mean((1, 2)) - torch.tensor([220.0, 20, 20])).abs().max() < 8
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_show_the_same_picture_as_eight(kind: str) -> None:
    eight = (RAMP * 255).round()
    wide = image.pixels_of(encoded(Image.fromarray((eight * 257).astype(np.uint16)), kind))
    assert torch.equal(wide, grey(eight)) and torch.equal(
        image.pixels_of(encoded(Image.fromarray(eight.astype(np.uint8)), kind)), grey(eight)
    )
    dark = image.pixels_of(encoded(Image.fromarray((RAMP * 2570).round().astype(np.uint16)), kind))
    assert int(dark.max()) == 10, "a dark picture stays dark"


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.0, np.float32), (255.0, np.float32), (5e6, np.int32), (70.0, np.float32)],
)
def test_depth_maps_and_floating_numbers_are_pictures(scale: float, dtype: Any) -> None:
    values = (RAMP * scale - (20 if scale == 70.0 else 0)).astype(dtype)
    pixels = image.pixels_of(encoded(Image.fromarray(values), "TIFF")).float()
    assert (
        int(pixels.min()) < 3
        and int(pixels.max()) > 250
        and bool((pixels[0].diff(dim=1) >= 0).all())
    )
    broken = values.astype(np.float32)
    broken[3, 3] = np.nan
    with pytest.raises(
        ValueError, match="image cannot be decoded: it has values that are not finite"
    ):
        image.pixels_of(encoded(Image.fromarray(broken), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(kind: str) -> None:
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (20, 0, 40, 20))
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned a quarter to the right
    pixels = image.pixels_of(encoded(picture, kind, exif=tags))
    assert (
        pixels.shape == (3, 40, 20)
        and pixels[:, 5, 10].argmax() == 0
        and pixels[:, 35, 10].argmax() == 2
    )


def test_a_broken_orientation_tag_says_nothing_of_the_pixels() -> None:
    plain = encoded(Image.new("RGB", (16, 8), "red"), "JPEG")
    tag = b"Exif\0\0" + b"II*\0" + b"\xff" * 20
    pixels = image.pixels_of(
        plain[:2] + b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag + plain[2:]
    )
    assert pixels.shape == (3, 8, 16)


def test_colours_of_every_mode_and_transparency() -> None:
    red = Image.new("RGB", (16, 16), (220, 20, 20))
    modes = [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("YCbCr", "JPEG"), ("LAB", "TIFF")]
    for picture, kind in (
        (red.quantize(4) if mode == "P" else red.convert(mode), kind) for mode, kind in modes
    ):
        assert (
            image.pixels_of(encoded(picture, kind)).float().mean((1, 2))
            - torch.tensor([220.0, 20, 20])
        ).abs().max() < 12, (picture.mode, kind)
    assert torch.equal(
        image.pixels_of(encoded(Image.new("1", (16, 16), 1), "PNG")),
        torch.full((3, 16, 16), 255, dtype=torch.uint8),
    )
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    hidden = [
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "GIF", transparency=0),
        encoded(Image.new("LA", (16, 16), (0, 0)), "PNG"),
    ]
    hidden.append(
        encoded(Image.fromarray(np.zeros((16, 16), dtype=np.uint16)), "PNG", transparency=0)
    )
    for content in hidden:
        assert (image.pixels_of(content) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_the_picture(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert image.pixels_of(content).float().mean((1, 2)).argmax() == 0


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "JPEG2000", "PPM"]
)
def test_truncated_pictures_are_value_errors_of_one_line(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), kind)
    for size in (len(content) // 2, 40, 10, 0):
        with pytest.raises(ValueError, match="image cannot be decoded") as caught:
            image.pixels_of(content[:size])
        assert "\n" not in str(caught.value)


FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "GSM610"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "ULAW"),
    ("WAV", "FLOAT"),
    ("FLAC", None),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", None),
    ("AIFF", None),
    ("AIFF", "GSM610"),
    ("AU", None),
    ("CAF", None),
    ("W64", None),
    ("RF64", None),
    ("VOC", "PCM_16"),
    ("NIST", None),
]


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
def test_every_container_of_libsndfile_is_heard_and_half_of_it_is_not(
    kind: str, subtype: str | None
) -> None:
    tone = 0.3 * np.sin(np.arange(16000) * 2 * np.pi * 440 / 16000)
    file = io.BytesIO()
    soundfile.write(file, tone, 16000, format=kind, subtype=subtype)
    samples = audio.decode(file.getvalue(), 8000, video.sound)
    assert (
        abs(len(samples) - 8000) < 600
        and np.isfinite(samples).all()
        and 0.15 < samples[1000:7000].std() < 0.26
    )
    if kind not in ("VOC", "NIST"):  # their headers do not tell how long they are
        with pytest.raises(ValueError, match="audio"):
            audio.decode(file.getvalue()[: len(file.getvalue()) // 2], 8000)


@pytest.mark.parametrize(
    ("value", "subtype"),
    [(np.nan, "FLOAT"), (np.inf, "FLOAT"), (-np.inf, "DOUBLE"), (1e29, "FLOAT"), (1e300, "DOUBLE")],
)
def test_samples_that_are_no_sound_are_value_errors(value: float, subtype: str) -> None:
    samples = np.zeros(8000)
    samples[100] = value
    file = io.BytesIO()
    soundfile.write(file, samples, 8000, format="WAV", subtype=subtype)
    with pytest.raises(ValueError, match="not finite, or larger than any sound's"):
        audio.decode(file.getvalue(), 8000, video.sound)


def test_floating_samples_of_whole_numbers_are_a_sound_and_a_pipe_tells_no_length() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(8000)) * 2**31, 8000, format="WAV", subtype="FLOAT")
    assert torch.from_numpy(audio.decode(file.getvalue(), 8000, video.sound)).isfinite().all()
    assert (
        audio.log_mel(
            audio.chunks(audio.decode(file.getvalue(), 8000, video.sound), 8000, 1), 8000, 16
        )
        .isfinite()
        .all()
    )
    piped = bytearray(wav(1))
    piped[4:8] = piped[40:44] = b"\xff" * 4
    assert np.array_equal(audio.decode(bytes(piped), 8000), audio.decode(wav(1), 8000))


def film(frames: int = 24, kind: str = "mp4", codec: str = "mpeg4", sound: bool = False) -> bytes:
    """A film whose frame n has the brightness 10 n."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 10 * n, dtype=np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(frames: list[torch.Tensor]) -> list[int]:
    return [round(float(frame.float().mean()) / 10) for frame in frames]


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "mpeg4"),
        ("webm", "libvpx-vp9"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        ("mp4", "libx264"),
    ],
)
def test_frames_of_a_film_are_spread_over_it(kind: str, codec: str) -> None:
    content = film(24, kind, codec)
    assert numbers(video.frames(content, 3, None)) == [4, 12, 20] and video.frames(
        content, 1, None
    )[0].shape == (3, 48, 64)
    assert numbers(video.frames(content, 40, None)) == list(range(24))
    drawn = [numbers(video.frames(content, 3, random.Random(seed))) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({tuple(one) for one in drawn}) > 1
    assert all(
        part * 8 <= number < (part + 1) * 8 for one in drawn for part, number in enumerate(one)
    )
    for wrong in (content[: len(content) // 2], content[:40], b"no film", b""):
        with pytest.raises(ValueError, match="film cannot be decoded") as caught:
            video.frames(wrong, 3, None)
        assert "\n" not in str(caught.value)


def test_a_film_is_a_row_of_pictures_and_a_broken_one_is_a_bad_sample(tmp_path: Path) -> None:
    write_shards(tmp_path)
    content = film(24)
    config = DataConfig(
        image_size=16,
        frames=3,
        max_tokens=24,
        audio_rate=8000,
        mel_bins=16,
        tokenizer=str(tmp_path / "tokenizer.json"),
    )
    decoder, view = ViewDecoder(config), ViewConfig(modalities=["vision"])
    members = [
        ("0.mp4", content),
        ("0.txt", b"a film"),
        ("1.webm", content),
        ("2.mp4", content[:90]),
        ("3.mp4", content),
        ("3.png", png(1)),
    ]
    members += [(f"4.{n}.png", encoded(Image.new("L", (8, 8), 10 * n), "PNG")) for n in range(12)]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    reader = RecordReader("films", DatasetConfig(), ShardIndex([tmp_path / "s.tar"]))
    items = [reader.read(position).item for position in range(5)]
    rows = [decoder.row(items[place], view, DatasetConfig()) for place in (0, 1)]
    assert all(numbers(list(row.images)) == [4, 12, 20] and row.valid for row in rows), (
        "by content, whatever the ending"
    )
    trained = [decoder.row(items[0], view, DatasetConfig(), seed) for seed in (5, 5, 6)]
    assert (
        numbers(list(trained[0].images))
        == numbers(list(trained[1].images))
        != numbers(list(trained[2].images))
    )
    with pytest.raises(BadSample, match="film cannot be decoded"):
        decoder.row(items[2], view, DatasetConfig())
    assert items[3] is not None and items[3].images == (png(1),) and items[3].video is None
    assert numbers(list(decoder.row(items[4], view, DatasetConfig()).images)) == [0, 1, 2]
    spread = ViewConfig(modalities=["vision"], frames="spread")
    assert numbers(list(decoder.row(items[4], spread, DatasetConfig()).images)) == [2, 6, 10]
    assert decoder.row(Item("x"), spread, DatasetConfig()).images == ()
    assert [pictures for _, pictures, _ in reader.outlines(0)] == [0xFFFF, 0xFFFF, 0xFFFF, 1, 12]


def test_sound_of_a_container_that_libsndfile_does_not_read() -> None:
    av = pytest.importorskip("av")
    tone = (0.3 * np.sin(np.arange(16000) * 2 * np.pi * 440 / 16000)).astype(np.float32)
    for kind, codec in (("mp4", "aac"), ("adts", "aac"), ("matroska", "aac")):
        file = io.BytesIO()
        with av.open(file, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=16000, layout="mono")
            for start in range(0, 16000, 1024):
                frame = av.AudioFrame.from_ndarray(
                    tone[None, start : start + 1024], format="fltp", layout="mono"
                )
                frame.rate, frame.pts = 16000, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        samples = audio.decode(file.getvalue(), 8000, video.sound)
        assert abs(len(samples) - 8000) < 1500 and 0.15 < samples[1500:7000].std() < 0.26, kind
    with pytest.raises(ValueError, match="no sound in it"):
        audio.decode(film(4), 8000, video.sound)


def test_no_ending_is_of_two_kinds() -> None:
    endings = [ending for of_kind in ENDINGS.values() for ending in of_kind.split()]
    assert len(endings) == len(set(endings)) and all(ending == ending.lower() for ending in endings)
