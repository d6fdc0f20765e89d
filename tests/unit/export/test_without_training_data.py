"""Risk: a model that can be used only where the data that trained it still lie."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from sailplan.checkpoint.store import folder_of, save
from sailplan.cli.testing import command
from sailplan.config.schema import StageConfig
from sailplan.curriculum.testing import write_pack
from sailplan.model.testing import join_layout
from sailplan.train.bundle import build_bundle
from sailplan.train.run_folder import RunFolder
from sailplan_kernels.testing import run_ranks


def test_commands_read_only_what_they_work_on(tmp_path: Path) -> None:
    """Embed and evaluate open the sets that they are asked for; both exports none, not even the
    tokenizer's folder.
    """
    config = write_pack(tmp_path / "data")
    config.evaluation.tasks = {
        "names": dataclasses.replace(config.evaluation.tasks["names"], metrics=["recall"])
    }
    config.evaluation.benchmark, config.data.mel_bins = [], config.model.audio.mel_bins
    config.objectives = {"infonce": {"_target_": "sailplan.objective.infonce.InfoNCE"}}
    config.order, config.stages = (
        ["one"],
        {"one": StageConfig(steps=7, data={"things": 1.0}, objectives={"infonce": 1.0})},
    )
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)

    def run(rank: int, world: int) -> None:
        parallel = join_layout(1)
        whole = build_bundle(config, parallel)
        save(
            folder_of(folder.checkpoints, 7),
            model=whole.module,
            optimizer=None,
            extra={"step": 7, "stage": "one"},
            parallel=parallel,
        )

    run_ranks(run, 1)
    for name in ("choices", "histories"):
        shutil.rmtree(tmp_path / "data" / name)
    (tmp_path / "data" / "tokenizer.json").unlink()
    at = ("--run-folder", str(folder.root))
    code, out, err = command(tmp_path, "evaluate", *at)
    assert code == 0 and "names" in json.loads(out), err
    code, out, err = command(tmp_path, "embed", *at, "--dataset", "things", "--view", "item")
    assert code == 0 and json.loads(out)["rows"] == 48, err
    shutil.rmtree(tmp_path / "data")
    for to, written in (
        ("sailplan", "export/model.json"),
        ("sentence-transformers", "sentence-transformers/modules.json"),
    ):
        code, _, err = command(tmp_path, "export", *at, "--to", to)
        assert code == 0 and (folder.root / written).is_file(), err
