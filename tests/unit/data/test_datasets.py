"""Opening data sets: what cannot work is told with its key; validation names every bad sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sailplan.config.schema import Config, StageConfig, ViewConfig
from sailplan.data.datasets import check_prompts, check_records, open_datasets
from sailplan.data.testing import item_record, json_member, png, write_set
from sailplan.data.validation import validate
from sailplan.errors import ConfigurationError

Make = Callable[..., Config]


def set_key(config: Config, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    target: Any = config.data.sets
    for part in parents:
        target = target[part] if isinstance(target, dict) else getattr(target, part)
    if isinstance(target, dict):
        target[last] = value
    else:
        setattr(target, last, value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "things.views.title.modalities",
            ["text", "smell"],
            r"data\.sets\.things\.views\.title\.modalities\.1=smell",
        ),
        ("things.views.title.fields", [], r"data\.sets\.things\.views\.title\.fields is empty"),
        ("things.views.title.of", "query", r"views\.title\.of=query: .*'items' has item"),
        ("things.views.title.pick", "two", r"views\.title\.pick=two"),
        (
            "things.patterns.image_title.target",
            "absent",
            r"patterns\.image_title: no view 'absent'",
        ),
        ("histories.catalogue", None, r"data\.sets\.histories\.catalogue is missing"),
        ("choices.catalogue", "absent", r"catalogue=absent: no such data set"),
        ("choices.catalogue", "graded", r"catalogue=graded: is of kind 'pairs'"),
        ("choices.kind", "triples", r"data\.sets\.choices\.kind=triples"),
        (
            "things.negatives",
            2,
            r"data\.sets\.things\.negatives=2: expected 0 or more for pairs and sequences",
        ),
        ("things.shards", "no/such/folder", r"data\.sets\.things\.shards=no/such/folder"),
    ],
)
def test_each_mistake_names_its_key(make_config: Make, path: str, value: Any, message: str) -> None:
    config = make_config()
    set_key(config, path, value)
    with pytest.raises(ConfigurationError, match=message) as caught:
        open_datasets(config)
    assert "\n" not in str(caught.value)


def test_data_sets_that_a_stage_makes_open_once_their_folder_is_known(
    make_config: Make, shards: Path
) -> None:
    config = make_config()
    config.data.sets["histories"].shards = "artifact:interests"
    assert set(open_datasets(config)) == {"things", "choices", "graded"}
    readers = open_datasets(
        config, artifacts={"interests": shards / "histories"}, names=["histories"]
    )
    assert (
        set(readers) == {"histories", "things"}
        and readers["histories"].catalogue is readers["things"]
    )
    with pytest.raises(ConfigurationError, match="no 'absent'"):
        open_datasets(config, names=["absent"])


def test_a_data_set_without_a_record_to_train_on_is_told(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    config.order, config.stages = (
        ["first", "second"],
        {"first": StageConfig(data={"graded": 1.0}), "second": StageConfig(data={"things": 1.0})},
    )
    check_records(config, open_datasets(config))
    config.data.sets["things"].shards = str(write_set(tmp_path / "none", [[]]))
    with pytest.raises(
        ConfigurationError, match=r"stages\.second\.data names 'things', which has no record"
    ):
        check_records(config, open_datasets(config))
    assert [str(problem) for problem in validate(config, names=["things"])][:1] == [
        "things: -: no record in 1 shards"
    ]
    config.data.sets["things"].shards = str(
        write_set(tmp_path / "held", [item_record(9), item_record(19)])
    )
    with pytest.raises(ConfigurationError, match="2 records, none of split 'train'"):
        check_records(config, open_datasets(config))


def test_a_prompt_that_leaves_no_room_is_told_before_the_run(make_config: Make) -> None:
    config = make_config(max_tokens=4)
    with pytest.raises(ConfigurationError, match=r"data\.max_tokens=4: the prompt"):
        check_prompts(config)


def test_each_shard_that_is_scanned_counts_as_progress(make_config: Make, tmp_path: Path) -> None:
    calls: list[int] = []
    config = make_config()
    config.data.sets["things"].shards = str(
        write_set(tmp_path / "things", [item_record(number) for number in range(48)])
    )
    readers = open_datasets(config, names=["things"], progress=lambda: calls.append(1))
    assert len(calls) >= 2 * len(readers["things"].index.shards) == 6, "its index and its lengths"


def test_good_data_sets_have_no_problems(make_config: Make) -> None:
    assert validate(make_config()) == []


def test_validation_names_every_bad_sample(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    records = [item_record(number) for number in range(40)]
    records[5] = [records[5][0], ("000005.png", png(5)[:100])]
    records[6] = [("000006.json", b"{")]
    records[7] = [json_member("again", {"id": "things/3"}), ("again.png", png(1))]
    config.data.sets["things"].shards = str(write_set(tmp_path / "things", records))
    cut = write_set(tmp_path / "cut", [[json_member("a", {"id": "a"})]]) / "part-000.tar"
    cut.write_bytes(cut.read_bytes()[:1024])
    config.data.sets["graded"].shards = str(cut)
    config.data.sets["choices"].views["video"] = ViewConfig(of="query", modalities=["vision"])
    problems = validate(config, names=["things", "choices", "graded"])
    assert [(problem.dataset, problem.record) for problem in problems] == [
        ("things", "things/5"),
        ("things", "part-000/000006"),
        ("things", "things/3"),
        ("choices", "choices/5"),
        ("choices", "choices/6"),
        ("choices", "choices/7"),
        ("choices", "-"),
        ("graded", "-"),
    ]
    text = "\n".join(map(str, problems))
    for reason in (
        "image cannot be decoded",
        "broken JSON",
        "occurs more than once",
        "not in the catalogue",
        "view 'video'",
        "end mark",
    ):
        assert reason in text
