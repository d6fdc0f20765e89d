"""Risks: lengths that ranks see differently, an old or damaged table, a folder that cannot be
written, tables opened without need.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sailplan.config.schema import Config, StageConfig
from sailplan.data.costs import RowCosts
from sailplan.data.datasets import open_datasets
from sailplan.data.index import id_hash
from sailplan.data.lengths import PICTURES, ROLES, SOUND, LengthIndex
from sailplan.data.plan import Plan
from sailplan.data.processor import processor_of
from sailplan.data.shares import StepShares
from sailplan.data.testing import item_body, item_record, json_member, repeated, write_set
from sailplan.data.text import Tokenizer
from sailplan.errors import BadDataError

Make = Callable[..., Config]


def things(make_config: Make, folder: Path, records: int = 40) -> Config:
    config = make_config()
    config.data.sets = {"things": config.data.sets["things"]}
    config.data.sets["things"].shards = str(
        write_set(folder / "things", [item_record(number) for number in range(records)])
    )
    return config


def test_entries_count_tokens_by_field_and_language(make_config: Make) -> None:
    readers = open_datasets(make_config())
    reader, tokenizer = readers["things"], processor_of(make_config()).tokenizer
    index = reader.lengths
    assert index is not None
    positions = np.array([40, 3, 4, 3])
    found = index.lengths(positions)
    assert found.record.tolist() == sorted(found.record.tolist())
    for place, position in enumerate(positions):
        own = found.record == place
        body = item_body(int(position))
        for name, languages in body["fields"].items():
            for language, value in languages.items():
                (entry,) = np.flatnonzero(
                    own
                    & (found.field == index.field(name))
                    & (found.language == index.language(language))
                )
                texts = list(dict.fromkeys([value] if isinstance(value, str) else value))
                assert found.texts[entry] == len(texts) and found.tokens[entry] == len(
                    tokenizer.texts([", ".join(texts)])[0]
                )
        assert found.texts[own & (found.field == PICTURES)].tolist() == [1]
        assert found.texts[own & (found.field == SOUND)].tolist() == (
            [1] if position % 4 == 0 else []
        )
    pairs = readers["graded"].lengths
    assert pairs is not None
    named = pairs.lengths(np.array([7]))
    assert {ROLES[role]: value for role, value in zip(named.role, named.hash, strict=True)} == {
        "query": id_hash("things/7"),
        "item": id_hash("things/8"),
    }


def test_tables_are_built_anew_where_they_are_missing_old_or_damaged(
    make_config: Make, tmp_path: Path
) -> None:
    config = things(make_config, tmp_path)
    everything = np.arange(40)
    wanted = open_datasets(config)["things"].lengths.lengths(everything).tokens  # type: ignore[union-attr]
    (manifest,), (tables,) = (
        files(tmp_path / "things", "manifest"),
        files(tmp_path / "things", "tables"),
    )
    for file, content in (
        (tables, tables.read_bytes()[:-9]),
        (manifest, b"{}\n"),
        (manifest, manifest.read_bytes()[:-9]),
    ):
        file.write_bytes(content)
        again = open_datasets(config)["things"].lengths
        assert again is not None and np.array_equal(again.lengths(everything).tokens, wanted)
        (tables,) = files(tmp_path / "things", "tables")
    before = manifest.stat().st_mtime_ns
    open_datasets(config)
    assert manifest.stat().st_mtime_ns == before, "what is current stays"
    write_set(tmp_path / "things", [item_record(number) for number in range(1, 41)])
    moved = open_datasets(config)["things"].lengths
    assert moved is not None and np.array_equal(
        moved.lengths(np.arange(39)).tokens, again.lengths(np.arange(1, 40)).tokens
    )
    for table in files(tmp_path / "things", "tables"):
        table.unlink()
    with pytest.raises(BadDataError, match=r"lengths.*tables: vanished or was damaged"):
        pickle.loads(pickle.dumps(moved)).lengths(np.array([0]))


def files(folder: Path, ending: str) -> list[Path]:
    return sorted((folder / ".index").glob(f"lengths-*.{ending}"))


def test_another_tokenizer_has_tables_of_its_own(make_config: Make, tmp_path: Path) -> None:
    config = things(make_config, tmp_path)
    open_datasets(config)
    other = tmp_path / "tokenizer.json"
    other.write_text(Path(config.data.tokenizer).read_text() + "\n")
    assert Tokenizer(str(other), 8).digest != Tokenizer(config.data.tokenizer, 8).digest
    config.data.tokenizer = str(other)
    open_datasets(config)
    assert len(files(tmp_path / "things", "manifest")) == 2


def test_tables_of_a_folder_that_cannot_be_written_are_kept_in_the_cache(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = things(make_config, tmp_path)
    open_datasets(config)
    tables = files(tmp_path / "things", "*")
    wanted = open_datasets(config)["things"].lengths.lengths(np.arange(40)).tokens  # type: ignore[union-attr]
    for table in tables:
        table.unlink()
    config.data.cache = str(tmp_path / "cache")
    monkeypatch.setattr("sailplan.data.places.os.access", lambda path, mode: False)
    found = open_datasets(config)["things"].lengths
    assert found is not None and np.array_equal(found.lengths(np.arange(40)).tokens, wanted)
    assert (
        not files(tmp_path / "things", "*")
        and len(list((tmp_path / "cache").rglob("lengths-*.manifest"))) == 1
    )


def test_a_broken_record_has_no_lengths_and_stops_nothing(
    make_config: Make, tmp_path: Path
) -> None:
    config = things(make_config, tmp_path)
    write_set(
        tmp_path / "things",
        [
            item_record(0),
            [("000001.json", b"{broken")],
            [json_member("000002", {"id": "x", "fields": 3})],
            item_record(3),
        ],
    )
    index = open_datasets(config)["things"].lengths
    assert index is not None and set(index.lengths(np.arange(4)).record.tolist()) == {0, 3}


def test_dealing_opens_the_tables_that_the_step_reads_and_no_others(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^5 shards of 16 records: a step of 512 rows in 64 lanes reads some hundred tables at
    most, the next ones hardly new ones.
    """
    config = things(make_config, tmp_path, records=16)
    config.global_batch, config.data.segment, config.data.window = 512, 16, 64
    monkeypatch.setattr("sailplan.data.plan.STREAMS", 64)
    (reader,) = open_datasets(config).values()
    index = repeated(reader.index, 100_000)
    reader.lengths = LengthIndex(index, processor_of(config).tokenizer, reader.outlines)
    stage = StageConfig(steps=50)
    plan = Plan(config, "first", stage, {"things": 1.0}, {"things": reader})
    shares = StepShares(
        config, stage, plan, {"things": reader}, RowCosts(config, processor_of(config)), 64
    )
    opened = []
    for step in range(8):
        before = reader.lengths.opened
        (part,) = shares.step(step)
        touched = len(
            np.unique(
                np.searchsorted(index.starts, plan.step(step).parts[0].positions, side="right")
            )
        )
        assert np.bincount(part.owners).tolist() == [8] * 64
        opened.append(reader.lengths.opened - before)
        assert opened[-1] <= touched <= 512
    touched = len(
        np.unique(
            [
                np.searchsorted(index.starts, plan.step(step).parts[0].positions, side="right")
                for step in range(8)
            ]
        )
    )
    assert sum(opened) == touched <= 64 * (2 * 64 // 15 + 2), (
        "each once, 15 rows of the split a shard"
    )
