"""Reading an exported folder (sailplan.export.weights writes it) into a model at any layout: a rank reads its own blocks only."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from sailplan.checkpoint.state import ModelState

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape


def is_exported(path: Path) -> bool:
    """Whether the folder is a completed export; its description is written last."""
    return (path / DESCRIPTION).is_file()


def exported_shapes(path: Path) -> Shapes:
    """Shapes of the whole tensors, from the file's header."""
    with safe_open(path / WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dictionary


def read_exported(path: Path, tensors: ModelState) -> None:
    """Fills the views "model.NAME" in place, in their own dtype."""
    with safe_open(path / WEIGHTS, framework="pt") as file:
        for key, view in tensors.items():
            name = key.removeprefix("model.")
            for chunk, held in view.blocks():
                if not chunk.sizes:
                    held.copy_(file.get_tensor(name))
                    continue
                place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
                held.copy_(file.get_slice(name)[place])
