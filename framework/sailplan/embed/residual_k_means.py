"""Residual k-means over all ranks, by mini-batches of rows that lie on disk: the same code books, bit
for bit, at any number of ranks.

Level 1 clusters the vectors; every further level clusters what the levels before it left over. A
level starts from k-means++ on a sample (Arthur and Vassilvitskii, SODA 2007) and then takes
mini-batches: each centre moves towards the mean of its rows by their share in all rows that it has
had (Sculley, "Web-scale k-means clustering", WWW 2010, algorithm 1). Where a batch holds all rows
that is Lloyd's algorithm. A centre that no row has chosen moves to the sample's worst rebuilt row.

What makes it exact: a batch is a number of blocks of fixed rows, whatever the ranks; a block is
multiplied by itself, so its codes do not depend on who does it; and the sums are of integers
(vectors in units of 2^-32), which come out alike in any order. Hardware whose products differ in
the last bit may differ in a code.

A rank holds one block, the sample, and a few copies of a level's code book; it sends a code book a
step. Rows are read as often as a level's batches take them, and not listed anywhere.

Shape legend: n rows, D dimensions, k codes of a level, b rows of a block, s of the sample, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_limits
from torch import Tensor

from sailplan.runtime.process import Parallel
from sailplan.runtime.progress import progress
from sailplan.runtime.seeds import derive, generator
from sailplan.runtime.turns import apart, sum_over_ranks
from sailplan.runtime.watch import alone, beat, computing, meet, together

BLOCK = 256  # rows
SAMPLE = 1 << 14  # rows of the sample: at least so many, and four a code
BATCH = 1 << 14  # rows of a mini-batch: at least so many, and eight a code
STEPS, RENEW = 100, 10  # of a level; unused centres move after so many
GREEDY = (
    1 << 36
)  # codes times numbers of the sample up to which each first centre is the best of some
UNITS = 2.0**32  # of a sum of vectors no longer than 2: exact up to 2^30 rows a batch

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class Blocks(Protocol):
    """Unit vectors in blocks of at most BLOCK rows."""

    rows: int
    dimension: int

    def __len__(self) -> int: ...

    def read(self, block: int, /) -> Floats:
        """Return the rows float32 [b, D] of a block."""
        ...

    def take(self, numbers: Integers, /) -> Floats:
        """Return the rows float32 [s, D] of these rising numbers."""
        ...


@dataclass(frozen=True)
class CodeBooks:
    """Vectors as L codes each; the sum of the chosen rows rebuilds the vector."""

    levels: tuple[Floats, ...]  # [k, D] each

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(level) for level in self.levels)

    def encode(self, vectors: Floats, device: torch.device | None = None) -> Integers:
        """Return the codes int64 [n, L] of vectors float32 [n, D] of length one.

        They are looked up in blocks of BLOCK rows, as they were when the books were made.
        """
        found = np.empty((len(vectors), len(self.levels)), dtype=np.int64)
        books = self.on(device or torch.device("cpu"))
        for start in range(0, len(vectors), BLOCK):
            part = torch.from_numpy(vectors[start : start + BLOCK]).to(books[0].device)
            found[start : start + BLOCK] = chosen(part, books)[0].cpu().numpy()
        return found

    def decode(self, codes: Integers) -> Floats:
        """Return the vectors float32 [n, D] that codes int64 [n, L] rebuild."""
        parts = [level[codes[:, number]] for number, level in enumerate(self.levels)]
        return np.sum(parts, axis=0, dtype=np.float32)

    def on(self, device: torch.device) -> list[Tensor]:
        """Return the levels on a device."""
        return [torch.from_numpy(level).to(device) for level in self.levels]


def chosen(vectors: Tensor, books: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return codes int64 [b, L] of vectors float32 [b, D], and what all levels left over [b, D]."""
    codes = torch.empty(len(vectors), len(books), dtype=torch.int64, device=vectors.device)
    for level, book in enumerate(books):
        nearness = torch.addmm(-0.5 * book.square().sum(1), vectors, book.T)
        codes[:, level] = nearness.argmax(1)
        vectors = vectors - book[codes[:, level]]
    return codes, vectors


def fit_level(
    parallel: Parallel, blocks: Blocks, books: Sequence[Floats], size: int, *seed: int | str
) -> Floats:
    """Return the code book float32 [k, D] of the level after `books`, the same on all ranks; k is
    `size`, or what different rows are left where there are fewer. Collective.

    Raises StopRequested on all ranks.
    """
    random = generator("residual k-means", *seed, len(books))
    before = CodeBooks(tuple(books)).on(parallel.device)
    sample = _sample(parallel, blocks, max(SAMPLE, 4 * size), random)
    sample = _left_over(sample, before)
    centres = _start(parallel, sample, size, derive("k-means++", *seed, len(books)), blocks.rows)
    level = _Level(parallel, blocks, before, centres, random)
    level.run(sample)
    return level.centres.astype(np.float32)


