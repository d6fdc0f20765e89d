"""Risks: data that is passed over in silence, a check that says fine because it was cut short,
and one that reads everything anew each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sailplan.config.schema import Config, StageConfig
from sailplan.data import validation
from sailplan.data.datasets import open_datasets
from sailplan.data.first_records import check_views
from sailplan.data.record import NamedInputs, StepBatch, ViewBatch
from sailplan.data.testing import Member, item_record, json_member, png, tar_bytes, write_set
from sailplan.data.validation import validate, validations
from sailplan.data.watch import PatternWatch
from sailplan.errors import BadDataError, ConfigurationError, SailplanError

Make = Callable[..., Config]


def stage_on(config: Config, name: str, folder: Path) -> Config:
    config.data.sets[name].shards = str(folder)
    config.order, config.stages = ["one"], {"one": StageConfig(data={name: 1.0})}
    return config


def captions(folder: Path, texts: list[str], *, apart: bool = False) -> Path:
    """A plain set of pictures and captions; apart: all pictures first."""
    pictures: list[Member] = [(f"{n:03d}.png", png(n)) for n in range(len(texts))]
    words: list[Member] = [(f"{n:03d}.txt", text.encode()) for n, text in enumerate(texts)]
    members = (
        pictures + words
        if apart
        else [member for pair in zip(pictures, words, strict=True) for member in pair]
    )
    folder.mkdir(parents=True)
    (folder / "s.tar").write_bytes(tar_bytes(members))
    return folder


def plain(config: Config) -> Config:
    """The items set with the views that plain shards have."""
    views = config.data.sets["things"].views
    config.data.sets["things"].views = {"title": views["title"], "image": views["image"]}
    config.data.sets["things"].patterns.pop("keyword_full")
    return config


def test_what_no_record_shows_is_counted_and_named(make_config: Make, tmp_path: Path) -> None:
    config = plain(make_config())
    records: list[list[Member]] = [
        [(f"{n}.png" if n % 3 else f"{n}.jpg", png(n)), (f"{n}.txt", f"boot {n}".encode())]
        for n in range(6)
    ]
    records[1] += [("1.heic", b"x"), ("1.mask.png", png(9))]
    records[2][1] = ("2.txt", "støvel".encode("latin-1"))
    records[3] = [
        ("._3.jpg", b"x"),
        ("3.jpg", png(3)),
        json_member(
            "3", {"split": "fold-7", "price": float("nan"), "fields": {"title": "word " * 60}}
        ),
    ]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "s.tar").write_bytes(
        tar_bytes([member for record in records for member in record]) + b"\1" * 512
    )
    config.data.sets["things"].shards = str(folder)
    (found,) = validations(config, names=["things"])
    assert found.problems == [] and found.notes == [
        "things: bytes after an end mark: 512 (first s.tar: byte 20480)",
        "things: records with a member .heic that nobody reads: 1 (first s/1)",
        "things: records with a member .mask.png that nobody reads: 1 (first s/1)",
        "things: records with a text that needed repair (bytes of no encoding, half characters): 1 "
        "(first s/2)",
        "things: pictures end in .jpg (2), .png (4): all are read, by their content",
    ]
    assert found.findings.counted == {
        "sidecars and hidden files": (1, "s.tar: ._3.jpg"),
        "records with a JSON value that is not finite": (1, "s/3"),
    }
    assert found.findings.splits == {"train": 5, "fold-7": 1} and found.findings.patterns == {
        "image_title": 6
    }
    title, image = found.findings.views["title"], found.findings.views["image"]
    assert (
        (title["rows"], title["valid"], title["text"], title["cut"]) == (6, 6, 6, 1)
        and title["longest"] > 60
        and title["sample"] == "boot 0"
    )
    assert (image["rows"], image["valid"], image["vision"]) == (6, 6, 6)


def test_several_processes_find_the_same_and_kept_findings_are_used(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    records = [item_record(number) for number in range(40)]
    records[5] = [records[5][0], ("000005.png", png(5)[:100])]
    records[30] = [json_member("again", {"id": "things/3"}), ("again.png", png(1))]
    config.data.sets["things"].shards = str(write_set(tmp_path / "things", records, per_shard=8))
    alone = list(validations(config, names=["things"], processes=1))
    for file in (tmp_path / "things" / ".index").glob("*.checked"):
        file.unlink()
    together = list(validations(config, names=["things"], processes=3))
    assert alone == together and [problem.record for problem in together[0].problems] == [
        "things/5",
        "things/3",
    ]
    read: list[int] = []
    inspect = validation.inspect
    monkeypatch.setattr(
        validation,
        "inspect",
        lambda reader, shard, processor: (read.append(shard), inspect(reader, shard, processor))[1],
    )
    assert list(validations(config, names=["things"], processes=1)) == alone and read == [], (
        "all is kept"
    )
    records[17] = [records[17][0], ("000017.png", b"broken")]
    write_set(tmp_path / "things", records, per_shard=8)
    (tmp_path / "things" / ".index" / "part-004.things.checked").write_text("{")
    assert [problem.record for problem in validate(config, names=["things"], processes=1)] == [
        "things/5",
        "things/17",
        "things/3",
    ]
    assert read == [0, 1, 2, 3, 4] or read == [2, 4], (
        "shards that were written anew, and one whose findings are damaged"
    )
    read.clear()
    config.data.image_size = 8
    list(validations(config, names=["things"], processes=1))
    assert read == [0, 1, 2, 3, 4], "other settings decode in another way"


def test_ids_that_occur_twice_are_found_in_ranges_of_their_hashes(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = plain(make_config())
    records = [
        [
            json_member(f"{n}", {"id": f"r{n % 50}", "fields": {"title": f"{n}"}}),
            (f"{n}.png", png(n)),
        ]
        for n in range(60)
    ]
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", records))
    monkeypatch.setattr(validation, "IDS_AT_ONCE", 7)
    assert [problem.record for problem in validate(config, names=["things"], processes=1)] == [
        f"r{n}" for n in range(10)
    ]


def test_a_field_that_no_record_has_is_told_before_the_first_step(
    make_config: Make, shards: Path
) -> None:
    config = stage_on(make_config(), "things", shards / "things")
    check_views(config, open_datasets(config, names=["things"]))
    config.data.sets["things"].views["title"].fields = ["titel"]
    with pytest.raises(
        ConfigurationError,
        match=r"data\.sets\.things\.views\.title\.fields: no record has a field 'titel'; the records have: title, tags",
    ):
        check_views(config, open_datasets(config, names=["things"]))
    for name, view in (("choices", "target"), ("histories", "target")):
        other = stage_on(make_config(), name, shards / name)
        check_views(other, open_datasets(other, names=[name]))
        other.data.sets[name].views[view].modalities, other.data.sets[name].views[view].fields = (
            ["text"],
            ["absent"],
        )
        with pytest.raises(
            ConfigurationError,
            match=rf"data\.sets\.{name}\.views\.target\.fields: no record has a field 'absent'",
        ):
            check_views(other, open_datasets(other, names=[name]))


def test_a_field_that_only_a_late_shard_has_is_no_mistake(
    make_config: Make, tmp_path: Path
) -> None:
    records = [
        [
            json_member(f"{n}", {"fields": {"title": f"{n}"} | ({"late": "x"} if n == 39 else {})}),
            (f"{n}.png", png(n)),
        ]
        for n in range(40)
    ]
    config = plain(
        stage_on(make_config(), "things", write_set(tmp_path / "set", records, per_shard=4))
    )
    config.data.sets["things"].views["title"].fields = ["title", "late"]
    check_views(config, open_datasets(config, names=["things"]))


@pytest.mark.parametrize(
    ("texts", "apart", "error", "reason"),
    [
        (["red"] * 24, False, BadDataError, "all 24 records have one text as target"),
        (["red boot"], False, BadDataError, "the only record"),
        (
            [f"boot {n}" for n in range(300)],
            True,
            BadDataError,
            "not one of 600 records has both sides",
        ),
        (["red", "Red "], False, BadDataError, "one text as target"),
        (["red", "blue"], False, None, ""),
    ],
)
def test_patterns_that_nothing_can_be_learned_from_are_told_before_the_first_step(
    make_config: Make,
    tmp_path: Path,
    texts: list[str],
    apart: bool,
    error: type[SailplanError] | None,
    reason: str,
) -> None:
    config = plain(
        stage_on(make_config(), "things", captions(tmp_path / "set", texts, apart=apart))
    )
    readers = open_datasets(config, names=["things"])
    if error is None:
        check_views(config, readers)
        return
    with pytest.raises(
        error, match=rf"data\.sets\.things\.patterns\.image_title: .*{reason}"
    ) as caught:
        check_views(config, readers)
    assert "\n" not in str(caught.value)


def test_a_medium_that_no_record_has_is_told(make_config: Make, tmp_path: Path) -> None:
    config = plain(stage_on(make_config(), "things", captions(tmp_path / "set", ["red", "blue"])))
    config.data.sets["things"].views["image"].modalities = ["audio"]
    with pytest.raises(
        ConfigurationError, match=r"views\.image\.modalities: no record has a sound"
    ):
        check_views(config, open_datasets(config, names=["things"]))


def batch_of(query: list[bool], target: list[int]) -> StepBatch:
    import torch

    def view(ids: torch.Tensor, valid: torch.Tensor) -> ViewBatch:
        return ViewBatch([NamedInputs(("text",), {"x": ids})], torch.arange(len(ids)), valid, ids)

    ids = torch.tensor(target)
    return StepBatch(
        0,
        "things",
        ["r"] * len(target),
        {"image": view(ids, torch.tensor(query)), "title": view(ids, ids >= 0)},
    )


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ([([True, False], [-1, 7]), ([False], [3])], "no row with both of its sides in 3 steps"),
        ([([True, True], [7, 7]), ([True], [7])], "no negative"),
        ([([True], [7]), ([True], [8])], ""),  # one row a rank: each is the other's negative
        ([([True, True], [7, 9]), ([False], [-1])], ""),
    ],
)
def test_patterns_without_rows_or_negatives_stop_the_run_after_some_steps(
    make_config: Make, ranks: list[tuple[list[bool], list[int]]], reason: str
) -> None:
    config = plain(make_config())
    watches = [
        PatternWatch({"absent": ["x"], "things": ["image_title"]}, config.data.sets, 3)
        for _ in ranks
    ]
    batches = [[batch_of(*rows)] for rows in ranks]

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            flags = [watch.flags(own, step) for watch, own in zip(watches, batches, strict=True)]
            world = [any(values) for values in zip(*flags, strict=True)]
            for watch, own in zip(watches, batches, strict=True):
                watch.note(own, world)

    steps(0, 2)
    if reason:
        with pytest.raises(
            BadDataError, match=rf"data\.sets\.things\.patterns\.image_title: {reason}"
        ):
            steps(2, 3)
    else:
        steps(2, 60)


def test_findings_are_json() -> None:
    assert json.loads(json.dumps(validation.asdict(validation.Findings())))["records"] == 0
