"""A data set's view as a folder of vectors (`export.vector_folder`): unit vectors in .npy shards,
and their record ids line by line.

The ranks encode into the embedding store (`embed.store`), then share the shards and write them, so
memory stays at a part of a shard whatever the data set's size. `embeddings.json` is written last: a
folder without it is not complete, and the same command goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn
from torch.nn.functional import normalize

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.selection import SplitPositions
from sailplan.embed.table import READ_ROWS
from sailplan.errors import ConfigurationError
from sailplan.export.semantic_ids import semantic_ids
from sailplan.export.vector_folder import MANIFEST, embeddings_file, ids_file, labels_file
from sailplan.runtime.arrays import SharedArray
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

BEGUN, WORK, CODES = "begun.json", "vectors", "semantic_ids"


def export_embeddings(
    encoder: nn.Module,
    reader: RecordReader,
    view: str,
    out: Path,
    *,
    parallel: Parallel,
    config: Config,
    split: str | None = None,
    semantic_id_sizes: Sequence[Sequence[int]] = (),
    label: str | None = None,
    shard_rows: int = 65536,
) -> JsonObject:
    """Embeds a view of a data set (all records, or one split's) into `out`; returns the
    manifest. Collective.

    Per shard: embeddings-00000.npy, float32 [k, D] rows of length one (normalise again after
    cutting to a Matryoshka prefix), and ids-00000.txt, k lines. Records without any of the view's
    modalities are left out and counted.
    semantic_id_sizes: code-book sizes, such as [[64, 64, 64]]; then semantic IDs of all rows are
    written, too (`export.semantic_ids`). label: a key of the records, whose values are written line
    by line and compared with the codes.
    Raises ConfigurationError for an unknown view, a history view, a split without records or a
    label that no record has.
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
    about: JsonObject = {
        "model": model,
        "view": repr(reader.config.views[view]),
        "split": split,
        "label": label,
    }
    about |= {"records": reader.identity, "shard_rows": shard_rows}
    on_main(parallel, f"looking into {out}", lambda: _begin(out, about))
    table = embedder.table(reader, view, SplitPositions(reader, split))
    sizes = np.zeros((-(-len(table) // shard_rows), 3), dtype=np.int64)  # kept, left out, labelled

    def write(number: int) -> None:
        stop = min(len(table), (number + 1) * shard_rows)
        identified = table.identify(number * shard_rows, stop)
        kept = identified.positions[identified.valid]
        sizes[number, :2] = len(kept), len(identified.positions) - len(kept)
        if (out / ids_file(number)).is_file():
            if label is not None:
                names = (out / labels_file(number)).read_text(encoding="utf-8").splitlines()
                sizes[number, 2] = sum(map(bool, names))
            return
        shape = (int(sizes[number, 0]), config.model.embedding)
        array = SharedArray(out / embeddings_file(number), shape, "float32")
        array.create()
        written = 0
        for start in range(number * shard_rows, stop, READ_ROWS):
            alone()
            found = table.read(start, min(stop, start + READ_ROWS))
            vectors = normalize(found.where(found.valid).fused, dim=-1).numpy()
            array.write(written, vectors)
            written += len(vectors)
        if label is not None:
            names = [_label(reader, position, label) for position in kept.tolist()]
            sizes[number, 2] = sum(map(bool, names))
            write_whole(out / labels_file(number), "".join(f"{name}\n" for name in names))
        ids = reader.ids(kept)
        write_whole(out / ids_file(number), "".join(f"{record_id}\n" for record_id in ids))

    in_turns(parallel, f"writing embeddings to {out}", range(len(sizes)), write)
    counts = sum_over_ranks(sizes).tolist()
    if label is not None and not any(labelled for _, _, labelled in counts):
        raise ConfigurationError(
            f"label {label}: no record of '{reader.name}' has this key; name one that they have"
        )
    manifest = {
        "dataset": reader.name,
        "view": view,
        "rows": sum(kept for kept, _, _ in counts),
        "left_out": sum(dropped for _, dropped, _ in counts),
        "dimensions": config.model.embedding,
        "prefixes": config.model.prefixes,
        "label": label,
        "shards": [
            {
                "embeddings": embeddings_file(number),
                "ids": ids_file(number),
                "rows": kept,
            }
            for number, (kept, _, _) in enumerate(counts)
        ],
    }

    def publish() -> None:
        write_whole(out / MANIFEST, json.dumps(manifest, indent=1))
        (out / BEGUN).unlink()

    on_main(parallel, f"writing {out / MANIFEST}", publish)
    embedder.close()
    if not semantic_id_sizes:
        return manifest
    found = semantic_ids(parallel, out, out / CODES, sizes=semantic_id_sizes, seed=config.seed)
    return manifest | {"semantic_ids": found}


def _label(reader: RecordReader, position: int, key: str) -> str:
    """Return a record's label as one line, "" where it has none."""
    found = reader.body(position).get(key)
    return "" if found is None else " ".join(str(found).split())


def _begin(out: Path, about: JsonObject) -> None:
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
        "labels-*.txt",
    ):
        for path in out.glob(pattern):
            path.unlink()
    write_whole(note, json.dumps(about))
