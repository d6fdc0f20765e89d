"""Risks: work done twice or lost by processes that index together, a manifest that is wrong, cut
or flipped, costs that grow with the set.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailplan.data import filling, id_table, shard_table
from sailplan.data.columns import PAGE, Columns, Damaged, pack
from sailplan.data.index import ShardIndex
from sailplan.data.shard_table import id_check, id_hash
from sailplan.data.testing import json_member, repeated, synthetic_set, write_set
from sailplan.errors import BadDataError, SailplanError

PER_SHARD = 8


def write(folder: Path, shards: int, first: int = 0, word: str = "r") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(first, first + shards):
        bodies = [
            {"id": f"{word}/{shard}/{n}", "split": "held_out" if n == 3 and shard % 2 else "train"}
            for n in range(PER_SHARD)
        ]
        made = write_set(
            folder / "new",
            [[json_member(f"{n}", body)] for n, body in enumerate(bodies)],
            PER_SHARD,
        )
        os.replace(made / "part-000.tar", folder / f"s{shard:04d}.tar")
    return sorted(folder.glob("*.tar"))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that this process scanned."""
    found: list[str] = []
    scan = shard_table.scan

    def counted(shard: Path, *rest: Any) -> Any:
        found.append(shard.name)
        return scan(shard, *rest)

    monkeypatch.setattr(shard_table, "scan", counted)
    return found


def whole(index: ShardIndex) -> tuple[Any, ...]:
    splits = {split: index.positions(split).tolist() for split in sorted(index.split_names)}
    return (
        index.ids(range(len(index))),
        splits,
        index.identity,
        [index.locate(p)[1].record(p % PER_SHARD)[2] for p in range(len(index))],
    )


def test_only_new_and_changed_shards_are_scanned(tmp_path: Path, scans: list[str]) -> None:
    shards = write(tmp_path / "set", 6)
    ShardIndex(shards)
    assert len(scans) == 6
    shards = write(tmp_path / "set", 3, first=6)
    index = ShardIndex(shards)
    assert scans[6:] == ["s0006.tar", "s0007.tar", "s0008.tar"] or sorted(scans[6:]) == [
        "s0006.tar",
        "s0007.tar",
        "s0008.tar",
    ]
    assert len(index) == 72 and index.find("r/7/2") == 58
    write(tmp_path / "set", 1, first=4, word="q")
    again = ShardIndex(shards)
    assert (
        scans[9:] == ["s0004.tar"]
        and again.find("q/4/0") == 32
        and again.find("r/4/0") is None
        and again.identity != index.identity
    )
    assert whole(ShardIndex(write(tmp_path / "anew", 9))) != whole(again)
    for shard in (tmp_path / "anew").glob("s0004.tar"):
        shard.write_bytes(shards[4].read_bytes())
    assert whole(ShardIndex(sorted((tmp_path / "anew").glob("*.tar")))) == whole(again), (
        "however it came about"
    )
    ShardIndex(shards[2:5])
    assert len(scans) == 9 + 1 + 9 + 1, "a part of the set has nothing of its own"


