"""The artifact `interests` from a log of timed events: cut by user, choose, write, on all ranks
and larger than memory.

    FOLDER/interests-000000.tar   one shard a bucket of users, the same bytes at any number of ranks
    FOLDER.work/                  events by user, chosen sequences; removed at the end

Three passes. The log is read once and cut into buckets by user. Each bucket's sequences are chosen
and kept as arrays, and how often each item is a target is added up over all ranks. Then each bucket
is written as a shard. A rank works on its own buckets, and the ranks meet after each one.

What it costs for n events: n x 45 bytes read and written three times; some five bytes of memory an
item of the catalogue on every rank; vectors of the items that `content_single` or content clusters
look at.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.config.schema import DatasetConfig
from sailplan.curriculum.event_buckets import BUCKET_EVENTS, Bucket, Cut, cut_by_user
from sailplan.curriculum.interests import Sequences, history_of, interest_views
from sailplan.data.config import INTEREST_VIEWS, InterestsConfig
from sailplan.data.events import EventReader, event_files
from sailplan.data.index import id_hash
from sailplan.data.reader import RecordReader
from sailplan.data.tar import HeldOut
from sailplan.data.writer import Record, write_tar
from sailplan.embed.clustering import k_means
from sailplan.errors import BadDataError
from sailplan.runtime.process import Parallel
from sailplan.runtime.seeds import generator
from sailplan.runtime.turns import from_all_ranks, in_turns, meet, sum_over_ranks

if TYPE_CHECKING:
    import pyarrow as pa


logger = logging.getLogger("sailplan.curriculum")
POOL = 16_384  # unused items among which a record's random negatives are drawn
ROWS_AT_ONCE = 8_192  # vectors compared at once
SAMPLE = 20_000  # items on which content clusters are fitted

ContentVectors = Callable[[NDArray[np.int64]], Callable[[NDArray[np.int64]], NDArray[np.float32]]]
"""Given the sorted catalogue positions that matter (collective): a function of positions int64 [n], a subset of those,
that returns unit vectors float32 [n, D]."""


@dataclass(frozen=True)
class _Negatives:
    """Ids of items that no event has, of which records bring some."""

    ids: list[str]
    per_record: int


def make_timed_interests(
    parallel: Parallel,
    name: str,
    dataset: DatasetConfig,
    catalogue: RecordReader,
    folder: Path,
    content: ContentVectors,
    *,
    seed: int = 0,
    bucket_events: int = BUCKET_EVENTS,
) -> JsonObject:
    """Write the shards of data set `name` to `folder` and return what was made. Collective.

    Records: {"id", "split", "history": [ids], "target": id, "target_probability", "views", "user"},
    and negatives where the data set wants some. Raises BadDataError where the log gives no sequence
    at all.
    """
    settings, work = dataset.interests, folder.with_name(folder.name + ".work")
    assert settings is not None, "only data sets with timed events come here"
    reader = EventReader(settings)
    files = event_files(f"data.sets.{name}.interests.events", settings.events)
    _fresh(parallel, folder, work)
    cut = cut_by_user(
        parallel,
        reader,
        files,
        work,
        lambda ids: find_items(catalogue, ids),
        len(catalogue),
        bucket_events=bucket_events,
    )
    stats = _checked(parallel, name, settings, cut)
    vectors = None
    if "content_single" in settings.views or (
        "collaboration_multi" in settings.views and settings.clusters == "content"
    ):
        vectors = content(np.flatnonzero(cut.used))
    held_out = (
        HeldOut(dataset.held_out.fraction, dataset.held_out.by)
        if dataset.held_out is not None
        else None
    )
    chooser = _Chooser(settings, dataset.history_length, vectors, np.flatnonzero(cut.used), seed)
    targets, views = np.zeros(len(catalogue), dtype=np.int32), Counter[str]()

    def choose(bucket: int) -> None:
        loaded = cut.buckets.load(bucket)
        found = chooser.sequences(loaded)
        held = np.array([split(held_out, user) == "held_out" for user in loaded.users], dtype=bool)
        first = _different(found)
        train = first & ~held[found.users] if len(held) else first
        np.add.at(targets, found.targets[train], 1)
        views.update(users=len(loaded.users), sequences=int(first.sum()), train=int(train.sum()))
        views.update(
            {view: int((found.views == place).sum()) for place, view in enumerate(INTEREST_VIEWS)}
        )
        np.savez(work / f"sequences-{bucket:06d}.npz", **vars(found))

    in_turns(parallel, "choosing sequences", range(cut.buckets.count), choose)
    counted = sum_over_ranks(
        np.array(
            [views[key] for key in ("users", "sequences", "train", *INTEREST_VIEWS)], dtype=np.int64
        )
    ).tolist()
    targets = sum_over_ranks(targets)
    stats |= {
        "users": counted[0],
        "sequences": counted[1],
        "train_sequences": counted[2],
        "kind": "timed",
    }
    stats["views"] = {
        view: count
        for view, count in zip(INTEREST_VIEWS, counted[3:], strict=True)
        if view in settings.views
    }
    if not counted[2]:
        raise BadDataError(
            f"data.sets.{name}.interests: {counted[0]} users give no sequence to train on; "
            "expected users with a positive event before "
            f"their last one; found {stats['labels']} positive labels: check positive and views"
        )
    _say_empty(parallel, name, settings, stats)
    negatives = _unused(catalogue, cut.used, dataset.negatives, seed) if dataset.negatives else None

    def write(bucket: int) -> None:
        with np.load(work / f"sequences-{bucket:06d}.npz") as arrays:
            found = Sequences(**{key: arrays[key] for key in arrays.files})
        loaded = cut.buckets.load(bucket)
        records = _records(bucket, loaded, found, targets, counted[2], held_out, negatives, seed)
        if records:
            write_tar(records, folder / f"interests-{bucket:06d}.tar")

    in_turns(parallel, "writing sequences", range(cut.buckets.count), write)
    if parallel.is_main:
        shutil.rmtree(work, ignore_errors=True)
    return stats


def find_items(catalogue: RecordReader, ids: pa.Array) -> NDArray[np.int64]:
    """Return the catalogue positions of an Arrow array of ids, int64 [n], -1 where unknown.

    Found by 64-bit hashes: among 10^8 items one unknown id in 10^11 would be taken for another's.
    """
    encoded = ids.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    places = catalogue.index.find_hashes(np.fromiter(map(id_hash, names), np.uint64, len(names)))
    return places[encoded.indices.to_numpy()] if len(places) else np.empty(0, dtype=np.int64)


def split(held_out: HeldOut | None, user: str) -> str:
    """Return the split of a user's sequences."""
    return "train" if held_out is None else held_out.split(user, {held_out.by: user})


