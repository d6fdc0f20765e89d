"""Risks: a logger that stops training, an option that nobody reads, a package that is missing
after an hour of work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sailplan.config.compose import compose
from sailplan.errors import ConfigurationError
from sailplan.observe.logger import Logger, RunInfo, StageInfo
from sailplan.observe.metrics import MetricWriter, logger_classes
from sailplan.observe.run_files import RunFiles, read_lines

STAGE = StageInfo("first", 1, 1, 1, 4, data={"emoji": 1.0})
TARGET = "sailplan.observe.tensorboard_logger.TensorBoardLogger"


class Fragile(Logger):
    """Fail from the second step on."""

    def __init__(self, run: RunInfo, *, steps: int = 1) -> None:
        super().__init__(run)
        self.steps = steps

    def log_step(self, step: int, stage: str, values: Any) -> None:
        if step > self.steps:
            raise ConnectionError("the service\nis gone")


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = {"own": {"_target_": f"{__name__}.Fragile", "steps": 2}}
    with pytest.raises(
        ConfigurationError, match=r"loggers\.own\._target_=.*add your module to allowed_targets"
    ):
        MetricWriter(RunInfo(tmp_path), own, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sailplan.config.targets.pkgutil.resolve_name", lambda name: Fragile)
        with MetricWriter(RunInfo(tmp_path), own, 0, allowed_targets=[__name__]) as writer:
            writer.start_stage(STAGE)
            for step in range(1, 5):
                writer.log_step(step, "first", {"loss/total": 1.0})
            writer.finish_stage()
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "sailplan: warning: loggers.own: the service is gone; the run goes on without it"
    )
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


class MoreFiles(RunFiles):
    """Write the losses into a file of their own, too."""

    def log_step(self, step: int, stage: str, values: Any) -> None:
        super().log_step(step, stage, values)
        with (self.folder / "losses.txt").open("a") as file:
            file.write(f"{values['loss/total']}\n")


def test_a_subclass_takes_the_place_of_the_run_folders_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sailplan.config.targets.pkgutil.resolve_name", lambda name: MoreFiles)
    own = {"run_files": {"_target_": f"{__name__}.MoreFiles"}}
    with MetricWriter(RunInfo(tmp_path), own, 0, allowed_targets=[__name__]) as writer:
        writer.start_stage(STAGE)
        writer.log_step(1, "first", {"loss/total": 0.5})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "losses.txt").read_text() == "0.5\n"
    with pytest.raises(ConfigurationError, match=r"loggers: found more, run_files, expected one"):
        MetricWriter(RunInfo(tmp_path), own | {"more": own["run_files"]}, 0, allowed_targets=[""])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"_target_": TARGET, "evry": 3},
            r"loggers\.board\.evry: TensorBoardLogger has no such option; did you mean 'every'",
        ),
        ({"every": 3}, r"loggers\.board\._target_: found None"),
        (
            {"_target_": "sailplan.observe.run_files.finite"},
            r"expected a subclass of sailplan\.observe\.logger\.Logger",
        ),
    ],
)
def test_a_logger_that_cannot_be_is_refused_before_the_run(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        logger_classes({"board": options}, ["sailplan."])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sailplan.observe.metrics.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match=r"loggers\.tensorboard: .*pip install tensorboard"
    ):
        logger_classes(
            compose(["experiment=quickstart", "+logger=tensorboard"]).loggers, ["sailplan."]
        )


def test_every_logger_of_ours_composes_and_a_list_takes_one_more() -> None:
    config = compose(["experiment=quickstart", "+logger=[tensorboard,mlflow]"])
    assert list(config.loggers) == ["console", "wandb", "tensorboard", "mlflow"]
    assert compose(["experiment=quickstart", "logger=[console]"]).loggers.keys() == {"console"}


def test_settings_of_the_former_version_are_carried_over() -> None:
    config = compose(
        [
            "experiment=quickstart",
            "tracking.wandb=online",
            "tracking.log_every=3",
            "tracking.project=mine",
        ]
    )
    assert (
        config.loggers["wandb"].items() >= {"mode": "online", "project": "mine", "every": 3}.items()
        and config.loggers["console"]["every"] == 3
    )
    assert "wandb" not in compose(["experiment=quickstart", "tracking.wandb=disabled"]).loggers
    with pytest.raises(
        ConfigurationError, match=r"tracking\.wandb=no: expected one of offline, online, disabled"
    ):
        compose(["experiment=quickstart", "tracking.wandb='no'"])


def test_tensorboard_shows_values_and_hides_steps_that_are_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(steps: range, resumed: int | None, factor: float) -> None:
        board = {"board": {"_target_": TARGET, "every": 1}}
        with MetricWriter(RunInfo(tmp_path, resumed_step=resumed), board, 0) as writer:
            writer.start_stage(STAGE)
            for step in steps:
                writer.log_step(step, "first", {"loss/total": factor * step, "data/set": "emoji"})
            writer.log_evaluation(steps[-1], "first", {"names": {"recall@1": 0.5}})

    train(range(1, 4), None, 1.0)
    train(range(3, 5), 2, 10.0)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss/total")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    assert [event.value for event in found.Scalars("evaluation/names/recall@1")] == [0.5]
