"""Risks: a tracker that stops training, writes outside the run folder, chats on the console, or
starts a second run on resume.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sailplan.errors import ConfigurationError
from sailplan.observe.logger import RunInfo, StageInfo
from sailplan.observe.metrics import MetricWriter
from sailplan.observe.run_files import RunFiles
from sailplan.observe.wandb_logger import WandbLogger, run_id

WANDB = "sailplan.observe.wandb_logger.WandbLogger"
STAGE = StageInfo(
    "first", 1, 2, 1, 4, data={"emoji": 0.75, "icons": 0.25}, objectives={"infonce": 1.0}
)


def records(path: Path) -> Iterator[Any]:
    """The records of an offline file (LevelDB log framing: 7-byte file header, 32 KiB blocks,
    7-byte record headers).
    """
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 and length == 0:
            return
        body = data[position + 7 : position + 7 + length]
        position += 7 + length
        whole = body if kind in (1, 2) else whole + body
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


@pytest.fixture
def keep_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, "unused")  # so that the values set by the sink are undone
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("keep_environment")
def test_offline_run_holds_stage_progress_evaluation_and_tables(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "my run"
    sink = WandbLogger(RunInfo(folder, {"seed": 3}), every=2)
    sink.start_stage(STAGE)
    for step in range(1, 5):
        sink.log_step(
            step, "first", {"loss/total": 1.0 / step, "accuracy": 0.5, "data/set": "emoji"}
        )
    sink.log_evaluation(4, "first", {"emoji": {"recall@1": 0.5}}, {})
    sink.close(finished=True)
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = (
        time.monotonic() + 30
    )  # the tracker's own process writes the last records just after finish() returned
    while (
        not any(record.WhichOneof("record_type") == "exit" for record in records(path))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    found = list(records(path))
    history = [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    assert [line["step"] for line in history if "loss/total" in line] == [
        2,
        4,
    ]  # every log_every-th step
    assert (
        history[-2]["progress/stage_fraction"] == 1.0
        and history[-2]["stage-first/loss/total"] == 0.25
    )
    assert history[-1]["evaluation/emoji/recall@1"] == 0.5
    assert any("weights" in key for key in history[0])
    [run] = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert run.run_id == run_id("sailplan", "my run") and run.display_name == "my run"
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.wandb"))


@pytest.mark.usefixtures("keep_environment")
def test_a_failure_warns_once_and_training_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb").write_text("a file where a folder is needed")
    with MetricWriter(RunInfo(folder), {"wandb": {"_target_": WANDB}}, 0) as writer:
        writer.start_stage(STAGE)
        writer.log_step(1, "first", {"loss/total": 1.0})
    [line] = capfd.readouterr().err.splitlines()
    assert "loggers.wandb" in line and "goes on without it" in line


@pytest.mark.usefixtures("keep_environment")
def test_online_without_a_key_does_not_wait_for_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with MetricWriter(
        RunInfo(tmp_path / "run"), {"wandb": {"_target_": WANDB, "mode": "online"}}, 0
    ) as writer:
        assert not writer.loggers
    assert "no API key" in capfd.readouterr().err


def test_a_mode_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"loggers\.wandb\.mode=disabled: expected offline or online"
    ):
        WandbLogger(RunInfo(tmp_path), mode="disabled")  # type: ignore[arg-type]


def test_the_id_is_stable_and_distinct() -> None:
    assert run_id("sailplan", "a b") == run_id("sailplan", "a b")
    assert len({run_id("sailplan", "a b"), run_id("sailplan", "a-b"), run_id("other", "a b")}) == 3
    assert run_id("sailplan", "///").startswith("run-")


@pytest.mark.usefixtures("keep_environment")
def test_what_a_kill_cut_off_is_written_again_once(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    values = {"loss/total": 0.5, "data/set": "emoji"}

    def steps() -> list[int]:
        found = []
        for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
            for record in records(path):
                items = {item.key or "/".join(item.nested_key) for item in record.history.item}
                if "loss/total" in items:
                    (step,) = (
                        i for i in record.history.item if (i.key or i.nested_key[0]) == "step"
                    )
                    found.append(json.loads(step.value_json))
        return found

    def wait(expected: list[int]) -> None:
        deadline = time.monotonic() + 30
        while steps() != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert steps() == expected

    run = RunInfo(folder)
    files, sink = RunFiles(run), WandbLogger(run, every=1)
    for logger in (files, sink):
        logger.start_stage(STAGE)
        for step in range(1, 4):
            logger.log_step(step, "first", values)
        logger.close(finished=False)
    wait([1, 2, 3])
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    path.write_bytes(path.read_bytes()[:7])  # as if nothing had been flushed
    assert steps() == []
    for _ in range(2):  # a second resume finds all steps and writes none again
        again = WandbLogger(RunInfo(folder, resumed_step=3), every=1)
        again.start_stage(STAGE)
        again.close(finished=False)
        wait([1, 2, 3])


@pytest.mark.usefixtures("keep_environment")
def test_every_chart_has_its_axis_and_the_run_its_tags_group_notes_and_alerts(
    tmp_path: Path,
) -> None:
    sink = WandbLogger(
        RunInfo(tmp_path / "run"), every=1, tags=["a", "b"], group="sweep", notes="why"
    )
    for stage in (STAGE, StageInfo("second", 2, 2, 5, 6)):
        sink.start_stage(stage)
        for step in range(stage.first_step, stage.last_step + 1):
            values = {"loss/total": 1.0, "loss/infonce": 1.0, "accuracy": 0.5, "tokens": 3}
            sink.log_step(step, stage.name, values)
    sink.log_alert(6, "straggler", "rank 3")
    sink.log_evaluation(6, "second", {"emoji": {"recall@1": 0.5}}, {})
    sink.close(finished=True)
    [path] = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while (
        not any(one.WhichOneof("record_type") == "exit" for one in records(path))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    found = list(records(path))
    axes: dict[str, str] = {}
    for record in found:
        if record.WhichOneof("record_type") == "metric":
            assert not record.metric.glob_name, "patterns that overlap give any of their axes"
            axes[record.metric.name] = record.metric.step_metric
    logged = {
        item.key or "/".join(item.nested_key)
        for record in found
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    }
    tables = ("_", "weights/", "evaluations/")
    named = {name for name in logged if not name.startswith(tables)}
    assert len(named) > 12 and named <= set(axes), named - set(axes)
    for name in named:
        stage = next((one for one in ("first", "second") if name.startswith(f"stage-{one}/")), "")
        axis = f"stage-{stage}/step" if stage else "step"
        assert axes[name] == ("" if name == axis else axis), name
    [run] = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert list(run.tags) == ["a", "b"] and run.run_group == "sweep" and run.notes == "why"
    [alert] = [record.alert for record in found if record.WhichOneof("record_type") == "alert"]
    assert alert.title == "run: straggler" and "rank 3" in alert.text
