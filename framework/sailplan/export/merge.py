"""The weighted average of several checkpoints' weights, as a folder that stands alone.

Averaging the weights of checkpoints of one run, or of runs that started from the same weights,
often generalises better than any one of them and costs nothing at inference (Izmailov et al., arXiv
1803.05407; Wortsman et al., "Model soups", arXiv 2203.05482). Sources are checkpoints and exported
folders in any mix; they are read one tensor at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sailplan.checkpoint.exported import DESCRIPTION, WEIGHTS, Entries, ExportedFolder, is_exported
from sailplan.checkpoint.loading import WholeCheckpoint
from sailplan.checkpoint.seal import is_complete
from sailplan.checkpoint.store import newest
from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError
from sailplan.export.weights import begin, describe, finish
from sailplan.model.lora import is_lora
from sailplan.runtime.progress import progress


def merge(
    sources: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    config: Config | None = None,
) -> Path:
    """Writes the average of `sources` to `out`, in the form of `export_weights`; returns it.

    One process, without any group.

    weights: one for each source, positive, scaled to the sum 1 (None: equal). Sums are formed in
    float64 and rounded once to the sources' dtype; tensors that are not floating point are the
    first source's. config: of the run; None where an exported folder is among the sources, whose
    description and tokenizer are then taken.

    Raises ConfigurationError for fewer than one source, bad weights, an incomplete source, tensors
    that differ in name, shape or dtype, and checkpoints with LoRA factors.
    """
    shares = _shares(sources, weights)
    opened = [_open(source) for source in sources]
    for source, found in zip(sources, opened, strict=True):
        if any(
            is_lora(name) for name in found.entries
        ):  # the average of factors is not the factors of the average
            raise ConfigurationError(
                f"merge: {source} holds LoRA factors, expected whole weights: run sailplan export "
                "on each, then merge those folders"
            )
    for source, found in zip(sources[1:], opened[1:], strict=True):
        _check_alike(sources[0], opened[0].entries, source, found.entries)
    averaged: dict[str, Tensor] = {}
    with progress("averaging", len(opened[0].entries), "tensors") as advance:
        for name, (shape, dtype) in opened[0].entries.items():
            advance(1)
            if not dtype.is_floating_point:
                averaged[name] = opened[0].read(name)
                continue
            total = torch.zeros(shape, dtype=torch.float64)
            for share, reader in zip(shares, opened, strict=True):
                total.add_(reader.read(name).double(), alpha=share)
            averaged[name] = total.to(dtype)
    description, exported = _description(sources, config)
    description |= {
        "merged": [
            {"source": source.name, "weight": share}
            for source, share in zip(sources, shares, strict=True)
        ]
    }

    def write_files() -> None:
        if exported is None:
            assert config is not None
            config.model.component().write_files(config, averaged, out)
        elif exported.resolve() != out.resolve():
            for file in exported.iterdir():
                if file.is_file() and file.name not in (WEIGHTS, DESCRIPTION):
                    shutil.copyfile(file, out / file.name)

    begin(out, write_files)
    return finish(out, averaged, description)


def last_checkpoints(
    checkpoints: Path, count: int, decay: float = 1.0
) -> tuple[list[Path], list[float]]:
    """The `count` newest complete checkpoints of a run, and a weight for each: 1 for the newest,
    and `decay` times the next newer one's.

    decay 1: the plain average (Izmailov et al.); below 1: an exponential moving average over the
    saved checkpoints.
    Raises ConfigurationError where there are fewer, and for a decay that is not in (0, 1].
    """
    if count < 1:
        raise ConfigurationError(f"--last {count}: expected at least 1")
    if not 0 < decay <= 1:
        raise ConfigurationError(
            f"--decay {decay}: expected a number above 0 and at most 1; 1 is the plain average"
        )
    found = newest(checkpoints, count)
    if len(found) < count:
        raise ConfigurationError(
            f"--last {count}: found {len(found)} complete checkpoints in {checkpoints}; train with "
            f"checkpoint.keep={count} or more"
        )
    return found, [decay**age for age in range(count)]


def _shares(sources: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if not sources:
        raise ConfigurationError(
            "merge: found no source, expected at least one; give --checkpoint once for each"
        )
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources) or not all(
        math.isfinite(weight) and weight > 0 for weight in weights
    ):
        raise ConfigurationError(
            f"--weights: found {', '.join(map(str, weights))}, expected {len(sources)} positive "
            "numbers, one for each --checkpoint"
        )
    return [weight / sum(weights) for weight in weights]


def _open(source: Path) -> WholeCheckpoint | ExportedFolder:
    if is_exported(source):
        return ExportedFolder(source)
    if is_complete(source):
        return WholeCheckpoint(source)
    raise ConfigurationError(
        f"--checkpoint {source}: expected a complete checkpoint "
        "(runs/NAME/checkpoints/step-XXXXXXXX) or an exported folder"
    )


def _check_alike(first: Path, wanted: Entries, other: Path, found: Entries) -> None:
    for name in sorted(set(wanted) | set(found)):
        if name not in found or name not in wanted:
            lacking, having = (other, first) if name in wanted else (first, other)
            raise ConfigurationError(
                f"merge: {having} has the tensor {name}, which {lacking} lacks: merge checkpoints "
                "of one model and set of objectives"
            )
        if wanted[name] != found[name]:
            raise ConfigurationError(
                f"merge: {name} is {_shown(wanted[name])} in {first}, but {_shown(found[name])} in "
                f"{other}; expected one model"
            )


def _shown(entry: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{list(entry[0])} {str(entry[1]).removeprefix('torch.')}"


def _description(sources: Sequence[Path], config: Config | None) -> tuple[JsonObject, Path | None]:
    """Return the content of model.json, and the exported folder whose other files go with it;
    None: the configuration's.
    """
    exported = next((source for source in sources if is_exported(source)), None)
    if config is not None:
        return describe(config, "merged"), None
    if exported is None:
        raise ConfigurationError(
            "merge: found checkpoints only, expected --run-folder of the run that they belong to, "
            "for the model's shape and prompts"
        )
    description: JsonObject = json.loads((exported / DESCRIPTION).read_text(encoding="utf-8"))
    return description | {"checkpoint": "merged"}, exported
