"""Dynamic hard negatives: for every query the targets that the current model finds most alike
and that are not matches.

First lambda* is fitted on a sample of fixed size (threshold.py), for the full size and for each
Matryoshka prefix. Then every training query is scored against all targets of its data set; of those
below lambda* the best are its hard negatives. What scores at or above lambda* without being a
labelled positive is most likely a positive that nobody labelled, and is dropped (recipe 2.1).
Never a negative: the target's own document or text, and every target of a query with the same text.

Vectors lie in the embedding store, candidates in files; ranks share blocks of queries, which each
search all candidates (`embed.search`), and write what they find into the round's arrays
(`curriculum.rounds`). A block that is written is not searched again. Scores are those of float64
multiplication, so the same negatives come out at any number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.config.schema import DatasetConfig, HardNegativeConfig, PatternKey
from sailplan.curriculum.matches import Matches, find_matches, write_keys
from sailplan.curriculum.rounds import Rounds
from sailplan.curriculum.threshold import Threshold, f1_threshold
from sailplan.data.excerpt import show
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import Embedder
from sailplan.embed.exchange import exchange_of
from sailplan.embed.scoring import labelled_pairs
from sailplan.embed.search import KeyFiles, SearchStats, nearest
from sailplan.embed.selection import Positions, SplitPositions
from sailplan.embed.table import Table
from sailplan.errors import ConfigurationError
from sailplan.runtime.arrays import SharedArray, save
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.seeds import generator
from sailplan.runtime.turns import in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

EXAMPLES = 6
PERMUTED = (
    1 << 22
)  # rows of which a sample is drawn by shuffling all; of more, without listing them
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}  # of the queries that a rank searches for at once
# In how many blocks, at least, a rank searches for its share, so that a block falls with the ranks
BLOCKS = {"cpu": 48, "cuda": 4}
BLOCK_ROWS = 1024  # that a block may have, however small the share
KEY_ROWS = 4096  # of a file of candidates
GAP = 1 << 16  # records without negatives that are written at once


@dataclass(frozen=True)
class MinedPattern:
    """What a pattern's mining found, beside its arrays."""

    threshold: Threshold
    prefixes: dict[str, Threshold]  # shorter Matryoshka size -> its own threshold
    counts: NDArray[np.int64]  # [blocks] records with negatives


def chosen_patterns(
    config: HardNegativeConfig,
    stage_data: Mapping[str, float],
    datasets: Mapping[str, DatasetConfig],
) -> dict[str, list[str]]:
    """Data set -> patterns to mine for: what the configuration names, else the first pattern of
    every set of the stage.

    Histories have no mined negatives: sequence sets are left out unless they are named.
    """
    if config.patterns:
        return {name: list(patterns) for name, patterns in config.patterns.items()}
    fitting = [
        name
        for name in stage_data
        if datasets[name].kind != "sequences" and datasets[name].patterns
    ]
    return {name: list(datasets[name].patterns)[:1] for name in fitting}


def check_minable(name: str, dataset: DatasetConfig, patterns: Sequence[str]) -> None:
    """Raises ConfigurationError for a pattern of the data set that starts from a history."""
    for pattern in patterns:
        sides = dataset.patterns[pattern]
        if "history" in (dataset.views[sides.query].of, dataset.views[sides.target].of):
            raise ConfigurationError(
                f"hard_negatives.patterns.{name}: pattern '{pattern}' starts from a history; name "
                "patterns of single items"
            )


def matched(reader: RecordReader, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n]: whether a record's two sides are a match.

    All are, except graded pairs whose score is not above the data
    set's `positive_score`: those say how alike two items are, not that they belong together."""
    if not reader.scored:
        return np.ones(len(positions), dtype=bool)
    scores = [reader.score(int(position)) for position in positions]
    return np.array(
        [score is not None and score > reader.config.positive_score for score in scores], dtype=bool
    )


