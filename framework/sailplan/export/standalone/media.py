"""Pictures and sound in the forms that they come in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sailplan.data.audio import at_rate, decode
from sailplan.data.image import pixels_of, rgb


def pixels(picture: Any) -> Tensor:
    """Return uint8 [3, height, width] of a path, encoded bytes, a Pillow picture, or an array
    [height, width, 3] of bytes.
    """
    if Image is None:
        raise ImportError("pictures need pillow: pip install pillow")
    if isinstance(picture, (str, Path)):
        picture = Path(picture).read_bytes()
    if isinstance(picture, bytes):
        return pixels_of(picture)
    if isinstance(picture, (np.ndarray, Tensor)):
        picture = Image.fromarray(np.asarray(picture))
    return rgb(picture)


def samples_of(sound: Any, rate: int) -> NDArray[np.float32]:
    """Return float32 [samples] at `rate` Hz of a path, encoded bytes, {"array",
    "sampling_rate"}, or an array at that rate.
    """
    if isinstance(sound, (str, Path)):
        sound = Path(sound).read_bytes()
    if isinstance(sound, bytes):
        if soundfile is None:
            raise ImportError(
                "files of sound need soundfile (pip install soundfile); or give "
                "{'array': samples, 'sampling_rate': rate}"
            )
        return decode(sound, rate)
    found = rate
    if isinstance(sound, Mapping):
        sound, found = sound["array"], int(sound["sampling_rate"])
    samples = np.asarray(sound, dtype=np.float32)
    mono = samples.mean(axis=int(np.argmin(samples.shape))) if samples.ndim == 2 else samples
    return at_rate(mono, found, rate)
