"""Sound: soundfile decodes, scipy resamples, torch makes log-mel spectrograms of fixed-length
chunks.

Audio is cut into non-overlapping chunks (10 s, recipe section 1); a short one is repeated whole as
often as it fits and padded with silence. Our own spectrogram is 25 ms windows every 10 ms,
triangular filters on the HTK mel scale (2595 log10(1 + f/700)), log10 power, shifted and scaled by
fixed constants to roughly zero mean and unit variance.
Whisper's and CLAP's, which their published weights need, differ in window, mel scale and scaling,
and in what becomes of a short sound or, with CLAP's fusion, of a long one; `SPECTROGRAMS` names
them all.
Augmentation works on the spectrogram: a turn in time, a gain, and masked bands and times
(SpecAugment).
"""

from __future__ import annotations

import io
import math
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.signal
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

# Broken bytes may tell any rate (Hz) and length, which would take all memory; silence in FLAC has
# some 4,700 samples a byte.
RATES, SAMPLES_A_BYTE = (1000, 768_000), 8192
HIGHEST = 2.0**32  # of a sample: files of floating numbers may hold whole ones of 32 bits
READ_AT_ONCE = 1 << 16
LEAST_READ = 0.99  # of the samples that a header tells: an MP3's is a guess
SIZED = frozenset(
    {"WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "SVX"}
)  # libsndfile reads of these what is there, without a word
UNKNOWN = 0x7FFF0000  # bytes: what is written without knowing the length
# Place and sign of containers that libsndfile does not read: MP4, ADTS AAC (two), ASF, AMR,
# Matroska.
BY_VIDEO = (
    (4, b"ftyp"),
    (0, b"\xff\xf1"),
    (0, b"\xff\xf9"),
    (0, b"\x30\x26\xb2\x75"),
    (0, b"#!AMR"),
    (0, b"\x1a\x45\xdf\xa3"),
)
OfVideo = Callable[[bytes], tuple[NDArray[np.float32], int]]
MEMORY = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")
WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
FLOOR = 1e-8  # power; about 80 dB below a full-scale tone's mean power
LOG_MEAN, LOG_SCALE = (
    -5.5,
    2.2,
)  # of log10 power, measured on the quick start's recordings of speech
WHISPER_RATE, WHISPER_WINDOW, WHISPER_HOP, WHISPER_SCALE = 16000, 400, 160, 4.0
CLAP_RATE, CLAP_WINDOW, CLAP_HOP, CLAP_TOP = 48000, 1024, 480, 14000
# Decibels: the mean of the quick start's recordings of speech, up to their 4 kHz; log10 of the
# power, divided by the scale.
CLAP_MIDDLE, CLAP_SCALE = -40.0, 0.1
FUSED = 4  # spectrograms of a recording that CLAP's fusion takes


def decode(content: bytes, rate: int, of_video: OfVideo | None = None) -> NDArray[np.float32]:
    """Encoded bytes of any container that libsndfile reads, by their content -> mono float32
    [samples] at `rate` Hz.

    of_video: decodes the containers of films, whose sound libsndfile does not read (`video.sound`).
    Raises ValueError with a reason for broken or truncated bytes, an empty recording, values that
    are no sound's (not finite, or beyond whole numbers of 32 bits), or a rate or length that cannot
    be.
    """
    samples, found = _decoded(content, of_video)
    if len(samples) == 0:
        raise ValueError("audio has no samples")
    if not bool((np.abs(samples) <= HIGHEST).all()):  # False of what is no number, too
        raise ValueError("audio has samples that are not finite, or larger than any sound's")
    return at_rate(samples.mean(axis=1), found, rate)


def at_rate(samples: NDArray[np.float32], found: int, rate: int) -> NDArray[np.float32]:
    """Return float32 [samples] at `found` Hz resampled to `rate` Hz."""
    if found == rate:
        return samples
    common = math.gcd(found, rate)
    resampled: NDArray[np.float32] = scipy.signal.resample_poly(
        samples, rate // common, found // common
    ).astype(np.float32)
    return resampled


def _decoded(content: bytes, of_video: OfVideo | None) -> tuple[NDArray[np.float32], int]:
    """All samples, float32 [frames, channels], and their rate in Hz."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, told = int(file.samplerate), file.frames * file.channels
            if not RATES[0] <= rate <= RATES[1] or told > SAMPLES_A_BYTE * len(content):
                raise ValueError(
                    f"audio has a broken header: {told} samples at {rate} Hz in {len(content)} "
                    "bytes"
                )
            samples = _read(file)
            if (file.format in SIZED and _told_bytes(content) > len(content) + 1) or len(
                samples
            ) < LEAST_READ * file.frames:
                raise ValueError(
                    f"audio is truncated: its header tells of more than the {len(samples)} samples "
                    "that are there"
                )
            return samples, rate
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        if of_video is not None and any(
            content[place : place + len(sign)] == sign for place, sign in BY_VIDEO
        ):
            return of_video(content)
        raise ValueError(
            f"audio cannot be decoded: {' '.join(MEMORY.sub('it', str(error)).split())}"
        ) from error


def _read(file: soundfile.SoundFile) -> NDArray[np.float32]:
    """All samples, float32 [frames, channels], block by block: some codecs in a WAV (GSM 6.10)
    cannot tell how many they have.
    """
    blocks = []
    while len(block := file.read(READ_AT_ONCE, dtype="float32", always_2d=True)):
        blocks.append(block)
    return np.concatenate(blocks) if blocks else np.empty((0, file.channels), dtype=np.float32)


def _told_bytes(content: bytes) -> int:
    """Bytes that a container's header says it has, 0 where it does not say; one that was written
    to a pipe says the most there can be.
    """
    sizes = {
        b"RIFF": ("<I", 4, 8),
        b"RIFX": (">I", 4, 8),
        b"FORM": (">I", 4, 8),
        b"riff": ("<Q", 16, 0),
        b"RF64": ("<Q", 20, 8),
    }
    layout, place, before = sizes.get(content[:4], ("<I", len(content), 0))
    size = struct.calcsize(layout)
    told = (
        struct.unpack(layout, content[place : place + size])[0]
        if len(content) >= place + size
        else 0
    )
    if content[:4] == b".snd" and len(content) >= 12:
        before, told = struct.unpack(">II", content[4:12])
    return before + told if told < UNKNOWN else 0


def chunks(
    samples: NDArray[np.float32],
    length: int,
    count: int,
    source: random.Random | None = None,
    *,
    repeat: bool = True,
) -> NDArray[np.float32]:
    """Non-overlapping chunks: float32 [c, length] with 1 <= c <= count.

    A recording shorter than a chunk is repeated whole (unless `repeat` is False) and padded with
    zeros; the last of several chunks is padded.
    In training a recording longer than count chunks starts at a random sample, else at its
    beginning.
    """
    if len(samples) < length:
        samples = np.tile(samples, length // len(samples)) if repeat else samples
        return np.pad(samples, (0, length - len(samples)))[None]
    spare = len(samples) - count * length
    start = int(source.random() * (spare + 1)) if source is not None and spare > 0 else 0
    used = samples[start : start + count * length]
    number = -(-len(used) // length)
    return np.pad(used, (0, number * length - len(used))).reshape(number, length)


def mel_filters(bins: int, spectrum: int, rate: int) -> Tensor:
    """Triangular filters float32 [spectrum, bins], centres equally spaced on the HTK mel scale
    from 0 to rate / 2 Hz.
    """
    return htk_filters(bins, spectrum, rate, rate / 2).float()


@lru_cache(maxsize=8)
def htk_filters(bins: int, spectrum: int, rate: int, top: float) -> Tensor:
    """The same up to `top` Hz, float64."""
    last = 2595.0 * math.log10(1.0 + top / 700.0)
    edges = 700.0 * (
        10.0 ** (torch.linspace(0.0, last, bins + 2, dtype=torch.float64) / 2595.0) - 1.0
    )
    frequencies = torch.linspace(0.0, rate / 2, spectrum, dtype=torch.float64)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0)


def log_mel(waves: NDArray[np.float32], rate: int, bins: int) -> Tensor:
    """float32 [c, samples] at `rate` Hz -> normalised log-mel float32 [c, frames, bins], one
    frame per 10 ms.
    """
    window, hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
    size = 1 << (window - 1).bit_length()
    frames = waves.shape[1] // hop
    spectrum = torch.stft(
        torch.from_numpy(waves),
        size,
        hop_length=hop,
        win_length=window,
        window=_window(window),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = torch.view_as_real(spectrum[:, :, :frames]).square().sum(-1) / window
    mel = power.transpose(1, 2) @ mel_filters(bins, size // 2 + 1, rate)
    return mel.clamp_(min=FLOOR).log10_().sub_(LOG_MEAN).div_(LOG_SCALE)


@lru_cache(maxsize=8)
def slaney_filters(bins: int, spectrum: int, rate: int, top: float) -> Tensor:
    """Triangular filters of area 1 (in Hz), float64 [spectrum, bins], centres equally spaced on
    Slaney's mel scale from 0 to `top` Hz: f / (200 / 3) up to 1000 Hz, then 15 + 27 ln(f / 1000) /
    ln 6.4 (Auditory Toolbox,
    1998)."""
    last = 15.0 + 27.0 * math.log(top / 1000.0) / math.log(6.4)
    mels = torch.linspace(0.0, last, bins + 2, dtype=torch.float64)
    edges = torch.where(
        mels < 15.0,
        mels * (200.0 / 3.0),
        1000.0 * torch.exp((mels - 15.0) * (math.log(6.4) / 27.0)),
    )
    frequencies = torch.linspace(0.0, rate / 2, spectrum, dtype=torch.float64)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0) * (2.0 / (edges[2:] - edges[:-2]))


def whisper_log_mel(waves: NDArray[np.float32], bins: int, rate: int = WHISPER_RATE) -> Tensor:
    """float32 [c, samples] at 16000 Hz, the only rate, -> Whisper's log-mel float32 [c, samples
    / 160, bins].

    log10 of the power, at least 1e-10 and at least the chunk's maximum less 8, plus 4, divided by 4
    (Radford et al., arXiv 2212.04356).
    """
    spectrum = torch.stft(
        torch.from_numpy(waves),
        WHISPER_WINDOW,
        WHISPER_HOP,
        window=_window(WHISPER_WINDOW),
        return_complex=True,
    )
    power = torch.view_as_real(spectrum[:, :, :-1]).square().sum(-1)
    filters = slaney_filters(bins, WHISPER_WINDOW // 2 + 1, rate, rate / 2).float()
    logarithm = (power.transpose(1, 2) @ filters).clamp_(min=1e-10).log10_()
    return (
        torch.maximum(logarithm, logarithm.amax((1, 2), keepdim=True) - 8.0)
        .add_(4.0)
        .div_(WHISPER_SCALE)
    )


def clap_log_mel(waves: NDArray[np.float32], bins: int, rate: int = CLAP_RATE) -> Tensor:
    """float32 [c, samples] at 48000 Hz, the only rate, -> CLAP's log-mel in decibels, float32
    [c, samples / 480 + 1, bins].

    10 log10 of the power, at least 1e-10, of filters from 0 to 14000 Hz: the published front end's
    truncation "rand_trunc" (Wu et al., arXiv 2211.06687). In float64 on the way, as there: of a
    loud tone, what rounding leaves beside it is above 1e-10 in float32.
    """
    return _clap_decibels(waves, slaney_filters(bins, CLAP_WINDOW // 2 + 1, rate, CLAP_TOP))


def clap_fusion_log_mel(waves: NDArray[np.float32], bins: int, rate: int = CLAP_RATE) -> Tensor:
    """The same with the filters of the published front end's truncation "fusion", which are
    HTK's and not of equal area.
    """
    return _clap_decibels(waves, htk_filters(bins, CLAP_WINDOW // 2 + 1, rate, CLAP_TOP))


def _clap_decibels(waves: NDArray[np.float32], filters: Tensor) -> Tensor:
    window = torch.hann_window(CLAP_WINDOW, dtype=torch.float64)
    spectrum = torch.stft(
        torch.from_numpy(waves).double(), CLAP_WINDOW, CLAP_HOP, window=window, return_complex=True
    )
    power = torch.view_as_real(spectrum).square().sum(-1)
    mel = power.transpose(1, 2) @ filters
    return mel.clamp_(min=1e-10).log10_().div_(CLAP_SCALE).float()


def fused(mel: Tensor, frames: int, source: random.Random | None = None) -> Tensor:
    """A recording's spectrogram [all frames, bins] as the four that CLAP's fusion takes, [4,
    frames, bins]; one of the usual length as it is, [1, frames, bins].

    The whole one shrunk in time, bilinear, and crops from the first, second and last third of the
    places where a crop can begin: anywhere in it, drawn from `source`, or without one in its
    middle.
    """
    if len(mel) <= frames:
        return mel[None]
    thirds = [
        third if len(third) else [0]
        for third in np.array_split(np.arange(len(mel) - frames + 1), 3)
    ]
    starts = [
        int(third[len(third) // 2 if source is None else int(source.random() * len(third))])
        for third in thirds
    ]
    whole = torch.nn.functional.interpolate(
        mel[None, None].float(), size=(frames, mel.size(1)), mode="bilinear", align_corners=False
    )[0, 0]
    return torch.stack([whole.to(mel.dtype), *(mel[start : start + frames] for start in starts)])


@lru_cache(maxsize=8)
def _window(length: int) -> Tensor:
    return torch.hann_window(length, periodic=True)


@dataclass(frozen=True)
class Spectrogram:
    """One front end: what `data.spectrogram` chooses.

    make: waves float32 [c, samples], rate=, bins= -> float32 [c, frames, bins]. repeat: a short
    sound is repeated whole before it is padded with silence. middle: what masked places are set to,
    about the mean. scale: what log10 of the power was divided by. extra_frames: beyond one for each
    hop of 10 ms. whole: a recording is one spectrogram, however long, of which `fused` makes what
    the model takes; else it is cut into chunks first.
    """

    make: Callable[..., Tensor]
    repeat: bool = True
    middle: float = 0.0
    scale: float = LOG_SCALE
    extra_frames: int = 0
    whole: bool = False

    def frames(self, seconds: float, rate: int) -> int:
        """Frames of a chunk of so many seconds."""
        return round(seconds * rate) // round(HOP_SECONDS * rate) + self.extra_frames


SPECTROGRAMS = {
    "own": Spectrogram(log_mel),
    "whisper": Spectrogram(whisper_log_mel, repeat=False, scale=WHISPER_SCALE),
    "clap": Spectrogram(clap_log_mel, middle=CLAP_MIDDLE, scale=CLAP_SCALE, extra_frames=1),
    "clap_fusion": Spectrogram(
        clap_fusion_log_mel, middle=CLAP_MIDDLE, scale=CLAP_SCALE, extra_frames=1, whole=True
    ),
}


def augment(
    mel: Tensor,
    source: random.Random,
    strength: float,
    spectrogram: Spectrogram = SPECTROGRAMS["own"],
) -> Tensor:
    """A changed copy of log-mel float32 [c, frames, bins] at a strength 0..1.

    spectrogram: what made it.

    At strength 1: a turn by any time, gain +-6 dB, one band of up to a quarter of the mel bins and
    one time of up to a fifth of each chunk set to the front end's middle (SpecAugment, Park et al.
    2019).
    """
    _, frames, bins = mel.shape
    turn, gain = (
        int(source.random() * strength * frames),
        (source.random() * 2 - 1) * 0.6 * strength / spectrogram.scale,
    )
    changed = torch.roll(mel, turn, dims=1) + gain
    band, time = (
        int(source.random() * strength * bins / 4),
        int(source.random() * strength * frames / 5),
    )
    first_bin, first_frame = (
        int(source.random() * (bins - band + 1)),
        int(source.random() * (frames - time + 1)),
    )
    changed[:, :, first_bin : first_bin + band] = spectrogram.middle
    changed[:, first_frame : first_frame + time, :] = spectrogram.middle
    return changed
