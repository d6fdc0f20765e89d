"""Named arrays in one run of bytes, read where they lie: the form of every derived file of a
data set.

    magic, sizes, CRC-32 | head: JSON | one CRC-32 a page of the body | body: the arrays, each
    aligned

A mapped file is read a few bytes at a time, so one checksum of the whole would cost more than the
reading. Each page of 4 KiB has its own, compared when the page is first read. Whatever is cut,
flipped or of another version is `Damaged`, never another exception: the callers make the file anew,
or name it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonValue, JsonView
from sailplan.runtime.arrays import Array

MAGIC = b"sailcol1"  # the last byte is the version of the form
PAGE = 4096
ALIGNMENT = 8
PREFIX = struct.Struct(
    "<8sIQI4x"
)  # magic, bytes of the head, bytes of the body, CRC-32 of these sizes, the head and the page sums

Buffer = bytes | mmap.mmap


class Damaged(Exception):
    """Bytes that are no whole set of columns; the text says what was found."""


def pack(arrays: Mapping[str, Array], note: object) -> bytes:
    """Return arrays, by name, and a note of JSON values as bytes."""
    extents, size = layout({name: (array.dtype, array.shape) for name, array in arrays.items()})
    body = bytearray(size)
    for name, (_, _, offset) in extents.items():
        content = np.ascontiguousarray(arrays[name]).tobytes()
        body[offset : offset + len(content)] = content
    sums = np.array(
        [crc32(body[start : start + PAGE]) for start in range(0, size, PAGE)], dtype="<u4"
    )
    return front(extents, note, sums, size) + body


def layout(
    arrays: Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]],
) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Return where arrays of these dtypes and shapes lie in a body, and the body's size in
    bytes.
    """
    extents, offset = {}, 0
    for name, (dtype, shape) in arrays.items():
        extents[name] = (dtype.str, shape, offset)
        offset += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return extents, offset


