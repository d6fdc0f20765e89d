"""Which rows of which published tensors make up a parameter of ours; read forwards it loads,
backwards it exports.

A parameter is a stack of *pieces* along its first dimension, each a run of rows of one published
tensor. That covers all that differs between the two worlds: megatron-core's grouped query/key/value
matrix (for each group its queries, its key, its value) and its gated first matrix (gate over up). A
piece without a name is zeros that the files lack.
Persistent buffers are treated like parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from sailplan.config.schema import TransformerShape
from sailplan.model.blocks import head_size


@dataclass(frozen=True)
class Piece:
    """Rows start..start+rows of a published tensor; the whole tensor where `rows` is None.

    A name stands behind the files' prefix, or, where it begins with "/", alone.
    """

    name: str | None
    start: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Entry:
    """A parameter of the omni encoder and the pieces it is made of, in order.

    drawn: the parameter is drawn from the seed, and taken from the files where they have it.
    """

    ours: str
    pieces: tuple[Piece, ...]
    drawn: bool = False


@dataclass(frozen=True)
class WeightMap:
    """All parameters that a part takes from its files.

    anchor: a tensor that every such file has; what stands before it is the prefix of the other
    names.
    left_out: regular expressions of published tensors, prefix included, that the encoder has no use
    for.
    constants: (our buffer, their tensor) that is computed here, and must be the same in the files.
    """

    entries: tuple[Entry, ...]
    anchor: str
    left_out: tuple[str, ...] = ()
    constants: tuple[tuple[str, str], ...] = ()


def same(ours: str, theirs: str, *, drawn: bool = False) -> Entry:
    return Entry(ours, (Piece(theirs),), drawn)


def grouped(ours: str, shape: TransformerShape, query: Piece, key: Piece, value: Piece) -> Entry:
    """megatron-core's query/key/value matrix from three stacks of heads; `start` of a piece is
    where its stack begins.
    """
    groups, size = shape.key_value_heads or shape.heads, head_size(shape)
    queries = shape.heads // groups * size
    pieces: list[Piece] = []
    for group in range(groups):
        for stack, rows in ((query, queries), (key, size), (value, size)):
            pieces.append(Piece(stack.name, stack.start + group * rows, rows))
    return Entry(ours, tuple(pieces))
