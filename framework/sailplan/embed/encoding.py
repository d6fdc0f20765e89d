"""Encode the missing shards of a request: each data-parallel rank its own, and writes them.

Records are decoded ahead by the loader's workers (`data.ahead`). Rows of nearly equal lengths of a
shard are encoded together and put back in order. Sharded weights make every forward pass a
collective, so the ranks go through the shards in waves, one shard a rank, and run as many forwards
in a wave as its longest shard needs; a rank that has no rows left encodes a filler whose vectors
are dropped. Tensor-parallel peers have the same shards and so the same batches. A row's vector does
not depend on the other rows of its batch: any number of ranks gives the same rows up to float
rounding.

Memory: one shard, and the batches that are decoded ahead.

Shape legend: k rows of a shard, b of a batch, D dimensions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from sailplan.config.schema import ViewConfig
from sailplan.data.ahead import ahead
from sailplan.data.evaluation import EvaluationRows, RowTask
from sailplan.data.reader import RecordReader
from sailplan.data.record import EncoderInputs
from sailplan.embed.context import RunContext
from sailplan.embed.selection import Positions
from sailplan.embed.shards import Shards
from sailplan.embed.store import FUSED, ViewStore
from sailplan.model.parallelize import reshard
from sailplan.runtime.progress import progress
from sailplan.runtime.watch import together
from sailplan.step.upload import Uploads

FEW_BATCHES = 8  # are decoded by a thread: workers take longer to start


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; after the block the former mode is back and gathered
    parameters are sharded again,
    as a forward without a backward would leave them whole."""
    former = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(module)
        module.train(former)


@dataclass
class _Shard:
    """A shard of this rank that is being encoded."""

    number: int
    rows: EvaluationRows
    batches: list[NDArray[np.int64]]
    found: NDArray[np.int64]  # [k, 2] positions and ids
    # kind -> [k, D], from its first batch on: shards are planned ahead
    vectors: dict[str, NDArray[np.generic]] = field(default_factory=dict)


