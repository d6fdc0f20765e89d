"""A checkpoint that changed on the disk is never loaded, and opening one runs nothing that is in
it.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from sailplan.checkpoint import loading, seal, store
from sailplan.checkpoint.index import IndexReader
from sailplan.errors import ConfigurationError
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks


def saved(folder: Path, steps: tuple[int, ...] = (1, 2)) -> None:
    def work(rank: int, world_size: int) -> None:
        parallel = join_layout(1)
        model = nn.Linear(64, 64)
        for step in steps:
            store.save(
                store.folder_of(folder, step),
                model=model,
                optimizer=None,
                extra={"step": step},
                parallel=parallel,
            )

    run_ranks(work, 2)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    file.write_bytes(content)


def test_any_flipped_bit_is_noticed_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    saved(tmp_path)
    newest = store.folder_of(tmp_path, 2)
    files = sorted(json.loads((newest / seal.COMPLETE).read_text())["files"])
    assert {".metadata", "small.pt", "__0_0.distcp"} <= set(files)
    for name in files:
        whole = (newest / name).read_bytes()
        for place in range(7, len(whole), max(1, len(whole) // 25)):
            flip(newest / name, place)
            assert seal.first_damage(newest) == name, (name, place)
            (newest / name).write_bytes(whole)
    assert seal.first_damage(newest) == ""
    flip(newest / "__0_0.distcp", 5000)

    def work(rank: int, world_size: int) -> str:
        parallel = join_layout(1)
        assert store.newest_whole(tmp_path, parallel) == store.folder_of(tmp_path, 1)
        try:
            loading.load(newest, model=nn.Linear(64, 64), optimizer=None, parallel=parallel)
        except ConfigurationError as error:
            return str(error)
        return ""

    assert all("__0_0.distcp is damaged" in told for told in run_ranks(work, 2))
    with pytest.raises(ConfigurationError, match="__0_0"):
        loading.WholeCheckpoint(newest)


class Crafted:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch $CRAFTED",)


def test_a_crafted_index_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFTED", str(tmp_path / "ran"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Crafted()))
    with pytest.raises(ConfigurationError, match="system"):
        IndexReader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_a_seal_of_before_still_loads(tmp_path: Path) -> None:
    saved(tmp_path, (1,))
    folder = store.folder_of(tmp_path, 1)
    listed = json.loads((folder / seal.COMPLETE).read_text())
    sizes = {name: entry["bytes"] for name, entry in listed["files"].items()}
    (folder / seal.COMPLETE).write_text(
        json.dumps({"index_sha256": listed["files"][".metadata"]["sha256"], "files": sizes})
    )
    assert seal.is_complete(folder) and seal.first_damage(folder) == ""
    assert torch.equal(
        loading.WholeCheckpoint(folder).read("weight"),
        loading.WholeCheckpoint(folder).read("weight"),
    )
