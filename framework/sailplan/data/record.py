"""What travels from a tar member to the loss: records, a rank's step batch, and the encoder's
inputs.

A *record* is what a shard holds. A *view* (config.schema.ViewConfig) is one way to show a record's
item to the encoder; every view that a step's patterns need is encoded once, and the patterns share
the results.

Shape legend: r rows of this rank in the step, g items per row (history length or hard negatives,
else 1), b rows of one micro-batch, t tokens, f frames, c audio chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sailplan.config.fields import JsonObject, JsonView
from sailplan.runtime.transfer import to_device


@dataclass(frozen=True)
class Item:
    """One document: encoded bytes as they lie in the shard, nothing decoded yet."""

    id: str
    fields: Mapping[str, JsonView] = field(
        default_factory=dict
    )  # field -> language -> str | list[str]
    images: tuple[bytes, ...] = ()
    audio: bytes | None = None
    video: bytes | None = None  # a film, of which a view of pictures shows some frames
    extra: JsonView = field(default_factory=dict)  # other JSON keys: group, held_out_tags, ...
    # Position of the record that holds it in its own data set, and which of the record's parts it
    # is: 0, the record's own negatives from 1 on
    source: tuple[int, int] = (-1, 0)


@dataclass(frozen=True)
class Record:
    """One training example; which of the parts are set depends on the data set's kind."""

    id: str
    split: str = "train"
    item: Item | None = None  # kind items
    query: Item | None = None  # kind pairs
    target: Item | None = None  # kinds pairs and sequences
    history: tuple[Item, ...] = ()  # kind sequences
    score: float | None = None  # graded pairs, 0..1
    label: str | None = None  # its class, where the data set names a key for it
    # Pairs: a teacher's score of the target, then of each of `negatives`, NaN where unknown
    teacher_scores: tuple[float, ...] = ()
    negatives: tuple[
        Item, ...
        # Pairs and sequences: items that are no answer, the data set's `negatives` of them at most
    ] = ()
    target_probability: float | None = (
        None  # sequences: how often a record of the set has this target, 0..1
    )
    negative_probability: float | None = (
        None  # sequences: how likely an item was to be drawn as a negative, 0..1
    )
    extra: JsonView = field(default_factory=dict)


@dataclass
class EncoderInputs:
    """One micro-batch of rows of one view, for one encoder: tensors with a row for each item,
    which its processor made and nobody else looks into.

    All rows run the same parts of the encoder: `modalities`, the view's declaration, is equal on
    all ranks, whatever is really present. An encoder's own class adds its tensors as fields, or
    keeps them by name (`NamedInputs`).
    """

    modalities: tuple[str, ...]

    @property
    def rows(self) -> int:
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """Return the inputs on `device`; from pinned memory to a GPU, without a wait."""
        return self.mapped(lambda tensor: to_device(tensor, torch.device(device)))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the inputs with every tensor changed; what was derived from them for other rows
        is left out.
        """
        held = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: JsonObject = {name: change(value) for name, value in held.items()}
        return replace(self, **changed)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, for counting their memory."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


@dataclass
class NamedInputs(EncoderInputs):
    """Tensors by the names that a published model's forward has, b rows each."""

    named: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(next(iter(self.named.values())))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, named={name: change(value) for name, value in self.named.items()})

    def tensors(self) -> list[Tensor]:
        return list(self.named.values())


class BadRecord(NamedTuple):
    """A record that cannot be used, and its position in the data set."""

    id: str
    reason: str
    position: int


class HardNegatives(NamedTuple):
    """Key of the rows that are negatives of a pattern: those mined for it, and the records' own."""

    pattern: str

    def __str__(self) -> str:
        """Return "negatives/PATTERN": its name in seeds and messages."""
        return f"negatives/{self.pattern}"


class TeacherKey(NamedTuple):
    """Key of the vectors that a teacher has for the rows of a view."""

    view: str
    teacher: str

    def __str__(self) -> str:
        """Return "VIEW/TEACHER": its name in metrics and messages."""
        return f"{self.view}/{self.teacher}"


ViewKey = str | HardNegatives  # of a step's rows: a view's name, or a pattern's negatives


@dataclass(frozen=True)
class ViewBatch:
    """This rank's rows of one view in a step.

    Each distinct item is encoded once, in one of the micro-batches (the same number on every rank),
    however many rows show it. Views that show items alike share one view's micro-batches.
    """

    micro_batches: Sequence[EncoderInputs]  # none where another view has them
    # int64 [r * g]; cat(micro_batches)[order] are the rows in the step's order
    order: Tensor
    valid: Tensor  # bool [r * g]; False where the item lacks every declared modality, or is padding
    ids: Tensor  # int64 [r * g]; equal ids = the same document (text-only views: the same text)
    group: int = 1  # g
    encoded_with: str | None = None  # the view whose micro-batches have its items; None: its own


@dataclass(frozen=True)
class StepBatch:
    """All that one rank needs for one step of one data set."""

    step: int
    dataset: str
    record_ids: list[str]  # r, in the step's order
    views: dict[ViewKey, ViewBatch]
    scores: Tensor | None = None  # float32 [r] graded pair scores
    # float32 [r, 1 + n] a teacher's scores of the target and of the record's own n negatives, NaN
    # where unknown; None where the data set has none
    teacher_scores: Tensor | None = None
    labels: Tensor | None = (
        None  # int64 [r], equal where classes are, -1 where unknown; None: the data set names none
    )
    teachers: dict[TeacherKey, Tensor] = field(
        default_factory=dict
    )  # float32 [r, d]; zero rows where unknown
    patterns: dict[str, float] = field(default_factory=dict)  # pattern name -> weight, of this step
    positions: list[int] = field(default_factory=list)  # r, of these records in the data set
    quarantined: list[BadRecord] = field(default_factory=list)  # replaced by spares
    # Plan.digest: 16 hex digits over the records of the whole step's global batch; equal on all
    # ranks
    digest: str = ""
    # float32 [r] log of the records' target_probability, with negatives of known probability
    # relative to those; None unless all have it
    target_log_probability: Tensor | None = None
    rank_rows: tuple[int, ...] | None = (
        None  # rows of every data-parallel rank, in rank order; None: the ranks ask each other
    )
