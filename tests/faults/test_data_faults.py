"""Faults of data, disks and servers end as the table of docs/cluster.md says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import data_faults

# The table's other rows take as long again, and have tests of their parts elsewhere
RUN = (
    "the disk does not give a record (EIO)",
    "a shard is written to while in use",
    "shards are deleted while in use",
    "a shard is written anew between two starts, same size and names",
    "the disk is full under metrics.jsonl",
    "the disk is full in a save, on one rank",
    "a server answers 500 alone",
)


def documented() -> dict[str, list[str]]:
    text = data_faults.DOCS.read_text()
    body = text.partition(data_faults.BEGIN)[2].partition(data_faults.END)[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.strip().splitlines()[2:]]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def words(text: str) -> str:
    """A message without what differs from run to run: its numbers, and which of a server's failures
    the client saw last when its time was over.
    """
    text = re.sub(r"no answer within 3 s \(.*\), data", "no answer within 3 s, data", text)
    return re.sub(r"\d+(\.\d+)?m?s?", "0", text)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_faults.pack(tmp_path_factory.mktemp("pack"))


def test_the_table_has_every_fault() -> None:
    assert list(documented()) == list(data_faults.FAULTS)


@pytest.mark.parametrize("name", RUN)
def test_a_fault_ends_as_the_table_says(pack: Path, name: str) -> None:
    outcome = data_faults.happen(name, pack)
    code, _, said = documented()[name]
    found = data_faults.row(name, outcome).rpartition(f"| {outcome.seconds:.0f} | ")[2]
    assert str(outcome.code) == code and words(found.removesuffix(" |")) == words(said), outcome
    if code == "0":
        assert outcome.steps in (0, data_faults.STEPS)  # none where nothing could be written
