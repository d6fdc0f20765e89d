"""What the docs tell to write works as it stands there: their files, in a folder of their own,
compose, pass the checks and are exact.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sailplan.cli.arguments import COMMANDS
from sailplan.cli.main import main
from sailplan.config.compose import compose
from sailplan.config.rules import check
from sailplan.objective.registry import build_objectives, check_objectives

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every block of the docs behind a line that ends with a file's name, as that file."""
    for text in TEXTS.values():
        for name, content in re.findall(
            r"`([\w/]+\.(?:yaml|py))`:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_its_files_make_experiments(project: Path) -> None:
    assert {"shoes.yaml", "shoes_aligned.yaml"} == {
        path.name for path in (project / "conf" / "experiment").iterdir()
    }
    for settings in (["experiment=shoes"], ["experiment=shoes_aligned"]):
        config = compose(settings)
        check(config, world_size=2)
        objectives = build_objectives(
            config.objectives,
            config.model.embedding,
            config.data.sets,
            allowed_targets=config.allowed_targets,
        )
        check_objectives(objectives, config.stages, config.data.sets)


def test_its_ways_to_set_values_on_the_command_line_are_taken(project: Path) -> None:
    told = next(text for text in TEXTS["recipe.md"].split("\n\n") if "On the command line" in text)
    settings = [line.strip("'") for line in re.findall(r"`('?[+~]?stages\.[^`]+)`", told)]
    config = compose(["experiment=shoes_aligned", *settings[:-1]])
    assert (
        config.stages["main"].steps == 10
        and config.stages["more"].steps == 10
        and "warm" not in config.stages
    )
    assert config.stages["main"].balance is not None and config.stages["main"].balance.clusters == 8
    assert compose(["experiment=shoes_aligned", *settings]).stages["main"].balance is None


def test_its_loss_is_exact(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "parity", "--loss", "shoe_losses:Alignment", "--world-size", "3"]) == 0
    assert ": exact:" in capsys.readouterr().out


def test_every_command_of_the_docs_is_a_command() -> None:
    for name, text in TEXTS.items():
        for line in re.findall(
            r"^(?:[A-Z_]+=\S+ )*(?:sailplan|launch/local\.sh \d+|launch/torchrun\.sh) ([\w-]+)",
            text,
            flags=re.MULTILINE,
        ):
            assert line in COMMANDS, f"{name}: {line}"
