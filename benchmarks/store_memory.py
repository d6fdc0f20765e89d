"""Memory of embedding and mining a set: what each rank needs above the model, at 1 and 2 ranks.

Made-up pairs of short texts, and an encoder that sums hashed words' vectors, so that time goes to
the store and the search. Embeds both views of all records, finds the matches, writes the
candidates, and searches the first blocks of queries of each rank against all candidates (a block
needs the same memory whichever it is). The peak is the kernel's (VmHWM, reset after a warm-up),
pages of mapped files included.

    python benchmarks/store_memory.py [--records 50000 200000] [--ranks 1 2 4] [--blocks 2] [--out FILE]
    python benchmarks/store_memory.py --table docs/recipe.md      # its table, from the results
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_memory import Value, measure_sizes, peak_of, peaks_table
from torch import nn

from sailplan.config.fields import Size
from sailplan.config.schema import (
    Config,
    DatasetConfig,
    HardNegativeConfig,
    PatternConfig,
    ViewConfig,
)
from sailplan.curriculum import hard_negatives
from sailplan.curriculum.hard_negatives import PatternMiner
from sailplan.data.datasets import open_datasets
from sailplan.data.processor import Processor
from sailplan.data.record import NamedInputs
from sailplan.data.writer import Record, write_tar
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.selection import SplitPositions
from sailplan.model.component import EncoderComponent
from sailplan.model.config import EncoderConfig
from sailplan.model.protocol import Embeddings, Encoder
from sailplan.model.testing import join_layout
from sailplan.runtime.arrays import SharedArray

PHASES = ("embed queries", "embed targets", "mining")
WORDS, SHARD = 4, 10_000


@dataclass
class Bag(EncoderConfig):
    buckets: Size = 5000

    def component(self) -> EncoderComponent:
        return BagComponent(self)


class _Words:
    digest = "words"

    def counts(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]


class BagProcessor(Processor):
    def __init__(self, buckets: int, max_tokens: int) -> None:
        self.tokenizer, self.buckets, self.max_tokens = _Words(), buckets, max_tokens

    def overhead(self, view: ViewConfig) -> int:
        return 0

    def tokens(self, rows: Any, view: ViewConfig) -> Any:
        crc, buckets, most = zlib.crc32, self.buckets, self.max_tokens
        return [
            [1 + crc(word.encode()) % buckets for word in row.text.split()][:most] for row in rows
        ]

    def batch(self, rows: Any, tokens: Any, view: ViewConfig) -> NamedInputs:
        ids = torch.zeros(len(rows), max(1, *map(len, tokens)) if tokens else 1, dtype=torch.int64)
        for row, words in enumerate(tokens):
            ids[row, : len(words)] = torch.tensor(words, dtype=torch.int64)
        return NamedInputs(tuple(view.modalities), {"ids": ids})

    def largest(self, modalities: Any, rows: int) -> NamedInputs:
        ids = torch.ones(rows, self.max_tokens, dtype=torch.int64)
        return NamedInputs(tuple(modalities), {"ids": ids})


class BagEncoder(Encoder):
    modalities = ("text",)

    def __init__(self, model: Bag) -> None:
        super().__init__()
        self.dimension = model.embedding
        torch.manual_seed(0)
        self.vectors = nn.Embedding(model.buckets + 1, model.embedding, padding_idx=0)

    def forward(self, inputs: Any, *, per_modality: bool = False) -> Embeddings:
        return Embeddings(self.vectors(inputs.named["ids"]).sum(1), {})


class BagComponent(EncoderComponent):
    def processor(self, config: Config) -> BagProcessor:
        return BagProcessor(self.model.buckets, config.data.max_tokens)

    def module(self, dtype: torch.dtype) -> BagEncoder:
        return BagEncoder(self.model)


def write_pairs(folder: Path, records: int) -> None:
    """Write pairs of texts that share half of their words."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, records, SHARD):
        count = min(SHARD, records - start)
        words = random.integers(0, 20_000, (count, 3, WORDS))
        texts = [[" ".join(f"w{word}" for word in part) for part in row] for row in words.tolist()]
        bodies = [
            {
                "id": f"p/{start + number}",
                "split": "train",
                "query": {"text": f"{both} {left}"},
                "target": {"text": f"{both} {right}"},
            }
            for number, (both, left, right) in enumerate(texts)
        ]
        write_tar([Record(body) for body in bodies], folder / f"pairs-{start // SHARD:06d}.tar")


