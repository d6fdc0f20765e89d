"""Risks: a link of the documentation that leads nowhere, a page that the site leaves out, an
example that does not run.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import docs_site
import sailplan

ROOT = Path(__file__).resolve().parents[2]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = [
    *(path.name for path in sorted((ROOT / "docs").glob("*.md"))),
    *(name for name in docs_site.BESIDE if name.endswith(".md")),
]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def named(entry: Any) -> list[str]:
    """Return the files of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [
        name
        for one in (entry if isinstance(entry, list) else entry.values())
        for name in named(one)
    ]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    text = (ROOT / docs_site.place(name)).read_text()
    made = docs_site.for_site(text, name)  # refuses a link to nothing
    for target in re.findall(r"\]\(([^)\s:]+)\)", docs_site.FENCED.sub("", made)):
        path, _, anchor = target.partition("#")
        page = Path("/") / Path(name).parent / path if path else Path("/") / name
        source = ROOT / docs_site.place(str(page.resolve().relative_to("/")))
        assert source.is_file(), target
        if anchor and source.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", source.read_text(), flags=re.MULTILINE)
            slugs = {
                re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")
                for heading in headings
            }
            assert anchor in slugs, f"{name}: {target}"


def test_a_link_to_nothing_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"docs/data.md links to nowhere.md"):
        docs_site.for_site("see [this](nowhere.md)", "data.md")
    assert (
        docs_site.for_site("[a](../CONTRIBUTING.md#map) `[b](nowhere.md)`", "data.md")
        == "[a](CONTRIBUTING.md#map) `[b](nowhere.md)`"
    )
    assert docs_site.for_site("[a](../docs/data.md)", "kernels/README.md") == "[a](../data.md)"


def test_the_navigation_has_every_page_of_docs() -> None:
    pages = named(SITE["nav"])
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(pages)
    assert all((ROOT / docs_site.place(name)).is_file() for name in pages) and len(
        set(pages)
    ) == len(pages)


def test_the_reference_has_the_whole_public_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    losses = {"MICL", "CoSENT", "ID2Item", "InfoNCE", "LateFusion", "Seq2Item"} | {
        "Sigmoid",
        "MultiPositive",
        "ScoreDistillation",
        "LateInteraction",
    }
    assert {
        name
        for name in sailplan.__all__
        if not re.search(rf"^::: \S+\.{name}$", text, flags=re.MULTILINE)
    } <= losses, "the recipe says what losses do"


def test_what_builds_the_site_is_pinned() -> None:
    lines = [
        line
        for line in (ROOT / "requirements" / "docs.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"\S+==\S+", line) for line in lines)
    assert {"mkdocs-material", "mkdocstrings", "mkdocstrings-python"} <= {
        line.partition("==")[0] for line in lines
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_shows_what_it_promises(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "examples" / name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    found = re.search(r"largest difference of a gradient (\S+)$", last)
    assert found and float(found[1]) < 1e-5, last
