"""The `sailplan` command around weights from elsewhere: `initialise_from`, `export merge`, and a
merged folder in a checkpoint's place.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sailplan.checkpoint.store import folder_of, latest, save
from sailplan.config.compose import compose
from sailplan.export.weights import read_whole
from sailplan.model.testing import join_layout
from sailplan.train.bundle import build_bundle
from sailplan.train.run_folder import RunFolder
from sailplan.train.testing import SMALL, run
from sailplan_kernels.testing import run_ranks

# One step that moves nothing: what its checkpoint holds is what the run started from.
STILL = [
    *SMALL,
    "order=[diverse]",
    "stages.diverse.steps=1",
    "stages.diverse.balance=null",
    "stages.diverse.data={prompts: 1}",
    "stages.diverse.objectives={infonce: 1.0}",
    "optimizer.learning_rate=0",
    "optimizer.final_learning_rate=0",
    "optimizer.temperature_learning_rate=0",
    "evaluation.at_stage_end=false",
    "~evaluation.tasks.emoji_image_to_name",
    "logger=[console]",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with another seed that stopped before its first step."""
    config = replace(compose(STILL), seed=5)
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "source")
    folder.write_config(config)

    def write(rank: int, world: int) -> None:
        parallel = join_layout(1)
        save(
            folder_of(folder.checkpoints, 0),
            model=build_bundle(config, parallel).module,
            optimizer=None,
            extra={"step": 0},
            parallel=parallel,
        )

    run_ranks(write, 1)
    return folder.root


def test_a_fresh_run_starts_from_it_and_its_own_checkpoint_wins_later(source: Path) -> None:
    arguments = ("train", *STILL, "name=fresh", f"runs={source.parent}")
    started = run(*arguments, f"initialise_from={source}")
    assert started.returncode == 0, started.stderr[-3000:]
    fresh = source.with_name("fresh")
    newest = latest(fresh / "checkpoints")
    assert newest is not None
    theirs, own = read_whole(folder_of(source / "checkpoints", 0)), read_whole(newest)
    assert all(
        torch.equal(own[name], theirs[name]) for name in theirs if name.startswith("encoder.")
    )
    assert any(
        not torch.equal(own[name], theirs[name])
        for name in theirs
        if name.startswith("objectives.")
    )
    again = run(*arguments, f"initialise_from={source.with_name('gone')}", "resume=auto")
    assert again.returncode == 0, again.stderr[-3000:]

    merged = source.with_name("merged")
    told = run(
        "export",
        "merge",
        "--checkpoint",
        str(newest),
        "--checkpoint",
        str(folder_of(source / "checkpoints", 0)),
        "--out",
        str(merged),
    )
    assert told.returncode == 0 and told.stdout.strip() == str(merged), told.stderr
    written = fresh / "evaluation" / f"{newest.name}.json"
    written.unlink()
    found = []
    for place in (merged, newest):
        assert not written.exists()  # an exported folder's figures are not the run's
        told = run("evaluate", "--run-folder", str(fresh), "--checkpoint", str(place))
        assert told.returncode == 0, told.stderr[-3000:]
        found.append(json.loads(told.stdout))
    assert written.is_file()
    assert found[0] == found[1] != {}  # the average of two equal encoders


def test_what_does_not_fit_ends_the_run_before_its_first_step(source: Path, tmp_path: Path) -> None:
    refused = run(
        "train",
        *STILL,
        "name=other",
        f"runs={tmp_path}",
        f"initialise_from={source}",
        "model.vocabulary=8320",
    )
    assert refused.returncode == 64 and "initialise_from, part encoder" in refused.stderr, (
        refused.stderr[-3000:]
    )
    assert not (tmp_path / "other" / "checkpoints").exists()
