"""Risks: an event after the target that leaks, a view that is not what the report defines, other
bytes on other ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sailplan.config.schema import Config, DatasetConfig, PatternConfig, ViewConfig
from sailplan.curriculum import event_buckets
from sailplan.curriculum.interests import Events, history_of, interest_views
from sailplan.curriculum.timed import make_timed_interests
from sailplan.data.config import INTEREST_VIEWS, HeldOutConfig, InterestsConfig
from sailplan.data.datasets import open_datasets
from sailplan.data.events import EventReader, EventUnit
from sailplan.data.index import ShardIndex
from sailplan.data.reader import RecordReader
from sailplan.data.writer import Record, write_shards
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import RankFailure, run_ranks

GOLDEN = json.loads((Path(__file__).parent / "golden_interests.json").read_text(encoding="utf-8"))
NAMES = {"L": "like", "S": "share", "F": "finish", "V": "save"}
POSITIVE = list(NAMES.values())
Row = tuple[str, str, int, list[str]]


def catalogue(root: Path, ids: list[str]) -> RecordReader:
    write_shards(
        [Record({"id": name, "fields": {"title": {"en": name}}}) for name in ids],
        root / "items",
        "items",
        7,
    )
    dataset = DatasetConfig(
        shards=str(root / "items"), views={"title": ViewConfig(fields=["title"])}
    )
    return RecordReader("items", dataset, ShardIndex(sorted((root / "items").glob("*.tar"))))


def parquet(path: Path, rows: list[Row], **changes: Any) -> None:
    columns = dict(
        zip(("user", "item", "time", "labels"), map(list, zip(*rows, strict=True)), strict=True)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {name: pa.array(values, type=changes.get(name)) for name, values in columns.items()}
        ),
        path,
        row_group_size=5,
    )


def json_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"labels": labels, "time": time, "item": item, "more": {"x": 1}, "user": user}
        for user, item, time, labels in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def golden_rows() -> list[Row]:
    return [
        (
            user,
            item if item == "unknown" else f"items/{item}",
            time,
            ["view"] if labels == "view" else [NAMES[one] for one in labels],
        )
        for user, item, time, labels in GOLDEN["events"]
    ]


def made(
    root: Path,
    events: Path,
    ranks: int,
    items: RecordReader,
    vectors: Callable[[np.ndarray], np.ndarray],
    length: int,
    bucket_events: int = 6,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(statistics, shard name -> bytes), the same on all ranks."""
    dataset = DatasetConfig(
        shards="artifact:interests", kind="sequences", catalogue="items", history_length=length
    )
    dataset.negatives, dataset.held_out = (
        settings.pop("negatives", 0),
        settings.pop("held_out", None),
    )
    dataset.interests = InterestsConfig(
        **({"events": str(events), "positive": POSITIVE} | settings)
    )
    folder = root / f"made-{ranks}"

    def work(rank: int, world_size: int) -> dict[str, Any]:
        return make_timed_interests(
            join_layout(1),
            "sequences",
            dataset,
            items,
            folder,
            lambda used: vectors,
            bucket_events=bucket_events,
        )

    found = run_ranks(work, ranks, timeout=60)
    assert all(one == found[0] for one in found) and not (root / f"made-{ranks}.work").exists()
    return found[0], {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(places: np.ndarray) -> np.ndarray:
    """Vectors of items that are all alike."""
    return np.ones((len(places), 1), dtype=np.float32)


def bodies(folder: Path) -> list[dict[str, Any]]:
    dataset = DatasetConfig(kind="sequences", catalogue="items")
    reader = RecordReader("made", dataset, ShardIndex(sorted(folder.glob("*.tar"))))
    return [reader.body(position) for position in range(len(reader))]


def golden_vectors(items: RecordReader) -> Callable[[np.ndarray], np.ndarray]:
    table = np.array(
        [GOLDEN["vectors"][name.removeprefix("items/")] for name in items.ids(range(len(items)))],
        dtype=np.float32,
    )
    return lambda positions: table[positions]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "both"])
