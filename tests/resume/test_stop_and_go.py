"""Killed and stopped runs continue with the same samples and, on the CPU, bit-equal losses,
across stage edges too.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sailplan.errors import EXIT_STOPPED
from sailplan.train.testing import MEASURED, SMALL, metrics, run, run_until


def essence(folder: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in metrics(folder)
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    done = run("train", *SMALL, "name=whole", f"runs={runs}", ranks=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "whole"


def test_killed_and_stopped_runs_equal_the_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    arguments = ("train", *SMALL, "name=broken", f"runs={tmp_path}", "resume=auto")

    def reached(step: int):
        return lambda: any(line["step"] >= step for line in metrics(folder))

    # Step 7 is the first of stage III; the newest checkpoint is of step 6, the end of stage II: the
    # edge is done again.
    assert run_until(reached(7), signal.SIGKILL, *arguments, ranks=2) < 0
    # Step 8 lies in the middle of stage III, which reads back what its start computed.
    assert run_until(reached(8), signal.SIGTERM, *arguments, ranks=2) == EXIT_STOPPED
    stopped_at = metrics(folder)[-1]["step"]
    assert stopped_at in (8, 9)
    assert (folder / "checkpoints" / f"step-{stopped_at:08d}" / "COMPLETE").is_file()
    finished = run(*arguments, ranks=2)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert [line["step"] for line in metrics(folder)] == list(range(1, 16))
    assert essence(folder) == essence(uninterrupted)


def test_a_finished_run_has_nothing_left_to_do_and_is_not_overwritten(uninterrupted: Path) -> None:
    arguments = ("train", *SMALL, "name=whole", f"runs={uninterrupted.parent}")
    before = essence(uninterrupted)
    assert run(*arguments, "resume=auto", ranks=2).returncode == 0
    refused = run(*arguments)
    assert refused.returncode == 64 and "resume=auto" in refused.stderr
    changed = run(*arguments, "resume=auto", "seed=7")
    assert changed.returncode == 64 and "seed: 0 -> 7" in changed.stderr
    assert essence(uninterrupted) == before


def test_the_plan_says_what_then_ran(uninterrupted: Path) -> None:
    import json

    planned = json.loads(run("plan", *SMALL, "--json", "--ranks", "2").stdout)
    ran = json.loads((uninterrupted / "stages.json").read_text())
    assert [
        (one["name"], one["first_step"], one["last_step"], one["objectives"])
        for one in planned["stages"]
    ] == [(one["name"], one["first_step"], one["last_step"], one["objectives"]) for one in ran]
    assert [one["learning_rate"]["peak"] for one in planned["stages"]] == [
        one["learning_rate"][0] for one in ran
    ]
    lines = metrics(uninterrupted)
    for stage in planned["stages"]:
        own = [line for line in lines if line["stage"] == stage["name"]]
        assert own[-1]["learning_rate"] == pytest.approx(stage["learning_rate"]["last"])
        assert stage["digests"] is None or stage["digests"] == [line["data/digest"] for line in own]


def test_commands_work_on_the_run_at_another_layout(uninterrupted: Path, tmp_path: Path) -> None:
    import json

    last = sorted((uninterrupted / "evaluation").glob("*.json"))[-1]
    written = json.loads(last.read_text())["tasks"]
    found = run("evaluate", "--run-folder", str(uninterrupted))
    assert found.returncode == 0, found.stderr
    again = json.loads(found.stdout)
    assert again.keys() == written.keys()
    assert (
        json.loads(last.read_text())["stage"] == "id2item"
    )  # the report's table has a column for each stage
    for task, values in written.items():
        assert again[task] == pytest.approx(
            values, abs=0.06
        )  # a tie may fall the other way on another number of ranks
    tensor = run("evaluate", "--run-folder", str(uninterrupted), "parallel.tensor=2", ranks=2)
    assert tensor.returncode == 0, tensor.stderr

    out = tmp_path / "vectors"
    wanted = ("--dataset", "prompts", "--view", "transcript", "--semantic-ids", "8,8")
    embedded = run("embed", "--run-folder", str(uninterrupted), *wanted, "--out", str(out), ranks=2)
    assert embedded.returncode == 0, embedded.stderr
    assert any(out.iterdir())
    mined = run(
        "mine",
        "--run-folder",
        str(uninterrupted),
        "--stage",
        "hard",
        "--out",
        str(tmp_path / "mined.npz"),
    )
    assert mined.returncode == 0 and (tmp_path / "mined.npz").is_file(), mined.stderr
    balanced = run("balance", "--run-folder", str(uninterrupted), "--stage", "diverse")
    assert balanced.returncode == 0 and sum(
        json.loads(balanced.stdout)["weights"].values()
    ) == pytest.approx(1.0), balanced.stderr
    exported = run("export", "--run-folder", str(uninterrupted), "--out", str(tmp_path / "export"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "export" / "model.json").is_file()
    report = run("report", "--run-folder", str(uninterrupted))
    assert report.returncode == 0, report.stderr
    page = (uninterrupted / "report.html").read_text()
    assert "data:image" in page and 'src="http' not in page
