"""What leaves a run is the model itself: exported weights embed like the run's model, from any
layout.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sailplan.checkpoint.store import folder_of, save
from sailplan.cli.main import main
from sailplan.config.schema import Config, ParallelConfig
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.embed.embedding import embed_view
from sailplan.errors import ConfigurationError
from sailplan.export.embeddings import export_embeddings
from sailplan.export.vector_folder import VectorFolder
from sailplan.export.weights import export_weights, load_exported, read_whole
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan.train.run_folder import RunFolder
from sailplan_kernels.testing import run_ranks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_pack(tmp_path_factory.mktemp("pack"))


def test_embeddings_are_whole_ordered_and_the_same_on_any_number_of_ranks(
    config: Config, tmp_path: Path
) -> None:
    def write(rank: int, world_size: int, out: Path) -> dict[str, Any]:
        parallel = join_layout(1)
        encoder, reader = (
            build_encoder(config.model, config.parallel, parallel, seed=0),
            open_datasets(config)["things"],
        )
        return export_embeddings(
            encoder,
            reader,
            "item",
            out,
            parallel=parallel,
            config=config,
            semantic_id_sizes=[[4, 4], [8]],
            label="subgroup",
            shard_rows=20,
        )

    manifests = run_ranks(write, 1, tmp_path / "one") + run_ranks(write, 2, tmp_path / "two")
    codes = [manifest.pop("semantic_ids") for manifest in manifests]
    assert (
        manifests[0] == manifests[1] == manifests[2]
        and codes[1] == codes[2]
        and codes[0]["4-4"]["unique"] <= 16
    )
    assert codes[1]["8"]["labelled_rows"] == 48 and len(codes[1]["8"]["nmi"]) == 1
    one, two = VectorFolder(tmp_path / "one"), VectorFolder(tmp_path / "two")
    ids = [name for shard in range(3) for name in one.ids(shard)]
    assert (
        ids == [f"things/{number:03d}" for number in range(48)] and len(manifests[0]["shards"]) == 3
    )
    vectors = one.take(np.arange(48))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert np.allclose(vectors, two.take(np.arange(48)), atol=1e-5)
    tables = sorted((tmp_path / "one" / "semantic_ids" / "4-4").glob("part-*.parquet"))
    assert [name for path in tables for name in parquet.read_table(path)["id"].to_pylist()] == ids


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 2), (2, 1)])
def test_exported_weights_embed_like_the_run(
    config: Config, tmp_path: Path, world_size: int, tensor: int
) -> None:
    def run(rank: int, world: int) -> torch.Tensor:
        parallel = join_layout(tensor)
        encoder, reader = (
            build_encoder(config.model, config.parallel, parallel, seed=3),
            open_datasets(config)["things"],
        )
        save(
            folder_of(tmp_path, 7),
            model=nn.ModuleDict({"encoder": encoder}),
            optimizer=None,
            extra={"step": 7},
            parallel=parallel,
        )
        return embed_view(
            encoder, reader, "item", np.arange(10), parallel=parallel, config=config
        ).fused

    wanted = run_ranks(run, world_size)[0]
    out = export_weights(folder_of(tmp_path, 7), tmp_path / "export", config=config)

    def load(rank: int, world: int) -> tuple[torch.Tensor, dict[str, Any]]:
        parallel = join_layout(1)
        encoder, description = load_exported(out)
        exported = Config(data=config.data, model=config.model)
        exported.data.tokenizer = str(out / "tokenizer.json")
        rows = embed_view(
            encoder,
            open_datasets(config)["things"],
            "item",
            np.arange(10),
            parallel=parallel,
            config=exported,
        )
        return rows.fused, description

    found, description = run_ranks(load, 1)[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert (
        description["views"]["things"]["image"]["prompt"] == "name"
        and description["checkpoint"] == "step-00000007"
    )


def test_unfinished_folders_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a complete checkpoint"):
        export_weights(tmp_path, tmp_path / "out", config=config)
    with pytest.raises(ConfigurationError, match=r"no embeddings\.json"):
        VectorFolder(tmp_path)
    with pytest.raises(ConfigurationError, match=r"no model\.json"):
        load_exported(tmp_path)


def test_the_command_exports_a_tensor_parallel_run_from_one_process(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No process group is made; the ranks of a larger launch but the first leave it to that one;
    another model is refused.
    """
    config = dataclasses.replace(config, parallel=ParallelConfig(tensor=2))
    folder = RunFolder(tmp_path)
    folder.write_config(config)

    def run(rank: int, world: int) -> None:
        parallel = join_layout(2)
        encoder = build_encoder(config.model, config.parallel, parallel, seed=3)
        save(
            folder_of(folder.checkpoints, 7),
            model=nn.ModuleDict({"encoder": encoder}),
            optimizer=None,
            extra={"step": 7},
            parallel=parallel,
        )

    run_ranks(run, 2)
    for rank, written in (("1", False), ("0", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setenv("WORLD_SIZE", "2")
            assert main(["export", "--run-folder", str(tmp_path)]) == 0
        assert (tmp_path / "export" / "model.json").is_file() == written
    exported = load_file(tmp_path / "export" / "model.safetensors")
    whole = read_whole(folder_of(folder.checkpoints, 7))
    assert exported.keys() == whole.keys() and all(
        torch.equal(exported[name], whole[name]) for name in whole
    )
    assert not torch.distributed.is_initialized()
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocabulary=2 * config.model.vocabulary)
    )
    with pytest.raises(ConfigurationError, match=r"encoder\.text\.weight has the shape"):
        export_weights(folder_of(folder.checkpoints, 7), tmp_path / "other", config=other)
