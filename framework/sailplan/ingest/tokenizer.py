"""A tokenizer for models that have none: byte-level BPE of a bounded number of an imported set's
training texts.

The texts are the first ones of shards spread evenly over the data set, so the cost does not grow
with it. One thread, one
order: the same file for the same shards.
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from sailplan.config.fields import JsonObject
from sailplan.data.kinds import kind_of
from sailplan.data.names import readable, split_name
from sailplan.data.parse import decode_text, parse_json
from sailplan.data.shard_files import Shard, open_shard
from sailplan.data.tar import HeldOut
from sailplan.errors import BadDataError
from sailplan.runtime.files import write_whole

VOCABULARY = 8192
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0, 1, 2, 3
TEXTS = 100_000
SHARDS = 1000
LONGEST = 10_000  # characters of a text
MARGIN = 8  # tokens of a prompt


def training_texts(
    sets: Sequence[tuple[Sequence[Shard], HeldOut | None]], most: int = TEXTS
) -> Iterator[str]:
    """Yield texts of the training records of data sets (shards, rule of its held-out records),
    about `most` in all.
    """
    for shards, held_out in sets:
        chosen = [
            shards[place * len(shards) // min(len(shards), SHARDS)]
            for place in range(min(len(shards), SHARDS))
        ]
        share = max(1, most // max(1, len(sets) * len(chosen)))
        for shard in chosen:
            for text in itertools.islice(_texts(shard, held_out), share):
                yield text[:LONGEST]


def _texts(shard: Shard, held_out: HeldOut | None) -> Iterator[str]:
    """Texts of a shard's training records, read from its beginning."""
    key, body, captions = "", JsonObject(), list[str]()
    with (
        open_shard(shard) as file,
        tarfile.open(fileobj=cast(BinaryIO, file), mode="r|") as archive,
    ):
        for member in archive:
            name, extension = split_name(member.name)
            if name != key:
                yield from _training(shard, key, body, captions, held_out)
                key, body, captions = name, {}, []
            opened = (
                archive.extractfile(member)
                if member.isfile() and kind_of(extension) in ("json", "text")
                else None
            )
            if opened is None:
                continue
            content = opened.read()
            if kind_of(extension) == "text":
                captions.append(decode_text(content).text)
            else:
                with suppress(ValueError):
                    body = parse_json(content)
    yield from _training(shard, key, body, captions, held_out)


def _training(
    shard: Shard, key: str, body: dict[str, object], captions: list[str], held_out: HeldOut | None
) -> Iterator[str]:
    record_id = body.get("id") or f"{shard.stem}/{readable(key)}"
    split = body.get("split") or (
        "train" if held_out is None else held_out.split(str(record_id), body)
    )
    if split == "train":
        parts = [body.get(part) for part in ("fields", "text", "query", "target", "negatives")]
        yield from (text for text in [*captions, *_strings(parts)] if text.strip())


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key != "id":
                yield from _strings(entry)


def train_tokenizer(texts: Iterable[str], path: Path) -> int:
    """Write a tokenizer.json learned from texts; return how many tokens 95 of 100 texts have at
    most, and a prompt.

    Raises BadDataError without a text.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the import: one thread, one order
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    sample: list[str] = []
    count = 0

    def noted() -> Iterator[str]:
        nonlocal count
        for text in texts:
            count += 1
            if len(sample) < 2000:
                sample.append(text)
            yield text

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(noted(), trainer)
    if not count:
        raise BadDataError(
            f"{path}: no training text to learn a tokenizer from; give one with --tokenizer FILE"
        )
    write_whole(path, tokenizer.to_str(pretty=False) + "\n")
    lengths = sorted(
        len(encoding.ids) for encoding in tokenizer.encode_batch(sample, add_special_tokens=False)
    )
    return lengths[int(0.95 * (len(lengths) - 1))] + MARGIN
