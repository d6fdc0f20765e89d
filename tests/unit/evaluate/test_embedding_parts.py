"""Risks: parts of a job array that leave a folder unlike the whole one's, wait for each other, start
over after a kill, or mix two models.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailplan.config.schema import Config
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.embed.config import StoreConfig
from sailplan.embed.shards import Shards
from sailplan.errors import ConfigurationError
from sailplan.export.embedding_parts import Part
from sailplan.export.embeddings import export_embeddings
from sailplan.export.vector_folder import VectorFolder
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan.runtime.claim import Claim
from sailplan_kernels.testing import RankFailure, run_ranks

ROWS = 5  # a file, 10 files in all


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    found = write_pack(tmp_path_factory.mktemp("pack"))
    return dataclasses.replace(found, store=StoreConfig(shard_rows=4))


def embed(
    config: Config,
    out: Path,
    part: str | None = None,
    *,
    ranks: int = 1,
    seed: int = 0,
    dies_after: int | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], int]:
    """Return what one job returns, and how many shards of the store its first rank wrote."""

    def job(rank: int, world_size: int) -> tuple[dict[str, Any], int]:
        written, write = [], Shards.write

        def counted(self: Shards, shard: int, *content: Any) -> None:
            if dies_after is not None and len(written) == dies_after:
                os._exit(9)
            write(self, shard, *content)
            written.append(shard)

        Shards.write = counted  # type: ignore[method-assign]
        parallel = join_layout(1)
        encoder = build_encoder(config.model, config.parallel, parallel, seed=seed)
        place = None if part is None else Part.parse(part)
        reader = open_datasets(config)["things"]
        common = {"label": "subgroup", "shard_rows": ROWS, "part": place} | settings
        found = export_embeddings(
            encoder, reader, "item", out, parallel=parallel, config=config, **common
        )
        return found, len(written)

    found: tuple[dict[str, Any], int] = run_ranks(job, ranks)[0]
    return found


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("whole")
    embed(config, out)
    return out


def equal(one: Path, two: Path) -> bool:
    """Return whether two folders have the same index, ids, labels and, up to rounding, vectors."""
    assert (one / "embeddings.json").read_bytes() == (two / "embeddings.json").read_bytes()
    folders, names = (VectorFolder(one), VectorFolder(two)), sorted(one.glob("*.txt"))
    assert len(names) == 20 and all(
        path.read_bytes() == (two / path.name).read_bytes() for path in names
    )
    rows = np.arange(folders[0].rows)
    return np.allclose(folders[0].take(rows), folders[1].take(rows), atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_parts_in_any_order_make_the_whole_folder(
    config: Config, whole: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    written = 0
    for place, number in enumerate(order):
        assert not (tmp_path / "embeddings.json").exists()
        found, shards = embed(config, tmp_path, f"{number}/3", ranks=1 + number % 2)
        left = sorted(order[place + 1 :])
        assert found.get("waiting_for", []) == [f"{other}/3" for other in left]
        written += shards
    assert equal(whole, tmp_path) and written >= 10
    assert not list(tmp_path.glob("part-*/")), "working folders of parts that are done"


def test_parts_at_the_same_time_make_the_whole_folder(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    """Three jobs of which none knows of the others, started together."""
    with ThreadPoolExecutor(3) as jobs:
        list(jobs.map(lambda number: embed(config, tmp_path, f"{number}/3"), range(3)))
    assert equal(whole, tmp_path)


def test_a_killed_part_goes_on_with_what_it_had_and_others_do_not_wait(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure):
        embed(config, tmp_path, "1/3", dies_after=2)
    embed(config, tmp_path, "0/3")
    found, _ = embed(config, tmp_path, "2/3")
    assert found["waiting_for"] == ["1/3"] and not (tmp_path / "embeddings.json").exists()
    total = -(-3 * ROWS // 4)  # three of the ten files, in shards of four rows
    found, shards = embed(config, tmp_path, "1/3")
    assert shards == total - 2 and found["rows"] == 48
    assert equal(whole, tmp_path)


def test_a_part_that_is_done_embeds_nothing_and_can_publish(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    for number in range(3):
        embed(config, tmp_path, f"{number}/3")
    (tmp_path / "embeddings.json").unlink()  # as where a file system showed notes late
    found, shards = embed(config, tmp_path, "1/3")
    assert shards == 0 and found["rows"] == 48 and equal(whole, tmp_path)


@pytest.mark.parametrize(
    ("part", "changed", "said"),
    [
        ("1/4", {}, r"number of parts \(found 3, expected 4\)"),
        ("1/3", {"seed": 1}, "another weights or model settings"),
        ("1/3", {"label": None}, "another label"),
        ("1/3", {"shard_rows": 7}, "another shard_rows"),
        (None, {}, "unfinished parts"),
    ],
)
def test_what_is_not_the_same_embedding_is_refused_and_harms_nothing(
    config: Config, whole: Path, tmp_path: Path, part: str, changed: dict[str, Any], said: str
) -> None:
    embed(config, tmp_path, "0/3")
    with pytest.raises(RankFailure, match=said) as refused:
        embed(config, tmp_path, part, **changed)
    assert isinstance(refused.value.__cause__, ConfigurationError)
    assert len(str(refused.value.__cause__).splitlines()) == 1
    embed(config, tmp_path, "1/3")
    embed(config, tmp_path, "2/3")
    assert equal(whole, tmp_path)


def test_a_whole_folder_is_not_mixed_with_parts_and_may_replace_them(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match="without --part"):
        embed(config, whole, "0/3")
    for number in range(2):
        embed(config, tmp_path, f"{number}/2")
    embed(config, tmp_path)
    assert equal(whole, tmp_path) and not list(tmp_path.glob("part*"))


def test_a_second_job_of_a_part_is_refused(config: Config, tmp_path: Path) -> None:
    first = Claim(tmp_path / "part-0001")
    with pytest.raises(RankFailure, match="another job is writing here"):
        embed(config, tmp_path, "1/3")
    first.release()


def test_shards_are_shared_evenly_and_more_parts_than_shards_are_no_failure(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    for total, count in itertools.product((0, 1, 10, 15_259), (1, 3, 64, 1000)):
        found = [Part(number, count).shards(total) for number in range(count)]
        assert [shard for one in found for shard in one] == list(range(total))
        assert max(map(len, found)) - min(map(len, found)) <= 1
    for number in range(12):
        found, _ = embed(config, tmp_path, f"{number}/12")
    assert equal(whole, tmp_path) and json.loads((tmp_path / "part-0000.json").read_text()) == []


@pytest.mark.parametrize("text", ["3/3", "1", "-1/3", "1/0", "a/b", "1/3/5"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="expected K/N"):
        Part.parse(text)