def test_what_cannot_be_written_is_completed_in_the_cache(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write(tmp_path / "set", 3)
    ShardIndex(shards)
    kept = {file: file.read_bytes() for file in (tmp_path / "set" / ".index").iterdir()}
    shards = write(tmp_path / "set", 2, first=3)
    monkeypatch.setattr("sailplan.data.places.os.access", lambda path, mode: False)
    index = ShardIndex(shards, tmp_path / "cache")
    assert sorted(scans[3:]) == ["s0003.tar", "s0004.tar"] and index.ids([0, 39]) == [
        "r/0/0",
        "r/4/7",
    ]
    assert index.split_names == ["train", "held_out"] and index.count("held_out") == 2
    assert {file: file.read_bytes() for file in (tmp_path / "set" / ".index").iterdir()} == kept


def test_a_sample_of_many_shards_is_looked_at_and_one_that_changed_is_found_at_the_latest_when_it_is_opened(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write(tmp_path / "set", 12)
    ShardIndex(shards)
    monkeypatch.setattr("sailplan.data.index.CHECKED", 3)
    for number in (4, 5, 9):  # of which 4 is in the sample 0, 4, 8
        write(tmp_path / "set", 1, first=number, word="q")
        index = ShardIndex(shards)
        if number == 4:
            assert scans[12:] == ["s0004.tar"]
        else:
            with pytest.raises(
                BadDataError, match=rf"s000{number}\.tar: changed since it was indexed"
            ):
                index.check_shard(number)
    assert len(scans) == 13
    ShardIndex(shards, thorough=True)
    assert sorted(scans[13:]) == ["s0005.tar", "s0009.tar"]


def _index(shards: list[Path], results: Any, delay: float = 0.0, together: Any = None) -> None:
    count, scan = [0], shard_table.scan

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        time.sleep(delay)
        return scan(*arguments)

    shard_table.scan = counted  # type: ignore[assignment]
    if together is not None:
        together.wait(30)
    results.put((whole(ShardIndex(shards)), count[0]))


def test_processes_that_index_at_once_share_the_shards(tmp_path: Path) -> None:
    shards, context = write(tmp_path / "set", 24), multiprocessing.get_context("fork")
    results = context.Queue()
    together = context.Barrier(4)
    workers = [
        context.Process(target=_index, args=(shards, results, 0.05, together)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(10)
    assert all(one[0] == found[0][0] for one in found) and found[0][0][0] == [
        f"r/{s}/{n}" for s in range(24) for n in range(PER_SHARD)
    ]
    counts = [count for _, count in found]
    assert sum(counts) == 24 and max(counts) < 24, (
        "each shard once, by one of them, and not all by the same"
    )


def test_what_a_killed_process_did_is_not_done_again(tmp_path: Path, scans: list[str]) -> None:
    shards, context = write(tmp_path / "set", 24), multiprocessing.get_context("fork")
    worker = context.Process(target=_index, args=(shards, context.Queue(), 0.1))
    worker.start()
    until = time.monotonic() + 30
    while len(list(tmp_path.glob("set/.index/*.parts/*.part"))) < 5 and time.monotonic() < until:
        time.sleep(0.02)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    done = len(list(tmp_path.glob("set/.index/*.parts/*.part")))
    assert 5 <= done < 24
    index = ShardIndex(shards, processes=2)
    assert len(index) == 192 and len(scans) <= 24 - done
    assert sorted(
        file.suffix for file in (tmp_path / "set" / ".index").iterdir() if file.name != ".gitignore"
    ) == [".lock", ".manifest", ".tables"]


def test_a_shard_that_one_helper_cannot_read_is_one_error(tmp_path: Path) -> None:
    shards = write(tmp_path / "set", 6)
    shards[3].write_bytes(shards[3].read_bytes()[:1024])
    with pytest.raises(BadDataError, match=r"s0003\.tar: .*end mark"):
        ShardIndex(shards, processes=3)
    assert len(ShardIndex(shards[:3] + shards[4:])) == 40


def test_tables_of_older_states_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "WASTED", 0)
    sizes = []
    for turn in range(8):
        shards = write(tmp_path / "set", 4, word=f"w{turn}")
        index = ShardIndex(shards)
        assert index.ids([9]) == [f"w{turn}/1/1"]
        (tables,) = (tmp_path / "set" / ".index").glob("*.tables")
        sizes.append(tables.stat().st_size)
    assert max(sizes) <= 3 * sizes[0]


def damages(content: bytes, seed: int, flips: int) -> Iterator[bytes]:
    """Yield the content cut, extended, flipped in single bits and of another version."""
    draw = random.Random(seed)
    yield from (
        content[:size]
        for size in sorted(
            {
                0,
                1,
                7,
                23,
                24,
                len(content) // 2,
                len(content) - 1,
                *(draw.randrange(len(content)) for _ in range(12)),
            }
        )
    )
    yield content.replace(b"sailcol1", b"sailcol9")
    yield b"PK\x03\x04" + content[4:]
    for _ in range(flips):
        changed = bytearray(content)
        changed[
            draw.randrange(len(content) if draw.random() < 0.7 else min(600, len(content)))
        ] ^= 1 << draw.randrange(8)
        yield bytes(changed)


@pytest.mark.parametrize("suffix", [".manifest", ".tables", ".ids"])
def test_a_damaged_file_is_made_anew_or_named_and_never_gives_another_answer(
    tmp_path: Path, suffix: str
) -> None:
    shards = write(tmp_path / "set", 3)
    index = ShardIndex(shards)
    wanted, places = whole(index), [index.find(name) for name in ("r/0/0", "r/2/7", "r/2/8")]
    (name,) = [
        file.name for file in (tmp_path / "set" / ".index").iterdir() if file.suffix == suffix
    ]
    kept = {file.name: file.read_bytes() for file in (tmp_path / "set" / ".index").iterdir()}
    named = 0
    for number, content in enumerate(damages(kept[name], 3, 60)):
        for file in (tmp_path / "set" / ".index").iterdir():
            file.unlink()
        for other, whole_content in kept.items():
            (tmp_path / "set" / ".index" / other).write_bytes(whole_content)
        (tmp_path / "set" / ".index" / name).write_bytes(content)
        try:
            found = ShardIndex(shards)
            assert (
                whole(found) == wanted
                and [found.find(one) for one in ("r/0/0", "r/2/7", "r/2/8")] == places
            ), number
        except SailplanError as error:
            assert "\n" not in str(error) and name in str(error), number
            named += 1
        repaired = ShardIndex(shards, thorough=True)
        assert whole(repaired) == wanted, number
    assert named < 60 and (suffix != ".manifest" or not named)


def test_columns_are_checked_a_page_at_a_time() -> None:
    values = np.arange(5 * PAGE // 8, dtype=np.int64)
    content = bytearray(pack({"values": values, "wide": values.reshape(-1, 4)}, {"a": [1]}))
    assert (
        Columns(bytes(content)).note == {"a": [1]}
        and (Columns(bytes(content)).whole("wide") == values.reshape(-1, 4)).all()
    )
    content[-PAGE * 6 + 8] ^= 1  # of the ten pages of the body the fifth, the last of `values`
    columns = Columns(bytes(content))
    assert (columns.part("values", 0, 2048) == values[:2048]).all() and columns.take(
        "values", np.array([2047, 0])
    ).tolist() == [2047, 0]
    assert (columns.whole("wide") == values.reshape(-1, 4)).all()
    for read in (
        lambda: columns.part("values", 2047, 2049),
        lambda: columns.take("values", np.array([0, 2100])),
        columns.check,
    ):
        with pytest.raises(Damaged, match="a page at byte"):
            read()


@pytest.mark.parametrize("at_once", [1 << 22, 1000])
def test_ids_are_found_however_many_parts_they_were_sorted_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(id_table, "SORTED_AT_ONCE", at_once)
    names = [f"item/{n}" for n in range(20_000)]
    names[777] = names[15_000] = "twice"
    hashes, checks = (
        np.array([id_hash(name) for name in names], np.uint64),
        np.array([id_check(name) for name in names], np.uint64),
    )
    hashes[3], checks[3] = hashes[4], checks[4] ^ np.uint64(1)  # two ids of one hash
    id_table.write_ids(
        tmp_path / "ids",
        len(names),
        zip(np.split(hashes, 40), np.split(checks, 40), strict=True),
        filling.Progress(),
    )
    table = id_table.IdTable(tmp_path / "ids", len(names))
    assert [table.find(name) for name in names[4:777]] == list(range(4, 777)) and table.find(
        "twice"
    ) == 777
    assert table.find("absent") is None and table.find(names[-1]) == 19_999
    assert table.find_hashes(np.append(hashes[5:9], np.uint64(1))).tolist() == [5, 6, 7, 8, -1]
    assert [file.name for file in tmp_path.iterdir()] == ["ids"]
    with pytest.raises(Damaged):
        id_table.IdTable(tmp_path / "ids", 19_999)


OPENED: list[str] = []
sys.addaudithook(
    lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None
)


def test_to_open_many_shards_is_few_opens_and_a_resume_reads_a_few_pages(tmp_path: Path) -> None:
    shards = write(tmp_path / "set", 4)
    for shard in shards:
        os.utime(shard, (1e9, 1e9))  # long ago, so that the time is a proof
    counts: dict[int, tuple[int, int]] = {}
    for copies in (25, 2_500):
        linked = synthetic_set(tmp_path / f"of{copies}", shards, copies)
        OPENED.clear()
        index = ShardIndex(linked)
        assert index.select("train", np.array([0, index.count("train") - 1])).tolist() == [
            0,
            32 * copies - 1,
        ]
        opened = [name for name in OPENED if str(tmp_path) in name]
        counts[copies] = len(opened), index.loaded
        assert (
            len(index) == 32 * copies
            and index.count("train") == 30 * copies
            and index.identity != ShardIndex(shards).identity
        )
    assert counts[25] == counts[2_500] and counts[25][0] < 5 and counts[25][1] <= 2
    assert repeated(ShardIndex(shards), 100).count("train") == 100 * 30
