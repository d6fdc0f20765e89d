"""The README's first page tells the truth: its table is the results file's, its commands and
files exist.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_made_from_the_committed_results(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)
    subprocess.run(
        [sys.executable, "benchmarks/quickstart.py", "table", "--readme", str(copy)],
        check=True,
        cwd=ROOT,
    )
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_links_and_make_targets_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert f"\n{name}:" in makefile, name


def test_every_command_of_the_readme_is_a_command() -> None:
    from sailplan.cli.arguments import COMMANDS

    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"sailplan ([\w-]+)", text):
        if name not in ("trains", "follows"):
            assert name in COMMANDS, name