def test_the_golden_users_get_what_the_definition_says_at_any_number_of_ranks(
    tmp_path: Path, form: str
) -> None:
    items, rows, log = (
        catalogue(tmp_path, [f"items/{name}" for name in GOLDEN["vectors"]]),
        golden_rows(),
        tmp_path / "log",
    )
    shuffled = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    for part, start in enumerate(range(0, len(shuffled), 7)):
        write = json_lines if form == "jsonl" or (form == "both" and part % 2) else parquet
        write(
            log / f"part-{part}.{'jsonl' if write is json_lines else 'parquet'}",
            shuffled[start : start + 7],
        )
    results = [
        made(tmp_path, log, ranks, items, golden_vectors(items), GOLDEN["length"])
        for ranks in (1, 2, 4)
    ]
    assert results[0] == results[1] == results[2]
    stats, shards = results[0]
    assert (
        len(shards) > 1
        and stats["users"] == 6
        and stats["unknown_events"] == 1
        and stats["labels"]["save"] == 4
    )
    found: dict[str, dict[str, str]] = {}
    for body in bodies(tmp_path / "made-1"):
        assert body["target"] == f"items/{GOLDEN['targets'][body['user']]}"
        for view in body["views"]:
            found.setdefault(body["user"], {})[view] = "".join(
                name.removeprefix("items/") for name in body["history"]
            )
    assert found == GOLDEN["expected"]
    assert stats["views"] == {
        view: sum(view in views for views in found.values()) for view in INTEREST_VIEWS
    }


def by_the_words(
    rows: list[Row], length: int, settings: InterestsConfig, cosine: Callable[[str, str], float]
) -> dict[str, tuple[str, list[str]]]:
    """The definition in plain words for one user: view -> (target, history)."""
    together: dict[tuple[int, str], set[str]] = {}
    for _, item, time, labels in rows:
        together.setdefault((time, item), set()).update(set(labels) & set(settings.positive))
    events = [(time, item, labels) for (time, item), labels in sorted(together.items())][
        -settings.max_events :
    ]
    events = [event for event in events if event[2]]
    if not events:
        return {}
    last = events[-1][0]
    _, target, wanted = next(event for event in events if event[0] == last)
    labels_of: dict[str, set[str]] = {}
    seen: dict[str, int] = {}
    for time, item, labels in events:
        if time < last and item != target:
            labels_of.setdefault(item, set()).update(labels)
            seen[item] = time
    recent = sorted(seen, key=lambda item: (-seen[item], item))
    agree = [
        item
        for item in recent
        if Fraction(len(labels_of[item] & wanted), len(labels_of[item] | wanted)) > Fraction(1, 2)
    ]
    compact = [item for item in recent if len(labels_of[item]) >= settings.single_peak_behaviours]

    def by_clusters(among: list[str], distribution: list[str]) -> list[str]:
        taken: dict[frozenset[str], int] = {}
        turns = {}
        for item in among:
            cluster = frozenset(labels_of[item])
            taken[cluster] = taken.get(cluster, 0) + 1
            turns[item] = Fraction(
                2 * taken[cluster] - 1, sum(labels_of[other] == cluster for other in distribution)
            )
        return sorted(among, key=lambda item: (turns[item], recent.index(item)))[:length]

    views = {
        "content_single": sorted(
            compact, key=lambda item: (-cosine(item, target), recent.index(item))
        )[:length],
        "content_multi": agree[:length],
        "collaboration_single": by_clusters([item for item in compact if item in agree], recent),
        "collaboration_multi": by_clusters(recent, recent),
    }
    return {
        view: (target, sorted(chosen, key=lambda item: (seen[item], item)))
        for view, chosen in views.items()
        if chosen
    }


