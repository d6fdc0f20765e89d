"""Risks of an import: bytes that depend on processes or on a kill, rows lost in silence, rows
alive without bound, wrong records.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from sailplan.data.index import ShardIndex
from sailplan.data.tar import HeldOut
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.ingest.importing import import_data
from sailplan.ingest.job import ImportOptions
from sailplan.ingest.work import IN_FLIGHT, Outcome, Workshop


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAILPLAN_CONF", raising=False)
    return tmp_path


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def photos(count: int) -> None:
    Path("photos").mkdir()
    for number in range(count):
        Path(f"photos/{number}.png").write_bytes(picture(number))
    Path("photos/captions.csv").write_text(
        "file_name,caption,price\n"
        + "".join(f"{n}.png,a thing {n},{n % 2}\n" for n in range(count))
    )


def records(shards: str) -> list[tuple[dict[str, Any], list[str]]]:
    """Return JSON and the extensions of the other members of each record."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for shard in sorted(Path(shards).glob("*.tar")):
        with tarfile.open(shard) as archive:
            members: dict[str, dict[str, bytes]] = {}
            for member in archive:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = archive.extractfile(member).read()  # type: ignore[union-attr]
        found += [(json.loads(own.pop("json")), sorted(own)) for own in members.values()]
    return found


def digests(folder: str) -> dict[str, str]:
    paths = [
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and ".index" not in path.parts and path.name != "import.json"
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def shop(users: int) -> None:
    Path("items.csv").write_text("sku,title\n" + "".join(f"{n},thing {n}\n" for n in range(9)))
    rows = [f"u{n % users},{n * 7 % 9},{1000 - n}\n" for n in range(users * 6)]
    Path("used.csv").write_text("user,item,time\n" + "".join(rows))


SHOP = ImportOptions("used.csv", "shop", items="items.csv", shard_size=7)
PHOTOS = ImportOptions("photos", "photos", shard_size=5)


@pytest.mark.parametrize(
    ("make", "options"),
    [(lambda: photos(43), PHOTOS), (lambda: shop(11), SHOP)],
    ids=["photos", "interactions"],
)
def test_bytes_are_the_same_for_any_workers_and_after_a_kill(
    make: Any, options: ImportOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sailplan.ingest.shuffle.BUCKET_BYTES", 100
    )  # several buckets, of several parts
    monkeypatch.setattr("sailplan.ingest.shuffle.SPILL_ROWS", 7)
    make()
    import_data(replace(options, out="one"))
    import_data(replace(options, out="three", workers=3))
    expected = digests("one")
    assert len(expected) > 8 and digests("three") == expected

    def killed() -> None:
        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            done += 1
            if done == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        import_data(replace(options, out="killed", workers=2), advance)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and not Path("killed/import.json").exists()
    first = next(iter(sorted(Path("killed").rglob("*-000000.tar"))))
    before = first.stat().st_mtime_ns
    import_data(replace(options, out="killed", workers=2))
    assert first.stat().st_mtime_ns == before, "a shard that was whole is not written again"
    assert digests("killed") == expected
    assert import_data(replace(options, out="killed")).again and not list(
        Path("killed").rglob("*.tmp")
    )


def test_rows_alive_are_bounded_by_the_workers_not_by_the_source(tmp_path: Path) -> None:
    made: list[int] = []

    def parts() -> Any:
        for number in range(60):
            made.append(number)
            yield number

    finished: list[int] = []
    shop = Workshop(
        tmp_path, workers=2, progress=lambda rows: finished.append(len(made) - len(finished))
    )
    total = shop.run("phase", parts(), _count)
    assert total.rows == 60 and shop.worked == 60
    assert shop.live_parts <= IN_FLIGHT * 2 and max(finished) <= IN_FLIGHT * 2 + 1
    again = Workshop(tmp_path, workers=2)
    assert again.run("phase", parts(), _count).rows == 60 and again.worked == 0


def _count(number: int, part: Any) -> Outcome:
    return Outcome(rows=1)


def test_dropped_rows_are_listed_and_too_many_are_65() -> None:
    photos(40)
    Path("photos/3.png").unlink()
    Path("photos/5.png").write_bytes(picture(5)[:60])
    with Path("photos/captions.csv").open("a") as file:
        file.write("1.png,\n2.png,  ,0\nhttp://a/b.png,words,0\n")
    with pytest.raises(BadDataError, match=r"5 of 43 rows dropped \(11\.6%\)") as error:
        import_data(PHOTOS)
    assert error.value.exit_code == 65 and not Path("conf").exists()
    found = [
        json.loads(line) for line in Path("data/photos/dropped.jsonl").read_text().splitlines()
    ]
    assert [(one["file"], one["line"]) for one in found] == [
        ("captions.csv", line) for line in (5, 7, 42, 43, 44)
    ]
    for one, words in zip(
        found,
        ("No such file", "cannot be opened", "found 2 cells, expected 3", "no text", "URL"),
        strict=True,
    ):
        assert words in one["reason"], one
    result = import_data(replace(PHOTOS, drop_limit=0.2))
    assert (result.rows, result.dropped) == (43, 5) and len(records("data/photos")) == 38


def test_pictures_with_captions_become_items_and_zero_is_kept() -> None:
    photos(30)
    result = import_data(PHOTOS)
    found = records("data/photos")
    assert len(found) == 30 and all(extensions == ["png"] for _, extensions in found)
    assert found[2][0] == {
        "id": "captions.csv/2",
        "source": "2.png",
        "price": 0,
        "fields": {"caption": {"en": "a thing 2"}},
    }
    body = yaml.safe_load(Path("conf/data/photos.yaml").read_text())
    assert body["patterns"] == {"photo_to_text": {"query": "photo", "target": "text"}} and body[
        "held_out"
    ] == {"fraction": 0.1, "by": "source"}
    index = ShardIndex(sorted(Path("data/photos").glob("*.tar")), held_out=HeldOut(0.1, "source"))
    assert {name: index.count(name) for name in index.split_names} == result.sets["photos"][
        "splits"
    ]


def test_pairs_keep_negatives_media_and_scores() -> None:
    Path("a.png").write_bytes(picture(1))
    rows = [
        {
            "query": {"image": "a.png", "text": "like this"},
            "positive": "b",
            "negatives": ["c", "d"],
            "score": 0,
        },
        {"query": "q", "positive": ["first", "second"], "negatives": [], "score": 5},
        {"query": "q", "positive": "", "score": 1},
        {"query": "q", "positive": "x", "score": 9},
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_data(ImportOptions("pairs.jsonl", "graded", score_maximum=5, drop_limit=0.5, held_out=0))
    (first, media), (second, _) = records("data/graded")
    assert (
        media == ["query.png"]
        and first["negatives"] == ["c", "d"]
        and first["score"] == 0
        and first["query"] == {"text": "like this"}
    )
    assert second["target"] == "first" and second["score"] == 1
    body = yaml.safe_load(Path("conf/data/graded.yaml").read_text())
    assert (
        body["negatives"] == 2
        and body["views"]["query"]["modalities"] == ["vision", "text"]
        and body["views"]["target"]["modalities"] == ["text"]
    )


def test_interactions_become_a_record_a_user_in_time_and_parquet() -> None:
    Path("items.csv").write_text(
        "item_id,title\n" + "".join(f"{n},thing {n}\n" for n in range(200))
    )
    rows = [
        ("b", 1, 30, 1),
        ("a", 2, 20, 1),
        ("a", 0, 10, 0),
        ("a", 7, 15, 1),
        ("a", 3, 5, 1),
        ("c", 1, 1, 1),
    ]
    rows += [(f"u{n}", n % 200, n, 1) for n in range(400)] + [
        (f"u{n}", (n + 1) % 200, 0, 1) for n in range(400)
    ]
    Path("used.csv").write_text(
        "user_id,item_id,timestamp,label\n"
        + "".join(",".join(map(str, row)) + "\n" for row in [*rows, ("b", 999, 1, 1)])
    )
    result = import_data(ImportOptions("used.csv", "shop", items="items.csv"))
    found = {body["id"]: body for body, _ in records("data/shop")}
    assert found["a"] == {
        "id": "a",
        "items": ["3", "0", "7", "2"],
        "times": [5.0, 10.0, 15.0, 20.0],
        "labels": [1.0, 0.0, 1.0, 1.0],
    }
    assert (
        "b" not in found
        and "c" not in found
        and result.notes["users with fewer than two items"] == 2
    )
    [dropped] = Path("data/shop/dropped.jsonl").read_text().splitlines()
    assert "'999' is not in the items" in dropped and json.loads(dropped)["line"] == 808
    table = pq.read_table("data/shop/interactions").to_pylist()
    assert len(table) == 806 and [row for row in table if row["user"] == "c"] == [
        {"user": "c", "item": "1", "time": 1.0, "label": 1.0}
    ]
    assert table == sorted(table, key=lambda row: (row["user"], row["time"]))


def test_retrieval_sets_become_pairs_over_their_corpus() -> None:
    Path("set/qrels").mkdir(parents=True)
    Path("set/corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"d{n}", "title": "", "text": f"document {n}"}) + "\n"
            for n in range(9)
        )
    )
    Path("set/queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{n}", "text": f"query {n}"}) + "\n" for n in range(9))
    )
    Path("set/qrels/train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t2\nq0\td2\t0\nq1\td1\t1\n"
    )
    Path("set/qrels/test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq2\td3\t1\nq3\td99\t1\nq99\td1\t1\n"
    )
    result = import_data(ImportOptions("set", "facts", drop_limit=0.2))
    found = {body["id"]: body for body, _ in records("data/facts")}
    assert set(found) == {"train/q0/d0", "train/q0/d1", "train/q1/d1", "held_out/q2/d3"}
    assert found["train/q0/d1"]["negatives"] == ["d2"] and found["train/q0/d1"]["text"] == {
        "en": "query 0"
    }
    assert result.dropped == 2 and len(records("data/facts/items")) == 9
    assert yaml.safe_load(Path("conf/data/facts.yaml").read_text())["catalogue"] == "facts_corpus"


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_hugging_face_folders_keep_splits_pictures_and_classes(form: str) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["boot", "sandal"], "_type": "ClassLabel"},
    }
    kinds = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
        ("caption", pa.string()),
    ]
    schema = pa.schema(kinds, {"huggingface": json.dumps({"info": {"features": features}})})
    for split, count in (("train", 700), ("test", 30)):  # more than a batch is read at once
        rows = [
            {
                "image": {"bytes": picture(n % 9), "path": None},
                "label": n % 2,
                "caption": f"{split} {n}",
            }
            for n in range(count)
        ]
        table = pa.Table.from_pylist(rows, schema)
        Path("hf", split).mkdir(parents=True)
        if form == "parquet":
            pq.write_table(table, f"hf/{split}/0000.parquet", row_group_size=333)
        else:
            with (
                pa.OSFile(f"hf/{split}/data-0.arrow", "wb") as file,
                pa.ipc.new_stream(file, schema) as writer,
            ):
                writer.write_table(table, max_chunksize=300)
            Path("hf", split, "state.json").write_text(
                json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})
            )
    if form == "save_to_disk":
        Path("hf/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    result = import_data(ImportOptions("hf", "shoes", shard_size=128, workers=2))
    assert result.sets["shoes"]["splits"] == {"train": 700, "held_out": 30}
    bodies = [body for body, extensions in records("data/shoes") if extensions == ["png"]]
    by_split = {
        split: [body["fields"]["caption"]["en"] for body in bodies if body["split"] == split]
        for split in ("train", "held_out")
    }
    assert by_split == {
        "train": [f"train {n}" for n in range(700)],
        "held_out": [f"test {n}" for n in range(30)],
    }
    assert {body["label"] for body in bodies} == {"boot", "sandal"}


def test_another_import_is_never_written_over() -> None:
    photos(20)
    import_data(PHOTOS)
    with pytest.raises(ConfigurationError, match="shard_size was 5, is 6"):
        import_data(replace(PHOTOS, shard_size=6))
    Path("photos/captions.csv").write_text("file_name,caption,price\n1.png,other,0\n")
    with pytest.raises(ConfigurationError, match="holds another import"):
        import_data(PHOTOS)
    Path("conf/data/own.yaml").write_text("# @package data.sets.own\nshards: x\n")
    for name in ("emoji", "own", "reading", "a.b"):
        with pytest.raises(ConfigurationError, match=name):
            import_data(replace(PHOTOS, name=name))
