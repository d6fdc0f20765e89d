"""The three commands of docs/data.md, run as they stand there, on a small set of each kind: the
last one trains.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import sailplan.evaluate.runner
import sailplan.train.run  # noqa: F401  what the forked commands would import one after the other
from sailplan.cli.testing import command
from sailplan.train.testing import metrics

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
ROWS = 24


def commands() -> dict[str, list[list[str]]]:
    """Return each block of three commands of the docs' first section, by the name of its
    experiment.
    """
    section = DOCS.read_text(encoding="utf-8").split("# By hand")[0]
    blocks = [
        [line.split() for line in block.splitlines()]
        for block in re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)
    ]
    return {block[-1][-1].partition("=")[2]: block for block in blocks}


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), list(COLOURS.values())[number % 3]).save(file, "JPEG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"a {list(COLOURS)[number % 3]} shoe, number {number}"


def photos(folder: Path) -> None:
    (folder / "photos" / "images").mkdir(parents=True)
    with open(folder / "photos" / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for number in range(ROWS):
            (folder / "photos" / "images" / f"{number}.jpg").write_bytes(picture(number))
            table.writerow([f"{number}.jpg", caption(number)])


def faq(folder: Path) -> None:
    rows = [
        {"anchor": f"what is {n}", "positive": f"it is {n}", "negative": f"it is {n + 1}"}
        for n in range(ROWS)
    ]
    (folder / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def laion(folder: Path) -> None:
    (folder / "laion").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "laion" / f"{shard:05d}.tar", "w") as archive:
            for number in range(ROWS // 2):
                key, text = f"{shard:05d}{number:04d}", caption(number)
                about = json.dumps(
                    {
                        "caption": text,
                        "url": "http://somewhere/x.jpg",
                        "key": key,
                        "status": "success",
                    }
                )
                for name, content in (
                    (f"{key}.jpg", picture(number)),
                    (f"{key}.json", about.encode()),
                    (f"{key}.txt", text.encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        (folder / "laion" / f"{shard:05d}_stats.json").write_text("{}")


def shop(folder: Path) -> None:
    draw = random.Random(0)
    (folder / "items.csv").write_text(
        "id,title\n" + "".join(f"{n},thing {n} of kind {n % 5}\n" for n in range(40))
    )
    rows = [
        f"u{user},{draw.randrange(40)},2024-05-{day + 1:02d}\n"
        for user in range(ROWS)
        for day in range(draw.randint(4, 8))
    ]
    (folder / "interactions.csv").write_text("user,item,time\n" + "".join(rows))


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """One thread a command, which two would wait for each other on a busy machine."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("make", [photos, faq, laion, shop])
def test_three_commands_of_the_docs_train(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    for line in commands()[make.__name__]:
        assert line[0] == "sailplan"
        code, out, err = command(tmp_path, *line[1:], timeout=400)
        assert code == 0, f"{' '.join(line)}: {out}{err}"
    lines = metrics(tmp_path / "runs" / make.__name__)
    loss = "loss/seq2item" if make is shop else "loss/infonce"
    assert len(lines) >= 20 and all(line[loss] > 0 for line in lines)
    assert sum(line[loss] for line in lines[-5:]) < sum(line[loss] for line in lines[:5])
    [evaluation] = (tmp_path / "runs" / make.__name__ / "evaluation").iterdir()
    [task] = json.loads(evaluation.read_text())["tasks"].values()
    assert task["recall@10"] > 0
    assert not list((tmp_path / "laion").glob("*.json.tmp")) and len(
        list((tmp_path / "laion").glob("*"))
    ) in (0, 4, 5)  # nothing is copied
