"""A made-up pack and its configuration for tests: pictures with names, choices, histories, small
enough for seconds.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config, DatasetConfig, EvaluationTask, PatternConfig, ViewConfig
from sailplan.data.writer import Record, write_shards
from sailplan.model.testing import small_config

COLOURS = ("red", "green", "blue", "grey")
SHAPES = ("low", "middle", "high")


def picture(colour: int, shape: int, noise: np.random.Generator) -> bytes:
    """A WebP of 8 x 8 pixels: one colour, a bright line at one of three heights."""
    pixels = np.full((8, 8, 3), 40, dtype=np.uint8)
    if colour < 3:
        pixels[:, :, colour] = 200
    pixels[1 + 2 * shape : 3 + 2 * shape] = 255
    pixels = np.clip(pixels + noise.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return file.getvalue()


def write_pack(root: Path, items: int = 48, users: int = 20, held_out_seed: int = 0) -> Config:
    """Writes the sets `things` (items), `choices` (pairs), `histories` (sequences) and a
    tokenizer below root.

    Every fifth item, choice and user is held out. Two items have the same title; user u likes one
    colour. The returned configuration has them, the artifact sets `sequences` and `neighbours`, and
    one evaluation task of each kind.
    held_out_seed: changes the held-out pictures and nothing else.
    """
    noise = np.random.default_rng(0)
    colours, shapes = np.arange(items) % 4, np.arange(items) // 4 % 3
    split = ["held_out" if number % 5 == 0 else "train" for number in range(max(items, users))]
    things = []
    for number in range(items):
        name = f"{COLOURS[colours[number]]} {SHAPES[shapes[number]]} {'0' if number in (5, 10) else number}"
        name = "twin" if number in (5, 10) else name
        body: JsonObject = {
            "id": f"things/{number:03d}",
            "split": split[number],
            "fields": {"title": {"en": name}, "tags": {"en": [COLOURS[colours[number]]]}},
            "held_out_tags": {"en": [SHAPES[shapes[number]]]},
            "subgroup": COLOURS[colours[number]],
        }
        seed = (held_out_seed, number) if split[number] == "held_out" else (0, number)
        things.append(
            Record(body, picture(colours[number], shapes[number], np.random.default_rng(seed)))
        )
    choices = [
        {
            "id": f"choices/{number:03d}",
            "split": split[number],
            "text": {"en": f"want {COLOURS[colours[number]]} {number}"},
            "item": f"things/{number:03d}",
            "score": (number % 10) / 10,
        }
        for number in range(items)
    ]
    histories = []
    for user in range(users):
        liked = noise.permutation(np.flatnonzero(colours == user % 4))[:7]
        histories.append(
            {
                "id": f"histories/{user:03d}",
                "split": split[user],
                "items": [f"things/{number:03d}" for number in liked],
            }
        )
    write_shards(things, root / "things", "things", 20)
    write_shards([Record(body) for body in choices], root / "choices", "choices", 100)
    write_shards([Record(body) for body in histories], root / "histories", "histories", 100)
    words = [
        "[UNK]",
        "[PAD]",
        *COLOURS,
        *SHAPES,
        "want",
        "twin",
        "find",
        "item",
        "name",
        ":",
        "|",
        "title",
        "tags",
    ]
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    return pack_config(root)


def pack_config(root: Path) -> Config:
    """The configuration of `write_pack`'s sets."""
    item = ViewConfig(modalities=["vision", "text"], fields=["title"], prompt="item")
    history, target = (
        ViewConfig(of=of, modalities=["vision", "text"], fields=["title"], prompt="item")
        for of in ("history", "target")
    )
    config = Config(seed=1, model=small_config())
    config.model.vocabulary = 40
    config.data.root, config.data.tokenizer = str(root), str(root / "tokenizer.json")
    config.data.image_size, config.data.max_tokens = 8, 12
    config.evaluation.batch = 7
    pair_views = {
        "text": ViewConfig(of="query", modalities=["text"], fields=["text"], prompt="find"),
        "item": ViewConfig(
            of="target", modalities=["vision", "text"], fields=["title"], prompt="item"
        ),
    }
    sequence = {
        "kind": "sequences",
        "catalogue": "things",
        "history_length": 4,
        "views": {"history": history, "item": target},
    }
    to_item = {"history_to_item": PatternConfig("history", "item")}
    both = {
        "query": ViewConfig("query", ["vision", "text"], ["title"]),
        "item": ViewConfig("target", ["vision", "text"], ["title"]),
    }
    config.data.sets = {
        "things": DatasetConfig(
            shards=str(root / "things"),
            views={
                "image": ViewConfig(modalities=["vision"], prompt="name"),
                "name": ViewConfig(modalities=["text"], fields=["title"], prompt="name"),
                "keyword": ViewConfig(
                    modalities=["text"], fields=["tags"], pick="one", prompt="find"
                ),
                "item": item,
            },
            patterns={
                "image_to_name": PatternConfig("image", "name"),
                "keyword_to_item": PatternConfig("keyword", "item"),
            },
        ),
        "choices": DatasetConfig(
            shards=str(root / "choices"),
            kind="pairs",
            catalogue="things",
            views=pair_views,
            patterns={"text_to_item": PatternConfig("text", "item")},
        ),
        "histories": DatasetConfig(shards=str(root / "histories"), patterns=to_item, **sequence),  # type: ignore[arg-type]
        "sequences": DatasetConfig(shards="artifact:interests", patterns=to_item, **sequence),  # type: ignore[arg-type]
        "neighbours": DatasetConfig(
            shards="artifact:co_occurrence",
            kind="pairs",
            catalogue="things",
            views=both,
            patterns={"item_to_item": PatternConfig("query", "item")},
        ),
    }
    config.evaluation.tasks = {
        "names": EvaluationTask(
            "things",
            query="image",
            target="name",
            split="all",
            metrics=["recall", "prefixes", "auc", "gap", "bijection"],
            recall_at=[1, 5],
        ),
        "tags": EvaluationTask(
            "things",
            query="keyword",
            target="item",
            query_text="held_out_tags",
            split="all",
            candidates="all",
            recall_at=[1],
        ),
        "choice": EvaluationTask(
            "choices",
            query="text",
            target="item",
            candidates="all",
            metrics=["recall", "kendall", "overlap"],
            recall_at=[5],
        ),
        "labels": EvaluationTask(
            "things",
            kind="classification",
            query="image",
            target="keyword",
            split="all",
            recall_at=[1],
        ),
        "groups": EvaluationTask(
            "things",
            kind="clustering",
            query="item",
            split="all",
            label="subgroup",
            metrics=["nmi"],
        ),
        "completion": EvaluationTask(
            "histories",
            kind="sequence",
            query="history",
            target="item",
            candidates="all",
            recall_at=[5],
        ),
    }
    config.evaluation.benchmark = ["names", "choice"]
    return config
