"""Risks: costs foreseen wrongly, ranks that do not agree, rows lost between ranks, padding and
imbalance that come back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
from sailplan.data.datasets import open_datasets
from sailplan.data.evaluation import EvaluationRows
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.order import keyed, keyed_integer
from sailplan.data.packing import OmniInputs
from sailplan.data.plan import Plan
from sailplan.data.record import HardNegatives, StepBatch
from sailplan.data.testing import json_member, micro_batches_of, write_set

Make = Callable[..., Config]


def collator(
    config: Config,
    weights: dict[str, float],
    rank: int = 0,
    size: int = 1,
    mixed: float = 0.0,
    store: HardNegativeStore | None = None,
) -> Collator:
    readers, stage = (
        open_datasets(config, names=weights),
        StageConfig(steps=50, mixed_fraction=mixed),
    )
    return Collator(
        config, stage, Plan(config, "first", stage, weights, readers), readers, rank, size, store
    )


def counted(maker: Collator, dataset: str, key: str, batch: StepBatch) -> np.ndarray:
    """Costs of a view batch's rows as they came, in the step's order."""
    config = maker.readers[dataset].config
    show = (
        config.views[key]
        if key in config.views
        else config.views[config.patterns[key.pattern].target]
    )
    costs = [
        cost for inputs in micro_batches_of(batch, key) for cost in of_inputs(maker, inputs, show)
    ]
    return np.array(costs)[batch.views[key].order.numpy()]


def of_inputs(maker: Collator, inputs: OmniInputs, view: ViewConfig) -> list[int]:
    none = torch.zeros(inputs.rows, 1)
    tokens = inputs.token_mask.sum(1) - len(maker.processor.tokenizer.prompt(view.prompt))
    media = [
        (mask if mask is not None else none).sum(1).long()
        for mask in (inputs.image_mask, inputs.audio_mask)
    ]
    return [
        maker.processor.counted(*map(int, row), view) for row in zip(tokens, *media, strict=True)
    ]


def foreseen(maker: Collator, step: int) -> list[dict[str, np.ndarray]]:
    return [
        {key: found.costs for key, found in maker.shares.foreseen(step, part).items()}
        for part in maker.plan.step(step).parts
    ]


def test_draws_of_one_row_and_of_all_rows_are_the_same() -> None:
    seeds = np.random.default_rng(0).integers(0, 2**63 - 1, 50)
    for parts in ((), (3,), (1, 2**62)):
        assert keyed(seeds, *parts).tolist() == [keyed_integer(int(seed), *parts) for seed in seeds]


@pytest.mark.parametrize("dataset", ["things", "choices", "graded", "histories"])
@pytest.mark.parametrize("drop", [0.0, 0.15, 1.0])
def test_costs_are_foreseen_with_their_draws(make_config: Make, dataset: str, drop: float) -> None:
    config = make_config(global_batch=64)
    for entry in config.data.sets.values():
        entry.field_drop, entry.language_weights = drop, {"en": 0.4, "fr": 0.1}
    maker = collator(config, {dataset: 1.0})
    for step in range(3):
        (batch,), (costs,) = maker.batches(step), foreseen(maker, step)
        assert set(costs) == set(batch.views)
        for key in batch.views:
            real = counted(maker, dataset, key, batch).reshape(costs[key].shape)
            if key == "keyword":  # one of two entries, counted with their mean
                assert np.abs(real - costs[key]).max() <= 2 and (real == costs[key]).mean() > 0.5
            else:
                assert np.array_equal(real, costs[key]), key


def test_costs_of_histories_and_negatives_are_foreseen(make_config: Make, tmp_path: Path) -> None:
    config = make_config(global_batch=32)
    bodies = [
        {
            "id": f"s/{n}",
            "history": [f"things/{(n * k) % 64}" for k in range(n % 7)],
            "target": f"things/{n % 64}",
            "negatives": [f"things/{n}"] * (n % 3),
        }
        for n in range(48)
    ]
    show = {"modalities": ["vision", "text"], "fields": ["title"]}
    config.data.sets["sequences"] = DatasetConfig(
        shards=str(
            write_set(
                tmp_path / "s", [[json_member(f"{n}", body)] for n, body in enumerate(bodies)]
            )
        ),
        kind="sequences",
        catalogue="things",
        views={
            "history": ViewConfig(of="history", **show),
            "target": ViewConfig(of="target", **show),
        },  # type: ignore[arg-type]
        patterns={"next": PatternConfig("history", "target")},
        history_length=4,
        negatives=2,
        language_weights={"en": 0.5},
    )
    mined = np.random.default_rng(0).integers(-1, 48, (48, 3))
    maker = collator(
        config,
        {"sequences": 1.0},
        store=HardNegativeStore({PatternKey("sequences", "next"): mined}),
    )
    (batch,), (costs,) = maker.batches(1), foreseen(maker, 1)
    assert {key: value.shape[1] for key, value in costs.items()} == {
        "history": 4,
        "target": 1,
        HardNegatives("next"): 5,
    }
    for key in batch.views:
        assert np.array_equal(
            counted(maker, "sequences", key, batch).reshape(costs[key].shape), costs[key]
        ), key


def quickstart(*overrides: str) -> Config:
    return compose(["experiment=quickstart", "global_batch=2048", *overrides])


def texts_alone(config: Config, name: str) -> Config:
    """Without pictures and sounds, whose share is the same in every row: dealing must be right
    for the text by itself.
    """
    for view in config.data.sets[name].views.values():
        view.modalities, view.fields = ["text"], view.fields or ["none"]
    return config


@pytest.mark.parametrize(
    ("name", "most"), [("icon_choices", 1.05), ("icons", 1.05), ("emoji", 1.08), ("prompts", 1.05)]
)
def test_no_rank_of_64_has_much_more_to_do_than_the_mean(
    name: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 ranks x 32 rows, text tokens alone.

    Emoji keywords are drawn from many of several lengths, which count with their mean.
    """
    monkeypatch.setattr("sailplan.data.plan.STREAMS", 64)  # a lane for each rank, to compare with
    config = texts_alone(quickstart(), name)
    one, many = collator(config, {name: 1.0}), collator(config, {name: 1.0}, size=64)
    (batch,), (share,) = one.batches(1), many.shares.step(1)
    real = np.sum([counted(one, name, key, batch) for key in batch.views], axis=0)
    by_rank, by_lanes = (
        np.bincount(owners, weights=real, minlength=64)
        for owners in (share.owners, np.arange(2048) % 64)
    )
    assert (
        by_rank.max() <= most * by_rank.mean() and np.bincount(share.owners).tolist() == [32] * 64
    )
    assert by_lanes.max() > 1.1 * by_lanes.mean(), "there was something to balance"


