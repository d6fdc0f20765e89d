"""Films: PyAV decodes some frames of an encoded film, spread evenly over it; jittered in training.

A film of n frames is cut into as many equal parts as a row shows frames. Evaluation takes the
middle frame of each part, training one that the row's seed draws. Frames are counted from the
beginning by decoding, which is exact in every container; a seek is not.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.errors import ConfigurationError

if TYPE_CHECKING:
    from av import VideoFrame


MOST_PIXELS = 1 << 26  # of a frame; a broken header may tell any size
Frame = TypeVar("Frame")


def spread(total: int, count: int, source: random.Random | None) -> list[int]:
    """Return `count` of the numbers 0 ..

    total - 1, rising: the middles of equal parts, or with a source a random place in each.

    All numbers where there are no more than `count`.
    """
    if total <= count:
        return list(range(total))
    return [
        min(total - 1, int((part + (0.5 if source is None else source.random())) * total / count))
        for part in range(count)
    ]


def chosen(frames: Sequence[Frame], count: int, source: random.Random | None) -> list[Frame]:
    """Return `count` of a film's frames, which lie in a record as pictures, as `spread` takes
    them.
    """
    return [frames[number] for number in spread(len(frames), count, source)]


def frames(content: bytes, count: int, source: random.Random | None) -> list[Tensor]:
    """Return at most `count` frames of an encoded film, each uint8 [3, height, width], upright.

    Raises ValueError with a reason for bytes that are no film, and for one that is truncated.
    """
    av = _library()
    try:
        wanted = spread(_count(av, content), count, source)
        found = {}
        for number, frame in enumerate(_decoded(av, content)):
            if number in wanted:
                found[number] = _pixels(frame)
            if number == wanted[-1]:
                break
    except (av.error.FFmpegError, ValueError, OverflowError, IndexError) as error:
        raise ValueError(f"film cannot be decoded: {' '.join(str(error).split())}") from error
    return [found[number] for number in wanted]


def sound(content: bytes) -> tuple[NDArray[np.float32], int]:
    """Return the sound of containers that libsndfile does not read (M4A, AAC, WMA, AMR): float32
    [samples, channels], and its rate in Hz.

    Raises ValueError with a reason where there is none.
    """
    av = _library()
    try:
        with av.open(io.BytesIO(content)) as container:
            if not container.streams.audio:
                raise ValueError("no sound in it")
            rate = container.streams.audio[0].rate
            resampler = av.AudioResampler(format="fltp", rate=rate)
            blocks = [
                out.to_ndarray().T
                for frame in container.decode(audio=0)
                for out in resampler.resample(frame)
            ]
            blocks += [out.to_ndarray().T for out in resampler.resample(None)]
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        raise ValueError(f"audio cannot be decoded: {' '.join(str(error).split())}") from error
    return (np.concatenate(blocks) if blocks else np.empty((0, 1), dtype=np.float32)), int(rate)


def _library() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigurationError(
            "a data set has films or sounds that only PyAV reads, and it is not installed: pip "
            "install av"
        ) from error
    av.logging.set_level(av.logging.PANIC)  # what is wrong is said by exceptions
    return av


def _count(av: ModuleType, content: bytes) -> int:
    """The film's number of frames: as its packets say, which need no decoding."""
    with av.open(io.BytesIO(content)) as container:
        if not container.streams.video:
            raise ValueError("no pictures in it")
        stream = container.streams.video[0]
        if stream.codec_context.width * stream.codec_context.height > MOST_PIXELS:
            raise ValueError(
                f"frames of {stream.codec_context.width} x {stream.codec_context.height} pixels"
            )
        told = stream.frames or round(
            float((container.duration or 0) / 1e6 * (stream.average_rate or 0))
        )
        found = sum(packet.size > 0 for packet in container.demux(stream))
        if not found or found < 0.9 * told - 1:
            raise ValueError(f"truncated: {found} of {told} frames are there")
        return found


def _decoded(av: ModuleType, content: bytes) -> Iterator[VideoFrame]:
    with av.open(io.BytesIO(content)) as container:
        yield from container.decode(video=0)


def _pixels(frame: VideoFrame) -> Tensor:
    array = np.rot90(frame.to_ndarray(format="rgb24"), (frame.rotation or 0) // 90)
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)