class _Chooser:
    """Choose the sequences of a bucket's users."""

    def __init__(
        self,
        settings: InterestsConfig,
        length: int,
        vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None,
        used: NDArray[np.int64],
        seed: int,
    ) -> None:
        self.settings, self.length, self.vectors, self.seed = settings, length, vectors, seed
        self.centres: NDArray[np.float32] | None = None
        if (
            vectors is not None
            and settings.clusters == "content"
            and "collaboration_multi" in settings.views
        ):
            sample = (
                used
                if len(used) <= SAMPLE
                else np.sort(generator("interests", seed, "clusters").permutation(used)[:SAMPLE])
            )
            self.centres = k_means(vectors(sample), settings.content_clusters, "interests", seed)[
                1
            ].astype(np.float32)

    def sequences(self, bucket: Bucket) -> Sequences:
        history = history_of(bucket.events, len(bucket.users), self.settings.max_events)
        seeds = bucket.hashes ^ np.uint64(
            generator("interests", self.seed, "draw").integers(0, 2**63)
        )
        assign = None if self.centres is None else self._assign
        return interest_views(
            history,
            self.settings,
            self.length,
            similarity=self._similarity,
            assign=assign,
            seeds=seeds,
        )

    def _similarity(
        self, items: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        assert self.vectors is not None, "content_single has vectors"
        result = np.empty(len(items), dtype=np.float64)
        for start in range(0, len(items), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            result[part] = (self.vectors(items[part]) * self.vectors(targets[part])).sum(
                1, dtype=np.float64
            )
        return result

    def _assign(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self.vectors is not None and self.centres is not None, (
            "content clusters have vectors"
        )
        places, inverse = np.unique(items, return_inverse=True)
        nearest = np.empty(len(places), dtype=np.int64)
        lengths = (self.centres**2).sum(1)
        for start in range(0, len(places), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            nearest[part] = (lengths - 2 * self.vectors(places[part]) @ self.centres.T).argmin(1)
        return nearest[inverse]


# ---------------------------------------------------------------- parts
def _fresh(parallel: Parallel, folder: Path, work: Path) -> None:
    """Empty both folders of what an attempt that was given up left."""
    problem = None
    if parallel.is_main:
        try:
            for path in (folder, work):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
        except OSError as error:
            problem = error
    meet(parallel, f"making {folder}", problem)


def _checked(parallel: Parallel, name: str, settings: InterestsConfig, cut: Cut) -> JsonObject:
    """Return counts of the log; say what its labels do not allow.

    Raises BadDataError for a log of nothing that counts.
    """
    positive, counts = settings.positive_labels(), cut.counts
    kinds = ("whole numbers", "timestamps", "numbers with a fraction")
    own = [
        counts.rows,
        counts.incomplete,
        cut.known,
        cut.unknown,
        *(int(kind in counts.time_kinds) for kind in kinds),
    ]
    added = sum_over_ranks(
        np.array([*own, *(counts.labels[label] for label in positive)], dtype=np.int64)
    ).tolist()
    rows, incomplete, known, unknown = added[:4]
    seen = dict(zip(positive, added[7:], strict=True))
    key = f"data.sets.{name}.interests"
    mixed_times = [kind for kind, ranks in zip(kinds, added[4:7], strict=True) if ranks]
    if len(mixed_times) > 1:
        raise BadDataError(
            f"{key}.events={settings.events}: times are {' and '.join(mixed_times)}, which cannot "
            "be compared; expected one kind in all files"
        )
    if not known or not any(seen.values()):
        named = sorted({label for own in from_all_ranks(parallel, counts.others) for label in own})[
            :20
        ]
        others = f"; other labels: {', '.join(named)}" if named else ""
        raise BadDataError(
            f"{key}.events={settings.events}: {rows} events, {incomplete} of them without user, "
            f"item or time, {unknown} of items that the catalogue does not "
            "have; positive labels "
            f"{', '.join(f'{label} {times}' for label, times in seen.items())}{others}: expected "
            "some of each; check ids and positive"
        )
    found = [label for label, times in seen.items() if times]
    if parallel.is_main:
        for label in seen.keys() - set(found):
            logger.warning("%s.positive: no event has the label '%s'", key, label)
        if len(found) == 1:
            logger.warning(
                "%s: the log has one kind of positive label (%s), so every Jaccard coefficient is "
                "1 and no item has more than one behaviour: "
                "content_multi is the last items, and views with single_peak_behaviours=%d %s",
                key,
                found[0],
                settings.single_peak_behaviours,
                "give nothing" if settings.single_peak_behaviours > 1 else "keep every item",
            )
    return {
        "events": rows,
        "incomplete_events": incomplete,
        "unknown_events": unknown,
        "labels": seen,
    }


def _say_empty(parallel: Parallel, name: str, settings: InterestsConfig, stats: JsonObject) -> None:
    for view, count in stats["views"].items():
        if not count and parallel.is_main:
            logger.warning(
                "data.sets.%s.interests.views: %s gives no sequence: no user has what it needs",
                name,
                view,
            )


def _different(found: Sequences) -> NDArray[np.bool_]:
    """Return which sequences are the first of their user with these items, bool [s]; a user has
    at most one in a view.
    """
    keep, seen = np.ones(len(found.users), dtype=bool), set()
    users, starts, items = found.users.tolist(), found.starts.tolist(), found.items
    for row, user in enumerate(users):
        key = (user, items[starts[row] : starts[row + 1]].tobytes())
        keep[row] = key not in seen
        seen.add(key)
    return keep


def _unused(
    catalogue: RecordReader, used: NDArray[np.uint8], per_record: int, seed: int
) -> _Negatives:
    """Return items of the train split that no event has: at most POOL of them, at random."""
    count = catalogue.count("train")
    random = generator("interests", seed, "unused")
    numbers = (
        np.arange(count) if count <= 8 * POOL else np.unique(random.integers(0, count, 8 * POOL))
    )
    positions = catalogue.select("train", numbers)
    positions = positions[used[positions] == 0]
    return _Negatives(catalogue.ids(np.sort(random.permutation(positions)[:POOL])), per_record)


def _records(
    bucket: int,
    loaded: Bucket,
    found: Sequences,
    targets: NDArray[np.int32],
    train: int,
    held_out: HeldOut | None,
    negatives: _Negatives | None,
    seed: int,
) -> list[Record]:
    """Return a bucket's records in a shuffled, reproducible order; equal sequences of a user are
    one with several views.
    """
    bodies: dict[tuple[int, tuple[str, ...]], JsonObject] = {}
    views, users, targeted, starts = (
        found.views.tolist(),
        found.users.tolist(),
        found.targets.tolist(),
        found.starts.tolist(),
    )
    names = [loaded.ids[item] for item in found.items.tolist()]
    for row, user in enumerate(users):
        history = names[starts[row] : starts[row + 1]]
        key = (user, tuple(history))
        if key in bodies:
            bodies[key]["views"].append(INTEREST_VIEWS[views[row]])
            continue
        bodies[key] = {
            "split": split(held_out, loaded.users[user]),
            "history": history,
            "target": loaded.ids[targeted[row]],
            "target_probability": float(max(int(targets[targeted[row]]), 1) / train),
            "views": [INTEREST_VIEWS[views[row]]],
            "user": loaded.users[user],
        }
    random = generator("interests", seed, "bucket", bucket)
    listed = list(bodies.values())
    order = random.permutation(len(listed))
    if negatives is not None and negatives.ids:
        drawn = random.integers(0, len(negatives.ids), (len(listed), negatives.per_record)).tolist()
        for body, places in zip(listed, drawn, strict=True):
            body |= {
                "negatives": [negatives.ids[place] for place in places],
                "negative_probability": 1 / len(negatives.ids),
            }
    return [
        Record({"id": f"interests/{bucket:06d}-{number:06d}", **listed[index]})
        for number, index in enumerate(order.tolist())
    ]