def front(extents: JsonView, note: object, sums: Array, size: int) -> bytes:
    """Return what lies before a body of `size` bytes; its length does not depend on the values
    of the sums.
    """
    head = json.dumps({"arrays": extents, "note": note}).encode()
    head += b" " * (-(PREFIX.size + len(head)) % ALIGNMENT)
    rest = head + sums.tobytes().ljust(-(-sums.nbytes // ALIGNMENT) * ALIGNMENT, b"\0")
    return PREFIX.pack(MAGIC, len(head), size, _front_sum(len(head), size, rest)) + rest


def _front_sum(head_bytes: int, body_bytes: int, rest: bytes) -> int:
    return crc32(rest, crc32(struct.pack("<IQ", head_bytes, body_bytes)))


class Columns:
    """The arrays of a run of bytes: `note`, `part(name, low, high)`, `take(name, rows)`,
    `whole(name)`.
    """

    def __init__(self, buffer: Buffer, start: int = 0, size: int | None = None) -> None:
        """Read the head of what begins at byte `start`.

        Raises Damaged unless it is whole and, where given, `size` bytes long.
        """
        try:
            magic, head_bytes, body_bytes, checksum = PREFIX.unpack_from(buffer, start)
        except struct.error as error:
            raise Damaged(f"{len(buffer) - start} bytes") from error
        if magic != MAGIC:
            raise Damaged("another form or version")
        sums_at, pages = start + PREFIX.size + head_bytes, -(-body_bytes // PAGE)
        body = sums_at + -(-4 * pages // ALIGNMENT) * ALIGNMENT
        end = body + body_bytes
        if end > len(buffer) or (size is not None and end - start != size):
            raise Damaged(f"{len(buffer) - start} bytes, expected {end - start}")
        if _front_sum(head_bytes, body_bytes, buffer[start + PREFIX.size : body]) != checksum:
            raise Damaged("a head whose checksum differs")
        try:
            head = json.loads(bytes(buffer[start + PREFIX.size : start + PREFIX.size + head_bytes]))
            self.note: JsonValue = head["note"]
            self._arrays: dict[str, Array] = {}
            self._offsets: dict[str, int] = {}
            self._views: dict[str, tuple[memoryview[int], int]] = {}
            for name, (kind, shape, offset) in head["arrays"].items():
                count, dtype = math.prod(shape), np.dtype(kind)
                array = np.frombuffer(buffer, dtype, count, body + offset)
                self._arrays[name] = array if len(shape) == 1 else array.reshape(shape)
                self._offsets[name] = offset
                self._views[name] = self._arrays[name].data, offset
                if offset < 0 or offset + self._arrays[name].nbytes > body_bytes:
                    raise ValueError(name)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged("a head that cannot be read") from error
        self._buffer, self._body, self._end = buffer, body, end
        self._sums = np.frombuffer(buffer, "<u4", pages, sums_at)
        self._checked = bytearray(len(self._sums))
        self._checks = np.frombuffer(self._checked, dtype=np.uint8)

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._arrays)

    def length(self, name: str) -> int:
        """Return the rows of an array."""
        return len(self._arrays[name])

    def part(self, name: str, low: int, high: int) -> Array:
        """Return rows low .. high - 1 of an array, as a view.

        Raises Damaged where a page of theirs differs from its checksum.
        """
        self.ensure(name, low, high)
        return self._arrays[name][low:high]

    def numbers(self, name: str, low: int, high: int) -> list[int]:
        """Return rows low .. high - 1 of an array of whole numbers, one dimension: of a few, ten
        times cheaper than `part`. Raises Damaged as `part`.
        """
        return self._rows(name, low, high).tolist()

    def content(self, name: str, low: int, high: int) -> bytes:
        """Return rows low .. high - 1 of an array of bytes. Raises Damaged as `part`."""
        return bytes(self._rows(name, low, high))

    def _rows(self, name: str, low: int, high: int) -> memoryview[int]:
        view, offset = self._views[name]
        if high > low:
            width = view.itemsize
            first, last = (offset + low * width) // PAGE, (offset + high * width - 1) // PAGE
            if last > first + 1 or not (self._checked[first] and self._checked[last]):
                self._check(first, last + 1)
        return view[low:high]

    def ensure(self, name: str, low: int, high: int) -> None:
        """Raise Damaged where a page of rows low ..

        high - 1 of an array differs from its checksum.
        """
        if high > low:
            offset, width = self._offsets[name], self._arrays[name].strides[0]
            self._check((offset + low * width) // PAGE, (offset + high * width - 1) // PAGE + 1)

    def take(self, name: str, rows: NDArray[np.int64]) -> Array:
        """Return some rows of an array, int64 [n] -> [n, ...]; reads their pages, no others.

        Raises Damaged as `part`.
        """
        array, width = self._arrays[name], self._arrays[name].strides[0]
        if len(rows):
            first = (self._offsets[name] + rows * width) // PAGE
            last = (self._offsets[name] + (rows + 1) * width - 1) // PAGE
            for pages in (first, last):  # a row is never longer than a page
                for page in np.unique(pages[self._checks[pages] == 0]).tolist():
                    self._check(page, page + 1)
        return array[rows]

    def whole(self, name: str) -> Array:
        """Return an array, as a view. Raises Damaged as `part`."""
        return self.part(name, 0, len(self._arrays[name]))

    def unchecked(self, name: str) -> Array:
        """Return an array of which the caller has the pages checked that it relies on."""
        return self._arrays[name]

    def check(self) -> None:
        """Raise Damaged unless every page equals its checksum."""
        self._check(0, len(self._checked))

    def _check(self, first: int, last: int) -> None:
        for page in range(first, last):
            if not self._checked[page]:
                low = self._body + page * PAGE
                if crc32(self._buffer[low : min(low + PAGE, self._end)]) != self._sums[page]:
                    raise Damaged(f"a page at byte {low} whose checksum differs")
                self._checked[page] = 1


def mapped(file: Path, size: int | None = None) -> mmap.mmap:
    """Return the first `size` bytes of a file (None: all), mapped.

    Raises OSError, Damaged for a file that is shorter or empty.
    """
    with open(file, "rb") as source:
        found = os.fstat(source.fileno()).st_size
        wanted = found if size is None else size
        if found < wanted or not wanted:
            raise Damaged(f"{found} bytes, expected {wanted or 'some'}")
        return mmap.mmap(source.fileno(), wanted, access=mmap.ACCESS_READ)


def packed_strings(strings: list[str]) -> NDArray[np.uint8]:
    """Return strings as one byte array: numpy's own fixed width would cost four bytes a
    character of the longest.
    """
    return np.frombuffer(
        "\0".join(strings).encode("utf-8", "surrogateescape") if strings else b"", dtype=np.uint8
    )


def unpacked_strings(packed: NDArray[np.uint8], count: int) -> list[str]:
    """Return the strings of `packed_strings`. Raises Damaged unless there are `count` of them."""
    found = packed.tobytes().decode("utf-8", "surrogateescape").split("\0") if count else []
    if len(found) != count:
        raise Damaged(f"{len(found)} names, expected {count}")
    return found
