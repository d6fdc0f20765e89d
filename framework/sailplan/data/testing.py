"""Made-up shards for tests: an items catalogue with pictures and sounds, pairs, histories, and a
tokenizer for them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import tokenizers
from PIL import Image

from sailplan.config.fields import JsonObject, Options
from sailplan.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    PatternConfig,
    StepConfig,
    ViewConfig,
)
from sailplan.data.index import ShardIndex
from sailplan.data.manifest import Manifest
from sailplan.data.record import EncoderInputs, StepBatch, ViewKey
from sailplan.data.tables import Tables

WORDS = [
    "red",
    "blue",
    "green",
    "round",
    "flat",
    "fish",
    "bird",
    "tree",
    "boat",
    "house",
    "sun",
    "moon",
    "star",
    "wheel",
    "apple",
    "stone",
]
Member = tuple[str, bytes]


def tar_bytes(members: Sequence[Member]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_set(folder: Path, records: Sequence[Sequence[Member]], per_shard: int = 16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(records), per_shard):
        members = [member for record in records[start : start + per_shard] for member in record]
        (folder / f"part-{start // per_shard:03d}.tar").write_bytes(tar_bytes(members))
    return folder


def repeated(index: ShardIndex, copies: int) -> ShardIndex:
    """Return the index as of so many times its shards, all of them the same files: a set of a
    size that no test can write out.
    """
    known = index.tables
    index.shards = index.shards * copies
    index._use(Tables(known._sources, np.tile(known._source, copies), np.tile(known._row, copies)))
    return index


def synthetic_set(folder: Path, shards: Sequence[Path], copies: int) -> list[Path]:
    """Make a folder of many shards, links to a few, with the manifest that indexing all of them
    would write; return their paths.
    """
    folder.mkdir(parents=True)
    linked = [folder / f"s{number:06d}.tar" for number in range(len(shards) * copies)]
    for number, link in enumerate(linked):
        link.symlink_to(shards[number % len(shards)].resolve())
    ShardIndex(linked[: len(shards)])
    (file,) = (folder / ".index").glob("*.manifest")
    repeat_manifest(file, [link.name for link in linked])
    return linked


def repeat_manifest(file: Path, names: Sequence[str]) -> None:
    """Rewrite a manifest: its shards, in the order of their names, stand for others over and
    over.
    """
    known = Manifest.load(file)
    assert known is not None
    order, count = np.argsort(known.names), len(known.names)
    copies, place = len(names) // count, np.argsort(order)
    tag_rows = np.add.outer(np.arange(copies) * count, place[known.tag_rows]).reshape(-1)
    codes, counts = np.tile(known.tag_codes, copies), np.tile(known.tag_counts, copies)
    Manifest(
        known.blob,
        known.end,
        list(names),
        np.tile(known.rows[order], copies),
        known.tags,
        tag_rows,
        codes,
        counts,
    ).save(file)


def json_member(key: str, body: object) -> Member:
    return f"{key}.json", json.dumps(body, ensure_ascii=False).encode()


def png(number: int, size: int = 16) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(number: int, seconds: float = 0.4, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(
        file,
        np.random.default_rng(number).standard_normal(int(seconds * rate)).astype(np.float32) * 0.1,
        rate,
        format="WAV",
    )
    return file.getvalue()


def item_body(number: int) -> JsonObject:
    first, second = WORDS[number % 16], WORDS[(number // 16 + number) % 16]
    return {
        "id": f"things/{number}",
        "split": "held_out" if number % 10 == 9 else "train",
        "fields": {
            "title": {"en": f"{first} {second} {number}", "de": f"das {first} {number}"},
            "tags": {"en": [first, second], "fr": [f"le {first}"]},
        },
        "held_out_tags": {"en": [f"kept {second}"]} if number % 2 else {},
        "group": number % 3,
    }


def item_record(number: int) -> list[Member]:
    key = f"{number:06d}"
    members = [json_member(key, item_body(number)), (f"{key}.png", png(number))]
    return members + [(f"{key}.wav", wav(number))] * (number % 4 == 0)


def write_shards(root: Path) -> None:
    """things (64 items), choices (40 text -> item), graded (40 item -> item with score),
    histories (24), tokenizer.json.
    """
    write_set(root / "things", [item_record(number) for number in range(64)])
    choices = [
        {
            "id": f"choices/{n}",
            "text": {"en": f"choose {WORDS[n % 16]} {n}"},
            "item": f"things/{n}",
            "user": f"u{n % 5}",
        }
        for n in range(40)
    ]
    write_set(root / "choices", [[json_member(f"{n}", body)] for n, body in enumerate(choices)])
    graded = [
        {"id": f"graded/{n}", "query": f"things/{n}", "item": f"things/{n + 1}", "score": n / 40}
        for n in range(40)
    ]
    write_set(root / "graded", [[json_member(f"{n}", body)] for n, body in enumerate(graded)])
    histories = [
        {
            "id": f"histories/{n}",
            "items": [f"things/{(n * 7 + k * 3) % 64}" for k in range(2 + n % 12)],
        }
        for n in range(24)
    ]
    write_set(root / "histories", [[json_member(f"{n}", body)] for n, body in enumerate(histories)])
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<pad>", "?"], show_progress=False
    )
    model.train_from_iterator(
        [*WORDS, "title: tags: Find the: | , 0 1 2 3 4 5 6 7 8 9 choose le das kept"], trainer
    )
    model.save(str(root / "tokenizer.json"))


def made_up_config(
    root: Path, global_batch: int = 16, micro_batch: int = 5, seed: int = 3, **data: object
) -> Config:
    """A configuration over the shards that `write_shards(root)` wrote; keyword arguments replace
    fields of DataConfig.
    """
    text = ViewConfig(fields=["title"], prompt="Find the:")
    item_views = {
        "title": text,
        "image": ViewConfig(modalities=["vision"]),
        "keyword": ViewConfig(fields=["tags"], pick="one"),
        "full": ViewConfig(modalities=["vision", "audio", "text"], fields=["title", "tags"]),
        "sound": ViewConfig(modalities=["audio"]),
    }
    target = ViewConfig(of="target", modalities=["vision", "text"], fields=["title", "tags"])
    sets = {
        "things": DatasetConfig(
            shards=str(root / "things"),
            views=item_views,
            patterns={
                "image_title": PatternConfig("image", "title"),
                "keyword_full": PatternConfig("keyword", "full", 0.5),
            },
            image_augmentation=0.5,
        ),
        "choices": DatasetConfig(
            shards=str(root / "choices"),
            kind="pairs",
            catalogue="things",
            views={"query": ViewConfig(of="query", fields=["text"]), "target": target},
            patterns={"q2i": PatternConfig("query", "target")},
        ),
        "graded": DatasetConfig(
            shards=str(root / "graded"),
            kind="pairs",
            catalogue="things",
            views={"query": ViewConfig(of="query", modalities=["vision"]), "target": target},
            patterns={"i2i": PatternConfig("query", "target")},
        ),
        "histories": DatasetConfig(
            shards=str(root / "histories"),
            kind="sequences",
            catalogue="things",
            views={
                "history": ViewConfig(of="history", modalities=["vision"]),
                "target": ViewConfig(of="target", modalities=["vision"]),
            },
            patterns={"next": PatternConfig("history", "target")},
            history_length=4,
        ),
    }
    options: Options = {
        "segment": 4,
        "window": 8,
        "max_tokens": 24,
        "image_size": 16,
        "audio_rate": 8000,
        "mel_bins": 16,
    }
    options |= {
        "audio_chunk_seconds": 1.0,
        "tokenizer": str(root / "tokenizer.json"),
        "sets": sets,
    } | data
    return Config(
        seed=seed,
        global_batch=global_batch,
        step=StepConfig(micro_batch=micro_batch),
        data=DataConfig(**options),
    )


def micro_batches_of(batch: StepBatch, key: ViewKey) -> Sequence[EncoderInputs]:
    """Return the micro-batches that hold the items of a view batch."""
    return batch.views[batch.views[key].encoded_with or key].micro_batches
