"""Pictures, sound and films that rows name or hold: found, read, and opened once, so that a
broken file is a dropped row today
and not a bad sample in training."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sailplan.data.kinds import kind_of
from sailplan.data.names import given, is_sidecar
from sailplan.ingest.rows import Dropped

Check = Literal["decode", "open"]
KIND = {"image": "picture", "audio": "sound", "video": "video"}
# First bytes of what is in a table without a name; an ending only says which decoder is asked.
MAGIC = (
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"GIF8", "gif"),
    (b"II*", "tiff"),
    (b"MM\0*", "tiff"),
    (b"BM", "bmp"),
)
DEFAULT_ENDING = {"image": "jpg", "audio": "wav", "video": "mp4"}


@dataclass(frozen=True)
class Media:
    """Where files that rows name are looked for, and how thoroughly they are tried: `decode`
    whole, or `open` only.
    """

    root: Path
    check: Check = "decode"

    def read(self, role: str, value: object) -> tuple[str, bytes] | None:
        """Return ending and content of a row's medium; None where the row has none.

        value: a path below the root, bytes, or Hugging Face's {bytes, path}. Raises Dropped for
        what cannot be read or opened.
        """
        name, content = self._content(role, value)
        if content is None:
            return None
        extension = name.rpartition(".")[2].lower()
        if kind_of(extension) != KIND[role]:
            extension = next(
                (found for start, found in MAGIC if role == "image" and content.startswith(start)),
                DEFAULT_ENDING[role],
            )
        self._try(role, name or "bytes", content)
        return extension, content

    def _content(self, role: str, value: object) -> tuple[str, bytes | None]:
        if isinstance(value, Mapping):
            name = str(value.get("path") or "")
            if value.get("bytes") is not None:
                return name, bytes(value["bytes"])
            value = name
        if isinstance(value, bytes):
            return "", value
        if isinstance(value, list):
            if len(value) > 1:
                raise Dropped(f"{role}: found {len(value)} files in one cell, expected one")
            value = value[0] if value else None
        name = given(value) or ""
        if not name:
            return "", None
        if re.match(r"[a-z0-9+]+://", name, re.IGNORECASE):
            raise Dropped(
                f"{role} is a URL: {name[:200]}; fetch the files first, as img2dataset does"
            )
        path = self.root / str(value)
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Dropped(f"{role}: {name[:200]} cannot be read ({reason})") from error
        return name, content

    def _try(self, role: str, name: str, content: bytes) -> None:
        if not content:
            raise Dropped(f"{role}: {name[:200]} is empty")
        try:
            if role == "image":
                _try_picture(content, whole=self.check == "decode")
            elif role == "audio":
                _try_sound(content, whole=self.check == "decode")
        except Exception as error:  # decoders raise of every kind
            raise Dropped(
                " ".join(f"{role}: {name[:200]} cannot be opened ({error})".split())[:400]
            ) from error


def _try_picture(content: bytes, whole: bool) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        if whole:
            picture.draft("RGB", (64, 64))  # JPEG: all bytes are read, an eighth of the pixels made
            picture.load()


def _try_sound(content: bytes, whole: bool) -> None:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as sound:
            if whole:
                for _ in sound.blocks(1 << 16, dtype="float32"):
                    pass
    except soundfile.LibsndfileError:
        import av  # what libsndfile does not know: M4A, AAC, WMA

        with av.open(io.BytesIO(content)) as container:
            if not container.streams.audio:
                raise ValueError("no sound in it") from None


def find_root(names: Iterable[str], folder: Path) -> Path:
    """Return the folder that a table's file names are relative to: its own, or one below it; its
    own where none of them is there.
    """
    known = [name for name in names if name]
    below = sorted(
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.is_dir() and not is_sidecar(f"{entry.name}/x")
    )
    for root in (folder, *below):
        if any((root / name).is_file() for name in known):
            return root
    return folder