class ShardEncoder:
    """Encode shards of a view's request with the context's encoder as it is now."""

    def __init__(
        self,
        run: RunContext,
        reader: RecordReader,
        view: ViewConfig,
        positions: Positions,
        shards: Shards,
        text_from: str | None = None,
        known: ViewStore | None = None,
    ) -> None:
        """known: has rows that need not be encoded again; None: all are encoded."""
        self._run, self._reader, self._view, self._text_from = run, reader, view, text_from
        self._positions, self._shards, self._known = positions, shards, known
        tensor = run.parallel.tensor_parallel_size
        self._config = replace(run.config, parallel=replace(run.config.parallel, tensor=tensor))
        self._maker = self._rows(np.empty(0, dtype=np.int64))
        self._planned: dict[int, _Shard] = {}
        self._precision = run.config.store.precision

    def encode(self, missing: Sequence[int]) -> None:
        """Encode and write the shards of these numbers, the same on all ranks. Collective.

        Raises StopRequested on all ranks where a stop signal reached any.
        """
        if not missing:
            return
        parallel = self._run.parallel
        own = list(missing[parallel.data_parallel_rank :: parallel.data_parallel_size])
        waves = -(-len(missing) // parallel.data_parallel_size)
        turns: deque[tuple[_Shard, NDArray[np.int64], Tensor] | None] = deque()
        encoder = self._run.encoder
        name = f"{self._reader.name}, {'+'.join(self._view.modalities)}"
        parts = [self._shards.part(number) for number in own]
        rows = sum(part.stop - part.start for part in parts) * self._maker.group
        # Entries of a record's key are counted when they are read
        total = None if self._text_from is not None else rows
        shown = progress(f"encoding {name}", total, "rows")
        with evaluating(encoder), shown as advance:
            inputs = self._inputs(own, waves, turns)
            try:
                uploads = Uploads(inputs, parallel.device)
                while turns:
                    together()
                    encoded = encoder(next(uploads), per_modality=len(self._shards.kinds) > 1)
                    turn = turns.popleft()
                    if turn is not None:
                        by_kind = {FUSED: encoded.fused, **encoded.by_modality}
                        self._keep(*turn, by_kind)
                        advance(len(turn[1]))
                    del encoded
            finally:
                inputs.close()

    # ---------------------------------------------------------------- parts
    def _inputs(
        self,
        own: list[int],
        waves: int,
        turns: deque[tuple[_Shard, NDArray[np.int64], Tensor] | None],
    ) -> Generator[EncoderInputs, None, None]:
        """Yield the inputs of each forward, and note in `turns` whose they are; None: nobody's."""
        made = self._made(own)
        latest: EncoderInputs | None = None
        try:
            for wave in range(waves):
                shard = self._plan(own[wave]) if wave < len(own) else None
                batches = shard.batches if shard is not None else []
                longest = torch.tensor([len(batches)])
                dist.all_reduce(longest, op=dist.ReduceOp.MAX)  # over the CPUs' group
                if shard is not None and not batches:
                    self._write(shard)
                for turn in range(int(longest)):
                    if shard is not None and turn < len(batches):
                        latest, ids = next(made)
                        turns.append((shard, batches[turn], ids))
                    else:
                        if latest is None:  # nothing yet: the request's first record fills in
                            first = self._rows(self._positions[:1])
                            latest, _ = first.inputs(np.arange(first.group))
                        turns.append(None)
                    yield latest
        finally:
            made.close()

    def _made(self, own: list[int]) -> Generator[tuple[EncoderInputs, Tensor], None, None]:
        """Yield inputs and ids of all batches of this rank's shards, decoded ahead."""

        def tasks() -> Iterator[RowTask]:
            for number in own:
                shard = self._plan(number)
                yield from (shard.rows.task(batch) for batch in shard.batches)

        data = self._run.config.data
        few = len(own) == 1 and len(self._plan(own[0]).batches) <= FEW_BATCHES
        workers = 0 if few or not own else data.workers
        return ahead(tasks(), self._maker.make, workers=workers, prefetch=data.prefetch)

    def _rows(self, positions: NDArray[np.int64]) -> EvaluationRows:
        return EvaluationRows(self._reader, self._view, positions, self._config, self._text_from)

    def _plan(self, number: int) -> _Shard:
        """Return the rows of a shard and how they are cut into batches."""
        if number not in self._planned:
            positions = np.asarray(self._positions[self._shards.part(number)])
            if self._known is not None and len(positions):
                positions = positions[~self._known.known(positions, self._shards.kinds)]
            rows = self._rows(positions)
            batches = rows.shares(1)[0] if len(rows) else []
            found = np.stack([rows.positions, np.full(len(rows), -1, dtype=np.int64)], axis=1)
            self._planned[number] = _Shard(number, rows, batches, found)
        return self._planned[number]

    def _keep(
        self, shard: _Shard, batch: NDArray[np.int64], ids: Tensor, encoded: dict[str, Tensor]
    ) -> None:
        """Put a batch's vectors [b, D] into its shard, and write the shard after its last."""
        shard.found[batch, 1] = ids.numpy()
        for kind, array in self._arrays(shard).items():
            array[batch] = encoded[kind].float().cpu().numpy()
        if batch is shard.batches[-1]:
            self._write(shard)

    def _arrays(self, shard: _Shard) -> dict[str, NDArray[np.generic]]:
        if not shard.vectors:
            shape = (len(shard.found), self._run.config.model.embedding)
            shard.vectors = {kind: np.zeros(shape, self._precision) for kind in self._shards.kinds}
        return shard.vectors

    def _write(self, shard: _Shard) -> None:
        if self._run.parallel.tensor_parallel_rank == 0:
            self._shards.write(shard.number, shard.found, self._arrays(shard))
        self._planned.pop(shard.number)
