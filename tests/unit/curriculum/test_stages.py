"""A stage's start on a made-up pack: nothing held out gets in, the same on any number of ranks,
resume computes nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sailplan.config.compose import compose
from sailplan.config.schema import (
    BalanceConfig,
    Config,
    HardNegativeConfig,
    StageConfig,
    SubsetConfig,
)
from sailplan.curriculum.hard_negatives import matched
from sailplan.curriculum.histories import read_histories
from sailplan.curriculum.stages import (
    StageState,
    check_stage,
    load_stage,
    prepare_stage,
    refresh_hard_negatives,
)
from sailplan.curriculum.testing import write_pack
from sailplan.data.config import INTEREST_VIEWS, HeldOutConfig, InterestsConfig
from sailplan.data.datasets import open_datasets
from sailplan.embed.context import RunContext
from sailplan.embed.embedding import embed_view
from sailplan.errors import ConfigurationError, SailplanError
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan.runtime.main_rank import on_main
from sailplan_kernels.testing import RankFailure, run_ranks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    found = write_pack(tmp_path_factory.mktemp("pack"))
    found.parallel.dtype = "float64"
    found.stages = {
        "selected": StageConfig(
            data={"things": 1.0, "choices": 3.0},
            balance=BalanceConfig(sample=30, clusters=4),
            subset=SubsetConfig(nearest=0.5, drop_noisy=0.25, sets=["things"]),
            hard_negatives=HardNegativeConfig(per_query=3, sample=30),
        ),
        "collaborative": StageConfig(
            data={"sequences": 1.0, "neighbours": 1.0},
            artifacts=["interests", "teachers", "co_occurrence"],
        ),
    }
    return found


def prepared(rank: int, world_size: int, config: Config, name: str, folder: Path) -> dict[str, Any]:
    parallel = join_layout(1)
    encoder = build_encoder(config.model, config.parallel, parallel, seed=0)
    context = RunContext(config, parallel, encoder, {}, open_datasets(config))
    recorded = set(context.readers)
    state = prepare_stage(context, name, folder)
    negatives = {} if state.negatives is None else state.negatives.positions
    return {
        "weights": state.weights,
        "subsets": {key: value.tolist() for key, value in state.subsets.items()},
        "negatives": {str(key): value.tolist() for key, value in negatives.items()},
        "thresholds": {str(key): value.full for key, value in state.thresholds.items()},
        "made": {
            name: [reader.body(position) for position in range(len(reader))]
            for name, reader in context.readers.items()
            if name not in recorded
        },
        "teachers": None if state.teachers is None else state.teachers.ids,
    }


def read_back(config: Config, folder: Path, done: int) -> StageState:
    return load_stage(config, open_datasets(config), "selected", folder, done)


@pytest.mark.parametrize("name", ["selected", "collaborative"])
def test_a_stage_starts_the_same_on_any_number_of_ranks(
    config: Config, tmp_path: Path, name: str
) -> None:
    alone = run_ranks(prepared, 1, config, name, tmp_path / name)[0]
    for found in run_ranks(prepared, 3, config, name, tmp_path / "three" / name, timeout=120):
        assert found["weights"] == pytest.approx(alone["weights"], abs=1e-6)
        assert found["thresholds"] == pytest.approx(alone["thresholds"], abs=1e-6)
        for part in ("subsets", "negatives", "made", "teachers"):
            assert found[part] == alone[part], part


def test_a_stage_makes_sequences_from_timed_events(config: Config, tmp_path: Path) -> None:
    """The whole way: events -> views by the model's vectors -> shards -> data set; the same on
    any number of ranks.
    """
    random = np.random.default_rng(0)
    rows = [
        {
            "user": user,
            "item": f"things/{item:03d}",
            "time": time,
            "labels": random.permutation(["like", "share", "save", "view"])[:3].tolist(),
        }
        for user in range(30)
        for time, item in enumerate(random.permutation(48)[:9].tolist())
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    timed = replace(
        config.data.sets["sequences"],
        interests=InterestsConfig(str(tmp_path / "log.jsonl"), positive=["like", "share", "save"]),
    )
    run = replace(config, data=replace(config.data, sets={**config.data.sets, "timed": timed}))
    run.stages = {"timed": StageConfig(data={"timed": 1.0}, artifacts=["interests"])}
    check_stage("timed", run.stages["timed"], run)
    alone = run_ranks(prepared, 1, run, "timed", tmp_path / "one")[0]
    assert [found["made"] for found in run_ranks(prepared, 2, run, "timed", tmp_path / "two")] == [
        alone["made"]
    ] * 2
    bodies = alone["made"]["timed"]
    assert {view for body in bodies for view in body["views"]} == set(INTEREST_VIEWS)
    times = {(str(row["user"]), row["item"]): row["time"] for row in rows}
    for body in bodies:
        shown = [times[body["user"], item] for item in (*body["history"], body["target"])]
        assert shown == sorted(shown) and shown[-1] == 8 and len(body["history"]) <= 4
    with pytest.raises(ConfigurationError, match=r"sets\.timed\.held_out\.by=id: expected user"):
        run.data.sets["timed"] = replace(timed, held_out=HeldOutConfig())
        check_stage("timed", run.stages["timed"], run)


def test_selection_keeps_its_promises(config: Config, tmp_path: Path) -> None:
    found = run_ranks(prepared, 1, config, "selected", tmp_path / "selected")[0]
    readers = open_datasets(config)
    train = readers["things"].positions("train").tolist()
    assert set(found["subsets"]["things"]) <= set(train)
    assert len(found["subsets"]["things"]) == round(round(len(train) * 0.5) * 0.75)
    assert sum(found["weights"].values()) == pytest.approx(1.0)
    assert (
        set(found["negatives"])
        == set(found["thresholds"])
        == {"things/image_to_name", "choices/text_to_item"}
    )
    choices = readers["choices"]
    held_out = set(choices.positions("held_out").tolist())
    for position, negatives in enumerate(found["negatives"]["choices/text_to_item"]):
        assert not held_out & set(negatives)
        if position in held_out:
            assert set(negatives) == {-1}
        own = choices.body(position)["item"]
        assert all(choices.body(negative)["item"] != own for negative in negatives if negative >= 0)
    told = json.loads((tmp_path / "selected" / "state.json").read_text())
    assert told["thresholds"]["things/image_to_name"]["tp"] > 0
    assert told["subsets"] == {"things": len(found["subsets"]["things"])}
    assert set(told["balance"]["things"]) == {"names", "choice", "mean", "error"}
    stage = replace(
        config.stages["selected"], hard_negatives=HardNegativeConfig(mask_in_batch=False)
    )
    unmasked = replace(config, stages={"selected": stage})
    assert (
        read_back(config, tmp_path / "selected", 0).thresholds
        and not read_back(unmasked, tmp_path / "selected", 0).thresholds
    )
    assert all(
        "score" in negative
        for example in told["examples"]["choices/text_to_item"]
        for negative in example["negatives"]
    )


def test_held_out_users_never_reach_the_artifacts(config: Config, tmp_path: Path) -> None:
    reader = open_datasets(config)["histories"]
    bodies = [reader.body(position) for position in range(len(reader))]
    held_out = {body["id"] for body in bodies if body["split"] == "held_out"}
    train_items = {item for body in bodies if body["split"] == "train" for item in body["items"]}
    assert held_out and not held_out & set(read_histories(reader).users)
    found = run_ranks(prepared, 1, config, "collaborative", tmp_path / "collaborative")[0]
    assert set(found["teachers"]) == train_items
    pairs = {frozenset((body["query"], body["item"])) for body in found["made"]["neighbours"]}
    together = [set(body["items"]) for body in bodies if body["split"] == "train"]
    assert pairs and all(sum(pair <= items for items in together) >= 2 for pair in pairs)
    owner = {body["id"]: set(body["items"]) for body in bodies}
    for body in found["made"]["sequences"]:
        assert body["user"] not in held_out
        assert {*body["history"], body["target"]} <= owner[body["user"]]
        assert body["target"] not in body["history"] and len(body["history"]) <= 4


def test_resume_reads_back_the_same_and_refresh_carries_its_step(
    config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "selected"

    def run(rank: int, world_size: int) -> None:
        parallel = join_layout(1)
        encoder = build_encoder(config.model, config.parallel, parallel, seed=0)
        context = RunContext(config, parallel, encoder, {}, open_datasets(config))
        first = prepare_stage(context, "selected", folder)
        other = replace(
            context, encoder=build_encoder(config.model, config.parallel, parallel, seed=9)
        )
        fresh = refresh_hard_negatives(other, "selected", folder, first, 40)
        assert first.negatives is not None and fresh.negatives is not None
        assert first.thresholds != fresh.thresholds and first.weights == fresh.weights
        for done, wanted in ((1, first), (39, first), (40, fresh), (70, fresh)):
            back = read_back(config, folder, done)
            assert back.negatives is not None and wanted.negatives is not None
            assert back.thresholds == wanted.thresholds and back.weights == first.weights
            assert all(
                np.array_equal(back.negatives.positions[key], table)
                for key, table in wanted.negatives.positions.items()
            )
            assert all(
                np.array_equal(back.subsets[key], kept) for key, kept in first.subsets.items()
            )
        again = prepare_stage(context, "selected", folder)
        assert (
            read_back(config, folder, 70).thresholds == again.thresholds == first.thresholds
        )  # the given-up refresh is gone

    run_ranks(run, 1)
    (folder / "state.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no state\.json"):
        read_back(config, folder, 1)


def test_a_set_that_the_stage_does_not_make_is_refused(config: Config, tmp_path: Path) -> None:
    stage = StageConfig(data={"sequences": 1.0})
    broken = Config(
        data=config.data, model=config.model, parallel=config.parallel, stages={"alone": stage}
    )
    with pytest.raises(RankFailure, match=r"stages\.alone\.data\.sequences") as caught:
        run_ranks(prepared, 1, broken, "alone", tmp_path)
    assert isinstance(caught.value.__cause__, ConfigurationError)


def test_a_failure_on_rank_0_reaches_all_ranks() -> None:
    def attempt(rank: int, world_size: int) -> str:
        def work() -> None:
            raise OSError("disk full")

        try:
            on_main(join_layout(1), "saving", work)
        except (OSError, SailplanError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    assert run_ranks(attempt, 2) == [
        "OSError: disk full",
        "SailplanError: saving failed on rank 0: OSError: disk full",
    ]


def test_graded_pairs_below_the_positive_score_are_no_matches(config: Config) -> None:
    reader = open_datasets(config)["choices"]
    scores = np.array([reader.body(position)["score"] for position in range(len(reader))])
    assert matched(reader, np.arange(len(reader))).tolist() == (scores > 0).tolist()
    assert matched(open_datasets(config)["things"], np.arange(48)).all()


def test_embeddings_keep_the_order_of_the_positions(config: Config) -> None:
    def embed(rank: int, world_size: int) -> None:
        parallel = join_layout(1)
        encoder = build_encoder(config.model, config.parallel, parallel, seed=0)
        reader = open_datasets(config)["things"]
        shuffled = np.random.default_rng(0).permutation(len(reader))
        straight = embed_view(
            encoder, reader, "item", np.arange(len(reader)), parallel=parallel, config=config
        )
        found = embed_view(encoder, reader, "item", shuffled, parallel=parallel, config=config)
        assert torch.allclose(found.fused, straight.fused[torch.from_numpy(shuffled)], atol=1e-6)
        assert found.positions.tolist() == shuffled.tolist()

    run_ranks(embed, 2)


def test_held_out_rows_never_steer_the_weights(config: Config, tmp_path: Path) -> None:
    """Other held-out pictures and names, the same weights and subsets."""
    before = run_ranks(prepared, 1, config, "selected", tmp_path / "before" / "selected")[0]
    other = write_pack(tmp_path / "pack", held_out_seed=5)
    other.parallel, other.stages = config.parallel, config.stages
    after = run_ranks(prepared, 1, other, "selected", tmp_path / "after" / "selected")[0]
    assert after["weights"] == before["weights"] and after["subsets"] == before["subsets"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["stages.seq2item.artifacts=[]"],
            r"stages\.seq2item\.data\.icon_sequences: its shards are artifact:interests; list that",
        ),
        (
            ["stages.hard.subset.sets=[icons]"],
            r"stages\.hard\.subset\.sets: found icons; expected data sets of the stage",
        ),
        (
            ["stages.seq2item.hard_negatives.patterns={icon_sequences: [history_to_item]}"],
            r"icon_sequences: pattern 'history_to_item' starts from a history",
        ),
        (
            ["data.sets.icon_neighbours.shards=elsewhere"],
            r"stages\.id2item\.artifacts: no data set has `shards: artifact:co_occurrence`",
        ),
        (
            ["+data.sets.more=${data.sets.icon_histories}"],
            r"2 sequences data sets with recorded histories over 'icons'",
        ),
    ],
)
def test_what_a_later_stage_cannot_make_is_told_by_the_configuration_alone(
    settings: list[str], message: str
) -> None:
    config = compose(["experiment=quickstart"])
    for name in config.order:
        check_stage(name, config.stages[name], config)
    broken = compose(["experiment=quickstart", *settings])
    with pytest.raises(ConfigurationError, match=message):
        for name in broken.order:
            check_stage(name, broken.stages[name], broken)
