"""A data set's view as embedding files: unit vectors in .npy shards, and their record ids line
by line.

All ranks encode each shard together, rank 0 writes it, so memory stays at one shard whatever the
data set's size. `embeddings.json` is written last: a folder without it is not complete.
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
from sailplan.embed.embedding import embed_view
from sailplan.errors import ConfigurationError
from sailplan.export.semantic_ids import SemanticIds, semantic_ids, write_semantic_ids
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel

MANIFEST = "embeddings.json"


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
    positions = reader.positions(split)
    if not len(positions):
        raise ConfigurationError(
            f"split {split}: data set '{reader.name}' has the splits "
            f"{', '.join(reader.index.split_names)}; choose one of them"
        )
    on_main(parallel, f"clearing {out}", lambda: _clear(out))
    shards: list[dict[str, Any]] = []
    rows, left_out = 0, 0
    for start in range(0, len(positions), shard_rows):
        found = embed_view(
            encoder,
            reader,
            view,
            positions[start : start + shard_rows],
            parallel=parallel,
            config=config,
        )
        kept = found.where(found.valid)
        name, vectors = f"{len(shards):05d}", normalize(kept.fused, dim=-1).numpy()
        ids = reader.ids(kept.positions)

        def write(name: str = name, vectors: np.ndarray = vectors, ids: list[str] = ids) -> None:
            np.save(out / f"embeddings-{name}.npy", vectors)
            (out / f"ids-{name}.txt").write_text(
                "".join(f"{record_id}\n" for record_id in ids), encoding="utf-8"
            )

        on_main(parallel, f"writing embeddings to {out}", write)
        shards.append(
            {"embeddings": f"embeddings-{name}.npy", "ids": f"ids-{name}.txt", "rows": len(kept)}
        )
        rows, left_out = rows + len(kept), left_out + len(found) - len(kept)
    manifest = {
        "dataset": reader.name,
        "view": view,
        "rows": rows,
        "left_out": left_out,
        "dimensions": config.model.embedding,
        "prefixes": config.model.prefixes,
        "shards": shards,
    }

    def publish() -> None:
        write_whole(out / MANIFEST, json.dumps(manifest, indent=1))

    on_main(parallel, f"writing {out / MANIFEST}", publish)
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


def _clear(out: Path) -> None:
    """An empty place to write to: files of an older export are removed, so that two never mix."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in (
        MANIFEST,
        "embeddings-*.npy",
        "ids-*.txt",
        "semantic_ids.json",
        "code_books.npz",
    ):
        for path in out.glob(pattern):
            path.unlink()
