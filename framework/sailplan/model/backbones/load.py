"""Published weights into the encoder's parameters, each tensor-parallel rank reading its own
rows and columns.

The parts that files fill are never drawn: they are laid out without numbers, given this rank's
memory, and filled tensor by tensor. No rank holds more than its own part plus one slice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sailplan.config.schema import ModelConfig
from sailplan.errors import ConfigurationError
from sailplan.model.backbones import clap, clap_fusion, naflex, qwen, qwen_vl, whisper
from sailplan.model.backbones.folder import PublishedFolder
from sailplan.model.backbones.weight_map import Entry, Piece, WeightMap

NOTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "tensor_parallel_partial")


@dataclass(frozen=True)
class Source:
    """One part's files and how their tensors make up ours."""

    part: str
    folder: PublishedFolder
    weights: WeightMap
    prefix: str

    @property
    def entries(self) -> Iterator[Entry]:
        """The entries that these files have."""
        return (
            entry
            for entry in self.weights.entries
            if not entry.drawn
            or all(self.name(piece) in self.folder.files for piece in entry.pieces)
        )

    def name(self, piece: Piece) -> str:
        """The piece's tensor in the files."""
        return full_name(self.prefix, piece.name or "")


def full_name(prefix: str, name: str) -> str:
    return name[1:] if name.startswith("/") else prefix + name


class Family(Protocol):
    """What a module of this package says of one kind of model."""

    MODEL_TYPES: tuple[str, ...]

    def weight_map(self, config: ModelConfig) -> WeightMap: ...

    def unsupported(self, found: dict[str, object]) -> str | None:
        """What such files ask for that is not built, and what to do; None where there is
        nothing. found: config.json.
        """

    def expected(
        self, config: ModelConfig, found: dict[str, object]
    ) -> dict[str, tuple[str, object, object]]:
        """config.json's key -> (our key, our value, the value there)."""


def published_parts(config: ModelConfig) -> dict[str, str]:
    """Part -> folder or hub id, of the parts that start from published weights."""
    places = {
        "tower": config.weights.tower,
        "vision": config.weights.vision,
        "audio": config.weights.audio,
    }
    return {part: place for part, place in places.items() if place is not None}


FAMILIES = {
    "vision": {"siglip2": naflex, "qwen3_vl": qwen_vl},
    "audio": {"whisper": whisper, "clap": clap, "clap_fusion": clap_fusion},
}
ADAPTED = {"vision": ("published",)}  # transformers' own, which open their files themselves


def _family(config: ModelConfig, part: str) -> Family:
    if part == "tower":
        return cast(Family, qwen)
    backbone, families = getattr(config, part).backbone, FAMILIES[part]
    if backbone not in families:
        raise ConfigurationError(
            f"model.weights.{part} is set, but model.{part}.backbone is {backbone}: expected "
            f"{' or '.join([*families, *ADAPTED.get(part, ())])}"
        )
    return cast(Family, families[backbone])


def open_sources(config: ModelConfig) -> list[Source]:
    """The folders that `model.weights` names, their config.json compared with the configured
    shape. Reads headers only.

    Raises ConfigurationError for another kind of model, another size, or a tensor that is missing
    or unknown.
    """
    sources = []
    for part, place in published_parts(config).items():
        if part in ADAPTED and getattr(config, part).backbone in ADAPTED[part]:
            continue
        family, folder = _family(config, part), PublishedFolder(f"model.weights.{part}", place)
        reason = family.unsupported(folder.config)
        if reason is not None:
            raise ConfigurationError(f"{folder.key}={folder.path}: {reason}")
        kind = folder.config.get("model_type")
        if kind not in family.MODEL_TYPES:
            raise ConfigurationError(
                f"{folder.key}={folder.path}: config.json has model_type {kind}; expected one of "
                f"{', '.join(family.MODEL_TYPES)}"
            )
        for name, (ours, configured, found) in family.expected(config, folder.config).items():
            if configured != found:
                raise ConfigurationError(
                    f"{ours} is {configured}, but {folder.path}/config.json has {name} {found}: "
                    "expected equal; choose the conf/model of this size"
                )
        weights = family.weight_map(config)
        sources.append(Source(part, folder, weights, _prefix(folder, weights)))
    return sources


