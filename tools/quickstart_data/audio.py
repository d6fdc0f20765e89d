"""Encode speech as mono Ogg/Opus with the same bytes every time.

libsndfile gives each Ogg stream a random serial number and pads the comment header with about 800
bytes, a tenth of a short prompt. Both are rewritten here, page by page, with fresh checksums (RFC
3533); the audio packets stay untouched.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile

from sailplan.data.writer import BuildError

COMPRESSION = 0.97  # libsndfile's scale, about 13 kbit/s for 8 kHz mono
SERIAL = 1
HEADER = struct.Struct(
    "<4sBBqIIIB"
)  # magic, version, flags, granule, serial, sequence, checksum, segments


def _table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = ((value << 1) ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
        table.append(value)
    return table


_TABLE = _table()


def _checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ _TABLE[(value >> 24) ^ byte]
    return value


def steady(stream: bytes) -> bytes:
    """The same Ogg/Opus stream with a fixed serial number and an unpadded comment header."""
    out, at = bytearray(), 0
    while at < len(stream):
        magic, version, flags, granule, _, sequence, _, segments = HEADER.unpack_from(stream, at)
        assert magic == b"OggS", "not at an Ogg page"
        lacing = stream[at + HEADER.size : at + HEADER.size + segments]
        body = stream[at + HEADER.size + segments : at + HEADER.size + segments + sum(lacing)]
        at += HEADER.size + segments + sum(lacing)
        if body.startswith(b"OpusTags"):
            vendor = struct.unpack_from("<I", body, 8)[0]
            body = body[: 12 + vendor] + struct.pack("<I", 0)  # no comments, no padding
            lacing = bytes([len(body)])
        page = (
            HEADER.pack(magic, version, flags, granule, SERIAL, sequence, 0, len(lacing))
            + lacing
            + body
        )
        out += page[:22] + struct.pack("<I", _checksum(page)) + page[26:]
    return bytes(out)


def opus(samples: np.ndarray, rate: int) -> bytes:
    """Encode mono samples (int16, shape [n]) at their own rate, which must be one that Opus
    knows (8 or 16 kHz here).
    """
    out = io.BytesIO()
    try:
        soundfile.write(
            out, samples, rate, format="OGG", subtype="OPUS", compression_level=COMPRESSION
        )
    except (TypeError, ValueError, soundfile.LibsndfileError) as error:
        raise BuildError(
            f"this soundfile cannot write Ogg/Opus ({error}); 0.13 or newer with libsndfile 1.2 can"
        ) from None
    return steady(out.getvalue())
