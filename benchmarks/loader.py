"""CPU seconds of loading 1,000 samples: this project's loader beside a plain webdataset pipeline.

Both read the same tar shards and decode, tokenise and stack with the same functions; what differs
is how records are found, ordered, dealt and handed over. The plain pipeline is what webdataset's
documentation shows: shards shuffled, a buffer of 1,000 samples shuffled, batched in the worker.
Each run is a process of its own; the two take turns, and the ratio is taken pair by pair. CPU
seconds are the operating system's, of the process and its workers, from the first batch asked for
to the workers' end; making the index is not in it (`sailplan data index`), starting workers is.

    python benchmarks/loader.py [--samples 4096] [--pairs 5] [--workers 0 1 2] [--out FILE]
    python benchmarks/loader.py --table docs/performance.md --out FILE  # from the results in FILE
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import webdataset
from documents import fill
from PIL import Image

from sailplan.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    PatternConfig,
    StageConfig,
    ViewConfig,
)
from sailplan.data.datasets import open_datasets
from sailplan.data.image import pixels_of
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.processor import ViewRow, processor_of
from sailplan.runtime.seeds import derive

BATCH, SHARD, SIDE, BUFFER = 256, 512, 224, 1000
SETS = ("pictures", "texts")
WORDS = [f"word{number}" for number in range(2000)]


# ------------------------------------------------------------------------------ the data
def sentence(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS, k=words))


def picture(source: np.random.Generator) -> bytes:
    """A JPEG of 256 x 256 with soft structure, about 12 kB."""
    small = source.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def write(root: Path, samples: int) -> None:
    """Pictures with captions as img2dataset writes them, pairs of texts, and a tokenizer."""
    texts, pixels = random.Random(0), np.random.default_rng(0)
    for name in SETS:
        (root / name).mkdir()
        pattern = str(root / name / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=SHARD, verbose=0) as writer:
            for number in range(samples):
                sample: dict[str, Any] = {"__key__": f"{number:08d}"}
                if name == "pictures":
                    sample |= {"jpg": picture(pixels), "txt": sentence(texts, 12)}
                else:
                    pair = {"query": sentence(texts, 8), "target": sentence(texts, 40)}
                    sample["json"] = json.dumps(pair)
                writer.write(sample)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=4096, special_tokens=["<pad>", "?"], show_progress=False
    )
    model.train_from_iterator(WORDS, trainer)
    model.save(str(root / "tokenizer.json"))


def configuration(root: Path, workers: int) -> Config:
    sets = {
        "pictures": DatasetConfig(
            shards=str(root / "pictures"),
            views={
                "picture": ViewConfig(modalities=["vision"]),
                "caption": ViewConfig(fields=["title"]),
            },
            patterns={"main": PatternConfig("picture", "caption")},
        ),
        "texts": DatasetConfig(
            shards=str(root / "texts"),
            kind="pairs",
            views={
                "query": ViewConfig(of="query", fields=["text"]),
                "target": ViewConfig(of="target", fields=["text"]),
            },
            patterns={"main": PatternConfig("query", "target")},
        ),
    }
    data = DataConfig(
        tokenizer=str(root / "tokenizer.json"),
        image_size=SIDE,
        max_tokens=64,
        workers=workers,
        sets=sets,
    )
    config = Config(data=data, global_batch=BATCH, stages={"first": StageConfig(steps=10**6)})
    config.step.micro_batch = BATCH
    return config


# ------------------------------------------------------------------------------ the contenders
def ours(root: Path, name: str, samples: int, workers: int) -> Callable[[], Iterator[int]]:
    config = configuration(root, workers)
    readers = open_datasets(config, names=[name])
    stage = config.stages["first"]
    plan = Plan(config, "first", stage, {name: 1.0}, readers)

    def batches() -> Iterator[int]:
        steps = samples // BATCH
        with StepLoader(plan, readers, config, stage, stop_step=steps) as loader:
            for (batch,) in loader:
                yield len(batch.record_ids)

    return batches


def plain(root: Path, name: str, samples: int, workers: int) -> Callable[[], Iterator[int]]:
    config = configuration(root, workers)
    processor, views = processor_of(config), config.data.sets[name].views

    def row(key: str, text: str = "", jpeg: bytes | None = None) -> ViewRow:
        images = () if jpeg is None else (processor.picture(pixels_of(jpeg)),)
        return ViewRow(id=derive(key), text=text, images=images)

    def decode(sample: dict[str, Any]) -> tuple[ViewRow, ViewRow]:
        key = sample["__key__"]
        if name == "pictures":
            return row(key, jpeg=sample["jpg"]), row(key, sample["txt"].decode())
        pair = json.loads(sample["json"])
        return row(key, pair["query"]), row(key, pair["target"])

    def stack(rows: list[tuple[ViewRow, ViewRow]]) -> list[Any]:
        made = []
        for view, column in zip(views.values(), zip(*rows, strict=True), strict=True):
            made.append(processor.batch(list(column), processor.tokens(list(column), view), view))
        return made

    def batches() -> Iterator[int]:
        shards = sorted(str(path) for path in (root / name).glob("*.tar"))
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
        pipeline = dataset.shuffle(BUFFER).map(decode).batched(BATCH, collation_fn=stack)
        loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers)
        for made in loader:
            yield made[0].rows

    return batches


CONTENDERS = {"ours": ours, "webdataset": plain}


def _run(theirs: Connection, contender: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    batches = CONTENDERS[contender](*arguments)
    before = _cpu()
    loaded = sum(batches())
    theirs.send((_cpu() - before, loaded))


def _cpu() -> float:
    """Seconds of user and system time of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(contender: str, *arguments: Any) -> float:
    """CPU seconds a 1,000 samples of one run, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours_end, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, contender, arguments))
    process.start()
    theirs.close()
    seconds, loaded = ours_end.recv()
    process.join()
    assert loaded >= arguments[2] // 2, f"{contender} loaded {loaded} samples"
    return 1000 * float(seconds) / int(loaded)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| set | workers | ours, CPU s per 1,000 | webdataset | ratio, median (lowest to highest) |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        lines.append(
            f"| {row['set']} | {row['workers']} | {row['ours']:.3f} | {row['webdataset']:.3f} | "
            f"{row['ratio']:.2f} ({spread}) |"
        )
    return "\n".join(lines)


def write_table(document: Path, results: Path) -> None:
    fill(document, "loader", table(json.loads(results.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="a document whose table is made of --out")
    options = parser.parse_args()
    if options.table:
        return write_table(options.table, options.out)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, options.samples)
        open_datasets(configuration(root, 0))  # the index, once
        for name in SETS:
            for workers in options.workers:
                found: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
                for pair in range(options.pairs + 1):  # the first is a warm-up
                    for contender, measured in found.items():
                        cost = measure(contender, root, name, options.samples, workers)
                        if pair:
                            measured.append(cost)
                ratios = [a / b for a, b in zip(found["ours"], found["webdataset"], strict=True)]
                rows.append(
                    {
                        "set": name,
                        "workers": workers,
                        **{key: statistics.median(values) for key, values in found.items()},
                        "ratio": statistics.median(ratios),
                        "ratios": ratios,
                    }
                )
                print(
                    f"{name:9} workers {workers}: ours {rows[-1]['ours']:.3f}, webdataset "
                    f"{rows[-1]['webdataset']:.3f} CPU s per 1,000; ratio {rows[-1]['ratio']:.3f} "
                    f"({min(ratios):.3f}-{max(ratios):.3f})",
                    flush=True,
                )
    if options.out:
        result = {
            "date": datetime.date.today().isoformat(),
            "device": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "torch": torch.__version__,
            "webdataset": webdataset.__version__,
            "samples": options.samples,
            "batch": BATCH,
            "side": SIDE,
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