@pytest.mark.parametrize("budget", [0, 60])
@pytest.mark.parametrize("dealing", ["length", "lanes"])
def test_all_ranks_cut_alike_and_hold_the_step_together(
    make_config: Make, budget: int, dealing: str
) -> None:
    config = make_config(global_batch=32)
    config.step.token_budget, config.step.dealing, config.step.micro_batch = budget, dealing, 6
    weights = {"things": 1.0, "choices": 1.0, "histories": 1.0}
    whole = collator(config, weights, mixed=1.0)
    for step in (0, 3):
        expected = whole.batches(step)
        for size in (2, 4):
            ranks: list[list[StepBatch]] = [
                collator(config, weights, rank, size, mixed=1.0).batches(step)
                for rank in range(size)
            ]
            for place, batch in enumerate(expected):
                shares = [own[place] for own in ranks]
                assert {share.digest for share in shares} == {batch.digest} and len(
                    {len(share.record_ids) for share in shares}
                ) == 1
                assert sorted(name for share in shares for name in share.record_ids) == sorted(
                    batch.record_ids
                )
                for key in batch.views:
                    assert len({len(share.views[key].micro_batches) for share in shares}) == 1
                    for share in shares:
                        for inputs in share.views[key].micro_batches:
                            costs = of_inputs(
                                whole, inputs, whole.readers[batch.dataset].config.views[key]
                            )
                            assert inputs.rows <= 6 and (
                                not budget or sum(costs) <= budget * 1.1 or inputs.rows <= 1
                            )
    if dealing == "lanes":
        assert collator(config, weights, 1, 4).shares.step(0)[0].owners.tolist() == [0, 1, 2, 3] * 8


@pytest.mark.parametrize("dataset", ["things", "choices"])
def test_rows_without_tables_count_as_equally_long(make_config: Make, dataset: str) -> None:
    config = make_config()
    config.step.token_budget = 200
    makers = [collator(config, {dataset: 1.0}, rank, 4) for rank in range(4)]
    known = {maker.shares.fingerprint(1) for maker in makers}
    for maker in makers:
        for reader in {
            id(r): r
            for name in maker.readers
            for r in (maker.readers[name], maker.readers[name].catalogue)
            if r is not None
        }.values():
            reader.lengths = None
    assert makers[0].shares.step(1)[0].owners.tolist() == [0, 1, 2, 3] * 4
    assert len(known) == 1 and makers[0].shares.fingerprint(1) not in known, (
        "a rank that sees other lengths is noticed"
    )
    assert all(
        sum(inputs.rows for inputs in view.micro_batches) == 4
        for maker in makers
        for view in maker.batches(1)[0].views.values()
    )


@pytest.mark.parametrize(
    ("name", "view", "most"),
    [
        ("icon_choices", "text", 1.1),
        ("icons", "alias", 1.12),
        ("prompts", "transcript", 1.25),
        ("emoji", "name", 1.1),
    ],
)
def test_evaluation_pads_little(name: str, view: str, most: float) -> None:
    config = texts_alone(quickstart("evaluation.batch=64"), name)
    reader = open_datasets(config, names=[name])[name]
    rows = EvaluationRows(reader, reader.config.views[view], reader.positions()[:800], config)
    for ranks in (1, 4):
        real = padded = 0
        for own in rows.shares(ranks):
            for batch in own:
                inputs, _ = rows.inputs(batch)
                real, padded = (
                    real + int(inputs.token_mask.sum()),
                    padded + inputs.token_mask.numel(),
                )
        assert padded <= most * real, padded / real
    unsorted = sum(
        inputs.token_mask.numel()
        for start in range(0, len(rows), 64)
        for inputs in [rows.inputs(np.arange(start, min(start + 64, len(rows))))[0]]
    )
    assert unsorted > 1.4 * real
