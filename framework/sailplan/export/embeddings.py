"""A data set's view as a folder of vectors (`export.vector_folder`): unit vectors in .npy shards,
and their record ids line by line.

The ranks encode into the embedding store (`embed.store`), then share the shards and write them, so
memory stays at a part of a shard whatever the data set's size. `embeddings.json` is written last: a
folder without it is not complete, and the same command goes on with it. Several jobs can share the
shards of one folder (`export.embedding_parts`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn
from torch.nn.functional import normalize

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.fingerprint import fingerprint
from sailplan.embed.selection import PositionsPart, SplitPositions
from sailplan.embed.table import READ_ROWS, EmbeddedTable, SequentialTable
from sailplan.errors import ConfigurationError
from sailplan.export.embedding_parts import Counts, Part, PartFolder, clear_parts
from sailplan.export.semantic_ids import semantic_ids
from sailplan.export.vector_folder import BEGUN, MANIFEST, embeddings_file, ids_file, labels_file
from sailplan.runtime.arrays import SharedArray
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

WORK, CODES = "vectors", "semantic_ids"
SHARD_ROWS = 65536


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
    shard_rows: int = SHARD_ROWS,
    part: Part | None = None,
) -> JsonObject:
    """Embeds a view of a data set (all records, or one split's) into `out`; returns the
    manifest. Collective.

    Per shard: embeddings-00000.npy, float32 [k, D] rows of length one (normalise again after
    cutting to a Matryoshka prefix), and ids-00000.txt, k lines. Records without any of the view's
    modalities are left out and counted.
    semantic_id_sizes: code-book sizes, such as [[64, 64, 64]]; then semantic IDs of all rows are
    written, too (`export.semantic_ids`). label: a key of the records, whose values are written line
    by line and compared with the codes. part: embed this part's shards alone, and return what is
    waited for where the other parts are not done.
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
    positions = SplitPositions(reader, split)
    if not len(positions):
        raise ConfigurationError(
            f"split {split}: data set '{reader.name}' has the splits "
            f"{', '.join(reader.index.split_names)}; choose one of them"
        )
    about: JsonObject = {
        "model": fingerprint(encoder, config, parallel),
        "view": repr(reader.config.views[view]),
        "split": split,
        "label": label,
    }
    about |= {"records": reader.identity, "shard_rows": shard_rows}
    shards = range(-(-len(positions) // shard_rows))
    manifest = _manifest_of(reader.name, view, label, config)

    def embed(work: Path, shards: range) -> Counts:
        first = shards.start * shard_rows
        own = PositionsPart(positions, first, min(len(positions), shards.stop * shard_rows))
        context = RunContext(config, parallel, encoder, {}, {reader.name: reader}, work)
        table = Embedder(context).table(reader, view, own)
        return _write(
            table, reader, out, shards, shard_rows, label, parallel, config.model.embedding
        )

    if part is not None:
        folder = PartFolder(out, part, about, parallel)
        with folder.claimed():
            counts = folder.done()
            if counts is None:
                own = part.shards(len(shards))
                counts = embed(folder.work / WORK, own) if own else []
            return folder.finish(counts, manifest)
    on_main(parallel, f"looking into {out}", lambda: _begin(out, about))
    found = manifest(embed(out / WORK, shards))

    def publish() -> None:
        write_whole(out / MANIFEST, json.dumps(found, indent=1))
        shutil.rmtree(out / WORK, ignore_errors=True)
        (out / BEGUN).unlink()

    on_main(parallel, f"writing {out / MANIFEST}", publish)
    if not semantic_id_sizes:
        return found
    codes = semantic_ids(parallel, out, out / CODES, sizes=semantic_id_sizes, seed=config.seed)
    return found | {"semantic_ids": codes}


def _write(
    table: EmbeddedTable | SequentialTable,
    reader: RecordReader,
    out: Path,
    shards: range,
    shard_rows: int,
    label: str | None,
    parallel: Parallel,
    dimension: int,
) -> Counts:
    """Write the files of these shards, whose rows are the table's; return their counts.
    Collective.
    """
    sizes = np.zeros((len(shards), 3), dtype=np.int64)  # kept, left out, labelled

    def write(number: int) -> None:
        place = number - shards.start
        stop = min(len(table), (place + 1) * shard_rows)
        identified = table.identify(place * shard_rows, stop)
        kept = identified.positions[identified.valid]
        sizes[place, :2] = len(kept), len(identified.positions) - len(kept)
        if (out / ids_file(number)).is_file():
            if label is not None:
                names = (out / labels_file(number)).read_text(encoding="utf-8").splitlines()
                sizes[place, 2] = sum(map(bool, names))
            return
        shape = (int(sizes[place, 0]), dimension)
        array = SharedArray(out / embeddings_file(number), shape, "float32")
        array.create()
        written = 0
        for start in range(place * shard_rows, stop, READ_ROWS):
            alone()
            found = table.read(start, min(stop, start + READ_ROWS))
            vectors = normalize(found.where(found.valid).fused, dim=-1).numpy()
            array.write(written, vectors)
            written += len(vectors)
        if label is not None:
            names = [_label(reader, position, label) for position in kept.tolist()]
            sizes[place, 2] = sum(map(bool, names))
            write_whole(out / labels_file(number), "".join(f"{name}\n" for name in names))
        ids = reader.ids(kept)
        write_whole(out / ids_file(number), "".join(f"{record_id}\n" for record_id in ids))

    in_turns(parallel, f"writing embeddings to {out}", shards, write)
    return [[int(number) for number in row] for row in sum_over_ranks(sizes)]


def _manifest_of(
    dataset: str, view: str, label: str | None, config: Config
) -> Callable[[Counts], JsonObject]:
    """Return what makes the manifest of the counts of all shards.

    It raises ConfigurationError where no record has the label.
    """

    def manifest(counts: Counts) -> JsonObject:
        if label is not None and not any(labelled for _, _, labelled in counts):
            raise ConfigurationError(
                f"label {label}: no record of '{dataset}' has this key; name one that they have"
            )
        return {
            "dataset": dataset,
            "view": view,
            "rows": sum(kept for kept, _, _ in counts),
            "left_out": sum(dropped for _, dropped, _ in counts),
            "dimensions": config.model.embedding,
            "prefixes": config.model.prefixes,
            "label": label,
            "shards": [
                {"embeddings": embeddings_file(number), "ids": ids_file(number), "rows": kept}
                for number, (kept, _, _) in enumerate(counts)
            ],
        }

    return manifest


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
    clear_parts(out)
    for pattern in (
        MANIFEST,
        "embeddings-*.npy",
        "ids-*.txt",
        "labels-*.txt",
    ):
        for path in out.glob(pattern):
            path.unlink()
    write_whole(note, json.dumps(about))
