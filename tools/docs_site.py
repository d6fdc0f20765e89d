"""Give the documentation site the pages that lie beside docs/, under the paths that they have in
the repository.

In the repository, docs/ links to ../CONTRIBUTING.md and README.md to docs/data.md: both are right
there, for people who read the files. On the site docs/ is the root, so a link is resolved in the
repository first and then written for the site. A link to a file that is no page of the site (code,
a result) becomes its path in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BESIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "kernels/README.md",
    "kernels/AOT.md",
    "kernels/benchmark_cpu.png",
    "benchmarks/NOTES.md",
    "benchmarks/results/step_cpu.md",
    "benchmarks/results/step_cpu.png",
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"(^```.*?^```|`[^`\n]+`)", flags=re.MULTILINE | re.DOTALL)


def place(name: str) -> str:
    """Return where a page of the site lies in the repository."""
    return name if name in BESIDE else f"docs/{name}"


def site_path(path: str) -> str | None:
    """Return the site's path of a file of the repository; None: it is no page."""
    if path in BESIDE:
        return path
    return (
        "index.md"
        if path == "README.md"
        else path.removeprefix("docs/")
        if path.startswith("docs/")
        else None
    )


def for_site(text: str, name: str) -> str:
    """Return a page's text with its relative links as the site needs them.

    Raises FileNotFoundError for a link to nothing.
    """

    def rewritten(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place(name)), path))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{place(name)} links to {target}: {path} is not there")
        page = site_path(path)
        if page is None:
            return f"{words} (`{path}`)"
        return f"{mark}[{words}]({posixpath.relpath(page, posixpath.dirname(name) or '.')}{hash_}{anchor})"

    parts = FENCED.split(text)
    return "".join(
        part if number % 2 else LINK.sub(rewritten, part) for number, part in enumerate(parts)
    )


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie beside docs/ (mkdocs calls it)."""
    from mkdocs.structure.files import File

    for name in BESIDE:
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the page's text for the site (mkdocs calls it)."""
    return for_site(markdown, page.file.src_uri)