def mine(
    embedder: Embedder,
    patterns: Mapping[str, list[str]],
    hard: HardNegativeConfig,
    rounds: Rounds,
    step: int,
    subsets: Mapping[str, Positions] | None = None,
) -> dict[str, JsonObject]:
    """Mine for every named pattern over the train split, or over `subsets` (data set ->
    positions); put the round in force and return what it notes of each pattern. Collective.

    Goes on with what an unfinished round of the same model has. Raises ConfigurationError for a
    pattern from a history or without a match, StopRequested on all ranks.
    """
    run, working, model = embedder.context, rounds.working(step), embedder.store.folder.name
    parallel = run.parallel
    finished = on_main(parallel, f"looking into {working}", partial(rounds.begin, step, model))
    if finished:
        return dict(finished)
    about: dict[str, JsonObject] = {}
    for name, names in patterns.items():
        reader = run.readers[name]
        check_minable(name, reader.config, names)
        positions = (subsets or {}).get(name)
        positions = SplitPositions(reader, "train") if positions is None else positions
        for pattern in names:
            key, number = str(PatternKey(name, pattern)), len(about)
            done, folder = working / f"{number}.json", working / str(number)
            known = on_main(parallel, f"looking for {done}", partial(_text, done))
            if known:
                about[key] = json.loads(known)
                continue
            arrays = [
                SharedArray(working / f"{number}.{kind}.npy", (len(reader), hard.per_query), dtype)
                for kind, dtype in (("negatives", "int64"), ("scores", "float32"))
            ]
            sides = reader.config.patterns[pattern]
            queries, targets = (
                embedder.table(reader, view, positions) for view in (sides.query, sides.target)
            )
            miner = PatternMiner(
                parallel, reader, pattern, queries, targets, positions, hard, folder, arrays
            )
            found = miner.run(run.config.seed, run.config.model.prefixes)
            note = {
                "threshold": asdict(found.threshold),
                "prefixes": {size: asdict(one) for size, one in found.prefixes.items()},
                "with_negatives": int(found.counts.sum()),
                "negatives": arrays[0].path.name,
                "scores": arrays[1].path.name,
            }
            keep = partial(_keep, miner, found, note, done)
            about[key] = on_main(parallel, f"writing {done}", keep)
    on_main(parallel, f"writing {rounds.path(step)}", partial(rounds.publish, step, model, about))
    return about


def _keep(miner: PatternMiner, found: MinedPattern, note: JsonObject, done: Path) -> JsonObject:
    """Write a pattern's note, which says that it is done, and remove what it needed until then."""
    note = note | {"examples": miner.examples(found.counts)}
    write_whole(done, json.dumps(note))
    shutil.rmtree(miner.folder, ignore_errors=True)
    return note


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