def _prefix(folder: PublishedFolder, weights: WeightMap) -> str:
    """What stands before the names of the weight map, after checking that both sides have the
    same names.
    """
    found = [
        name.removesuffix(weights.anchor)
        for name in folder.files
        if name == weights.anchor or name.endswith("." + weights.anchor)
    ]
    if len(found) != 1:
        raise ConfigurationError(
            f"{folder.key}={folder.path}: found {len(found)} tensors named {weights.anchor}; "
            "expected one"
        )
    prefix = found[0]
    wanted, drawn = (
        {
            full_name(prefix, piece.name)
            for entry in weights.entries
            if entry.drawn == own
            for piece in entry.pieces
            if piece.name is not None
        }
        for own in (False, True)
    )
    wanted |= {full_name(prefix, name) for _, name in weights.constants}
    missing = sorted(wanted - set(folder.files)) or (
        sorted(drawn - set(folder.files)) if drawn & set(folder.files) else []
    )
    if missing:
        raise ConfigurationError(
            f"{folder.key}={folder.path}: no tensor {missing[0]} ({len(missing)} missing); "
            "expected every tensor of the model"
        )
    unknown = sorted(
        name
        for name in set(folder.files) - wanted - drawn
        if not any(re.fullmatch(pattern, name) for pattern in weights.left_out)
    )
    if unknown:
        raise ConfigurationError(
            f"{folder.key}={folder.path}: unknown tensor {unknown[0]} ({len(unknown)} in all); "
            f"expected names such as {sorted(wanted)[0]}; "
            "is it the model that the configuration describes?"
        )
    return prefix


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_shapes(source: Source, model: nn.Module, tensor_parallel: int = 1) -> None:
    """Raises ConfigurationError where a tensor's shape is not what the parameter needs.

    model: may be on the meta device.
    """
    tensors = tensors_of(model)
    for entry in source.entries:
        parameter = tensors[entry.ours]
        whole = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            whole[parameter.partition_dim] *= tensor_parallel  # type: ignore[attr-defined]
        needed: dict[str, int] = {}
        for piece in entry.pieces:
            if piece.name is not None:
                name = source.name(piece)
                needed[name] = max(
                    needed.get(name, 0),
                    piece.start + (whole[0] if piece.rows is None else piece.rows),
                )
        for name, rows in needed.items():
            if source.folder.dtypes[name] == "I64":
                raise ConfigurationError(
                    f"{source.folder.key}={source.folder.path}: {name} has the type I64; expected "
                    "a floating-point type"
                )
            found = source.folder.shapes[name]
            if found != (rows, *whole[1:]):
                raise ConfigurationError(
                    f"{source.folder.key}={source.folder.path}: {name} has the shape {found}; "
                    f"expected {(rows, *whole[1:])} "
                    f"for {entry.ours} of the configured model"
                )


def allocate(module: nn.Module) -> None:
    """Gives a module that was built on the meta device memory of its own, numbers undefined,
    keeping the tensor-parallel notes.
    """
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = nn.Parameter(
                    torch.empty_like(parameter, device="cpu"), parameter.requires_grad
                )
                for note in NOTES:
                    if hasattr(parameter, note):
                        setattr(filled, note, getattr(parameter, note))
                owner.register_parameter(name, filled)
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(owner, name, torch.empty_like(buffer, device="cpu"))


def local_rows(parameter: Tensor, rank: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(first local row, first row of the whole parameter, rows) of each run of rows that this
    tensor-parallel rank holds.
    """
    rows = parameter.shape[0]
    if not getattr(parameter, "tensor_model_parallel", False) or parameter.partition_dim != 0:  # type: ignore[attr-defined]
        yield 0, 0, rows
        return
    halves = max(parameter.partition_stride, 1)  # type: ignore[attr-defined]
    piece = rows // halves
    for half in range(halves):
        yield half * piece, half * piece * size + rank * piece, piece


@torch.no_grad()
def load(source: Source, model: nn.Module, rank: int, size: int) -> None:
    """Fills the parameters and buffers of `model` (not yet sharded over data-parallel ranks)
    that the source has.

    rank, size: this rank's place in the tensor-parallel group. Values are cast to the parameters'
    type.
    Raises ConfigurationError as `check_shapes`, and where a constant of the files is not the one
    that is computed here.
    """
    check_shapes(source, model, size)
    tensors = tensors_of(model)
    for ours, name in source.weights.constants:
        theirs = full_name(source.prefix, name)
        if not torch.equal(source.folder.read(theirs), tensors[ours]):
            raise ConfigurationError(
                f"{source.folder.key}={source.folder.path}: {theirs} is not what the model's shape "
                "gives; download the folder again"
            )
    for entry in source.entries:
        parameter = tensors[entry.ours]
        columns = slice(None)
        if getattr(parameter, "tensor_model_parallel", False) and parameter.partition_dim == 1:  # type: ignore[attr-defined]
            columns = slice(rank * parameter.shape[1], (rank + 1) * parameter.shape[1])
        for local, whole, rows in local_rows(parameter, rank, size):
            for start, piece, first, count in _overlaps(entry.pieces, whole, rows):
                target = parameter[local + start - whole : local + start - whole + count]
                if piece.name is None:
                    target.zero_()
                else:
                    target.copy_(
                        source.folder.read(source.name(piece), slice(first, first + count), columns)
                    )


def _overlaps(
    pieces: tuple[Piece, ...], start: int, rows: int
) -> Iterator[tuple[int, Piece, int, int]]:
    """(row of the whole parameter, piece, first row of its tensor, rows) for rows
    start..start+rows of the stack.
    """
    offset = 0
    for piece in pieces:
        size = (
            start + rows if piece.rows is None else piece.rows
        )  # a piece without a size stands alone
        first, last = max(start, offset), min(start + rows, offset + size)
        if first < last:
            yield first, piece, piece.start + first - offset, last - first
        offset += size
