"""Risk: a model that mteb reads otherwise than we do, or not at all.

An exported folder runs a small task of its own here, without a network.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sailplan.evaluate import beir_files
from sailplan.evaluate.beir import evaluate_beir
from sailplan.export.load import load
from sailplan.export.sentence_transformers import export_sentence_transformers
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "export")]
from folders import trained  # noqa: E402
from test_beir import write  # noqa: E402
from test_published_folder import source  # noqa: E402

mteb = pytest.importorskip(
    "mteb",
    reason="mteb is not installed: pip install -r requirements/test.txt; exported folders were NOT run under it",
)


def task(folder: Path) -> Any:
    """Return docs/evaluation.md's task over a folder in BEIR's form."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text(
        encoding="utf-8"
    )
    code = text.split("```python\n# own_task.py\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    return names["task"](folder)


def test_an_exported_folder_scores_under_mteb_as_under_our_command(tmp_path: Path) -> None:
    from sailplan.config.schema import Config, DataConfig

    data = write(tmp_path / "set")
    lines = (data / "qrels" / "test.tsv").read_text().splitlines()
    lost = [
        line for line in lines if line.startswith(("q4\t", "lost\t"))
    ]  # mteb leaves out queries without a relevant document
    (data / "qrels" / "test.tsv").write_text(
        "".join(f"{line}\n" for line in lines if line not in lost)
    )
    model = TransformersConfig(
        source=str(source("bert", tmp_path / "source")), embedding=16, prefixes=[16]
    )
    config = Config(name="run", model=model, data=DataConfig(max_tokens=16))
    checkpoint, _ = trained(config, tmp_path, ["text"])
    folder = export_sentence_transformers(checkpoint, tmp_path / "exported", config=config)

    def ours(rank: int, world_size: int) -> dict[str, float]:
        encode = load(folder, device="cpu").encode
        return evaluate_beir(encode, encode, data, parallel=join_layout(1), same_ids=True).metrics

    found = run_ranks(ours, 1, timeout=60)[0]

    def theirs(rank: int, world_size: int) -> dict[str, float]:
        from sentence_transformers import SentenceTransformer

        options: dict[str, Any] = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
        results = mteb.evaluate(
            SentenceTransformer(str(folder), device="cpu"), task(data), **options
        )
        return dict(results.task_results[0].scores["test"][0])

    scores = run_ranks(theirs, 1, timeout=120)[0]
    # Many texts of the set are equal, and rounding of other batches parts them: a few places of
    # order within ties may differ.
    for name, other in (
        ("ndcg@10", "ndcg_at_10"),
        ("recall@100", "recall_at_100"),
        ("mrr@10", "mrr_at_10"),
    ):
        assert scores[other] == pytest.approx(found[name], abs=0.02), name
    assert (
        0 < found["ndcg@10"] < 1
        and len(list(beir_files.records(data / "corpus.jsonl", 0, 1))) == found["documents"]
    )