def test_many_random_users_equal_the_definition_in_plain_words_and_nothing_later_is_shown() -> None:
    random = np.random.default_rng(3)
    names = [f"i{number:02d}" for number in range(30)]
    vectors = random.standard_normal((30, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    settings = InterestsConfig("log", positive=POSITIVE, max_events=40)
    rows: list[Row] = []
    for user in range(150):
        for _ in range(int(random.integers(1, 60))):
            labels = random.choice([*POSITIVE, "view"], int(random.integers(1, 4))).tolist()
            rows.append((f"u{user}", names[random.integers(30)], int(random.integers(40)), labels))
    bits = np.array(
        [sum(1 << POSITIVE.index(one) for one in set(row[3]) & set(POSITIVE)) for row in rows],
        dtype=np.uint64,
    )
    events = Events(
        *(
            np.array([int(row[column][1:]) if column < 2 else row[column] for row in rows])
            for column in range(3)
        ),
        bits,
    )  # type: ignore[misc]
    history = history_of(events, 150, settings.max_events)
    found = interest_views(
        history,
        settings,
        4,
        similarity=lambda one, two: (vectors[one] * vectors[two]).sum(1),
        seeds=np.zeros(150, dtype=np.uint64),
    )
    got = {
        (f"u{found.users[row]}", INTEREST_VIEWS[found.views[row]]): (
            names[found.targets[row]],
            [names[item] for item in found.items[found.starts[row] : found.starts[row + 1]]],
        )
        for row in range(len(found.users))
    }
    expected = {}
    for user in range(150):
        own = [row for row in rows if row[0] == f"u{user}"]
        chosen = by_the_words(
            own, 4, settings, lambda one, two: float(vectors[int(one[1:])] @ vectors[int(two[1:])])
        )
        expected |= {(f"u{user}", view): value for view, value in chosen.items()}
        for target, shown in chosen.values():
            moment = max(
                time
                for _, item, time, labels in own
                if item == target and set(labels) & set(POSITIVE)
            )
            assert all(
                any(item == other and time < moment for _, other, time, _ in own) for item in shown
            )
    assert got == expected and len(got) > 300


def test_a_log_with_one_label_is_told_what_it_cannot_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = catalogue(tmp_path, [f"items/{number}" for number in range(9)])
    rows: list[Row] = [
        (f"u{user}", f"items/{item}", item, []) for user in range(5) for item in range(user, 9)
    ]
    parquet(tmp_path / "log.parquet", rows, labels=pa.list_(pa.string()))
    vectors = golden = np.eye(9, dtype=np.float32)
    with caplog.at_level(logging.WARNING, logger="sailplan.curriculum"):
        dataset = DatasetConfig(
            shards="artifact:interests", kind="sequences", catalogue="items", history_length=3
        )
        dataset.interests = InterestsConfig(str(tmp_path / "log.parquet"), labels=None)
        said = run_ranks(
            lambda rank, world: _logged(dataset, items, tmp_path / "once", vectors), 1
        )[0]
    assert any(
        "one kind of positive label (event)" in line
        and "single_peak_behaviours=3 give nothing" in line
        for line in said
    )
    assert any("content_single gives no sequence" in line for line in said)
    stats, _ = made(
        tmp_path,
        tmp_path / "log.parquet",
        1,
        items,
        lambda places: golden[places],
        3,
        labels=None,
        positive=[],
        single_peak_behaviours=1,
    )
    assert stats["views"] == dict.fromkeys(INTEREST_VIEWS, 5)


def _logged(
    dataset: DatasetConfig, items: RecordReader, folder: Path, vectors: np.ndarray
) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sailplan.curriculum").addHandler(handler)
    make_timed_interests(
        join_layout(1),
        "sequences",
        dataset,
        items,
        folder,
        lambda used: lambda places: vectors[places],
    )
    return lines


def test_held_out_users_and_random_negatives_and_draws(tmp_path: Path) -> None:
    items = catalogue(tmp_path, [f"items/{number:02d}" for number in range(60)])
    random = np.random.default_rng(0)
    rows: list[Row] = [
        (f"u{user}", f"items/{item:02d}", time, ["like", "share", "save"])
        for user in range(40)
        for time, item in enumerate(random.permutation(30)[:12])
    ]
    json_lines(tmp_path / "log.jsonl", rows)
    options: dict[str, Any] = {
        "held_out": HeldOutConfig(0.3, "user"),
        "negatives": 2,
        "draw": "random",
        "views": ["collaboration_multi"],
    }
    results = [
        made(tmp_path, tmp_path / "log.jsonl", ranks, items, same, 3, 100, **options)
        for ranks in (1, 3)
    ]
    assert results[0] == results[1]
    found = bodies(tmp_path / "made-1")
    assert len(found) == 40 and 4 < sum(body["split"] == "held_out" for body in found) < 20
    train = [body for body in found if body["split"] == "train"]
    for body in train:
        assert body["target_probability"] == sum(
            other["target"] == body["target"] for other in train
        ) / len(train)
        assert (
            all(name >= "items/30" for name in body["negatives"])
            and body["negative_probability"] == 1 / 30
        )
        own = {item: time for user, item, time, _ in rows if user == body["user"]}
        assert [own[name] for name in body["history"]] == sorted(
            own[name] for name in body["history"]
        ) and max(own.values()) == own[body["target"]]
    assert (
        len(
            {
                tuple(own.index(name) for name in body["history"])
                for body in train
                for own in [[row[1] for row in rows if row[0] == body["user"]]]
            }
        )
        > 10
    )


def test_work_is_shared_and_no_rank_holds_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: what each rank reads, and the most events that it has in memory at once."""
    items = catalogue(tmp_path, [f"items/{number}" for number in range(50)])
    random = np.random.default_rng(0)
    for part in range(8):
        drawn = random.integers(0, (400, 50, 1000), (500, 3)).tolist()
        parquet(
            tmp_path / "log" / f"{part}.parquet",
            [(f"u{user}", f"items/{item}", time, ["like"]) for user, item, time in drawn],
        )
    monkeypatch.setattr(event_buckets, "CHUNK_ROWS", 300)
    dataset = DatasetConfig(shards="artifact:interests", kind="sequences", catalogue="items")
    dataset.interests = InterestsConfig(
        str(tmp_path / "log"), positive=["like"], views=["content_multi"]
    )

    def work(rank: int, world_size: int) -> tuple[int, int, int]:
        chunks, buckets, read = [0], [0], [0]
        flush, load, batches = (
            event_buckets._Writer.flush,
            event_buckets.EventBuckets.load,
            EventReader.batches,
        )

        def flushed(self: Any) -> None:
            chunks.append(self.rows)
            flush(self)

        def loaded(self: Any, bucket: int) -> Any:
            found = load(self, bucket)
            buckets.append(len(found.events.users))
            return found

        def counted(self: Any, unit: EventUnit) -> Any:
            for batch in batches(self, unit):
                read.append(len(batch.times))
                yield batch

        monkeypatch.setattr(event_buckets._Writer, "flush", flushed)
        monkeypatch.setattr(event_buckets.EventBuckets, "load", loaded)
        monkeypatch.setattr(EventReader, "batches", counted)
        make_timed_interests(
            join_layout(1),
            "s",
            dataset,
            items,
            tmp_path / f"made-{world_size}",
            lambda used: lambda places: places,
            bucket_events=250,
        )
        return sum(read), max(chunks), max(buckets)

    for ranks in (1, 2, 4):
        found = run_ranks(work, ranks)
        assert [read for read, _, _ in found] == [4000 // ranks] * ranks
        assert all(chunk < 300 + 500 and bucket < 500 for _, chunk, bucket in found)


def test_lines_are_read_once_wherever_a_file_is_cut(tmp_path: Path) -> None:
    rows: list[Row] = [
        (f"user {number}", "ä" * (number % 13), number, ["like"] * (number % 3))
        for number in range(200)
    ]
    json_lines(tmp_path / "log.jsonl", rows)
    for parts in (1, 2, 7, 50):
        reader = EventReader(InterestsConfig("x", positive=["like"]))
        times = [
            time
            for part in range(parts)
            for batch in reader.batches(EventUnit(tmp_path / "log.jsonl", part, parts))
            for time in batch.times.tolist()
        ]
        assert times == list(range(200)) and reader.counts.labels["like"] == sum(
            number % 3 for number in range(200)
        )


@pytest.mark.parametrize(
    ("times", "kind"),
    [
        ([-2.5, -0.0, 0.0, 1e-300, 3.25], pa.float64()),
        (
            [
                "2026-01-01T00:00:00Z",
                "2026-01-01T02:00:00+01:00",
                "2026-01-01T01:00:00Z",
                "2026-01-01T01:00:00.5Z",
                "2027-01-01T00:00:00Z",
            ],
            pa.string(),
        ),
        ([1, 2, 2, 3, 4], pa.timestamp("s")),
    ],
)
def test_times_of_any_type_rise(tmp_path: Path, times: list[Any], kind: Any) -> None:
    pq.write_table(
        pa.table(
            {
                "user": [1] * 5,
                "item": [7] * 5,
                "time": pa.array(times, type=kind),
                "labels": ["like"] * 5,
            }
        ),
        tmp_path / "log.parquet",
    )
    batch = next(
        EventReader(InterestsConfig("x", positive=["like"])).batches(
            EventUnit(tmp_path / "log.parquet", 0, 1)
        )
    )
    steps = np.diff(batch.times)
    assert (
        (steps >= 0).all()
        and (steps == 0).tolist() == [False, True, False, False]
        and batch.users.to_pylist() == ["1"] * 5
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"user": ["a"], "item": ["items/0"], "time": [1]},
            r"log\.parquet: found the columns user, item, time, expected labels too",
        ),
        (
            {"user": ["a"], "item": ["items/0"], "time": [1], "labels": ["likes"]},
            r"positive labels like 0.*other labels: likes",
        ),
        (
            {"user": ["a"], "item": ["nowhere"], "time": [1], "labels": ["like"]},
            r"1 of items that the catalogue does not have",
        ),
        (
            {"user": ["a"], "item": ["items/0"], "time": [1], "labels": ["like"]},
            r"1 users give no sequence to train on",
        ),
        (
            {"user": ["a"], "item": ["items/0"], "time": ["soon"], "labels": ["like"]},
            r"log\.parquet: cannot be read as events: .*soon",
        ),
    ],
)
def test_a_log_that_cannot_serve_is_bad_data_on_all_ranks(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    items = catalogue(tmp_path, ["items/0", "items/1"])
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    with pytest.raises(RankFailure, match=message) as caught:
        made(tmp_path, tmp_path / "log.parquet", 2, items, same, 3, positive=["like"])
    assert isinstance(caught.value.__cause__, BadDataError)


def test_half_a_file_names_itself(tmp_path: Path) -> None:
    items = catalogue(tmp_path, ["items/0", "items/1"])
    (tmp_path / "log.jsonl").write_text(
        '{"user": 1, "item": "items/0", "time": 1, "labels": ["like"]}\n{"user": 2, "it'
    )
    with pytest.raises(RankFailure, match=r"log\.jsonl: cannot be read as events"):
        made(tmp_path, tmp_path / "log.jsonl", 1, items, same, 3)


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        (InterestsConfig("log"), r"interests\.positive=\[\]: expected 1 to 64 labels"),
        (InterestsConfig("", positive=["like"]), r"interests\.events is empty"),
        (InterestsConfig("log", labels=None, positive=["like"]), r"beside labels=null"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            settings.validate("data.sets.x.interests")
    with pytest.raises(
        ConfigurationError,
        match=r"interests is set beside shards=x: expected shards: artifact:interests",
    ):
        DatasetConfig(
            "x", "sequences", catalogue="c", interests=InterestsConfig("log", positive=["like"])
        ).validate("data.sets.x")


def test_one_configuration_reads_back_as_a_data_set(tmp_path: Path) -> None:
    """What is written is read by the same reader as any data set, with its splits."""
    items = catalogue(tmp_path, [f"items/{name}" for name in GOLDEN["vectors"]])
    parquet(tmp_path / "log.parquet", golden_rows())
    made(tmp_path, tmp_path / "log.parquet", 1, items, golden_vectors(items), 3)
    views = {
        "history": ViewConfig("history", fields=["title"]),
        "item": ViewConfig("target", fields=["title"]),
    }
    config = Config()
    config.data.tokenizer = str(Path("data/quickstart/tokenizer.json").resolve())
    config.data.sets = {
        "items": items.config,
        "sequences": DatasetConfig(
            "artifact:interests",
            "sequences",
            catalogue="items",
            views=views,
            patterns={"next": PatternConfig("history", "item")},
        ),
    }
    reader = open_datasets(config, {"interests": tmp_path / "made-1"}, ["sequences"])["sequences"]
    record = reader.read(0)
    assert record.target is not None and record.history and reader.count("train") == len(reader)
