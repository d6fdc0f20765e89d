"""The shard index: damaged archives are named, stale indexes are not used, ranks may build at
once.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from sailplan.data.index import ShardIndex
from sailplan.data.shards import resolve
from sailplan.data.testing import item_record, json_member, tar_bytes, write_set
from sailplan.errors import BadDataError, ConfigurationError


def open_index(folder: Path) -> ShardIndex:
    return ShardIndex(sorted(folder.glob("*.tar")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", [item_record(number) for number in range(40)])


def test_ids_splits_and_lookup_over_shards(folder: Path) -> None:
    index = open_index(folder)
    assert len(index) == 40 and index.ids([0, 17, 39]) == ["things/0", "things/17", "things/39"]
    assert index.positions("held_out").tolist() == [9, 19, 29, 39]
    assert len(index.positions("train")) == 36 and index.positions("other").size == 0
    assert [index.find(f"things/{number}") for number in (0, 16, 33)] == [0, 16, 33] and index.find(
        "things/40"
    ) is None


def times(folder: Path) -> dict[str, int]:
    return {
        file.name: file.stat().st_mtime_ns
        for file in (folder / ".index").iterdir()
        if file.suffix in (".manifest", ".tables")
    }


def test_the_index_is_used_again_and_stays_valid_for_a_copy(folder: Path, tmp_path: Path) -> None:
    open_index(folder)
    before = times(folder)
    open_index(folder)
    assert times(folder) == before and len(before) == 2
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    for shard in copied.glob("*.tar"):
        os.utime(shard, (1, 1))
    before = times(copied)
    assert open_index(copied).ids([20]) == ["things/20"]
    assert times(copied) == before


def test_a_rewritten_shard_of_equal_size_is_indexed_anew(tmp_path: Path) -> None:
    first = write_set(
        tmp_path / "set", [[json_member("a", {"id": "one"})], [json_member("b", {"id": "two"})]]
    )
    assert open_index(first).ids([0, 1]) == ["one", "two"]
    write_set(first, [[json_member("a", {"id": "six"})], [json_member("b", {"id": "ten"})]])
    assert open_index(first).ids([0, 1]) == ["six", "ten"]


def _open_and_count(folder: Path) -> int:
    return len(open_index(folder).ids(range(40)))


def test_processes_may_build_the_same_index_at_once(folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_open_and_count, [folder] * 4) == [40] * 4
    kept = sorted(
        file.suffix for file in (folder / ".index").iterdir() if file.name != ".gitignore"
    )
    assert kept == [".lock", ".manifest", ".tables"], "no part and no temporary file is left"


@pytest.mark.parametrize("cut", ["inside a member", "between members", "no end mark"])
def test_a_cut_off_shard_is_named_with_its_size(tmp_path: Path, cut: str) -> None:
    content = tar_bytes([(f"{number}.txt", b"x" * 700) for number in range(5)])
    size = {
        "inside a member": 2 * 1536 + 900,
        "between members": 3 * 1536,
        "no end mark": 5 * 1536,
    }[cut]
    shard = tmp_path / "cut.tar"
    shard.write_bytes(content[:size])
    with pytest.raises(BadDataError, match=r"cut\.tar"):
        ShardIndex([shard])


def test_a_damaged_header_is_named_with_its_offset(tmp_path: Path) -> None:
    content = bytearray(tar_bytes([(f"{number}.txt", b"x" * 700) for number in range(5)]))
    content[2 * 1536 : 2 * 1536 + 40] = b"\xff" * 40
    shard = tmp_path / "damaged.tar"
    shard.write_bytes(content)
    with pytest.raises(BadDataError, match=r"damaged\.tar: damaged tar header at byte 3072"):
        ShardIndex([shard])


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "packed.tar"
    shard.write_bytes(gzip.compress(tar_bytes([("a.txt", b"x")])))
    with pytest.raises(BadDataError, match="uncompressed"):
        ShardIndex([shard])


@pytest.mark.parametrize("shards", ["", "nowhere", "empty", "part-{000..004}.tar"])
def test_missing_shards_name_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"data\.sets\.mine\.shards"):
        resolve("mine", shards)


def test_patterns_become_files(folder: Path) -> None:
    pattern = f"{folder}/part-{{000..002}}.tar"
    assert [path.name for path in resolve("mine", pattern)] == [
        "part-000.tar",
        "part-001.tar",
        "part-002.tar",
    ]


def test_a_shard_with_the_same_size_names_and_beginnings_is_read_again_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(letter: bytes) -> Path:
        records = [
            [
                json_member(f"{number}", {"id": f"r{number}"}),
                (f"{number}.bin", b"x" * 2000 + letter),
            ]
            for number in range(3)
        ]
        return write_set(tmp_path / "set", records)

    folder = write(b"a")
    first = open_index(folder)
    (shard,) = folder.glob("*.tar")
    scanned = int(first.tables.rows["scanned"][0])
    write(b"b")  # what differs is in no beginning of a record
    os.utime(shard, ns=(scanned, scanned + 10**7))
    with pytest.raises(BadDataError, match=r"part-000\.tar: changed since it was indexed"):
        first.open_shard(0)
    capsys.readouterr()
    again = open_index(folder)
    assert "part-000.tar: changed since its index was made" in capsys.readouterr().err
    assert again.identity == first.identity and again.tables.rows["scanned"][0] > scanned
    with again.open_shard(0) as file:
        assert file.size == shard.stat().st_size
    open_index(folder)
    assert not capsys.readouterr().err, "once"