def configuration(root: Path, dimension: int) -> Config:
    config = Config(seed=1, model=Bag(embedding=dimension, prefixes=[dimension]))
    config.data.root, config.data.max_tokens, config.evaluation.batch = str(root), 16, 256
    views = {
        "query": ViewConfig(of="query", modalities=["text"], fields=["text"]),
        "target": ViewConfig(of="target", modalities=["text"], fields=["text"]),
    }
    config.data.sets = {
        "pairs": DatasetConfig(
            shards=str(root / "pairs"),
            kind="pairs",
            views=views,
            patterns={"query_to_target": PatternConfig("query", "target")},
        )
    }
    return config


def write_set(root: Path, records: int, dimension: int) -> None:
    """Write the pairs and their index into a folder."""
    write_pairs(root / "pairs", records)
    open_datasets(configuration(root, dimension))


class _Enough(Exception):
    pass


def measure(rank: int, world_size: int, root: Path, dimension: int, blocks: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config, parallel = configuration(root, dimension), join_layout(1)
    reader = open_datasets(config)["pairs"]
    work = root / f"work-{world_size}"
    encoder = BagEncoder(config.model)
    context = RunContext(config, parallel, encoder, {}, {"pairs": reader}, work / "warm")
    Embedder(context).table(reader, "query", np.arange(2000))
    for dtype in (torch.float32, torch.float64):  # the products' own buffers: a model's, too
        torch.ones(512, dimension, dtype=dtype) @ torch.ones(dimension, 512, dtype=dtype)
    embedder = Embedder(
        RunContext(config, parallel, encoder, {}, {"pairs": reader}, work / "store")
    )
    found: dict[str, Any] = {}

    def phase(name: str, work: Callable[[], Value]) -> Value:
        result, found[name] = peak_of(work)
        found[name]["limit_bytes"] = int(0.3 * len(reader) * dimension * 4 / world_size)
        return result

    positions = SplitPositions(reader, "train")
    queries = phase("embed queries", lambda: embedder.table(reader, "query", positions))
    targets = phase("embed targets", lambda: embedder.table(reader, "target", positions))
    arrays = [
        SharedArray(work / f"{kind}.npy", (len(reader), 4), dtype)
        for kind, dtype in (("negatives", "int64"), ("scores", "float32"))
    ]
    miner = PatternMiner(
        parallel,
        reader,
        "query_to_target",
        queries,
        targets,
        positions,
        HardNegativeConfig(per_query=4),
        work / "pattern",
        arrays,
    )
    searched, nearest = [0], hard_negatives.nearest

    def few(*arguments: Any, **options: Any) -> Any:
        if searched[0] == blocks:
            raise _Enough
        searched[0] += 1
        return nearest(*arguments, **options)

    def mine() -> None:
        with contextlib.suppress(_Enough):
            miner.run(0, [])

    hard_negatives.nearest = few
    phase("mining", mine)
    found["searched_again"] = miner.stats.again
    return found


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""

    def limit(_: int, found: list[dict[str, Any]]) -> str:
        return f"{found[0]['mining']['limit_bytes'] / 1e6:.1f}"

    return peaks_table(result, PHASES, "limit, MB", limit)


if __name__ == "__main__":
    measure_sizes("store_memory", measure, write_set, table, mark="store-memory", blocks=2)
