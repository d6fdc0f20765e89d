"""A data set's view as embedding files: unit vectors in .npy shards, and their record ids line
by line.

The ranks encode into the embedding store (`embed.store`), then share the shards and write them, so
memory stays at a part of a shard whatever the data set's size. `embeddings.json` is written last: a
folder without it is not complete, and the same command goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.nn.functional import normalize

from sailplan.config.schema import Config
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.selection import SplitPositions
from sailplan.embed.table import READ_ROWS
from sailplan.errors import ConfigurationError
from sailplan.export.semantic_ids import SemanticIds, semantic_ids, write_semantic_ids
from sailplan.runtime.arrays import SharedArray
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

MANIFEST, BEGUN, WORK = "embeddings.json", "begun.json", "vectors"


def export_embeddings(
    encoder: nn.Module,
    reader: RecordReader,
    view: str,
    out: Path,
    *,
    parallel: Parallel,
    config: Config,
    split: str | None = None,
    semantic_id_sizes: Sequence[int] = (),
    shard_rows: int = 65536,
) -> dict[str, Any]:
    """Embeds a view of a data set (all records, or one split's) into `out`; returns the
    manifest. Collective.

    Per shard: embeddings-00000.npy, float32 [k, D] rows of length one (normalise again after
    cutting to a Matryoshka prefix), and ids-00000.txt, k lines. Records without any of the view's
    modalities are left out and counted.
    semantic_id_sizes: code-book sizes, such as 64, 64, 64; then semantic IDs of all rows are
    written too (in one memory).
    Raises ConfigurationError for an unknown view, a history view, or a split without records.
    """
    if view not in reader.config.views:
        raise ConfigurationError(
            f"view {view}: data set '{reader.name}' has {', '.join(reader.config.views)}; choose "
            "one of them"
        )
    if reader.config.views[view].of == "history":
        raise ConfigurationError(
            f"view {view} of '{reader.name}' shows whole histories: choose a view of single items"
        )
    if not len(SplitPositions(reader, split)):
        raise ConfigurationError(
            f"split {split}: data set '{reader.name}' has the splits "
            f"{', '.join(reader.index.split_names)}; choose one of them"
        )
    context = RunContext(config, parallel, encoder, {}, {reader.name: reader}, out / WORK)
    embedder = Embedder(context)
    model = embedder.store.folder.name
    about: dict[str, Any] = {
        "model": model,
        "view": repr(reader.config.views[view]),
        "split": split,
    }
    about |= {"records": reader.identity, "shard_rows": shard_rows}
    on_main(parallel, f"looking into {out}", lambda: _begin(out, about))
    table = embedder.table(reader, view, SplitPositions(reader, split))
    sizes = np.zeros((-(-len(table) // shard_rows), 2), dtype=np.int64)  # kept, left out

    def write(number: int) -> None:
        name, stop = f"{number:05d}", min(len(table), (number + 1) * shard_rows)
        identified = table.identify(number * shard_rows, stop)
        sizes[number] = identified.valid.sum(), (~identified.valid).sum()
        if (out / f"ids-{name}.txt").is_file():
            return
        shape = (int(sizes[number, 0]), config.model.embedding)
        array = SharedArray(out / f"embeddings-{name}.npy", shape, "float32")
        array.create()
        written = 0
        for start in range(number * shard_rows, stop, READ_ROWS):
            alone()
            found = table.read(start, min(stop, start + READ_ROWS))
            vectors = normalize(found.where(found.valid).fused, dim=-1).numpy()
            array.write(written, vectors)
            written += len(vectors)
        ids = reader.ids(identified.positions[identified.valid])
        write_whole(out / f"ids-{name}.txt", "".join(f"{record_id}\n" for record_id in ids))

    in_turns(parallel, f"writing embeddings to {out}", range(len(sizes)), write)
    counts = sum_over_ranks(sizes).tolist()
    manifest = {
        "dataset": reader.name,
        "view": view,
        "rows": sum(kept for kept, _ in counts),
        "left_out": sum(dropped for _, dropped in counts),
        "dimensions": config.model.embedding,
        "prefixes": config.model.prefixes,
        "shards": [
            {
                "embeddings": f"embeddings-{number:05d}.npy",
                "ids": f"ids-{number:05d}.txt",
                "rows": kept,
            }
            for number, (kept, _) in enumerate(counts)
        ],
    }

    def publish() -> None:
        write_whole(out / MANIFEST, json.dumps(manifest, indent=1))
        (out / BEGUN).unlink()

    on_main(parallel, f"writing {out / MANIFEST}", publish)
    embedder.close()
    return manifest | (
        {"semantic_ids": write_codes(out, semantic_id_sizes, parallel, config.seed)}
        if semantic_id_sizes
        else {}
    )


def read_embeddings(folder: Path) -> tuple[np.ndarray, list[str]]:
    """(float32 [n, D], ids) of a folder that `export_embeddings` completed.

    Raises ConfigurationError for any other folder.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigurationError(
            f"{folder}: no {MANIFEST}; expected a folder that `sailplan embed` has completed"
        )
    shards = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["shards"]
    vectors = np.concatenate([np.load(folder / shard["embeddings"]) for shard in shards])
    ids = [
        line
        for shard in shards
        for line in (folder / shard["ids"]).read_text(encoding="utf-8").splitlines()
    ]
    return vectors, ids


def write_codes(
    folder: Path, sizes: Sequence[int], parallel: Parallel, seed: int = 0
) -> dict[str, Any]:
    """Semantic IDs of a folder's embeddings, written beside them by rank 0; returns errors and
    statistics on all ranks.
    """

    def work() -> dict[str, Any]:
        vectors, ids = read_embeddings(folder)
        found: SemanticIds = semantic_ids(vectors, sizes, seed)
        write_semantic_ids(found, ids, folder)
        return {"errors": found.errors, **found.statistics}

    result: dict[str, Any] = on_main(parallel, "semantic ids", work)
    return result


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Keep what an export of the same that was stopped left; else remove files of an older one, so
    that two never mix.
    """
    note = out / BEGUN
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == about:
        return
    for pattern in (
        MANIFEST,
        "embeddings-*.npy",
        "ids-*.txt",
        "semantic_ids.json",
        "code_books.npz",
    ):
        for path in out.glob(pattern):
            path.unlink()
    write_whole(note, json.dumps(about))