class _Level:
    """A level that is being fitted."""

    def __init__(
        self,
        parallel: Parallel,
        blocks: Blocks,
        before: list[Tensor],
        centres: NDArray[np.float64],
        random: np.random.Generator,
    ) -> None:
        self._parallel, self._blocks, self._before = parallel, blocks, before
        self._random, self.centres = random, centres
        k = len(centres)
        self._batch = min(len(blocks), -(-max(BATCH, 8 * k) // BLOCK))
        self._seen = np.zeros(k, dtype=np.int64)  # rows that each centre has had
        self._recent = np.zeros(k, dtype=np.int64)  # since unused ones moved

    def run(self, sample: Floats) -> None:
        """Move the centres, batch after batch. Collective."""
        with progress("moving centres", STEPS, "steps") as advance:
            self._run(sample, advance)

    def _run(self, sample: Floats, advance: Callable[[int], None]) -> None:
        everything = self._batch == len(self._blocks)
        for step in range(1, STEPS + 1):
            together()
            advance(1)
            sums, counts = self._sums()
            self._recent += counts
            self._seen = counts if everything else self._seen + counts
            some = counts > 0
            share = counts[some] / self._seen[some]
            means = sums[some] / (UNITS * counts[some])[:, None]
            former = self.centres.copy()
            self.centres[some] += share[:, None] * (means - self.centres[some])
            unused = np.flatnonzero(self._recent == 0)
            if step % RENEW == 0 and step <= STEPS - RENEW:
                if len(unused):
                    self._renew(unused, sample)
                self._recent[:] = 0
            elif everything and not len(unused) and np.array_equal(former, self.centres):
                return

    def _sums(self) -> tuple[NDArray[np.int64], Integers]:
        """Return the sums int64 [k, D] of a batch's rows by their centre, in UNITS, and how many
        rows [k] each has.
        """
        drawn = self._random.choice(len(self._blocks), self._batch, replace=False, shuffle=False)
        book = torch.from_numpy(self.centres.astype(np.float32)).to(self._parallel.device)
        k, dimension = book.shape
        total = torch.zeros(k, dimension + 1, dtype=torch.int64, device=book.device)

        def add() -> None:
            rank, ranks = self._parallel.rank, self._parallel.world_size
            for block in drawn[rank::ranks].tolist():
                alone()
                rows = torch.from_numpy(self._blocks.read(block)).to(book.device)
                left = chosen(rows, self._before)[1]
                code = chosen(left, [book])[0][:, 0]
                units = (left.double() * UNITS).round_().to(torch.int64)
                total[:, :dimension].index_add_(0, code, units)
                total[:, dimension].index_add_(0, code, torch.ones_like(code))

        apart(self._parallel, "semantic IDs", add)
        found = sum_over_ranks(total.cpu().numpy())
        return found[:, :dimension], found[:, dimension]

    def _renew(self, unused: Integers, sample: Floats) -> None:
        """Move centres that no row has chosen to rows of the sample that are rebuilt worst."""
        book = torch.from_numpy(self.centres.astype(np.float32)).to(self._parallel.device)
        errors = np.square(_left_over(sample, [book])).sum(1)
        worst = np.argsort(-errors, kind="stable")[: len(unused)]
        moved = np.zeros_like(self.centres)
        if self._parallel.is_main:  # the choice of one rank: the others may round otherwise
            moved[unused[: len(worst)]] = sample[worst]
        meet("semantic IDs")
        moved = sum_over_ranks(moved)
        self.centres[unused] = moved[unused]
        self._seen[unused] = 0


def _sample(parallel: Parallel, blocks: Blocks, size: int, random: np.random.Generator) -> Floats:
    """Return rows float32 [s, D] drawn from all, the same on all ranks, which each read a part."""
    count = min(size, blocks.rows)
    numbers = np.sort(random.choice(blocks.rows, count, replace=False, shuffle=False))
    found = np.zeros((count, blocks.dimension), dtype=np.float32)
    each = -(-count // parallel.world_size)
    mine = slice(parallel.rank * each, (parallel.rank + 1) * each)

    def read() -> None:
        found[mine] = blocks.take(numbers[mine])

    apart(parallel, "semantic IDs: the sample", read)
    return sum_over_ranks(found)


def _left_over(rows: Floats, books: Sequence[Tensor]) -> Floats:
    """Return what code books leave of rows float32 [s, D]."""
    if not books:
        return rows
    found = np.empty_like(rows)
    for start in range(0, len(rows), BLOCK):
        beat()
        part = torch.from_numpy(rows[start : start + BLOCK]).to(books[0].device)
        found[start : start + BLOCK] = chosen(part, books)[1].cpu().numpy()
    return found


def _start(
    parallel: Parallel, sample: Floats, size: int, seed: int, rows: int
) -> NDArray[np.float64]:
    """Return the first centres float64 [k, D], rank 0's on all ranks. Collective."""
    k = min(size, len(sample))
    if rows == len(sample):
        k = min(k, len(np.unique(sample.round(6), axis=0)))
    centres = np.zeros((k, sample.shape[1]))
    with computing("semantic IDs: first centres"), threadpool_limits(limits=1):
        if parallel.is_main:
            trials = None if k * sample.size <= GREEDY else 1  # None: the best of 2 + ln k
            state = seed % 2**32
            centres[:] = kmeans_plusplus(sample, k, random_state=state, n_local_trials=trials)[0]
    meet("semantic IDs: first centres")
    return sum_over_ranks(centres)
