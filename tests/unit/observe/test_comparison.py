"""Two runs beside each other: results with intervals, and the settings that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sailplan.cli.main import main
from sailplan.errors import ConfigurationError
from sailplan.observe.comparison import differences, results, write_comparison
from sailplan.observe.report_data import read_run


@pytest.fixture
def runs(run_folder: Path) -> list[Path]:
    other = run_folder.with_name("other")
    shutil.copytree(run_folder, other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("global_batch: 256", "global_batch: 512"))
    path = sorted((other / "evaluation").glob("*.json"))[-1]
    known = json.loads(path.read_text())
    known["tasks"]["set_completion"]["recall@10"] = 0.5
    known["tasks"]["emoji_image_to_name"]["queries"] = 10.0
    path.write_text(json.dumps(known))
    return [run_folder, other]


def test_results_apart_are_marked_and_other_queries_are_said(runs: list[Path]) -> None:
    rows = {(row["task"], row["metric"]): row for row in results([read_run(one) for one in runs])}
    row = rows["set_completion", "recall@10"]
    assert [cell["value"] for cell in row["cells"]] == [0.18, 0.5]
    assert [cell["apart"] for cell in row["cells"]] == [False, True] and row["same"]
    assert not rows["emoji_image_to_name", "recall@10"]["same"]
    assert ("set_completion", "popularity/recall@10") not in rows


def test_only_settings_that_differ_are_shown(runs: list[Path]) -> None:
    assert differences([read_run(one) for one in runs]) == [("global_batch", ["256", "512"])]


def test_the_command_writes_a_page_that_needs_nothing(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two.html"
    assert main(["report", "--compare", *map(str, runs), "--out", str(out)]) == 0
    html = out.read_text()
    assert capsys.readouterr().out.strip() == str(out)
    assert "<script" not in html and "http" not in html and "&lt;script&gt;" in html
    assert "<b>0.500</b>" in html and "other queries or candidates" in html
    with pytest.raises(ConfigurationError, match="found 1 run folder, expected two or more"):
        write_comparison(runs[:1], out)
