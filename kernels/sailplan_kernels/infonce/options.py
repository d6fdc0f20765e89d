"""What kind of InfoNCE: everything about the loss that is not a tensor, checked once."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from sailplan_kernels.arguments import Negatives, Prefixes, sizes_and_weights

SMALLEST_DEFAULT_BUDGET = 16 * 2**20
ONE_TILE = 32 * 2**20  # without a budget, a loss that fits into so much is not cut into tiles


@dataclass(frozen=True)
class InfoNCEOptions:
    """The options of one call.

    Scores in thresholds and margins are cosines, whatever the temperature.

    The three filters apply to every negative, hard ones included; a negative must pass all that are
    set: cosine < max_cosine, cosine <= positive + margin_absolute, cosine <= margin_relative *
    positive. max_cosine is a number for each prefix, or True where each row has one of its own (a
    tensor, in LossInputs).
    """

    max_cosine: tuple[float, ...] | bool | None = None
    margin_absolute: float | None = None
    margin_relative: float | None = None
    symmetric: bool = False
    query_negatives: bool = False
    key_negatives: bool = False
    shared_hard_negatives: bool = False
    prefixes: tuple[int, ...] = ()
    prefix_weights: tuple[float, ...] = ()
    memory_budget: int = 0  # 0: not given, see with_budget
    one_tile_budget: int = 0  # what a loss of one tile may take, see one_tile.py

    @classmethod
    def checked(
        cls,
        dimension: int,
        prefixes: Prefixes | None,
        memory_budget: int | None,
        negatives: Negatives | None = None,
        symmetric: bool = False,
    ) -> InfoNCEOptions:
        """Return the options for embeddings of ``dimension``, defaults filled in.

        Raises ValueError that names what is wrong.
        """
        negatives = negatives or Negatives()
        sizes, weights = sizes_and_weights(prefixes, dimension)
        if memory_budget is not None and memory_budget <= 0:
            raise ValueError(
                f"options.memory_budget: found {memory_budget}, expected a positive number of bytes"
            )
        return cls(
            max_cosine=_max_cosine(negatives, sizes),
            margin_absolute=negatives.margin_absolute,
            margin_relative=negatives.margin_relative,
            symmetric=symmetric,
            query_negatives=negatives.queries,
            key_negatives=negatives.keys,
            shared_hard_negatives=negatives.shared,
            prefixes=sizes,
            prefix_weights=weights,
            memory_budget=int(memory_budget or 0),
        )

    def with_budget(self, vectors: int, dimension: int, size: int) -> InfoNCEOptions:
        """With the default budget where none was given: half of what the gradients of
        ``vectors`` take, ``size`` bytes an entry.
        """
        if self.memory_budget:
            return replace(self, one_tile_budget=self.memory_budget)
        found = max(SMALLEST_DEFAULT_BUDGET, vectors * dimension * size // 2)
        return replace(self, memory_budget=found, one_tile_budget=max(found, ONE_TILE))

    @property
    def filters(self) -> bool:
        """Whether any negative is dropped because of its score."""
        return not (
            self.max_cosine is None
            and self.margin_absolute is None
            and self.margin_relative is None
        )

    def fingerprint(self, *more: object) -> int:
        """A number that differs between ranks that were called differently (the budget may
        differ).
        """
        same = {name: value for name, value in vars(self).items() if name != "memory_budget"}
        return zlib.crc32(repr((sorted(same.items()), more)).encode())


def _max_cosine(negatives: Negatives, prefixes: tuple[int, ...]) -> tuple[float, ...] | bool | None:
    """Return what the options hold of a highest cosine. Raises ValueError for other prefixes."""
    highest = negatives.max_cosine
    if highest is None or isinstance(highest, Tensor):
        return None if highest is None else True
    if not isinstance(highest, Mapping):
        return (float(highest),) * len(prefixes)
    if set(highest) != set(prefixes):
        raise ValueError(
            f"negatives.max_cosine: found the lengths {sorted(highest)}, expected those of the "
            f"prefixes, {sorted(prefixes)}"
        )
    return tuple(float(highest[size]) for size in prefixes)
