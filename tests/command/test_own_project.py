"""A project of one's own, written from the docs alone: its data, its loss, its stages, in a
folder without our conf/.

One small run is trained from it; then what may happen to a run that has ended is tried on copies.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from sailplan.checkpoint.seal import is_complete
from sailplan.cli.testing import command
from sailplan.train.testing import metrics, run

PACK = Path(__file__).resolve().parents[2] / "data" / "quickstart"
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
FILES = {
    "conf/data/shoes.yaml": """# @package data.sets.shoes
shards: shards/shoes
language_weights: {en: 1.0}
views:
  photo: {modalities: [vision], prompt: "name this"}
  name: {modalities: [text], fields: [title, tags], prompt: "name"}
patterns:
  photo_to_name: {query: photo, target: name}
""",
    "conf/data/shoe_pairs.yaml": """# @package data.sets.shoe_pairs
shards: shards/pairs-{0..1}.tar
kind: pairs
catalogue: shoes
views:
  query: {of: query, fields: [text], prompt: "find"}
  item: {of: target, modalities: [vision, text], fields: [title], prompt: "item"}
patterns:
  query_to_item: {query: query, target: item}
""",
    "conf/objective/alignment.yaml": "# @package objectives.alignment\n_target_: own_losses.Alignment\npower: 1.0\n",
    "conf/stage/content.yaml": "steps: 2\ndata: {shoes: 1}\nobjectives: {infonce: 1.0, alignment: 0.5}\n",
    "conf/experiment/shoes.yaml": """# @package _global_
defaults:
  - /stage@stages.warm: content
  - /stage@stages.pairs: content
  - override /data: [reading, shoes, shoe_pairs]
  - override /objective: [infonce, alignment]
  - override /logger: [console]
  - _self_
name: shoes
global_batch: 16
allowed_targets: [sailplan., own_losses.]
step: {micro_batch: 16}
loggers: {console: {every: 1}}
checkpoint: {every_steps: 1}
parallel: {threads: 1}
order: [warm, pairs]
stages:
  pairs: {data: {shoe_pairs: 3}, optimizer: {learning_rate: 1.0e-4}}
evaluation:
  tasks:
    shoe_photo_to_name: {dataset: shoes, query: photo, target: name, metrics: [recall, auc]}
""",
    "own_losses.py": '''"""A loss of one's own: positives lie together."""

from torch.nn.functional import normalize

from sailplan.objective.patterns import patterns_of, zero_loss
from sailplan.objective.protocol import Objective, ObjectiveOutput


class Alignment(Objective):
    def __init__(self, *, embedding, datasets, power=2.0):
        super().__init__()
        self.power = power

    def applies(self, dataset):
        return dataset.kind != "sequences"

    def forward(self, encoded, context):
        total = zero_loss(encoded)
        for pattern in patterns_of(encoded, context, histories=False):
            query, target = normalize(pattern.query.fused, dim=-1), normalize(pattern.target.fused, dim=-1)
            valid = pattern.query.valid & pattern.target.valid
            distance = ((query - target).square().sum(-1) ** self.power * valid).sum()
            total = total + pattern.weight * distance * context.exchange.world_size / context.exchange.sum(valid.sum()).clamp_min(1)
        return ObjectiveOutput(total)
