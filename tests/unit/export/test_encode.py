"""Risks: a stop loses or repeats shards, shards of two jobs mix, a smaller type turns the
neighbours round.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sailplan
from sailplan.cli.main import main
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.export.encode import encode_file, quantised
from sailplan.export.load import Model

sys.path.insert(0, str(Path(__file__).parent))
from folders import WORDS
from test_published_folder import source

LACKING = [name for name in ("faiss", "pyarrow") if importlib.util.find_spec(name) is None]
TEXTS = [" ".join(np.random.default_rng(number).choice(WORDS, 5)) for number in range(50)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source("bert", tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return sailplan.load(place, device="cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"item {number}", "text": text}) + "\n"
            for number, text in enumerate(TEXTS)
        )
    )
    return path


def test_a_stop_repeats_no_shard(
    model: Model, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = model.encode

    def stops(items: Any, **options: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(items, **options)

    monkeypatch.setattr(model, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        encode_file(model, file, tmp_path / "out.npy", shard_rows=16)
    assert not (tmp_path / "out.npy").exists()
    with pytest.raises(ConfigurationError, match="another job \\(dimension is 16, now 8\\)"):
        encode_file(model, file, tmp_path / "out.npy", shard_rows=16, dimension=8)
    told = encode_file(model, file, tmp_path / "out.npy", shard_rows=16)
    assert calls == [16, 16, 16, 16, 2] and (told["shards"], told["encoded_now"], told["rows"]) == (
        4,
        2,
        50,
    )
    monkeypatch.undo()
    assert np.allclose(np.load(tmp_path / "out.npy"), model.encode(TEXTS), atol=1e-6)
    assert (tmp_path / "out.npy.ids.txt").read_text().splitlines() == [
        f"item {number}" for number in range(50)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "items.jsonl",
        "out.npy",
        "out.npy.ids.txt",
    ]


def test_smaller_types_keep_the_cosines(model: Model) -> None:
    vectors = model.encode(TEXTS, dimension=12)
    assert (
        np.abs(
            model.similarity(
                quantised(vectors, "int8", 127 / np.abs(vectors).max()).astype(np.float32), vectors
            ).diagonal()
            - 1
        ).max()
        < 1e-3
    )
    assert np.abs(quantised(vectors, "float16") - vectors).max() < 1e-3
    bits = quantised(vectors, "binary")
    assert bits.shape == (50, 2) and (np.unpackbits(bits, axis=1)[:, :12] == (vectors > 0)).all()


@pytest.mark.skipif(
    bool(LACKING),
    reason=f"{', '.join(LACKING)} not installed: pip install -r requirements/test.txt; parquet and faiss were NOT checked",
)
def test_parquet_and_faiss_come_back(model: Model, file: Path, tmp_path: Path) -> None:
    import faiss
    import pyarrow.parquet

    vectors = model.encode(TEXTS)
    encode_file(model, file, tmp_path / "out.parquet", shard_rows=20)
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist()[:2] == ["item 0", "item 1"] and np.allclose(
        np.array(table["vector"].to_pylist()), vectors, atol=1e-6
    )
    for precision in ("float32", "float16", "int8"):
        told = encode_file(
            model, file, tmp_path / f"{precision}.faiss", precision=precision, shard_rows=20
        )  # type: ignore[arg-type]
        index = faiss.read_index(str(tmp_path / f"{precision}.faiss"))
        _, found = index.search(vectors * told.get("scale", 1.0), 1)
        cosines = (vectors @ vectors.T)[np.arange(50), found[:, 0]]
        assert (
            index.ntotal == 50
            and cosines.mean() > 0.99
            and (precision == "int8" or cosines.min() > 0.998)
            and len(set(found[:, 0])) > 30
        )
    encode_file(model, file, tmp_path / "binary.faiss", precision="binary")
    distances, _ = faiss.read_index_binary(str(tmp_path / "binary.faiss")).search(
        quantised(vectors, "binary"), 1
    )
    assert (distances == 0).all()


def test_the_command(
    place: Path,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask = ["encode", "--model", str(place), "--input", str(file), "--device", "cpu"]
    assert (
        main(
            [
                *ask,
                "--output",
                str(tmp_path / "out.npy"),
                "--precision",
                "float16",
                "--dimension",
                "8",
            ]
        )
        == 0
    )
    assert (
        np.load(tmp_path / "out.npy").shape == (50, 8)
        and np.load(tmp_path / "out.npy").dtype == np.float16
    )
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main([*ask, "--output", str(tmp_path / "out.faiss")]) == 64
    assert "pip install faiss-cpu" in capsys.readouterr().err
    assert main([*ask, "--output", str(tmp_path / "out.csv")]) == 64
    file.write_text('{"text": "a"}\n{"text": \n')
    assert main([*ask, "--output", str(tmp_path / "other.npy")]) == 65
    assert "line 2 is not JSON" in capsys.readouterr().err


def test_a_bad_item_is_named(model: Model, file: Path, tmp_path: Path) -> None:
    file.write_text('{"text": "a"}\n{"image": "missing.png"}\n')
    with pytest.raises(BadDataError, match="items 0 to 1"):
        encode_file(model, file, tmp_path / "out.npy")