class PatternMiner:
    """Mine one pattern: queries and targets are tables of the same records, `positions`."""

    def __init__(
        self,
        parallel: Parallel,
        reader: RecordReader,
        pattern: str,
        queries: Table,
        targets: Table,
        positions: Positions,
        hard: HardNegativeConfig,
        folder: Path,
        arrays: Sequence[SharedArray],
    ) -> None:
        """folder: of what is needed until the pattern is done. arrays: of negatives and scores, a
        row a record of the set.
        """
        self._parallel, self._reader, self._pattern = parallel, reader, pattern
        self._queries, self._targets, self._positions = queries, targets, positions
        self._hard, self.folder, self._arrays = hard, folder, arrays
        self.stats = SearchStats()

    def run(self, seed: int, prefixes: Sequence[int]) -> MinedPattern:
        """Fit the thresholds, search, write the arrays. Collective."""
        parallel = self._parallel

        def create() -> None:
            for array in self._arrays:
                array.create()

        on_main(parallel, f"making {self.folder}", create)
        matches = find_matches(
            parallel,
            self._queries,
            self._targets,
            lambda positions: matched(self._reader, positions),
            self.folder,
        )
        full, shorter = self._thresholds(matches, seed, prefixes)
        files = write_keys(parallel, self._targets, matches, KEY_ROWS)
        counts = self._search(matches, KeyFiles(files), full.value)
        return MinedPattern(full, shorter, counts)

    def examples(self, counts: NDArray[np.int64]) -> list[JsonObject]:
        """Return [{"query", "positive", "negatives": [{..., "score"}]}] of a few records that have
        negatives.
        """
        total, upto = int(counts.sum()), np.concatenate([[0], np.cumsum(counts)])
        numbers = np.linspace(0, total - 1, min(EXAMPLES, total)).astype(np.int64)
        sides, reader = self._reader.config.patterns[self._pattern], self._reader
        query, target = reader.config.views[sides.query], reader.config.views[sides.target]
        negatives, scores = (np.load(array.path, mmap_mode="r") for array in self._arrays)
        result: list[JsonObject] = []
        for number in numbers:
            block = int(np.searchsorted(upto, number, side="right")) - 1
            position = int(np.load(self._done / f"{block:07d}.npy")[number - upto[block]])
            pairs = zip(negatives[position].tolist(), scores[position].tolist(), strict=True)
            result.append(
                {
                    "query": show(reader, position, query),
                    "positive": show(reader, position, target),
                    "negatives": [
                        show(reader, place, target) | {"score": round(score, 4)}
                        for place, score in pairs
                        if place >= 0
                    ],
                }
            )
        return result

    # ---------------------------------------------------------------- parts
    def _thresholds(
        self, matches: Matches, seed: int, prefixes: Sequence[int]
    ) -> tuple[Threshold, dict[str, Threshold]]:
        """Return lambda* of the full size and of each shorter prefix, of one sample."""
        key = str(PatternKey(self._reader.name, self._pattern))
        random, count = generator("hard negatives", seed, key), int(matches.valid.sum())
        if not count:
            raise ConfigurationError(
                f"hard_negatives.patterns: {key} has no record with both sides that match, expected "
                "some; leave the pattern out"
            )
        numbers = (
            random.permutation(count)[: self._hard.sample]
            if count <= PERMUTED
            else random.choice(count, self._hard.sample, replace=False, shuffle=False)
        )
        rows = matches.valid_rows(np.sort(numbers))
        queries, targets = self._queries.take(rows), self._targets.take(rows)
        facts = matches.facts(queries.ids.numpy())
        facts = facts[facts[:, 2] >= 0]
        device, exchange = self._parallel.device, exchange_of(self._parallel)
        positives = labelled_pairs(
            queries.ids, targets.ids, torch.from_numpy(np.ascontiguousarray(facts[:, [0, 2]].T))
        ).to(device)

        def fitted(size: int) -> Threshold:
            left, right = (side.fused[:, :size].to(device) for side in (queries, targets))
            return f1_threshold(left, right, positives, exchange)

        dimension = queries.fused.shape[1]
        shorter = {str(size): fitted(size) for size in prefixes if size < dimension}
        return fitted(dimension), shorter

    def _search(self, matches: Matches, keys: KeyFiles, threshold: float) -> NDArray[np.int64]:
        """Search in blocks of rows, which the ranks share; return how many records of each have
        negatives.
        """
        parallel, count = self._parallel, matches.count
        dimension = self._queries.read(0, 1).fused.shape[1]
        kind, share = parallel.device.type, -(-count // parallel.world_size)
        most = BLOCK_BYTES.get(kind, BLOCK_BYTES["cpu"]) // (4 * dimension)
        size = min(most, share // BLOCKS.get(kind, BLOCKS["cpu"]))
        size = max(1, size, min(BLOCK_ROWS, most, share))
        blocks = range(-(-count // size))
        self._done = done = self.folder / f"blocks-{size}"
        done.mkdir(parents=True, exist_ok=True)
        counts = np.zeros(len(blocks), dtype=np.int64)

        def search(block: int) -> None:
            marker, start = done / f"{block:07d}.npy", block * size
            stop = min(count, start + size)
            if not marker.is_file():
                ids = matches.ids(start, stop)[:, 0]
                valid = np.flatnonzero(ids >= 0)
                queries = self._queries.read(start, stop).fused[torch.from_numpy(valid)]
                scores, rows = nearest(
                    queries,
                    keys,
                    self._hard.per_query,
                    max_score=threshold,
                    excluded=matches.excluded(ids[valid]),
                    device=parallel.device,
                    progress=alone,
                    stats=self.stats,
                )
                save(marker, self._write(start, stop, valid, rows, scores.numpy()))
            counts[block] = len(np.load(marker))

        in_turns(parallel, f"mining {self._reader.name}/{self._pattern}", blocks, search)
        return sum_over_ranks(counts)

    def _write(
        self,
        start: int,
        stop: int,
        valid: NDArray[np.int64],
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """Write what rows start .. stop - 1 found, -1 for the records up to the next block's;
        return the records with negatives.
        """
        positions = np.asarray(self._positions[start:stop])
        records = len(self._reader)
        after = int(self._positions[stop : stop + 1][0]) if stop < len(self._positions) else records
        own = positions[valid]
        names, found = np.unique(rows, return_inverse=True)
        known = np.asarray(self._positions[names[names >= 0]], dtype=np.int64)
        named = np.concatenate([known[:0] if len(known) == len(names) else [-1], known])
        negatives = named[found.reshape(rows.shape)].astype(np.int64)
        for first in range(0 if start == 0 else int(positions[0]), after, GAP):
            length = min(GAP, after - first)
            part = slice(*np.searchsorted(own, [first, first + length]).tolist())
            names_of, scores_of = (
                np.full((length, rows.shape[1]), -1, dtype=np.int64),
                np.full((length, rows.shape[1]), -np.inf, dtype=np.float32),
            )
            names_of[own[part] - first], scores_of[own[part] - first] = (
                negatives[part],
                scores[part],
            )
            self._arrays[0].write(first, names_of)
            self._arrays[1].write(first, scores_of)
        return own[(negatives >= 0).any(1)]
