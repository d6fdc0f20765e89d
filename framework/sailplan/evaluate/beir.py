"""Retrieval on a folder in BEIR's form, by all ranks: each encodes its part of the corpus and
drops it again.

Query vectors are on every rank; of the corpus a rank holds `shard_rows` vectors at a time, and of
each query the best `depth` documents of its own part. At the end these meet where the query is
scored. Per rank, for Q judged queries:
Q x D x 4 bytes of vectors and Q x depth x 12 bytes of results; nothing grows with the corpus. Ranks
meet after every shard in one small message, so a bad line on one of them ends all, and none waits
longer than a shard takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sailplan.embed.exchange import exchange_of
from sailplan.errors import BadDataError, ConfigurationError, SailplanError
from sailplan.evaluate import beir_files as files
from sailplan.evaluate.rankings import measures, ordered
from sailplan.runtime.process import Parallel
from sailplan.runtime.progress import progress
from sailplan.runtime.watch import beat
from sailplan_kernels.topk import topk

Encode = Callable[[Sequence[object]], NDArray[np.float32]]  # items -> [n, D]
DEPTH, SHARD_ROWS = 1000, 8192


@dataclass
class Results:
    """The means over all judged queries, the same on all ranks, and this rank's own queries one
    by one.
    """

    metrics: dict[str, float]
    rankings: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # query id -> document id -> score float32
    judgments: dict[str, dict[str, int]] = field(default_factory=dict)


def evaluate_beir(
    queries: Encode,
    documents: Encode,
    folder: Path,
    *,
    parallel: Parallel,
    split: str = "test",
    at: Sequence[int] = (1, 10, 100),
    depth: int = DEPTH,
    shard_rows: int = SHARD_ROWS,
    same_ids: bool = False,
) -> Results:
    """Return nDCG, recall, MRR and MAP of cosine search, as trec_eval defines them. Collective.

    queries, documents: encode items to float32 [n, D]. depth: documents a query that count for mrr
    and map. same_ids: keep a document with the query's own id, which BEIR leaves out. metrics also
    counts queries, documents and judgments.

    Raises ConfigurationError for missing files and a depth below the largest k, BadDataError for
    lines that cannot be read.
    """
    judged = files.check_folder(folder, split)
    if not at or min(at) < 1 or max(at) > depth:
        raise ConfigurationError(
            f"--at {','.join(map(str, at))}: expected numbers from 1 to --depth, which is {depth}"
        )
    exchange = exchange_of(parallel)
    with _Together(parallel) as together:
        own = list(
            files.records(
                folder / files.QUERIES, parallel.data_parallel_rank, parallel.data_parallel_size
            )
        )
        grades, lines = files.judgments(judged, {record["_id"] for _, record in own})
        asked = [record for _, record in own if record["_id"] in grades]
        found = _in_shards(queries, [files.item(record, folder) for record in asked], shard_rows)
        together.say()
    width = int(exchange.max(torch.tensor([found.shape[1]], device=parallel.device)))
    if not width:
        raise BadDataError(
            f"{judged}: found no judgment of a query in {files.QUERIES}; expected the same query "
            "ids in both"
        )
    sizes: list[int] = exchange.gather(
        torch.tensor([len(asked)], device=parallel.device), [1] * exchange.world_size
    ).tolist()
    vectors = exchange.gather(
        torch.as_tensor(found.reshape(len(asked), width), device=parallel.device), sizes
    )
    scores, places, count = _search(
        documents, folder, vectors, depth + (not same_ids), parallel, shard_rows
    )
    scores, places = (_to_owners(each, sizes, parallel) for each in (scores, places))
    scores, places = _best(scores, places, depth + (not same_ids))
    names = files.ids_at(folder / files.CORPUS, places[places >= 0].tolist())
    results = Results({}, judgments=grades)
    for row, record in enumerate(asked):
        found_here = zip(places[row].tolist(), scores[row].tolist(), strict=True)
        listed = [
            (names[place], score)
            for place, score in found_here
            if place >= 0 and (same_ids or names[place] != record["_id"])
        ]
        results.rankings[record["_id"]] = dict(
            reversed(listed[:depth])
        )  # an id that is there twice: its best score
    single = [
        measures(ordered(results.rankings[name]), grades[name], at) for name in results.rankings
    ]
    keys = list(measures([], {}, at))
    sums = [sum(one[key] for one in single) for key in keys] + [
        len(single),
        count,
        sum(map(len, grades.values())),
    ]
    *totals, asked_all, documents_all, used = exchange.sum(
        torch.tensor(sums, dtype=torch.float64, device=parallel.device)
    ).tolist()
    results.metrics = {key: total / asked_all for key, total in zip(keys, totals, strict=True)}
    results.metrics |= {
        "queries": asked_all,
        "documents": documents_all,
        "judgments": used,
        "judgments_of_unknown_queries": lines - used,
    }
    return results


def _search(
    encode: Encode, folder: Path, queries: Tensor, depth: int, parallel: Parallel, shard_rows: int
) -> tuple[Tensor, Tensor, int]:
    """Return scores float32 [Q, depth] and places int64 [Q, depth] of this rank's best
    documents, and how many it read.
    """
    device = queries.device
    scores = torch.full((len(queries), depth), -torch.inf, device=device)
    places = torch.full((len(queries), depth), -1, dtype=torch.int64, device=device)
    remaining = files.records(
        folder / files.CORPUS, parallel.data_parallel_rank, parallel.data_parallel_size
    )
    asked, count, more = queries.double(), 0, True
    with progress("encoding and comparing", None, "documents of this rank") as advance:
        while more:
            with _Together(parallel) as together:
                shard = list(itertools.islice(remaining, shard_rows))
                if shard:
                    vectors = torch.as_tensor(
                        encode([files.item(record, folder) for _, record in shard]), device=device
                    ).double()
                    starts = torch.tensor([place for place, _ in shard], device=device)
                    score, index = topk(asked, vectors, min(depth, len(shard)))
                    place = torch.where(index >= 0, starts[index.clamp(min=0)], -1)
                    # Earlier documents stand first, and the sort is stable: ties go to the earlier
                    # place, at any number of ranks.
                    scores, places = _best(
                        torch.cat([scores, score], 1), torch.cat([places, place], 1), depth
                    )
                    count += len(shard)
                    beat()
                    advance(len(shard))
                more = together.say(len(shard) == shard_rows)
    return scores, places, count


def _best(scores: Tensor, places: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    kept, order = scores.sort(dim=1, descending=True, stable=True)
    return kept[:, :depth], places.gather(1, order[:, :depth])


def _to_owners(own: Tensor, sizes: list[int], parallel: Parallel) -> Tensor:
    """Return [q, W x depth]: of this rank's q queries what all W ranks found, in rank order.

    own: [Q, depth].
    """
    mine = sizes[parallel.data_parallel_rank]
    received = own.new_empty(mine * parallel.data_parallel_size, own.shape[1])
    dist.all_to_all_single(
        received,
        own.contiguous(),
        [mine] * parallel.data_parallel_size,
        sizes,
        group=parallel.data_parallel_group,
    )
    return received.unflatten(0, (parallel.data_parallel_size, mine)).transpose(0, 1).flatten(1)


def _in_shards(encode: Encode, items: Sequence[object], rows: int) -> NDArray[np.float32]:
    parts: Iterator[NDArray[np.float32]] = (
        encode(items[start : start + rows]) for start in range(0, len(items), rows)
    )
    return np.concatenate([*parts]) if items else np.zeros((0, 0), np.float32)


class _Together:
    """Work after which ranks meet in `say`; an error on one of them is raised on all, so that
    none waits for a rank that left.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel

    def say(self, more: bool = False) -> bool:
        """Return whether any rank has more. Raises BadDataError where another rank failed."""
        failed, going = self._meet(False, more)
        if failed:
            raise BadDataError("another rank could not go on: see its message")
        return going

    def _meet(self, failed: bool, more: bool) -> tuple[bool, bool]:
        flags = torch.tensor([float(failed), float(more)], device=self.parallel.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.parallel.data_parallel_group)
        any_failed, any_more = flags.tolist()
        self.met = True
        return bool(any_failed), bool(any_more)

    def __enter__(self) -> _Together:
        self.met = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is None or self.met:
            return
        self._meet(True, False)
        if isinstance(error, (ValueError, OSError)) and not isinstance(error, SailplanError):
            raise BadDataError(f"{error}; correct or leave out the item") from error
