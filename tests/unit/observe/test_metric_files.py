"""Risks: a step twice after a resume, a file broken by a kill, NaN that no reader can parse,
ranks that write over each other.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sailplan.observe.logger import RunInfo, StageInfo
from sailplan.observe.metrics import MetricWriter
from sailplan.observe.run_files import read_lines

CONSOLE = "sailplan.observe.console.ConsoleLogger"
FIRST = StageInfo(
    "first",
    1,
    2,
    1,
    6,
    data={"emoji": 0.7, "icons": 0.3},
    objectives={"infonce": 1.0},
    learning_rate=(1e-3, 1e-4),
)
SECOND = StageInfo("second", 2, 2, 7, 8, data={"prompts": 1.0})


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


def writing(
    folder: Path, console: Console, rank: int = 0, resumed: int | None = None
) -> MetricWriter:
    return MetricWriter(
        RunInfo(folder, resumed_step=resumed),
        {"console": {"_target_": CONSOLE, "every": 2, "console": console}},
        rank,
    )


def train(
    folder: Path, steps: range, resumed: int | None = None, stage: StageInfo = FIRST, rank: int = 0
) -> None:
    with writing(folder, silent(), rank, resumed) as writer:
        writer.start_stage(stage)
        for step in steps:
            writer.log_step(step, stage.name, {"loss/total": 1.0 / step, "data/set": "emoji"})


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    train(tmp_path, range(1, 6))
    train(tmp_path, range(4, 7), resumed=3)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_by_a_kill_is_dropped_on_resume(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "stage": "fir')
    train(tmp_path, range(4, 6), resumed=3)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2"):
        list(read_lines(path))


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with writing(tmp_path, silent()) as writer:
        writer.start_stage(FIRST)
        writer.log_step(1, "first", {"loss/total": float("nan"), "grad_norm": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss/total"] is None and line["grad_norm"] is None


def test_a_fresh_start_keeps_the_previous_file_once(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    train(tmp_path, range(1, 2))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    assert len(list(read_lines(tmp_path / "metrics.previous.jsonl"))) == 3


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    train(tmp_path / "run", range(1, 4), rank=1)
    assert not (tmp_path / "run").exists()


def test_evaluations_of_steps_to_be_redone_are_dropped(tmp_path: Path) -> None:
    with writing(tmp_path, silent()) as writer:
        writer.start_stage(FIRST)
        for step in (2, 4):
            writer.log_evaluation(step, "first", {"emoji": {"recall@1": 0.5}}, {"emoji": []})
    train(tmp_path, range(4, 5), resumed=3)
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["step-00000002.json"]
    assert json.loads((tmp_path / "evaluation" / "step-00000002.json").read_text())["tasks"] == {
        "emoji": {"recall@1": 0.5}
    }


def test_stages_are_recorded_in_order_and_survive_a_resume(tmp_path: Path) -> None:
    for resumed in (None, 7):
        with writing(tmp_path, silent(), 0, resumed) as writer:
            if resumed is None:
                writer.start_stage(FIRST)
                writer.finish_stage()
            writer.start_stage(SECOND)
            writer.finish_stage()
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert [(stage["name"], stage["first_step"], stage["last_step"]) for stage in stages] == [
        ("first", 1, 6),
        ("second", 7, 8),
    ]
    assert stages[0]["weights"] == {"emoji": 0.7, "icons": 0.3} and stages[0]["learning_rate"] == [
        1e-3,
        1e-4,
    ]


def test_a_stage_names_all_backends_that_its_steps_went_through(tmp_path: Path) -> None:
    foretold = StageInfo(
        "first", 1, 1, 1, 9, backends={"infonce": "triton bfloat16", "id2item": "torch float32"}
    )
    with writing(tmp_path, silent()) as writer:
        writer.start_stage(foretold)
        for step, ran in enumerate(
            ("chunked bfloat16", "chunked bfloat16 + triton bfloat16", "triton bfloat16"), 1
        ):
            writer.log_step(step, "first", {"backend/infonce": ran})
            (stage,) = json.loads((tmp_path / "stages.json").read_text())
            assert stage["backends"] == {
                "infonce": "chunked bfloat16" + " + triton bfloat16" * (step > 1),
                "id2item": "torch float32",
            }


def test_plain_console_prints_every_few_steps_and_tables(tmp_path: Path) -> None:
    console = silent()
    with writing(tmp_path, console) as writer:
        writer.start_stage(FIRST)
        for step in range(1, 7):
            writer.log_step(
                step, "first", {"loss/total": 2.5, "accuracy": 0.25, "rows_per_second": 1000.0}
            )
        writer.log_evaluation(6, "first", {"emoji [x]": {"recall@1": 0.5}})
        writer.log_evaluation(6, "first", {"emoji [x]": {"recall@1": 0.625, "candidates": 12.0}})
        writer.finish_stage()
        writer.start_stage(SECOND)
        writer.log_evaluation(
            8, "second", {"emoji [x]": {"recall@1": 0.75}, "speech": {"auc": 0.9}}
        )
        writer.finish_stage()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert [
        line.split("step ")[1].split("/")[0]
        for line in text.splitlines()
        if line.startswith("[1/2 first]")
    ] == ["1", "2", "4", "6"]
    assert "emoji [x]" in text and "+0.1250" in text and "candidates" not in text
    final = text[text.index("results after each stage") :]
    assert [word for word in ("0.6250", "0.7500", "0.9000") if word in final] == [
        "0.6250",
        "0.7500",
        "0.9000",
    ]
    assert "finished after" in final


def test_a_terminal_gets_a_live_bar_that_is_closed_on_an_error(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with pytest.raises(RuntimeError), writing(tmp_path, console) as writer:
        writer.start_stage(FIRST)
        writer.log_step(1, "first", {"loss/total": 2.5})
        raise RuntimeError("boom")
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is shown again


def test_quarantined_records_of_steps_to_be_redone_are_dropped(tmp_path: Path) -> None:
    train(tmp_path, range(1, 3))
    lines = [json.dumps({"step": step, "id": "a", "reason": "b"}) for step in (1, 2, 3)]
    (tmp_path / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
    train(tmp_path, range(3, 4), resumed=2)
    assert (tmp_path / "quarantine.jsonl").read_text().splitlines() == lines[:2]
