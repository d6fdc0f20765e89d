"""Risks: measures that are not the field's, a rank that holds or encodes the whole corpus, an
answer that depends on the number of ranks, a bad line that leaves the other ranks waiting.

The judge is pytrec_eval, trec_eval's own code.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailplan.cli.testing import command
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.evaluate import beir_files
from sailplan.evaluate.beir import evaluate_beir
from sailplan.evaluate.rankings import measures, ordered
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import RankFailure, run_ranks

pytrec_eval = pytest.importorskip(
    "pytrec_eval",
    reason="pytrec_eval is not installed: pip install -r requirements/test.txt; measures were NOT checked",
)
WORDS = ["red", "green", "blue", "boot", "shoe", "hat", "snow", "rain", "walking"]
DOCUMENTS, QUERIES, AT = 300, 40, (1, 3, 10, 100)
THEIRS = (
    {"mrr": "recip_rank", "map": "map"}
    | {f"ndcg@{k}": f"ndcg_cut_{k}" for k in AT}
    | {f"recall@{k}": f"recall_{k}" for k in AT}
)


def write(folder: Path, *, documents: int = DOCUMENTS) -> Path:
    """Few words, so that many documents tie; grades from -1 to 3; queries without a relevant
    document, and judged ones that are lost.
    """
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": f"d{number}", "title": text(1) if number % 3 else "", "text": text(2)}
        for number in range(documents)
    ]
    corpus[7]["_id"] = "q3"  # a document that is a query too
    queries = [{"_id": f"q{number}", "text": text(2)} for number in range(QUERIES)]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + "\n"
        )
    rows = ["query-id\tcorpus-id\tscore"]
    for number in range(0, QUERIES, 2):
        chosen = draw.sample(range(documents), 12)
        rows += [
            f"q{number}\td{document}\t{0 if number == 4 else draw.choice([-1, 0, 1, 1, 2, 3])}"
            for document in chosen
        ]
    rows += ["q3\tq3\t1", "q3\td5\t1", "q3\td9999\t1", "lost\td1\t1"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n")
    return folder


class Bag:
    """Vectors of hashed words, and how many items were asked for at a time."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        self.calls.append(len(items))
        found = np.zeros((len(items), 16), dtype=np.float32)
        for row, item in enumerate(items):
            for word in item.split():
                found[row] += (
                    np.random.default_rng(zlib.crc32(word.encode()))
                    .standard_normal(16)
                    .astype(np.float32)
                )
        return found


def found_by(
    folder: Path, world: int, **options: Any
) -> list[tuple[dict[str, float], Any, Any, list[int]]]:
    def run(rank: int, world_size: int) -> tuple[dict[str, float], Any, Any, list[int]]:
        documents = Bag()
        results = evaluate_beir(
            Bag(), documents, folder, parallel=join_layout(1), at=AT, shard_rows=32, **options
        )
        return results.metrics, results.rankings, results.judgments, documents.calls

    return run_ranks(run, world, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("beir") / "set")


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("same_ids", [False, True])
def test_measures_are_trec_evals(folder: Path, world: int, same_ids: bool) -> None:
    """On a ranking of every document, made here by one matrix product."""
    corpus = [record for _, record in beir_files.records(folder / "corpus.jsonl", 0, 1)]
    queries = [record for _, record in beir_files.records(folder / "queries.jsonl", 0, 1)]
    left, right = (
        Bag()([beir_files.item(record, folder) for record in records]).astype(np.float64)
        for records in (queries, corpus)
    )
    scores = (
        (left / np.linalg.norm(left, axis=1, keepdims=True))
        @ (right / np.linalg.norm(right, axis=1, keepdims=True)).T
    ).astype(np.float32)
    grades, lines = beir_files.judgments(
        folder / "qrels" / "test.tsv", {record["_id"] for record in queries}
    )
    run = {
        query["_id"]: {
            document["_id"]: float(score)
            for document, score in zip(corpus, row, strict=True)
            if same_ids or document["_id"] != query["_id"]
        }
        for query, row in zip(queries, scores, strict=True)
        if query["_id"] in grades
    }
    theirs = pytrec_eval.RelevanceEvaluator(grades, set(THEIRS.values())).evaluate(run)
    assert len(theirs) == QUERIES // 2 + 1 and any(
        one["recip_rank"] == 0 for one in theirs.values()
    )
    ranks = found_by(folder, world, depth=DOCUMENTS, same_ids=same_ids)
    for metrics, *_ in ranks:
        for ours, name in THEIRS.items():
            assert metrics[ours] == pytest.approx(
                np.mean([one[name] for one in theirs.values()]), abs=1e-12
            ), ours
        assert (
            metrics["queries"],
            metrics["documents"],
            metrics["judgments_of_unknown_queries"],
        ) == (len(theirs), DOCUMENTS, 1)
        assert metrics["judgments"] == lines - 1
    rankings = {name: one for _, found, *_ in ranks for name, one in found.items()}
    assert rankings == run


