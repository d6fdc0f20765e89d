"""Risks: an experiment that does not compose, trains on nothing, asks for held-out rows that are
not there, or writes over a person's file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sailplan.cli.main import main
from sailplan.config.compose import compose
from sailplan.config.rules import check
from sailplan.errors import ConfigurationError
from sailplan.ingest.experiment import write_experiment
from sailplan.ingest.importing import import_data
from sailplan.ingest.job import ImportOptions


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAILPLAN_CONF", raising=False)
    rows = [
        {"query": f"question {n}", "positive": f"answer {n}", "score": n / 99, "neg": f"other {n}"}
        for n in range(100)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("items.csv").write_text(
        "id,title,body\n" + "".join(f"{n},head {n},words of {n}\n" for n in range(20))
    )
    Path("used.csv").write_text(
        "user,item\n" + "".join(f"u{n % 40},{(n // 40 + n) % 20}\n" for n in range(200))
    )
    return tmp_path


def test_several_sets_share_a_tokenizer_and_bring_their_items() -> None:
    import_data(ImportOptions("pairs.jsonl", "pairs"))
    import_data(ImportOptions("used.csv", "shop", items="items.csv"))
    import_data(ImportOptions("items.csv", "heads", held_out=0))
    path, chosen = write_experiment("all", ["pairs", "shop", "heads"])
    config = compose(["experiment=all"])
    check(config, world_size=2)
    assert list(config.data.sets) == ["pairs", "shop_items", "shop", "heads"] and set(
        config.stages["main"].data
    ) == {"pairs", "shop", "heads"}
    assert config.stages["main"].objectives == {"infonce": 1.0, "seq2item": 1.0, "cosent": 0.1}
    assert config.global_batch == 8, "half of the smallest set, 20 records"
    assert set(config.evaluation.tasks) == {
        "pairs_query_to_target",
        "shop_history_to_target",
    } and chosen["without_held_out"] == ["heads"]
    assert (
        config.data.tokenizer == "data/all/tokenizer.json"
        and Tokenizer.from_file(config.data.tokenizer).encode("question").ids
    )
    assert config.data.sets["pairs"].negatives == 1
    path.write_text(path.read_text().replace("yours to change", "changed"))
    write_experiment("all", ["pairs"], steps=7)  # what we wrote may be written anew
    assert (
        compose(["experiment=all"]).stages["main"].steps == 7
        and compose(["experiment=all"]).data.tokenizer == "data/pairs/tokenizer.json"
    )


def test_a_published_model_sees_texts_as_it_was_trained_to_and_learns_slowly() -> None:
    import_data(ImportOptions("pairs.jsonl", "pairs"))
    found = {}
    for name, model in (("tuned", "minilm"), ("fresh", None)):
        write_experiment(name, ["pairs"], model=model)
        config = compose([f"experiment={name}"])
        check(config, world_size=1)
        prompts = {view.prompt for view in config.data.sets["pairs"].views.values()}
        found[name] = (prompts, config.stages["main"].optimizer.learning_rate)
    assert found["tuned"] == ({""}, 5e-5)
    assert "" not in found["fresh"][0] and found["fresh"][1] == 1e-3


def test_what_cannot_be_trained_is_said_before_a_file_is_written() -> None:
    import_data(ImportOptions("used.csv", "shop", items="items.csv"))
    for sets, words in (
        (["shoop"], "shoop.*shop"),
        (["shop_items"], "no pattern"),
        (["reading"], "reading"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            write_experiment("x", sets)
    Path("conf/experiment").mkdir()
    Path("conf/experiment/mine.yaml").write_text("# @package _global_\n")
    for name in ("mine", "quickstart", "a/b"):
        with pytest.raises(ConfigurationError, match=name):
            write_experiment(name, ["shop"])
    assert [path.name for path in Path("conf/experiment").iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("data import nowhere --name a", 64, ["nowhere", "no such file"]),
        ("data import used.csv --name a", 64, ["--items"]),
        (
            "data import pairs.jsonl --name a --score-maximum 0.5",
            65,
            ["rows dropped", "score is 0.5", "dropped.jsonl", "--drop-limit"],
        ),
        ("data import pairs.jsonl --name a.b", 64, ["--name a.b"]),
        ("data import pairs.jsonl --name a --held-out 2", 64, ["--held-out 2"]),
        ("data import pairs.jsonl --name a --column query=nothing", 64, ["nothing", "positive"]),
        ("data import pairs.jsonl --name a --tokenizer no.json", 64, ["no.json"]),
        ("data import pairs.jsonl", 64, ["--name"]),
        ("data import . --name a", 64, ["3 tables", "items.csv"]),
        ("new a --data b", 64, ["--data b"]),
        ("new a --data b experiment=c", 64, ["experiment=c"]),
    ],
)
def test_mistakes_are_one_line(
    line: str, code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == code
    told = capsys.readouterr().err
    assert (
        told.startswith("sailplan: ")
        and told.count("\n") == 1
        and all(word in told for word in words)
    ), told
    assert not Path("conf").exists()
