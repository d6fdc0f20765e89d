"""Risks: a checklist that does not work as it is written, a workflow that calls what is not
there, a list of fast tests that is not.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sailplan.cli.main import main
from sailplan.cli.testing import command, write_project
from sailplan.train.testing import metrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
CHECKLISTS = {
    name: body
    for name, body in re.findall(
        r"^### A new (\w+)\n(.*?)(?=^### |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL
    )
}
YAMLS = [
    ".pre-commit-config.yaml",
    "CITATION.cff",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / ".github").rglob("*.yml"))),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every block behind a line that ends with a file's name, as that file, in the small
    project.
    """
    root = tmp_path_factory.mktemp("contributing")
    write_project(root)
    for name, content in re.findall(
        r"`([\w/]+\.(?:yaml|py))`:\n\n```\w+\n(.*?)```", TEXT, flags=re.DOTALL
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_there_are_four() -> None:
    assert list(CHECKLISTS) == ["loss", "encoder", "artifact", "exchange"]


@pytest.mark.parametrize("name", ["loss", "encoder", "artifact", "exchange"])
def test_a_checklist_works_to_the_letter(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", CHECKLISTS[name], flags=re.MULTILINE | re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "python":
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=project,
                capture_output=True,
                text=True,
                timeout=120,
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        elif arguments[0] == "check":  # it forks ranks, as a forked command may not
            code = main(arguments)
            out, err = capsys.readouterr()
        else:
            assert program == "sailplan"
            code, out, err = command(project, *arguments)
        assert code == 0, (line, err)
        if "parity" in line or program == "python":
            assert "exact" in out and "not exact" not in out, out
    if name != "exchange":
        found = metrics(project / "runs" / name)
        assert len(found) == 2
        assert name != "loss" or all("loss/uniformity" in line for line in found)
        assert name != "artifact" or any(line["data/set"] == "beside" for line in found)


def test_every_make_target_of_the_texts_and_workflows_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    texts = [TEXT, *(path.read_text() for path in (ROOT / ".github").rglob("*.*"))]
    named = {
        name
        for text in texts
        for name in re.findall(r"(?:^|run: |`)make ([\w-]+)", text, flags=re.MULTILINE)
    }
    assert {"environment", "test", "test-fast", "lint", "docs"} <= named
    for name in named:
        assert f"\n{name}:" in makefile, name


def test_the_map_names_every_room() -> None:
    rooms = {
        path.name
        for path in (ROOT / "framework" / "sailplan").iterdir()
        if (path / "__init__.py").is_file()
    }
    assert {room for room in rooms if f"`{room}`" not in TEXT} == set()


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_is_yaml(name: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict)


def test_workflows_check_what_they_should_on_the_pythons_they_should() -> None:
    jobs: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())[
        "jobs"
    ]
    assert set(jobs) == {"lint", "test", "chaos", "wheel", "docs"}
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    for job in jobs.values():
        assert job["timeout-minutes"] and all(set(step) & {"uses", "run"} for step in job["steps"])


def test_ruff_before_a_commit_is_ruff_in_ci() -> None:
    pinned = re.search(
        r"^ruff==(\S+)", (ROOT / "requirements" / "constraints.txt").read_text(), flags=re.MULTILINE
    )
    assert pinned and f"ruff=={pinned[1]}" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_citation_has_the_version() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_fast_tests_start_no_ranks_and_no_commands() -> None:
    line = re.search(
        r"^FAST := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE
    )
    assert line
    files: list[Path] = []
    for name in line[1].replace("\\\n", " ").split():
        assert (ROOT / name).exists(), name
        files += (
            sorted((ROOT / name).rglob("test_*.py")) if (ROOT / name).is_dir() else [ROOT / name]
        )
    assert len(files) >= 20
    heavy = [
        path.name
        for path in files
        if re.search(r"import .*\b(run_ranks|run_until)\b|import command\b", path.read_text())
    ]
    assert not heavy
