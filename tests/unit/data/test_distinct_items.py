"""Risks: an item that several rows of a step show is encoded for each of them; rows that must draw
for themselves share one encoding; ranks cut a view into other numbers of micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sailplan.config.compose import compose
from sailplan.config.schema import (
    Config,
    DatasetConfig,
    PatternConfig,
    PatternKey,
    StageConfig,
    ViewConfig,
)
from sailplan.data.collate import Collator
from sailplan.data.costs import RowCosts
from sailplan.data.datasets import open_datasets
from sailplan.data.decoding import ItemDecoder
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.plan import Plan
from sailplan.data.reader import RecordReader
from sailplan.data.record import HardNegatives, StepBatch, ViewKey
from sailplan.data.shares import PartShares
from sailplan.data.testing import item_record, json_member, micro_batches_of, write_set

Make = Callable[..., Config]


def collator(
    config: Config,
    name: str,
    rank: int = 0,
    size: int = 1,
    store: HardNegativeStore | None = None,
) -> Collator:
    readers, stage = open_datasets(config, names=[name]), StageConfig(steps=50)
    plan = Plan(config, "first", stage, {name: 1.0}, readers)
    return Collator(config, stage, plan, readers, rank, size, store)


def encoded(batch: StepBatch, key: ViewKey) -> int:
    return sum(inputs.rows for inputs in micro_batches_of(batch, key))


def sequences(config: Config, folder: Path, count: int = 48) -> Config:
    """Histories of 64 items with a recorded target and one negative, in two languages, pictures
    changed at random.
    """
    bodies = [
        {
            "id": f"s/{n}",
            "history": [f"things/{(n * k) % 16}" for k in range(n % 6)],
            "target": f"things/{n % 20}",
            "negatives": [f"things/{(n + 1) % 20}"],
        }
        for n in range(count)
    ]
    show = {"modalities": ["vision", "text"], "fields": ["title"]}
    config.data.sets["sequences"] = DatasetConfig(
        shards=str(
            write_set(folder, [[json_member(f"{n}", body)] for n, body in enumerate(bodies)])
        ),
        kind="sequences",
        catalogue="things",
        views={
            "history": ViewConfig(of="history", **show),  # type: ignore[arg-type]
            "target": ViewConfig(of="target", **show),  # type: ignore[arg-type]
        },
        patterns={"next": PatternConfig("history", "target")},
        history_length=4,
        negatives=1,
        language_weights={"en": 0.5},
        image_augmentation=0.5,
    )
    return config


@pytest.mark.parametrize("size", [1, 2, 3])
def test_histories_targets_and_negatives_share_the_items_of_a_step(
    make_config: Make, tmp_path: Path, size: int
) -> None:
    config = sequences(make_config(global_batch=30, micro_batch=4), tmp_path / "s")
    mined = np.random.default_rng(0).integers(-1, 48, (48, 2))
    store = HardNegativeStore({PatternKey("sequences", "next"): mined})
    counts = set()
    for rank in range(size):
        maker = collator(config, "sequences", rank, size, store)
        (batch,) = maker.batches(1)
        assert {key: view.encoded_with for key, view in batch.views.items()} == {
            "history": "target",
            "target": None,
            HardNegatives("next"): "target",
        }
        valid = [view.ids[view.valid] for view in batch.views.values()]
        items = torch.cat(valid).unique()
        shown = {
            (int(number), int(place))
            for view in batch.views.values()
            for number, place in zip(view.ids, view.order, strict=True)
        }
        assert len(shown) == len({place for _, place in shown}) == len(items) + 1  # and nothing
        micro_batches = micro_batches_of(batch, "target")
        # Exactly these rows, in as few micro-batches as the fullest rank needs.
        assert encoded(batch, "target") == len(items) + 1
        counts.add(len(micro_batches))
        assert len(torch.cat(valid)) > 1.3 * len(items), "there was something to share"
    assert len(counts) == 1
    assert counts.pop() <= -(-21 // 4), "20 items and nothing fit into six"


def test_the_quick_start_s_histories_encode_half_of_their_rows() -> None:
    config = compose(["experiment=quickstart"])
    config.global_batch = 64
    (batch,) = collator(config, "icon_histories").batches(3)
    rows = sum(len(view.order) for view in batch.views.values())
    ids = torch.cat([view.ids for view in batch.views.values()])
    assert rows == 704
    assert encoded(batch, "item") == len(ids.unique()) < 352


def test_equal_texts_are_encoded_once(make_config: Make, tmp_path: Path) -> None:
    config = make_config(global_batch=32)
    records = []
    for number in range(64):
        members = [(n, c) for n, c in item_record(number) if not n.endswith("json")]
        label = {"en": ("red", "green", "Green")[number % 3]}
        body = {"id": f"things/{number}", "fields": {"label": label}}
        records.append([*members, json_member(members[0][0].split(".")[0], body)])
    things = config.data.sets["things"]
    things.shards = str(write_set(tmp_path / "labels", records))
    things.views = {
        "image": ViewConfig(modalities=["vision"]),
        "label": ViewConfig(modalities=["text"], fields=["label"]),
    }
    things.patterns = {"name": PatternConfig("image", "label")}
    (batch,) = collator(config, "things").batches(0)
    assert (encoded(batch, "image"), encoded(batch, "label")) == (32, 3)
    assert len(batch.views["label"].ids.unique()) == 2, "letters' case is no difference for a loss"


def test_two_views_of_an_item_draw_for_themselves(make_config: Make) -> None:
    """Else the two sides of a pattern that contrasts an item with itself would be equal."""
    config = make_config(global_batch=16)
    things = config.data.sets["things"]
    things.image_augmentation = 0.5
    things.views = {name: ViewConfig(modalities=["vision"]) for name in ("one", "other")}
    things.patterns = {"self": PatternConfig("one", "other")}
    (batch,) = collator(config, "things").batches(0)
    drawn = []
    for name, view in batch.views.items():
        assert view.encoded_with is None and encoded(batch, name) == 16
        changes = [inputs.image_augmentation for inputs in view.micro_batches]  # type: ignore[attr-defined]
        drawn.append(torch.cat(changes)[view.order])
    assert not (drawn[0] == drawn[1]).all(1).any()


def test_more_items_than_were_foreseen_still_fit(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spares bring items that no rank foresaw; the number of micro-batches is agreed already."""
    config = sequences(make_config(global_batch=30, micro_batch=4), tmp_path / "s")
    maker = collator(config, "sequences")
    (known,) = maker.shares.step(1)
    monkeypatch.setattr(
        maker.shares, "step", lambda step: [PartShares(known.owners, {"target": 2})]
    )
    (batch,) = maker.batches(1)
    rows = [inputs.rows for inputs in micro_batches_of(batch, "target")]
    assert len(rows) == 2 and sum(rows) == int(
        torch.cat([view.order for view in batch.views.values()]).max() + 1
    )


