"""A fresh run takes another's weights from a checkpoint, a run folder or an exported folder, at
any layout; nothing else, and only what fits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sailplan.checkpoint.source import initial_source
from sailplan.checkpoint.store import folder_of, save
from sailplan.config.schema import Config, LoraConfig, ParallelConfig
from sailplan.curriculum.testing import write_pack
from sailplan.errors import ConfigurationError
from sailplan.export.merge import merge
from sailplan.export.weights import export_weights
from sailplan.model.testing import join_layout, whole_tensor
from sailplan.train.bundle import build_bundle
from sailplan.train.load_pretrained import initialise
from sailplan_kernels.testing import RankFailure, run_ranks

ALL = ("encoder", "objectives", "temperatures")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def run_folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of seed 5 at tensor-parallel size 2, its temperatures
    moved.
    """
    root = tmp_path_factory.mktemp("runs") / "source"

    def write(rank: int, world: int) -> None:
        parallel = join_layout(2)
        whole = build_bundle(replace(config, seed=5), parallel)
        with torch.no_grad():
            for value in whole.temperatures.parameters():
                value.add_(0.25)
        save(
            folder_of(root / "checkpoints", 4),
            model=whole.module,
            optimizer=None,
            extra={"step": 4},
            parallel=parallel,
        )

    run_ranks(write, 2)
    return root


def weights(
    config: Config, tensor: int, world: int, source: Path | None, parts: tuple[str, ...] = ALL
) -> dict[str, Tensor]:
    """Every parameter, whole, of a run's start."""

    def work(rank: int, size: int) -> dict[str, object]:
        parallel = join_layout(tensor)
        whole = build_bundle(replace(config, parallel=ParallelConfig(tensor=tensor)), parallel)
        if source is not None:
            initialise(whole, source, parts, parallel)
        return {
            name: whole_tensor(value, value, parallel).numpy()
            for name, value in whole.module.named_parameters()
        }

    return {name: torch.from_numpy(value) for name, value in run_ranks(work, world)[0].items()}


@pytest.mark.parametrize(("tensor", "world"), [(1, 1), (1, 2), (2, 2)])
def test_weights_are_those_of_the_source_at_every_layout(
    config: Config, run_folder: Path, tmp_path: Path, tensor: int, world: int
) -> None:
    checkpoint = initial_source(str(run_folder))
    assert checkpoint == folder_of(run_folder / "checkpoints", 4) == initial_source(str(checkpoint))
    expected = weights(replace(config, seed=5), 1, 1, None)
    merged = merge(
        [checkpoint, export_weights(checkpoint, tmp_path / "export", config=config)],
        tmp_path / "merged",
    )
    assert initial_source(str(merged)) == merged
    for source in (checkpoint, merged):
        found = weights(config, tensor, world, source)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            moved = 0.25 if name.startswith("temperatures.") else 0.0
            assert torch.equal(found[name], value + moved), (source.name, name)


def test_parts_that_are_not_named_start_afresh(config: Config, run_folder: Path) -> None:
    fresh, source = weights(config, 1, 1, None), weights(replace(config, seed=5), 1, 1, None)
    found = weights(config, 1, 1, initial_source(str(run_folder)), ("encoder",))
    assert not torch.equal(fresh["encoder.text.weight"], source["encoder.text.weight"])
    for name, value in found.items():
        assert torch.equal(value, (source if name.startswith("encoder.") else fresh)[name]), name


def test_updates_that_the_source_lacks_start_afresh_and_those_that_the_run_lacks_are_refused(
    config: Config, run_folder: Path, tmp_path: Path
) -> None:
    with_updates = replace(config, model=replace(config.model, lora=LoraConfig(rank=2)))
    fresh = weights(with_updates, 1, 1, None)
    found = weights(with_updates, 1, 1, initial_source(str(run_folder)), ("encoder",))
    expected = weights(replace(config, seed=5), 1, 1, None)
    updates = [name for name in found if ".lora." in name]
    assert updates
    for name, value in found.items():
        assert torch.equal(
            value,
            (expected if name.startswith("encoder.") and name not in updates else fresh)[name],
        ), name

    def write(rank: int, world: int) -> None:
        parallel = join_layout(1)
        save(
            folder_of(tmp_path, 1),
            model=build_bundle(with_updates, parallel).module,
            optimizer=None,
            extra={},
            parallel=parallel,
        )

    run_ranks(write, 1)
    with pytest.raises(
        ConfigurationError, match=r"part encoder: .*\.lora\..*which the model lacks"
    ):
        refused(config, folder_of(tmp_path, 1))


def refused(config: Config, source: Path, parts: tuple[str, ...] = ALL, world: int = 1) -> None:
    with pytest.raises(RankFailure) as failure:
        weights(config, 1, world, source, parts)
    assert failure.value.__cause__ is not None
    raise failure.value.__cause__


@pytest.mark.parametrize("exported", [False, True])
def test_what_does_not_fit_is_named_on_all_ranks(
    config: Config, run_folder: Path, tmp_path: Path, exported: bool
) -> None:
    source = initial_source(str(run_folder))
    if exported:
        source = export_weights(source, tmp_path / "export", config=config)
    larger = replace(config, model=replace(config.model, vocabulary=2 * config.model.vocabulary))
    with pytest.raises(
        ConfigurationError,
        match=r"initialise_from, part encoder: .*text\.weight has the shape .* expects",
    ):
        refused(larger, source, world=2)
    name, dataset = next(iter(config.data.sets.items()))
    more = replace(
        config, data=replace(config.data, sets={**config.data.sets, f"{name}_again": dataset})
    )
    with pytest.raises(
        ConfigurationError,
        match=r"part temperatures: .*lacks the tensor .*leave the part out of initialise_parts",
    ):
        refused(more, source, ("temperatures",))


def test_a_place_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"initialise_from=.*expected a run folder"):
        initial_source(str(tmp_path))
