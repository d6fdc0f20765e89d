"""Risks: an artifact that needs a change of the package, whose bytes depend on the number of
ranks, or whose failure makes others wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sailplan.cli.testing import command, write_project
from sailplan.config.compose import compose
from sailplan.config.schema import Config
from sailplan.curriculum import artifact as room
from sailplan.curriculum.artifact import ArtifactContext, ShardArtifact, artifact
from sailplan.curriculum.stages import check_stage
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.model.testing import join_layout
from sailplan.train.testing import metrics
from sailplan_kernels.testing import RankFailure, run_ranks

OWN = '''"""Pairs of items that lie side by side in the item corpus."""

from sailplan.curriculum.artifact import ShardArtifact


class Neighbours(ShardArtifact):
    def __init__(self, name, *, items, step=1):
        super().__init__(name)
        self.items, self.step = items, step

    def records(self, context, part):
        reader = context.readers[self.items]
        ids = reader.ids(reader.positions("train"))
        for number in range(part, len(ids) - self.step, self.parts):
            yield {"id": f"{self.name}/{number:06d}", "split": "train", "query": ids[number], "item": ids[number + self.step]}
'''
YAML = "# @package artifacts.beside\n_target_: own_artifact.Neighbours\nitems: things\nstep: 2\n"
SET = """# @package data.sets.beside
shards: artifact:beside
kind: pairs
catalogue: things
views:
  query: {of: query, modalities: [vision, text], fields: [title]}
  item: {of: target, modalities: [vision, text], fields: [title]}
patterns:
  side_by_side: {query: query, target: item}
"""
LINES = [
    "experiment=small",
    "+artifact=beside",
    "+data=beside",
    "allowed_targets=[sailplan., own_artifact.]",
    "+stages.only.data.beside=1",
    "~stages.only.data.things",
    "~stages.only.patterns.things",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    write_project(root)
    for name, text in {
        "own_artifact.py": OWN,
        "conf/artifact/beside.yaml": YAML,
        "conf/data/beside.yaml": SET,
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def test_one_file_and_one_yaml_make_an_artifact_that_a_stage_trains_on_and_a_resume_reads(
    project: Path,
) -> None:
    code, _, err = command(
        project,
        "train",
        *LINES,
        "stages.only.artifacts=[beside]",
        "stages.only.steps=2",
        "name=own",
    )
    assert code == 0, err
    assert [line["data/set"] for line in metrics(project / "runs" / "own")] == ["beside", "beside"]
    made = project / "runs" / "own" / "curriculum" / "only" / "beside"
    assert len(list(made.glob("beside-*.tar"))) == ShardArtifact.parts
    settings = (
        "stages.only.artifacts=[beside]",
        "stages.only.steps=2",
        "name=own",
        "artifacts.beside.step=1",
    )
    code, _, err = command(project, "train", *LINES, *settings, "resume=auto")
    assert code == 64 and "artifacts.beside.step: 2 -> 1" in err, (
        "what an artifact is made with belongs to the run"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "its shards are artifact:beside; list that in stages.only.artifacts"),
        (
            ["stages.only.artifacts=[beside,besides]"],
            "artifacts.besides is missing: a stage lists it in its artifacts",
        ),
        (
            ["stages.only.artifacts=[beside]", "+artifacts.beside.stop=3"],
            "artifacts.beside.stop: Neighbours has no such option; did you mean 'step'?",
        ),
        (
            ["stages.only.artifacts=[beside]", "allowed_targets=[sailplan.]"],
            "own_artifact.Neighbours: expected a class below sailplan.",
        ),
        (
            [
                "stages.only.artifacts=[beside]",
                "artifacts.beside._target_=sailplan.data.config.DataConfig",
            ],
            "subclass of sailplan.curriculum.artifact.Artifact",
        ),
        (
            ["stages.only.artifacts=[beside]", "data.sets.beside.shards=elsewhere"],
            "no data set has `shards: artifact:beside`",
        ),
    ],
)
def test_what_cannot_be_made_is_one_line_before_the_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], message: str
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    config = compose([*LINES, *settings])
    with pytest.raises(ConfigurationError) as caught:
        check_stage("only", config.stages["only"], config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Numbers(ShardArtifact):
    """Records of numbers that counts how many it has open at once."""

    parts = 5

    def __init__(self, name: str, count: int = 37, bad: int = -1) -> None:
        super().__init__(name)
        self.count, self.bad, self.yielded = count, bad, 0

    def records(self, context: ArtifactContext, part: int) -> Iterator[dict[str, Any]]:
        for number in range(part, self.count, self.parts):
            if number == self.bad:
                raise BadDataError(f"record {number} is bad")
            self.yielded += 1
            yield {"id": f"{self.name}/{number}", "split": "train"}


def _made(
    rank: int, world_size: int, folder: Path, count: int, bad: int
) -> tuple[int, int, dict[str, str]]:
    room.PER_SHARD = 3
    parallel = join_layout(1)
    each = Numbers("numbers", count, bad)
    context: Any = SimpleNamespace(parallel=parallel, folder=folder)
    found = each.make(context)["records"]
    parallel.barrier()
    return (
        found,
        each.yielded,
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / "numbers").glob("*.tar")
        },
    )


def test_ranks_share_the_work_and_the_bytes_do_not_depend_on_them(tmp_path: Path) -> None:
    ((total, alone, files),) = run_ranks(_made, 1, tmp_path / "one", 37, -1)
    assert total == alone == 37 and len(files) == 15
    found = run_ranks(_made, 3, tmp_path / "three", 37, -1)
    assert (
        [each[0] for each in found] == [37] * 3
        and sum(each[1] for each in found) == 37
        and max(each[1] for each in found) <= 16
    )
    assert all(each[2] == files for each in found)


def test_a_failure_on_one_rank_ends_all(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"record 7 is bad|failed on another rank"):
        run_ranks(_made, 3, tmp_path, 37, 7, timeout=60)
    with pytest.raises(RankFailure, match="yielded no record"):
        run_ranks(_made, 2, tmp_path, 0, -1, timeout=60)


def test_the_package_s_own_are_named_as_any_other() -> None:
    config = Config()
    assert {
        name: type(artifact(name, options, config.allowed_targets)).__name__
        for name, options in config.artifacts.items()
    } == {
        "interests": "Interests",
        "teachers": "Teachers",
        "co_occurrence": "CoOccurrence",
    }
    with pytest.raises(
        ConfigurationError, match=r"artifacts.other: Interests is made under the name interests"
    ):
        artifact("other", config.artifacts["interests"], ["sailplan."]).check(
            config, "only", Config().stages.get("only")
        )  # type: ignore[arg-type]