def test_ties_are_in_trec_evals_order() -> None:
    scores = {"a": 0.5, "b": 0.5, "c": 0.7, "d": 0.5}
    assert ordered(scores) == ["c", "d", "b", "a"]
    theirs = pytrec_eval.RelevanceEvaluator({"q": {"b": 1}}, {"recip_rank"}).evaluate({"q": scores})
    assert (
        measures(ordered(scores), {"b": 1}, [10])["mrr"]
        == pytest.approx(theirs["q"]["recip_rank"])
        == pytest.approx(1 / 3)
    )
    late = measures([str(number) for number in range(20)], {"12": 2}, [10])
    assert (late["mrr@10"], late["ndcg@10"]) == (0, 0) and late["mrr"] == pytest.approx(1 / 13)


def test_a_short_list_is_the_head_of_the_long_one_at_any_number_of_ranks(folder: Path) -> None:
    """Ties at the cut go to the earlier document, whichever rank has it."""
    alone, *several = (found_by(folder, world, depth=100) for world in (1, 2, 3))
    for ranks in several:
        assert {name: one for _, found, *_ in ranks for name, one in found.items()} == alone[0][1]
        assert ranks[0][0] == pytest.approx(alone[0][0], abs=1e-12)


def test_no_rank_encodes_or_holds_the_corpus(folder: Path) -> None:
    ranks = found_by(folder, 3, depth=100)
    assert sum(sum(calls) for *_, calls in ranks) == DOCUMENTS
    for *_, calls in ranks:
        assert max(calls) <= 32 and sum(calls) < 0.4 * DOCUMENTS


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("corpus", '{"text": "no id"}', "has no _id"),
        ("corpus", "{", "is not JSON"),
        ("queries", "[]", "has no _id"),
    ],
)
def test_a_bad_line_of_one_rank_ends_all(
    tmp_path: Path, name: str, line: str, message: str
) -> None:
    folder = write(tmp_path / "set")
    file = folder / f"{name}.jsonl"
    file.write_text(file.read_text().rstrip("\n") + f"\n{line}\n")

    def run(rank: int, world_size: int) -> str:
        with pytest.raises(BadDataError) as caught:
            evaluate_beir(Bag(), Bag(), folder, parallel=join_layout(1), shard_rows=32, depth=100)
        return str(caught.value)

    told = run_ranks(run, 2, timeout=30)
    assert message in told[1] and str(file) in told[1] and "another rank" in told[0]


def test_what_is_missing_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no corpus\.jsonl"):
        beir_files.check_folder(tmp_path, "test")
    with pytest.raises(ConfigurationError, match=r"--split dev: .*has the splits test"):
        beir_files.check_folder(folder, "dev")
    (tmp_path / "bad.tsv").write_text("q\td\tgood\nq\td\tvery\n")
    with pytest.raises(BadDataError, match=r"line 2 is 'q\\td\\tvery'"):
        beir_files.judgments(tmp_path / "bad.tsv", {"q"})
    (tmp_path / "trec.txt").write_text("q 0 d 1\n")
    assert beir_files.judgments(tmp_path / "trec.txt", {"q"}) == ({"q": {"d": 1}}, 1)
    with pytest.raises(RankFailure, match="100: expected numbers from 1 to --depth, which is 50"):
        found_by(folder, 1, depth=50)


def test_every_line_is_read_once_at_any_number_of_parts(folder: Path) -> None:
    whole = list(beir_files.records(folder / "corpus.jsonl", 0, 1))
    for parts in (2, 7, 64, 1000):
        assert [
            record
            for part in range(parts)
            for record in beir_files.records(folder / "corpus.jsonl", part, parts)
        ] == whole
    places = [place for place, _ in whole[::50]]
    assert list(beir_files.ids_at(folder / "corpus.jsonl", places).values()) == [
        record["_id"] for _, record in whole[::50]
    ]


def test_the_command_evaluates_a_published_folder(tmp_path: Path, folder: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
    from test_published_folder import source

    place = source("bert", tmp_path / "source")
    code, out, err = command(
        tmp_path,
        "evaluate",
        "--model",
        str(place),
        "--data",
        str(folder),
        "--query-prompt",
        "find",
        "--at",
        "10",
    )
    assert code == 0, err
    found = json.loads(out)
    assert (
        found["documents"] == DOCUMENTS
        and found["query_prompt"] == "find"
        and 0 < found["ndcg@10"] < 1
        and "ndcg@100" not in found
    )
    for arguments, message in (
        (["--model", str(place)], "--data is missing"),
        (["--model", str(place), "--data", str(tmp_path)], "has no corpus.jsonl"),
        (["--model", str(place), "--data", str(folder), "seed=1"], "found seed=1"),
    ):
        code, _, err = command(tmp_path, "evaluate", *arguments)
        assert code == 64 and message in err, err