def looked_at(
    config: Config, monkeypatch: pytest.MonkeyPatch, rows: int, ranks: int, dealing: str
) -> dict[str, int]:
    """Return what one of `ranks` ranks with `rows` rows each asks for in a step, counted."""
    config.global_batch = rows * ranks
    config.step.dealing, config.step.token_budget = dealing, 0  # type: ignore[assignment]
    maker, found = collator(config, "sequences", ranks - 1, ranks), Counter[str]()
    read, item, foreseen = RecordReader.read, ItemDecoder.rows, RowCosts.foreseen

    def reading(self: RecordReader, *arguments: Any, **options: Any) -> Any:
        found["records"] += 1
        return read(self, *arguments, **options)

    def showing(self: ItemDecoder, items: Any, key: ViewKey, *more: Any) -> Any:
        shown = item(self, items, key, *more)
        found[f"rows of {key}"] += len(shown)
        return shown

    def costing(self: RowCosts, reader: Any, view: Any, positions: Any, *more: Any) -> Any:
        found["rows whose costs are looked up"] += len(positions)
        found["look-ups of costs"] += 1
        return foreseen(self, reader, view, positions, *more)

    with monkeypatch.context() as patch:
        patch.setattr(RecordReader, "read", reading)
        patch.setattr(ItemDecoder, "rows", showing)
        patch.setattr(RowCosts, "foreseen", costing)
        (batch,) = maker.batches(1)
    found["encoded"] = encoded(batch, "target")
    return dict(found)


def test_what_a_rank_asks_for_grows_with_its_rows_not_with_the_ranks(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 64 ranks: records and shown items of its own rows alone; only rows that are dealt by
    length are looked up whoever has them, once in each view, in one call of each.
    """
    config = sequences(make_config(micro_batch=4), tmp_path / "s", 48)
    few, many, twice = (
        looked_at(config, monkeypatch, rows, ranks, "lanes")
        for rows, ranks in ((8, 4), (8, 64), (16, 64))
    )
    assert "look-ups of costs" not in many, "nothing depends on them"
    for found, rows in ((few, 8), (many, 8), (twice, 16)):
        assert rows <= found["records"] <= 2 * rows, "a bad record has a spare"
        assert found["rows of target"] == rows and found["encoded"] <= rows * (4 + 1 + 1) + 1
        assert found["rows of history"] == 4 * rows
    dealt = {
        (rows, ranks): looked_at(config, monkeypatch, rows, ranks, "length")
        for rows, ranks in ((8, 4), (8, 64), (16, 64))
    }
    for (rows, ranks), found in dealt.items():
        assert found["rows whose costs are looked up"] == rows * ranks * 2, "history and target"
        assert found["look-ups of costs"] == 2
        assert found["records"] <= 2 * rows
