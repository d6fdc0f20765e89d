"""Step batches: every row in its place, the same on any number of ranks, bad samples replaced
and named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sailplan.config.schema import Config, PatternKey, StageConfig
from sailplan.data.collate import Collator
from sailplan.data.datasets import open_datasets
from sailplan.data.negatives import HardNegativeStore, MatchThreshold
from sailplan.data.packing import OmniInputs
from sailplan.data.plan import Plan
from sailplan.data.reader import BadSample
from sailplan.data.record import HardNegatives, StepBatch, TeacherKey, ViewKey
from sailplan.data.teachers import TeacherTable
from sailplan.data.testing import item_record, json_member, micro_batches_of, png, write_set
from sailplan.errors import BadDataError
from sailplan.runtime.seeds import derive

Make = Callable[..., Config]


def collator(
    config: Config,
    weights: dict[str, float],
    rank: int = 0,
    size: int = 1,
    mixed: float = 0.0,
    **options: object,
) -> Collator:
    readers, stage = open_datasets(config), StageConfig(steps=50, mixed_fraction=mixed)
    return Collator(
        config,
        stage,
        Plan(config, "first", stage, weights, readers),
        readers,
        rank,
        size,
        **options,
    )  # type: ignore[arg-type]


def one(batches: list[StepBatch]) -> StepBatch:
    assert len(batches) == 1
    return batches[0]


def in_step_order(batch: StepBatch, key: ViewKey) -> list[dict[str, torch.Tensor]]:
    """Each row's tensors, without the padding that its micro-batch happens to need, in the
    step's order.
    """
    rows = []
    for inputs in micro_batches_of(batch, key):
        for row in range(inputs.rows):
            length = int(inputs.token_mask[row].sum())
            entry = {
                "tokens": inputs.token_ids[row, :length],
                "text": inputs.text_mask[row, :length],
            }
            for name in ("images", "image_mask", "audio", "audio_mask"):
                tensor = getattr(inputs, name)
                if tensor is not None:
                    entry[name] = tensor[row]
            rows.append(entry)
    return [rows[place] for place in batch.views[key].order.tolist()]


def test_rows_are_cut_by_length_and_put_back_in_order(make_config: Make) -> None:
    config = make_config()
    maker = collator(config, {"things": 1.0})
    batch = one(maker.batches(2))
    assert set(batch.views) == {"image", "title", "keyword", "full"} and batch.patterns == {
        "image_title": 1.0,
        "keyword_full": 0.5,
    }
    assert [inputs.rows for inputs in batch.views["full"].micro_batches] == [5, 5, 5, 1]
    costs = []
    for inputs in batch.views["full"].micro_batches:
        assert inputs.image_mask is not None and inputs.audio_mask is not None
        own = inputs.token_mask.sum(1) - len(maker.processor.tokenizer.prompt(""))
        counts = zip(
            own.tolist(),
            inputs.image_mask.sum(1).tolist(),
            inputs.audio_mask.sum(1).tolist(),
            strict=True,
        )
        costs += [
            maker.processor.counted(*row, maker.readers["things"].config.views["full"])
            for row in counts
        ]
    assert costs == sorted(costs) and len(set(costs)) > 3
    decoder, reader = maker.processor, maker.readers["things"]
    for place, (record_id, shown) in enumerate(
        zip(batch.record_ids, in_step_order(batch, "image"), strict=True)
    ):
        item = reader.read(int(reader.find(record_id) or 0)).item
        assert item is not None
        assert shown["tokens"].numel() == 0 and shown["image_mask"].all()
        assert batch.views["image"].ids[place] == batch.views["full"].ids[place], (
            "one document, one id"
        )
        assert torch.equal(batch.views["full"].valid, torch.ones(16, dtype=torch.bool))
        heard = in_step_order(batch, "full")[place]
        assert bool(heard["audio_mask"].any()) == (item.audio is not None)
    prompt = decoder.tokenizer.prompt("Find the:")
    for shown in in_step_order(batch, "title"):
        assert shown["tokens"][: len(prompt)].tolist() == prompt
        assert shown["text"].tolist() == [False] * len(prompt) + [True] * (
            len(shown["text"]) - len(prompt)
        )


@pytest.mark.parametrize(("dataset", "mixed"), [("things", 0.0), ("histories", 0.0), ("all", 1.0)])
def test_a_row_is_the_same_on_any_number_of_ranks(
    make_config: Make, dataset: str, mixed: float
) -> None:
    config = make_config()
    weights = (
        {"things": 1.0, "choices": 1.0, "histories": 1.0} if dataset == "all" else {dataset: 1.0}
    )
    whole = collator(config, weights, mixed=mixed).batches(3)
    for size in (2, 4):
        shares = [collator(config, weights, rank, size, mixed).batches(3) for rank in range(size)]
        for part, batch in enumerate(whole):
            assert {share[part].digest for share in shares} == {batch.digest}
            for name, view in batch.views.items():
                counts = {len(share[part].views[name].micro_batches) for share in shares}
                assert len(counts) == 1, "the same number of micro-batches on all ranks"
                mine = in_step_order(batch, name)
                owners = collator(config, weights, 0, size, mixed).shares.step(3)[part].owners
                assert sorted(
                    record_id for share in shares for record_id in share[part].record_ids
                ) == sorted(batch.record_ids)
                for rank, share in enumerate(shares):
                    theirs = in_step_order(share[part], name)
                    for row, place in enumerate(np.flatnonzero(owners == rank)):
                        assert share[part].record_ids[row] == batch.record_ids[place], (
                            "in the step's order"
                        )
                        for item in range(view.group):
                            left, right = (
                                mine[place * view.group + item],
                                theirs[row * view.group + item],
                            )
                            assert left.keys() == right.keys() and all(
                                torch.equal(left[key], right[key]) for key in left
                            )


def test_histories_are_groups_with_absent_items_not_valid(make_config: Make) -> None:
    maker = collator(make_config(), {"histories": 1.0})
    batch = one(maker.batches(0))
    history, target, reader = (
        batch.views["history"],
        batch.views["target"],
        maker.readers["histories"],
    )
    assert (
        history.group == 4
        and target.group == 1
        and len(history.order) == 64
        and len(target.order) == 16
    )
    for row, record_id in enumerate(batch.record_ids):
        items = reader.body(int(reader.find(record_id) or 0))["items"]
        valid = history.valid[row * 4 : row * 4 + 4].tolist()
        assert valid == [place < min(4, len(items) - 1) for place in range(4)]
        assert target.ids[row] not in history.ids[row * 4 : row * 4 + 4]
    assert (history.ids[~history.valid] == -1).all()


def test_scores_and_text_ids(make_config: Make) -> None:
    graded = one(collator(make_config(), {"graded": 1.0}).batches(0))
    assert graded.scores is not None
    assert torch.allclose(
        graded.scores,
        torch.tensor([int(record_id.split("/")[1]) / 40 for record_id in graded.record_ids]),
    )
    assert one(collator(make_config(), {"choices": 1.0}).batches(0)).scores is None
    config = make_config(global_batch=64)
    config.data.sets["things"].language_weights = {"en": 1.0}
    batch = one(collator(config, {"things": 1.0}).batches(0))
    shown = in_step_order(batch, "keyword")
    for first in range(0, 64, 7):
        for second in range(64):
            same = torch.equal(shown[first]["tokens"], shown[second]["tokens"])
            assert same == bool(
                batch.views["keyword"].ids[first] == batch.views["keyword"].ids[second]
            ), "equal keywords share an id"


def test_items_without_a_declared_modality_are_not_valid_but_no_error(make_config: Make) -> None:
    config = make_config()
    config.data.sets["things"].patterns["image_title"].target = "sound"
    batch = one(collator(config, {"things": 1.0}).batches(0))
    has_sound = [int(record_id.split("/")[1]) % 4 == 0 for record_id in batch.record_ids]
    assert (
        batch.views["sound"].valid.tolist() == has_sound
        and not batch.quarantined
        and any(has_sound)
        and not all(has_sound)
    )


def test_hard_negatives_and_teachers_join_their_rows(make_config: Make, tmp_path: Path) -> None:
    positions = np.stack([np.array([(row + 1) % 64, (row + 2) % 64, -1]) for row in range(64)])
    key = PatternKey("things", "image_title")
    HardNegativeStore({key: positions}, {key: MatchThreshold(0.25)}).save(
        tmp_path / "negatives.npz"
    )
    store = HardNegativeStore.load(tmp_path / "negatives.npz")
    assert store.thresholds == {key: MatchThreshold(0.25)} and np.array_equal(
        store.positions[key], positions
    )
    vectors = {
        "svd": np.arange(1, 33, dtype=np.float32)[:, None].repeat(3, 1),
        "nmf": np.ones((32, 2), dtype=np.float32),
    }
    TeacherTable([f"things/{number}" for number in range(32)], vectors).save(
        tmp_path / "teachers.npz"
    )
    teachers = TeacherTable.load(tmp_path / "teachers.npz")
    config = make_config()
    config.data.sets["things"].language_weights = {"en": 1.0}
    maker = collator(config, {"things": 1.0}, negatives=store, teachers=teachers)
    batch = one(maker.batches(1))
    negatives = batch.views[HardNegatives("image_title")]
    assert (
        negatives.group == 3 and negatives.valid.view(16, 3).tolist() == [[True, True, False]] * 16
    )
    tokenizer, prompt = maker.processor.tokenizer, maker.processor.tokenizer.prompt("Find the:")
    for row, record_id in enumerate(batch.record_ids):
        number = int(record_id.split("/")[1])
        for place in range(2):
            title = maker.readers["things"].body((number + place + 1) % 64)["fields"]["title"]["en"]
            assert (
                in_step_order(batch, HardNegatives("image_title"))[row * 3 + place][
                    "tokens"
                ].tolist()
                == prompt + tokenizer.texts([title], "Find the:")[0]
            )
        expected = float(number + 1) if number < 32 else 0.0
        assert batch.teachers[TeacherKey("image", "svd")][row].tolist() == [expected] * 3
    assert {key.teacher for key in batch.teachers} == {"svd", "nmf"} and batch.teachers[
        TeacherKey("title", "nmf")
    ].shape == (16, 2)


def broken_config(make_config: Make, tmp_path: Path, broken: int) -> Config:
    records = [item_record(number) for number in range(40)]
    for number in range(0, 2 * broken, 2):
        records[number] = [
            (name, png(number)[:120] if name.endswith("png") else content)
            for name, content in records[number]
        ]
    config = make_config()
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", records))
    return config


def test_a_truncated_picture_is_replaced_and_named_alike_on_all_ranks(
    make_config: Make, tmp_path: Path
) -> None:
    config = broken_config(make_config, tmp_path, broken=3)
    bad = {f"things/{number}" for number in (0, 2, 4)}
    whole = [one(collator(config, {"things": 1.0}).batches(step)) for step in range(3)]
    assert {one.id for batch in whole for one in batch.quarantined} == bad, (
        "36 train records in 48 rows: all were met"
    )
    assert not bad & {record for batch in whole for record in batch.record_ids}
    assert all(
        "image cannot be decoded" in one.reason for batch in whole for one in batch.quarantined
    )
    assert all(batch.views["image"].valid.all() and len(batch.record_ids) == 16 for batch in whole)
    for rank in range(2):
        maker = collator(config, {"things": 1.0}, rank, 2)
        share, owners = one(maker.batches(1)), maker.shares.step(1)[0].owners
        assert (
            share.record_ids
            == [whole[1].record_ids[place] for place in np.flatnonzero(owners == rank)]
            and share.digest == whole[1].digest
        )


def test_a_set_of_broken_records_ends_with_bad_data(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    broken = [
        [
            (name, b"broken" if name.endswith("png") else content)
            for name, content in item_record(number)
        ]
        for number in range(20)
    ]
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", broken))
    with pytest.raises(BadDataError, match=r"data\.sets\.things: 17 records in a row"):
        collator(config, {"things": 1.0}).batches(0)


def test_a_rank_without_rows_has_as_many_micro_batches_as_the_others(make_config: Make) -> None:
    ranks = [
        one(
            collator(
                make_config(global_batch=3, micro_batch=1), {"things": 1.0}, rank=rank, size=5
            ).batches(0)
        )
        for rank in range(5)
    ]
    assert sorted(len(batch.record_ids) for batch in ranks) == [0, 0, 1, 1, 1]
    for key in ranks[0].views:
        assert {len(batch.views[key].micro_batches) for batch in ranks} == {1}
        assert sum(inputs.rows for batch in ranks for inputs in batch.views[key].micro_batches) == 3


def test_inputs_move_as_a_whole(make_config: Make) -> None:
    inputs: OmniInputs = (
        one(collator(make_config(), {"things": 1.0}).batches(0)).views["full"].micro_batches[0]
    )
    assert inputs.to("meta").images.device.type == "meta" and inputs.to("cpu").rows == 5  # type: ignore[union-attr]


def test_target_probabilities_travel_with_their_rows(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    bodies = [
        {
            "id": f"s/{n}",
            "history": ["things/1"],
            "target": f"things/{2 + n}",
            "target_probability": 1 / (n + 1),
        }
        for n in range(24)
    ]
    config.data.sets["histories"].shards = str(
        write_set(tmp_path / "set", [[json_member(f"{n}", body)] for n, body in enumerate(bodies)])
    )
    batch = one(collator(config, {"histories": 1.0}).batches(0))
    assert batch.target_log_probability is not None
    expected = [-np.log(int(name.split("/")[1]) + 1) for name in batch.record_ids]
    torch.testing.assert_close(
        batch.target_log_probability, torch.tensor(expected, dtype=torch.float32)
    )
    assert (
        one(collator(make_config(), {"histories": 1.0}).batches(0)).target_log_probability is None
    )


def test_a_records_own_negatives_join_its_rows(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    names = [f"things/{n}" for n in range(30, 36)]
    bodies = [
        {
            "id": f"s/{n}",
            "history": ["things/1"],
            "target": f"things/{2 + n}",
            "negatives": names[: n % 3 * 3],
        }
        | {"target_probability": 1 / 24, "negative_probability": 1 / 6}
        for n in range(24)
    ]
    config.data.sets["histories"].shards = str(
        write_set(tmp_path / "set", [[json_member(f"{n}", body)] for n, body in enumerate(bodies)])
    )
    assert not [
        name
        for name in one(collator(config, {"histories": 1.0}).batches(0)).views
        if isinstance(name, HardNegatives)
    ]
    config.data.sets["histories"].negatives = 4
    maker = collator(config, {"histories": 1.0})
    batch = one(maker.batches(0))
    (name,) = [name for name in batch.views if isinstance(name, HardNegatives)]
    view = batch.views[name]
    assert view.group == 4 and len(view.order) == 4 * len(batch.record_ids)
    known = {derive("document", name) for name in names}
    for row, record_id in enumerate(batch.record_ids):
        listed = min(4, int(record_id.split("/")[1]) % 3 * 3)
        own = view.ids[row * 4 : row * 4 + 4]
        assert view.valid[row * 4 : row * 4 + 4].tolist() == [place < listed for place in range(4)]
        assert set(own[:listed].tolist()) <= known and len(set(own[:listed].tolist())) == listed
    assert batch.target_log_probability is not None
    torch.testing.assert_close(
        batch.target_log_probability, torch.full((16,), np.log(6 / 24 / 4)).float()
    )
    again = one(collator(config, {"histories": 1.0}).batches(0)).views[name]
    assert torch.equal(again.ids, view.ids)


def test_unknown_negatives_make_a_bad_sample(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    config.data.sets["histories"].negatives = 2
    for value, message in (
        (["nowhere/1"], "nowhere/1 is not in the catalogue"),
        ("things/1", "expected a list of ids"),
    ):
        body = {"id": "s/0", "history": ["things/1"], "target": "things/2", "negatives": value}
        config.data.sets["histories"].shards = str(
            write_set(tmp_path / message[:3], [[json_member("0", body)]])
        )
        with pytest.raises(BadSample, match=message):
            collator(config, {"histories": 1.0}).readers["histories"].read(0)
