"""What a setting may hold, and where it has an effect, said once, in its annotation: `workers:
Count = 0`, `kind: Literal["items", "pairs"]`, `merge: Annotated[Size, When("backbone", ...)] = 2`.

`sailplan.config.components` reads the annotations: it derives Hydra's schema from them and refuses
what lies outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

Options = dict[str, Any]  # arguments of a call by name; of a class with its `_target_`
JsonObject = dict[str, Any]  # an object of a JSON file, or of one that will be written
JsonValue = Any  # what JSON holds: an object, a list, text, a number, a truth value or None
JsonView = Mapping[str, Any]  # the same, where it is only read

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.005, 1.0


@dataclass(frozen=True)
class Range:
    """The finite numbers that a setting may be; `words` ends "expected a number ..."."""

    words: str
    fits: Callable[[float], bool]


@dataclass(frozen=True)
class When:
    """A setting that has an effect only where the setting `name` beside it has one of `values`; ()
    means any but its default.

    Where it has not, another value than the default is refused: nothing would read it.
    """

    name: str
    values: tuple[object, ...] = ()


Size = Annotated[int, Range("at least 1", lambda value: value >= 1)]
Count = Annotated[int, Range("at least 0", lambda value: value >= 0)]
CountOrAll = Annotated[int, Range("at least -1 (-1: all)", lambda value: value >= -1)]
Positive = Annotated[float, Range("above 0", lambda value: value > 0)]
NotNegative = Annotated[float, Range("at least 0", lambda value: value >= 0)]
Share = Annotated[float, Range("from 0 to 1", lambda value: 0 <= value <= 1)]
ShareAboveZero = Annotated[float, Range("above 0, at most 1", lambda value: 0 < value <= 1)]
ShareBelowOne = Annotated[float, Range("at least 0, below 1", lambda value: 0 <= value < 1)]
Temperature = Annotated[
    float,
    Range(
        f"from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE:g}",
        lambda value: LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE,
    ),
]
