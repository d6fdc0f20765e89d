"""Risks: an item gets another's vector, an unknown one gets any, the index differs by ranks, a
process holds all rows.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sailplan.config.compose import compose
from sailplan.curriculum.stages import check_stage
from sailplan.data import teacher_files
from sailplan.data.config import TeacherConfig
from sailplan.data.teacher_files import TeacherFiles, build_teachers
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import RankFailure, run_ranks


def brought(
    root: Path, rows: int = 300
) -> tuple[dict[str, TeacherConfig], list[str], dict[str, np.ndarray]]:
    """A .npy with a text of ids, and a parquet of every other item, in another order and half
    precision.
    """
    random = np.random.default_rng(0)
    ids = [f"items/ä{number}" for number in random.permutation(rows)]
    vectors = {
        "plain": random.standard_normal((rows, 5)).astype(np.float32),
        "table": random.standard_normal((rows // 2, 3)).astype(np.float16),
    }
    np.save(root / "plain.npy", vectors["plain"])
    (root / "ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors["table"].ravel()), 3)
    pq.write_table(
        pa.table({"item": ids[::-2], "embedding": column}),
        root / "table.parquet",
        row_group_size=40,
    )
    return {
        "plain": TeacherConfig(str(root / "plain.npy"), str(root / "ids.txt"), dimension=5),
        "table": TeacherConfig(str(root / "table.parquet"), "item", "embedding"),
    }, ids, vectors  # fmt: skip


def test_every_item_gets_its_own_vector_at_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers, ids, vectors = brought(tmp_path)
    monkeypatch.setattr(teacher_files, "UNIT_BYTES", 500)
    monkeypatch.setattr(teacher_files, "PART_ROWS", 64)
    files = {}
    for ranks in (1, 2, 4):
        found = run_ranks(
            lambda rank, world, folder: build_teachers(join_layout(1), teachers, folder),
            ranks,
            tmp_path / str(ranks),
        )
        assert (
            found
            == [{"items": {"plain": 300, "table": 150}, "dimensions": {"plain": 5, "table": 3}}]
            * ranks
        )
        files[ranks] = {
            path.name: path.read_bytes() for path in (tmp_path / str(ranks)).glob("*.npy")
        }
    assert files[1] == files[2] == files[4] and not any("unsorted" in name for name in files[1])
    table = pickle.loads(pickle.dumps(TeacherFiles(tmp_path / "2")))
    assert table.names == ["plain", "table"] and table.dimension("table") == 3
    asked = [*ids, "items/nobody", ""]
    assert np.array_equal(
        table.look_up("plain", asked).numpy(),
        np.concatenate([vectors["plain"], np.zeros((2, 5))]).astype(np.float32),
    )
    expected = dict(zip(ids[::-2], vectors["table"].astype(np.float32), strict=True))
    assert np.array_equal(
        table.look_up("table", asked).numpy(),
        np.stack([expected.get(name, np.zeros(3, np.float32)) for name in asked]),
    )
    assert len(pickle.dumps(table)) < 2000  # what travels to a worker is paths
    assert table.look_up("plain", []).shape == (0, 5)


def test_ids_are_hashed_and_sorted_in_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers, _, _ = brought(tmp_path)
    monkeypatch.setattr(teacher_files, "UNIT_BYTES", 200)

    def work(rank: int, world_size: int) -> int:
        seen = [0]
        lines = teacher_files._lines

        def counted(path: str | None, unit: Any) -> Any:
            for line in lines(path, unit):
                seen[0] += 1
                yield line

        monkeypatch.setattr(teacher_files, "_lines", counted)
        build_teachers(join_layout(1), {"plain": teachers["plain"]}, tmp_path / "index")
        return seen[0]

    read = run_ranks(work, 4)
    assert sum(read) == 2 * 300 and max(read) < 220  # twice each: counted, then hashed


def test_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    teachers, ids, vectors = brought(tmp_path)

    def build(rank: int, world_size: int) -> None:
        build_teachers(join_layout(1), {"plain": teachers["plain"]}, tmp_path / "index")

    for text, message in (
        ("\n".join(ids[:-1]), "found 299 ids for 300 vectors"),
        ("\n".join([*ids[:-1], ids[0]]), r"rows 0 and 299 .* have the same item id"),
    ):
        (tmp_path / "ids.txt").write_text(text)
        with pytest.raises(RankFailure, match=message) as caught:
            run_ranks(build, 2)
        assert isinstance(caught.value.__cause__, BadDataError)
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    vectors["plain"][7, 2] = np.nan
    np.save(tmp_path / "plain.npy", vectors["plain"])
    run_ranks(build, 1)
    with pytest.raises(BadDataError, match=rf"the vector of {ids[7]} is not finite"):
        TeacherFiles(tmp_path / "index").look_up("plain", [ids[6], ids[7]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["+data.teachers={als: {path: nowhere.npy}}"],
            r"data\.teachers\.als\.path=nowhere\.npy: there is no such file",
        ),
        (
            ["+data.teachers={als: {path: PLAIN, ids: IDS, dimension: 4}}"],
            r"data\.teachers\.als\.dimension=4: found vectors of 5",
        ),
        (
            ["+data.teachers={als: {path: PLAIN}}"],
            r"data\.teachers\.als\.ids=None: there is no such file",
        ),
        (
            ["+data.teachers={als: {path: TABLE}}"],
            r"has the columns item, embedding, expected id; name them",
        ),
        (
            ["+data.teachers={als: {path: PLAIN, ids: IDS}}"],
            r"objectives\.id2item\.teachers=\{'svd': 64, 'nmf': 64\}: expected some of .*'als': 5",
        ),
    ],
)
def test_a_stage_says_before_the_run_which_teachers_do_not_fit(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    brought(tmp_path)
    places = {"PLAIN": "plain.npy", "IDS": "ids.txt", "TABLE": "table.parquet"}
    for word, name in places.items():
        settings = [one.replace(word, str(tmp_path / name)) for one in settings]
    config = compose(["experiment=quickstart", *settings])
    with pytest.raises(ConfigurationError, match=message):
        check_stage("id2item", config.stages["id2item"], config)


def test_the_command_makes_files_that_a_run_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sailplan.cli.main import run

    assert (
        run(
            [
                "teachers",
                "experiment=quickstart",
                "--dataset",
                "icon_histories",
                "--dimension",
                "8",
                "--out",
                str(tmp_path / "made"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        f"svd: {{path: {tmp_path}/made/svd.npy, ids: {tmp_path}/made/ids.txt, dimension: 8}}"
        in printed
    )
    settings = [
        f"+data.teachers.{name}={{path: {tmp_path}/made/{name}.npy, ids: {tmp_path}/made/ids.txt, "
        f"dimension: 8}}"
        for name in ("svd", "nmf")
    ]
    config = compose(
        ["experiment=quickstart", "objectives.id2item.teachers={svd: 8, nmf: 8}", *settings]
    )
    check_stage("id2item", config.stages["id2item"], config)
    ids = (tmp_path / "made" / "ids.txt").read_text().splitlines()
    run_ranks(
        lambda rank, world: build_teachers(
            join_layout(1), config.data.teachers, tmp_path / "index"
        ),
        2,
    )
    found = TeacherFiles(tmp_path / "index").look_up("nmf", ids[:3])
    assert np.array_equal(found.numpy(), np.load(tmp_path / "made" / "nmf.npy")[:3]) and len(
        set(ids)
    ) == len(ids)