''',
}


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), list(COLOURS.values())[number % 3]).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's folder, with one finished run of four steps in runs/shoes."""
    root = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    words = list(COLOURS)
    plain = [
        (f"{n:03d}.{kind}", content)
        for n in range(40)
        for kind, content in (("jpg", picture(n)), ("txt", f"{words[n % 3]} boot {n}".encode()))
    ]
    told: list[tuple[str, bytes]] = []
    for n in range(40):
        fields = {"title": f"{words[n % 3]} sandal {n}", "tags": {"en": ["summer"]}}
        body = {"id": f"shoe-{n}", "split": "held_out" if n % 4 == 0 else "train", "fields": fields}
        told += [(f"{n:03d}.json", json.dumps(body).encode()), (f"{n:03d}.jpg", picture(n))]
    write_tar(root / "shards" / "shoes" / "plain.tar", plain)
    write_tar(root / "shards" / "shoes" / "told.tar", told)
    for shard in range(2):
        pairs = [
            {
                "text": {"en": f"a {words[n % 3]} shoe"},
                "item": f"plain/{n:03d}" if n % 2 else f"shoe-{n}",
            }
            for n in range(20)
        ]
        write_tar(
            root / "shards" / f"pairs-{shard}.tar",
            [(f"{n}.json", json.dumps(pair).encode()) for n, pair in enumerate(pairs)],
        )
    shutil.copy(PACK / "tokenizer.json", root / "tokenizer.json")
    with (root / "conf" / "experiment" / "shoes.yaml").open("a") as file:
        file.write("data: {tokenizer: tokenizer.json}\n")
    done = run(
        "train", "experiment=shoes", "resume=auto", folder=root, timeout=280
    )  # as a user does; the others are forked
    assert done.returncode == 0, done.stderr
    return root


def test_its_own_loss_data_and_stages_are_trained(project: Path) -> None:
    lines = metrics(project / "runs" / "shoes")
    assert [line["stage"] for line in lines] == ["warm", "warm", "pairs", "pairs"]
    assert all(line["loss/alignment"] > 0 for line in lines)
    assert (
        json.loads((project / "runs" / "shoes" / "evaluation" / "step-00000004.json").read_text())[
            "tasks"
        ]["shoe_photo_to_name"]["queries"]
        == 10
    )


def test_its_loss_is_checked_for_exactness_as_a_class(project: Path) -> None:
    found = run(
        "check", "parity", "--loss", "own_losses:Alignment", "--world-size", "2", folder=project
    )
    assert found.returncode == 0 and ": exact:" in found.stdout, found.stderr


def test_a_finished_run_is_finished_but_for_an_evaluation_that_a_kill_came_before(
    project: Path,
) -> None:
    evaluation = project / "runs" / "shoes" / "evaluation" / "step-00000004.json"
    before = json.loads(evaluation.read_text())
    evaluation.unlink()
    code, out, err = command(project, "train", "experiment=shoes", "resume=auto")
    assert (
        code == 0 and "finished after" in out and len(metrics(project / "runs" / "shoes")) == 4
    ), err
    assert json.loads(evaluation.read_text())["tasks"] == before["tasks"]


def test_a_sweep_trains_a_run_for_each_value_and_goes_on_with_them(
    project: Path, tmp_path: Path
) -> None:
    lines = [
        "experiment=shoes",
        f"runs={tmp_path}",
        "order=[warm]",
        "stages.warm.steps=1,2",
        "resume=auto",
        "evaluation.tasks={}",
    ]
    for _ in range(2):
        done = run("train", "-m", *lines, folder=project, timeout=400)
        assert done.returncode == 0, done.stderr
        assert [
            len(metrics(tmp_path / f"shoes-stages.warm.steps={steps}")) for steps in (1, 2)
        ] == [1, 2]
    assert done.stdout.count("finished after") == 2 and ": done" in done.stdout


def test_an_evaluation_that_fails_does_not_cost_the_stage(project: Path, tmp_path: Path) -> None:
    task = (
        "+evaluation.tasks.groups={dataset: shoes, kind: clustering, query: name, label: nothing}"
    )
    code, _, err = command(
        project, "train", "experiment=shoes", f"runs={tmp_path}", task, "checkpoint.every_steps=0"
    )
    assert code == 64 and "evaluation.tasks.groups.label=nothing" in err, err
    assert is_complete(tmp_path / "shoes" / "checkpoints" / "step-00000002")


def test_damaged_checkpoints_are_told_and_never_make_a_run_begin_again(
    project: Path, tmp_path: Path
) -> None:
    shutil.copytree(project / "runs" / "shoes", tmp_path / "shoes")
    before, newest = sorted((tmp_path / "shoes" / "checkpoints").iterdir())
    _cut(newest)
    shutil.copytree(tmp_path / "shoes", tmp_path / "lost" / "shoes")
    _cut(tmp_path / "lost" / "shoes" / "checkpoints" / before.name)

    code, _, err = command(project, "train", "experiment=shoes", "resume=auto", f"runs={tmp_path}")
    assert code == 0 and f"{newest} is damaged, going on from {before}" in err, err
    code, _, err = command(
        project, "train", "experiment=shoes", "resume=auto", f"runs={tmp_path / 'lost'}"
    )
    assert code == 64 and err.count("\n") == 1 and "is damaged" in err, err
    assert len(metrics(tmp_path / "lost" / "shoes")) == 4


def _cut(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def test_records_that_end_a_run_are_in_its_quarantine(project: Path, tmp_path: Path) -> None:
    write_tar(
        tmp_path / "bad.tar",
        [
            (
                f"{n}.json",
                json.dumps({"text": "a shoe", "item": "nowhere" if n else "plain/001"}).encode(),
            )
            for n in range(20)
        ],
    )
    settings = (
        f"runs={tmp_path}",
        f"data.sets.shoe_pairs.shards={tmp_path}/bad.tar",
        "+stages.warm.data.shoe_pairs=1000",
    )
    code, _, err = command(project, "train", "experiment=shoes", *settings)
    assert code == 65 and "item nowhere is not in the catalogue" in err, err
    lines = [
        json.loads(line)
        for line in (tmp_path / "shoes" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert lines and all(line["step"] == 1 and "item nowhere" in line["reason"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            [
                "embed",
                "--run-folder",
                "runs/shoes",
                "--dataset",
                "shoes",
                "--view",
                "name",
                "--semantic-ids",
                "3,x",
            ],
            ["--semantic-ids 3,x", "64,64,64"],
        ),
        (
            ["export", "--run-folder", "runs/shoes", "--out", "tokenizer.json"],
            ["--out tokenizer.json", "cannot be written"],
        ),
        (
            ["plan", "experiment=shoes", "evaluation.tasks.shoe_photo_to_name.split=later"],
            ["split=later", "train, held_out"],
        ),
        (
            ["plan", "experiment=shoes", "+objectives.alignment.powr=2"],
            ["objectives.alignment.powr", "power"],
        ),
        (["plan", "experiment=shoes", "--ranks", "0"], ["--ranks 0", "at least 1"]),
    ],
)
def test_mistakes_are_one_line(project: Path, arguments: list[str], words: list[str]) -> None:
    code, _, told = command(project, *arguments)
    assert (
        code == 64
        and told.startswith("sailplan: ")
        and told.count("\n") == 1
        and all(word in told for word in words)
    ), told


def test_a_place_that_cannot_be_written_is_told(project: Path) -> None:
    code, _, err = command(project, "train", "experiment=shoes", "runs=tokenizer.json")
    assert code == 64 and err.count("\n") == 1 and "runs=tokenizer.json" in err, err
