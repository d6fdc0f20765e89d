"""Embed a view of a data set with all ranks: each data-parallel rank encodes a share, then all
rows are gathered.

Rows of nearly equal lengths are encoded together and put back in order behind the gathering.
Sharded weights make every forward pass a collective, so the ranks must run the same number of them:
as many as the longest share needs; a rank that has no rows left encodes a filler whose vectors are
dropped. Tensor-parallel peers have the same share and so the same batches. A row's vector does not
depend on the other rows of its batch: any number of ranks gives the same rows up to float rounding.

Shape legend: n rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sailplan.config.schema import Config, ViewConfig
from sailplan.data.config import MODALITIES
from sailplan.data.evaluation import EvaluationRows
from sailplan.data.reader import RecordReader
from sailplan.data.record import EncoderInputs
from sailplan.embed.exchange import exchange_of
from sailplan.model.parallelize import reshard
from sailplan.runtime.process import Parallel
from sailplan.runtime.transfer import to_device
from sailplan.runtime.watch import together
from sailplan.step.upload import Uploads


@dataclass(frozen=True)
class EmbeddedRows:
    """Vectors of n rows of a view, on the CPU, the same on all ranks, in the order of the
    positions asked for.
    """

    fused: Tensor  # float32 [n, D], not normalised
    # int64 [n]; equal ids = the same document (text-only views: the same text); -1: not valid
    ids: Tensor
    positions: NDArray[
        np.int64
    ]  # [n] record positions; repeated where a record gives several rows (text_from, history)
    valid: NDArray[np.bool_]  # [n]; False where the record has nothing of the view's modalities
    by_modality: dict[str, Tensor] = field(
        default_factory=dict
    )  # modality -> float32 [n, D], when asked for

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: NDArray[np.int64]) -> EmbeddedRows:
        """The rows of these indices int64 [k], in their order."""
        index = torch.from_numpy(rows)
        parts = {name: part[index] for name, part in self.by_modality.items()}
        return EmbeddedRows(
            self.fused[index], self.ids[index], self.positions[rows], self.valid[rows], parts
        )

    def where(self, keep: NDArray[np.bool_]) -> EmbeddedRows:
        """The rows of a bool mask [n]."""
        return self.take(np.flatnonzero(keep))

    def joined(self, other: EmbeddedRows) -> EmbeddedRows:
        """These rows, then the other's."""
        return EmbeddedRows(
            torch.cat([self.fused, other.fused]),
            torch.cat([self.ids, other.ids]),
            np.concatenate([self.positions, other.positions]),
            np.concatenate([self.valid, other.valid]),
            {
                name: torch.cat([part, other.by_modality[name]])
                for name, part in self.by_modality.items()
                if name in other.by_modality
            },
        )


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


def embed_view(
    encoder: nn.Module,
    reader: RecordReader,
    view: str | ViewConfig,
    positions: NDArray[np.int64],
    *,
    parallel: Parallel,
    config: Config,
    per_modality: bool = False,
    text_from: str | None = None,
) -> EmbeddedRows:
    """Encodes the view of the records at `positions` int64 [k], at most `evaluation.batch` rows
    at a time; a collective call.

    view: a name among the data set's views, or a view of one's own (catalogue items shown as
    another set's target).
    text_from: take the text from this key of the record, one row per entry, so n may differ from k.
    Every rank ends up with all n rows: n * D * 4 bytes.
    """
    view = reader.config.views[view] if isinstance(view, str) else view
    exchange = exchange_of(parallel)
    here = replace(config, parallel=replace(config.parallel, tensor=parallel.tensor_parallel_size))
    rows = EvaluationRows(reader, view, positions, here, text_from)
    shares = rows.shares(exchange.world_size)
    own, forwards = shares[exchange.rank], max(len(batches) for batches in shares)
    modalities = [
        modality for modality in MODALITIES if per_modality and modality in view.modalities
    ]
    vectors: list[Tensor] = []  # [b, 1 + modalities, D]
    ids: list[Tensor] = []

    def inputs() -> Iterator[EncoderInputs]:
        latest: EncoderInputs | None = None
        for turn in range(forwards):
            if turn < len(own):
                latest, found = rows.inputs(own[turn])
                ids.append(to_device(found, parallel.device))
            elif latest is None:  # an empty share: the first row of all serves as the filler
                latest, _ = rows.inputs(np.arange(rows.group))
            yield latest

    with evaluating(encoder):
        uploads = Uploads(inputs(), parallel.device)
        for turn in range(forwards):
            together()
            encoded = encoder(next(uploads), per_modality=per_modality)
            if turn < len(own):
                vectors.append(
                    torch.stack(
                        [encoded.fused, *(encoded.by_modality[name] for name in modalities)], 1
                    ).float()
                )
    shape = (0, 1 + len(modalities), config.model.embedding)
    sizes = [sum(map(len, batches)) for batches in shares]
    everything = exchange.gather(
        torch.cat(vectors) if vectors else torch.empty(shape, device=parallel.device), sizes
    ).cpu()
    all_ids = exchange.gather(
        torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64, device=parallel.device), sizes
    ).cpu()
    back = torch.empty(len(rows), dtype=torch.int64)  # where each row lies among those gathered
    back[
        torch.from_numpy(
            np.concatenate(
                [np.empty(0, dtype=np.int64), *(batch for batches in shares for batch in batches)]
            )
        )
    ] = torch.arange(len(rows))
    everything, all_ids = everything[back], all_ids[back]
    parts = dict(zip(["fused", *modalities], everything.unbind(1), strict=True))
    return EmbeddedRows(parts.pop("fused"), all_ids, rows.positions, all_ids.numpy() >= 0, parts)
