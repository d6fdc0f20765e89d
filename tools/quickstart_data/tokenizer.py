"""Learn the pack's tokenizer: byte-level BPE, 8,192 entries, NFKC and lower case, from training
text only.

English is counted four times, because the text encoders of the quick start are mostly judged in
English; without that the 24 other languages of the emoji keywords would take most of the
vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from quickstart_data.splits import TRAIN
from sailplan.data.writer import Record

VOCABULARY = 8192
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0, 1, 2, 3
ENGLISH_WEIGHT = 4


def training_lines(records: Iterable[Record]) -> Iterator[str]:
    """Every training string, English ones repeated."""
    for record in records:
        if record.body["split"] != TRAIN:
            continue
        for field in [record.body.get("text", {}), *record.body.get("fields", {}).values()]:
            for language, value in sorted(field.items()):
                for text in [value] if isinstance(value, str) else value:
                    yield from [text] * (ENGLISH_WEIGHT if language == "en" else 1)


def train_tokenizer(records: Iterable[Record], path: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the import: one thread, one order
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True
    )  # "sun" and "the sun": one token
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(records), trainer)
    path.write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
