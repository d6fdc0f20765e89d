"""A trained part back in the format that it came from: a Hugging Face folder that other programs load.

The folder is that of the weights the run started from, with the trained tensors in their old names, types and files;
tensors that the encoder has no use for (a language-model head) are copied as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sailplan.checkpoint.exported import TYPES
from sailplan.config.schema import ModelConfig
from sailplan.errors import ConfigurationError
from sailplan.model.backbones.folder import CONFIG, INDEX
from sailplan.model.backbones.load import Source, open_sources


def export_backbones(weights: Mapping[str, Tensor], out: Path, *, config: ModelConfig) -> list[Path]:
    """Writes one folder out/PART for each part that `model.weights` names, out/PART-PART for parts of one folder; returns them.

    weights: the encoder's whole tensors by name, as at tensor-parallel size 1 (`export.weights.read_whole` without its
    prefix "encoder."). One file's tensors are in memory at a time. Raises ConfigurationError where no part started from
    published weights, or the folder is gone.
    """
    sources = open_sources(config)
    if not sources:
        raise ConfigurationError("model.weights names no folder: expected the weights that the run started from, whose format is written")
    together: dict[Path, list[Source]] = {}
    for source in sources:
        together.setdefault(source.folder.path.resolve(), []).append(source)
    return [_write(parts, weights, out / "-".join(source.part for source in parts)) for parts in together.values()]


def _write(sources: list[Source], weights: Mapping[str, Tensor], out: Path) -> Path:
    folder = sources[0].folder
    out.mkdir(parents=True, exist_ok=True)
    places: dict[str, list[tuple[str, int, int, int]]] = {}  # published name -> (ours, first row of ours, first row there, rows)
    for source in sources:
        for entry in source.entries:
            offset = 0
            for piece in entry.pieces:
                rows = len(weights[entry.ours]) if piece.rows is None else piece.rows
                if piece.name is not None:
                    places.setdefault(source.name(piece), []).append((entry.ours, offset, piece.start, rows))
                offset += rows
    for file in sorted(set(folder.files.values())):
        tensors: dict[str, Tensor] = {}
        for name in sorted(name for name, where in folder.files.items() if where == file):
            if name not in places:
                tensors[name] = folder.read(name)
                continue
            tensors[name] = torch.empty(folder.shapes[name], dtype=TYPES[folder.dtypes[name]])
            for ours, first, start, rows in places[name]:
                tensors[name][start : start + rows] = weights[ours][first : first + rows]
        save_file(tensors, out / file, metadata={"format": "pt"})
    if (folder.path / INDEX).is_file():
        shutil.copyfile(folder.path / INDEX, out / INDEX)
    shutil.copyfile(folder.path / CONFIG, out / CONFIG)
    return out
