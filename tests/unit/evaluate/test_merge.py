"""A merged folder holds the weighted average of its sources, and sources that do not fit are
named.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sailplan.checkpoint.exported import WEIGHTS
from sailplan.checkpoint.store import folder_of, save
from sailplan.cli.main import main
from sailplan.config.schema import Config
from sailplan.curriculum.testing import write_pack
from sailplan.errors import ConfigurationError
from sailplan.export.merge import last_checkpoints, merge
from sailplan.export.weights import export_weights, load_exported, read_whole
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan.train.run_folder import RunFolder
from sailplan_kernels.testing import run_ranks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def checkpoints(config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds, and a model with one more tensor."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(rank: int, world: int) -> None:
        parallel = join_layout(1)
        for seed in (1, 2, 3):
            module = nn.ModuleDict(
                {"encoder": build_encoder(config.model, config.parallel, parallel, seed=seed)}
            )
            if seed == 3:
                module["head"] = nn.Linear(2, 2)
            save(folder_of(folder, seed), model=module, optimizer=None, extra={}, parallel=parallel)

    run_ranks(write, 2)
    return [folder_of(folder, seed) for seed in (1, 2, 3)]


def test_the_average_is_that_of_the_sources_checkpoints_or_exports(
    config: Config, checkpoints: list[Path], tmp_path: Path
) -> None:
    exported = export_weights(checkpoints[1], tmp_path / "exported", config=config)
    one, two = (
        load_file(export_weights(checkpoints[0], tmp_path / "first", config=config) / WEIGHTS),
        load_file(exported / WEIGHTS),
    )
    same = load_file(merge([checkpoints[0]] * 2, tmp_path / "same", config=config) / WEIGHTS)
    assert same.keys() == one.keys() and all(torch.equal(same[name], one[name]) for name in one)
    mixed = merge([checkpoints[0], exported], tmp_path / "mixed", weights=[3, 1])
    for name, value in load_file(mixed / WEIGHTS).items():
        assert torch.equal(
            value, (0.75 * one[name].double() + 0.25 * two[name].double()).to(value.dtype)
        ), name
    assert any(not torch.equal(one[name], two[name]) for name in one)

    def load(rank: int, world: int) -> str:
        join_layout(1)
        return load_exported(mixed)[1]["checkpoint"]

    assert run_ranks(load, 1) == ["merged"]


def test_what_does_not_fit_is_named(
    config: Config, checkpoints: list[Path], tmp_path: Path
) -> None:
    for sources, weights, words in (
        (checkpoints[:1] + checkpoints[2:], None, r"head\.(bias|weight), which"),
        (checkpoints[:2], [1.0], "expected 2 positive numbers"),
        (checkpoints[:2], [1.0, -1.0], "expected 2 positive numbers"),
        ([tmp_path / "none"], None, "complete checkpoint"),
        ([], None, "at least one"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            merge(sources, tmp_path / "out", weights=weights, config=config)
    assert not (tmp_path / "out").exists()


def test_the_last_checkpoints_of_a_run_averaged_with_a_decay(
    config: Config, checkpoints: list[Path], tmp_path: Path
) -> None:
    for name, checkpoint in zip(("step-00000005", "step-00000010"), checkpoints, strict=False):
        shutil.copytree(checkpoint, tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step-00000099").mkdir()  # unfinished
    folder = RunFolder(tmp_path)
    folder.write_config(config)
    old, new = (read_whole(checkpoint) for checkpoint in checkpoints[:2])
    for arguments, out, share in (
        (["--last", "2"], "merged", 0.5),
        (["--last", "2", "--decay", "0.25", "--out", str(tmp_path / "ema")], "ema", 0.8),
    ):
        assert main(["export", "merge", "--run-folder", str(tmp_path), *arguments]) == 0
        for name, value in load_file(tmp_path / out / WEIGHTS).items():
            expected = (share * new[name].double() + (1 - share) * old[name].double()).to(
                value.dtype
            )
            torch.testing.assert_close(
                value, expected, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )
    for count, decay, words in (
        (3, 1.0, "found 2 complete.*checkpoint.keep=3"),
        (0, 1.0, "at least 1"),
        (2, 0.0, "above 0"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            last_checkpoints(folder.checkpoints, count, decay)


def test_low_rank_factors_are_not_averaged(config: Config, tmp_path: Path) -> None:
    """The average of A and of B is not the factors of the average."""
    lora = copy.deepcopy(config)
    lora.model.lora.rank = 2

    def write(rank: int, world: int) -> None:
        parallel = join_layout(1)
        module = nn.ModuleDict(
            {"encoder": build_encoder(lora.model, lora.parallel, parallel, seed=0)}
        )
        save(folder_of(tmp_path, 1), model=module, optimizer=None, extra={}, parallel=parallel)

    run_ranks(write, 1)
    with pytest.raises(ConfigurationError, match=r"LoRA factors.*sailplan export"):
        merge([folder_of(tmp_path, 1)] * 2, tmp_path / "out", config=lora)
