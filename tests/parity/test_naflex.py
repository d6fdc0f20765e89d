"""SigLIP2 for images of any size: transformers' own image tower over pictures of several sides
at once, at every tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from sailplan.config.schema import ModelConfig, TransformerShape
from sailplan.errors import ConfigurationError
from sailplan.model.backbones.load import allocate, load, open_sources
from sailplan.model.backbones.naflex import resize_weights
from sailplan.model.count import check_weights
from sailplan.model.testing import (
    join_layout,
    packed_rows,
    random_inputs,
    rows_of,
    small_config,
    whole_tensor,
)
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

GRIDS = torch.tensor(
    [[5, 4], [2, 9], [7, 2], [1, 1], [3, 6], [1, 20]]
)  # larger and smaller than the 5 x 5 learned positions, either way
PATCHES = 20


def configured(folder: Path | None) -> ModelConfig:
    config = small_config()
    shape = TransformerShape(
        2, 32, 4, None, 48, norm="layer", activation="gelu_tanh", gated=False, bias=True
    )
    config.vision = dataclasses.replace(
        config.vision, backbone="siglip2", patch=4, position_grid=5, encoder=shape
    )
    config.weights.vision = None if folder is None else str(folder)
    return config


@pytest.fixture(scope="module", params=[True, False], ids=["both_towers", "image_tower"])
def published(request: Any, tmp_path_factory: Any) -> tuple[Path, Siglip2VisionModel]:
    """(folder, image tower) of a SigLIP2 of two towers, or of its image tower alone."""
    torch.manual_seed(4)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    vision = Siglip2VisionConfig(**sizes, num_patches=25, patch_size=4)
    text = Siglip2TextConfig(**sizes, vocab_size=20, max_position_embeddings=8)
    whole = (
        Siglip2Model(Siglip2Config(text_config=text.to_dict(), vision_config=vision.to_dict()))
        if request.param
        else Siglip2VisionModel(vision)
    )
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("siglip2")
    whole.eval().save_pretrained(folder)
    return folder, whole.vision_model if request.param else whole


def patches() -> torch.Tensor:
    return (
        torch.rand(len(GRIDS), PATCHES, 3 * 4**2, generator=torch.Generator().manual_seed(2)) * 2
        - 1
    )


def seen(rank: int, world: int, folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    parallel = join_layout(world)
    config = configured(folder)
    encoder = OmniEncoder(config, published=["vision"], share_encoders=False)
    allocate(encoder)
    (source,) = open_sources(config)
    load(source, encoder, parallel.tensor_parallel_rank, world)
    with torch.no_grad():
        own, _, rows = packed_rows(torch.arange(PATCHES) < GRIDS.prod(1, keepdim=True))
        tokens = (
            patches()
            .new_zeros(GRIDS.size(0) * PATCHES, 32)
            .index_copy(0, own, encoder.vision(patches(), GRIDS, own, rows))
            .unflatten(0, (-1, PATCHES))
        )
    return (
        tokens,
        {
            name: whole_tensor(parameter, parameter, parallel)
            for name, parameter in encoder.named_parameters()
        },
        source.folder.bytes_read,
    )


@pytest.mark.parametrize("tensor", [1, 2])
def test_it_sees_as_transformers_does(published: Any, tmp_path: Path, tensor: int) -> None:
    folder, model = published
    present = torch.arange(PATCHES) < GRIDS.prod(1, keepdim=True)
    with torch.no_grad():
        wanted = model(patches(), present.long(), GRIDS).last_hidden_state
    found, whole, read = run_ranks(seen, tensor, folder)[0]
    torch.testing.assert_close(found[present], wanted[present], rtol=0, atol=1e-5)
    assert wanted[present].std() > 0.5
    bytes_of_all = sum(value.nbytes for name, value in whole.items() if name.startswith("vision."))
    assert read == bytes_of_all if tensor == 1 else read < 0.7 * bytes_of_all


@pytest.mark.parametrize("grid", [5, 16])
def test_positions_are_resized_as_torch_does(grid: int) -> None:
    """Along a row: torch 2.13 on a CPU gives wrong numbers for a single column, which
    transformers' own tower then has.
    """
    points = torch.randn(grid, generator=torch.Generator().manual_seed(1))
    for length in (1, 2, grid - 1, grid, grid + 3, 5 * grid):
        wanted = torch.nn.functional.interpolate(
            points[None, None, None], size=(1, length), mode="bilinear", antialias=True
        )[0, 0, 0]
        found = resize_weights(torch.arange(length), torch.full((length,), length), grid) @ points
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def one_column(rank: int, world: int) -> None:
    join_layout(1)
    encoder = OmniEncoder(configured(None), seed=1).vision
    with torch.no_grad():
        column = encoder.positions_of(torch.arange(7), torch.tensor([[7, 1]]).expand(7, -1))
        encoder.positions.copy_(
            encoder.positions.unflatten(0, (5, 5)).transpose(0, 1).flatten(0, 1).clone()
        )
        torch.testing.assert_close(
            column,
            encoder.positions_of(torch.arange(7), torch.tensor([[1, 7]]).expand(7, -1)),
            rtol=0,
            atol=1e-6,
        )


def test_a_single_column_has_the_positions_of_a_row_across() -> None:
    run_ranks(one_column, 1)


def alone_and_together(rank: int, world: int) -> None:
    join_layout(1)
    encoder = OmniEncoder(small_config(vision="siglip2"), dtype=torch.float64, seed=1)
    inputs = random_inputs(("vision", "text"), 6, 0, vision="siglip2")
    with torch.no_grad():
        together = encoder(inputs, per_modality=True)
        for row in range(6):
            alone = encoder(rows_of(inputs, row, row + 1), per_modality=True)
            torch.testing.assert_close(
                alone.by_modality["vision"][0],
                together.by_modality["vision"][row],
                rtol=0,
                atol=1e-12,
            )
        own = (
            torch.arange(inputs.images.size(2)) < inputs.image_sizes.prod(-1, keepdim=True)
        ) & inputs.image_mask[..., None]
        assert not own.all() and not inputs.image_mask.all()
        noise = dataclasses.replace(
            inputs, images=inputs.images.masked_fill(~own[..., None], float("nan"))
        )
        assert torch.equal(encoder(noise, per_modality=True).fused, together.fused)
        wider = dataclasses.replace(
            inputs, images=torch.nn.functional.pad(inputs.images, (0, 0, 0, 3), value=9.0)
        )
        torch.testing.assert_close(encoder(wider).fused, together.fused, rtol=0, atol=1e-12)
        turned = encoder(
            dataclasses.replace(inputs, image_sizes=inputs.image_sizes.flip(-1)), per_modality=True
        )
        uneven = (
            inputs.image_mask & (inputs.image_sizes[..., 0] != inputs.image_sizes[..., 1])
        ).any(1)
        assert bool(
            ((turned.by_modality["vision"] - together.by_modality["vision"]).abs().amax(1) > 1e-6)
            .eq(uneven)
            .all()
        )
    assert encoder(rows_of(inputs, 6, 6)).fused.shape == (0, 16)
    for wrong in (dataclasses.replace(inputs, image_sizes=None), random_inputs(("vision",), 2, 0)):
        with pytest.raises(ValueError, match="go together"):
            encoder(wrong)


def test_a_row_is_its_own_and_what_is_filled_up_changes_nothing() -> None:
    run_ranks(alone_and_together, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_grid": 6}, r"model\.vision\.position_grid squared is 36.* num_patches 25"),
        ({"backbone": "own"}, "backbone is own: expected siglip2 or qwen3_vl or published"),
    ],
)
@pytest.mark.parametrize("published", [True], indirect=True)
def test_files_that_do_not_fit_are_one_line(
    published: Any, change: dict[str, Any], words: str
) -> None:
    folder, _ = published
    assert json.loads((folder / "config.json").read_text())["model_type"] == "siglip2"
    check_weights(configured(folder))
    config = configured(folder)
    config.vision = dataclasses.replace(config.vision, **change)
    with pytest.raises(ConfigurationError, match=words):
        check_weights(config)
