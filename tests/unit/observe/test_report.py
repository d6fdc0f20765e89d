"""Risks: a page that runs foreign text, that needs other files, that fails on a run without some
part, or that leaves results out.
"""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sailplan.errors import ConfigurationError
from sailplan.observe.report import write_report
from sailplan.observe.report_pictures import smooth, thin

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags and text, and checks that HTML elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_the_page_needs_no_other_file_and_runs_nothing(run_folder: Path) -> None:
    html, parsed = page(run_folder)
    names = {name for name, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#" if tag == "use" else "data:image/"), (
                tag,
                value,
            )
    style = "".join(re.findall(r"<style.*?</style>", html, flags=re.DOTALL))
    assert "@import" not in style and not re.search(r"url\((?!#)", style)


def test_foreign_text_is_shown_and_not_interpreted(run_folder: Path) -> None:
    html, parsed = page(run_folder)
    assert "<script>" not in html
    assert any("<script>alert('x')</script>" in text for text in parsed.text)
    assert 'src="https' not in html  # a link where a picture should be is not followed


def test_every_part_of_the_run_is_there(run_folder: Path) -> None:
    html, parsed = page(run_folder)
    text = " ".join(parsed.text)
    assert "not in this run" not in text
    for expected in (
        "made-up",
        "0123456789abcdef",
        "5 min 00 s",
        "truncated image",
        "998,780",
        "recall@10",
        "temperature",
        "set_completion",
        "+0.100",
        "192 dimensions",
        "7,188",
        "benchmark_two",
        "5,000 of 6,470",
        "backward",
    ):
        assert expected in text, expected
    assert [name for name, _ in parsed.tags].count("svg") >= 8
    assert html.count('class="card correct') >= 3 + 1
    identifiers = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert len(identifiers) == len(
        set(identifiers)
    )  # a clip path of one picture must not cut another
    references = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert references and set(references) <= set(identifiers)


def test_baselines_stand_beside_the_model(run_folder: Path) -> None:
    html, _ = page(run_folder)
    table = html[html.index("<h2>Baselines</h2>") : html.index("<h2>Loss</h2>")]
    row = re.search(r"<td>set_completion</td><td>recall@10</td>.*?</tr>", table, flags=re.DOTALL)
    assert row
    # chance at 10 of 7,188, popularity, mean of items, this run with its interval of 300 queries
    assert re.findall(r"0\.\d+", row.group(0)) == [
        "0.00139",
        "0.08",
        "0.12",
        "0.18",
        "0.141",
        "0.227",
    ]
    row = re.search(r"<td>emoji_image_to_name</td><td>recall@10</td>.*?</tr>", table, re.DOTALL)
    assert row and '<td class="n">0.03</td>' in row.group(0), "the model before its first step"


def test_the_mean_of_items_is_no_baseline_where_the_run_does_the_same(run_folder: Path) -> None:
    path = sorted((run_folder / "evaluation").glob("*.json"))[-1]
    known = json.loads(path.read_text())
    known["tasks"]["set_completion"]["recall@10"] = 0.12
    path.write_text(json.dumps(known))
    html, _ = page(run_folder)
    table = html[html.index("<h2>Baselines</h2>") : html.index("<h2>Loss</h2>")]
    row = re.search(r"<td>set_completion</td><td>recall@10</td>.*?</tr>", table, flags=re.DOTALL)
    assert row and re.findall(r">(0\.\d+|–)<", row.group(0)) == [
        "0.00139",
        "–",
        "0.08",
        "–",
        "0.12",
    ]


def test_nothing_outside_a_box_that_scrolls_is_wider_than_a_phone(run_folder: Path) -> None:
    html, _ = page(run_folder)
    style = re.findall(r"<style.*?</style>", html, flags=re.DOTALL)[0]
    widths = {
        rule.split("{")[0].strip(): int(width)
        for rule in style.split("}")
        for width in re.findall(r"(?:min-width: |minmax\()(\d+)px", rule)
        if not rule.strip().startswith("@media")
    }
    wide = {name for name, width in widths.items() if width > 390 - 2 * 14}
    assert wide == {".chart svg"} and ".chart { overflow-x: auto; }" in style
    for table in re.finditer(r"<table", html):
        before = html[: table.start()]
        boxes = [before.rfind(box) for box in ('scroll"', "scroll'", '<div class="confusion">')]
        assert max(boxes) > 0


@pytest.mark.parametrize(
    "part",
    ["config.yaml", "stages.json", "metrics.jsonl", "evaluation", "curriculum", "quarantine.jsonl"],
)
def test_a_missing_part_is_said_and_the_rest_is_shown(run_folder: Path, part: str) -> None:
    path = run_folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    html, _ = page(run_folder)
    assert part == "config.yaml" or "not in this run" in html


def test_an_empty_run_folder_gives_a_page(tmp_path: Path) -> None:
    html, _ = page(tmp_path)
    assert html.count("not in this run") >= 9


def test_a_broken_or_missing_input_is_one_line(run_folder: Path) -> None:
    (run_folder / "stages.json").write_text("[{")
    with pytest.raises(ConfigurationError, match=r"stages\.json: not JSON"):
        write_report(run_folder)
    with pytest.raises(ConfigurationError, match="no such run folder"):
        write_report(run_folder / "absent")


def test_long_runs_give_small_pages(run_folder: Path) -> None:
    small = len(write_report(run_folder).read_bytes())
    with (run_folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 20001):
            file.write(
                json.dumps(
                    {
                        "step": step,
                        "stage": "diverse",
                        "time": 0.0,
                        "data/set": "emoji",
                        "loss/total": 1.0,
                        "accuracy": 0.5,
                    }
                )
                + "\n"
            )
    assert len(write_report(run_folder).read_bytes()) < 2 * small


def test_thinning_and_smoothing_keep_the_mean_and_a_constant() -> None:
    series = [(step, float(step % 7)) for step in range(1000)]
    short = thin(series, 100)
    assert len(short) == 100 and sum(value for _, value in short) / 100 == pytest.approx(
        sum(value for _, value in series) / 1000
    )
    assert all(
        value == pytest.approx(3.0) for _, value in smooth([(step, 3.0) for step in range(20)])
    )


def test_similarities_are_drawn_with_their_intervals_and_whose_weights_embedded(
    run_folder: Path,
) -> None:
    html, _ = page(run_folder)
    # 0.52 +- 0.02 and 0.48 +- 0.01 in a range from 0.47 to 0.54
    places = re.findall(
        r'class="interval"><span title="(\w+)">.*?left:([\d.]+)%;width:([\d.]+)%.*?left:([\d.]+)%',
        html,
    )
    assert places == [("emoji", "42.9", "57.1", "71.4"), ("icons", "0.0", "28.6", "14.3")]
    assert "weights from a model that has learned nothing mean nothing" in html
