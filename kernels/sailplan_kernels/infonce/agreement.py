"""What ranks must agree on before their collectives can match: how many rows each has, which
options, who needs which gradient.

Where the caller knows all ranks' sizes, a call of a kind that was agreed on before costs nothing:
no collective, no wait.
Else the ranks ask each other in one small collective, whose answer the host reads. Either way a
rank that was called with other options is an error on all ranks, not a hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from sailplan_kernels.exchange import Exchange


@dataclass(frozen=True)
class Needs:
    """Which gradients any rank needs: the collectives depend on it."""

    queries: bool
    keys: bool
    hard: bool
    temperature: bool


@dataclass(frozen=True)
class Agreement:
    """Equal on all ranks."""

    rows: tuple[int, ...]  # of every rank
    keys: tuple[int, ...]
    needs: Needs
    low_temperature: bool  # of any rank, as far as its host knows
    float64: bool  # all ranks can have their scores in it


_known: WeakKeyDictionary[Exchange, dict[tuple, Agreement]] = WeakKeyDictionary()


def agree(
    exchange: Exchange,
    sizes: Sequence[tuple[int, int]] | None,
    own: tuple[int, int],
    call: int,
    needs: Sequence[bool],
    low_temperature: bool,
    float64: bool,
    device: torch.device,
) -> Agreement:
    """The ranks' agreement; a collective, and a wait of the host, where this kind of call is new
    or ``sizes`` is None.

    sizes: (rows, keys) of every rank. own: this rank's. call: a number that differs between calls
    whose options differ.
    Raises ValueError, on all ranks, where ranks differ in what must be equal.
    """
    if sizes is not None:
        sizes = tuple((int(rows), int(keys)) for rows, keys in sizes)
        if len(sizes) != exchange.world_size or sizes[exchange.rank] != own:
            raise ValueError(
                f"sizes: found {sizes}, expected {exchange.world_size} pairs, {own} for rank "
                f"{exchange.rank}"
            )
    if exchange.world_size == 1:
        return Agreement((own[0],), (own[1],), Needs(*needs), low_temperature, float64)
    known = _known.setdefault(exchange, {})
    kind = (sizes, call, tuple(needs), low_temperature, float64)
    if sizes is not None and kind in known:
        return known[kind]
    numbers = torch.tensor(
        [*own, call, *needs, low_temperature, float64, hash(sizes) % 2**31 if sizes else 0],
        dtype=torch.int64,
    )
    table = exchange.gather(numbers[None].to(device), [1] * exchange.world_size).tolist()
    if any(row[2] != call or row[9] != table[0][9] for row in table):
        raise ValueError(
            "infonce: ranks differ in dimensions, dtype, ids given, kind of temperature, backend, "
            "sizes or options, expected equal calls"
        )
    found = Agreement(
        rows=tuple(row[0] for row in table),
        keys=tuple(row[1] for row in table),
        needs=Needs(*(any(row[3 + i] for row in table) for i in range(4))),
        low_temperature=any(row[7] for row in table),
        float64=all(row[8] for row in table),
    )
    if sizes is not None:
        known[kind] = found
    return found
