"""Which candidate is a negative of which anchor.

Everything that may stand in a denominator (keys, other queries, shared hard negatives; of all
ranks) carries the same three integers, its tags: the global index of the key it stands for, that
key's id, and the id of the query it belongs to. An anchor carries the tags of its positive and its
own query id. A candidate is NOT a negative when it is
invalid or shares any tag with the anchor: the same key (so the positive itself, and in query-query
blocks the row itself and every query with the same positive), the same key id, the same query id.
-1 is "none" and never matches.
Positives by id are no key in particular: their anchor's key index is none, and the id does it
alone.
In an anchor "none" is -2, so that equality alone compares tags. Two marks say the rest by equality
too, against a key's validity (0 or 1) twice: 0, which an invalid key equals, and 1 in an invalid
row (else a number that nothing equals), which all others do. The relation is symmetric, so the same
function serves the columns of the symmetric loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from sailplan_kernels.infonce.options import InfoNCEOptions


@dataclass(frozen=True)
class Candidates:
    """Tags [C, 3] (key index, key id, query id) and validity [C] of candidates, all ranks in
    rank order.
    """

    tags: Tensor
    valid: Tensor

    @classmethod
    def of(cls, notes: Tensor) -> Candidates:
        """From int64 [C, 4 or more]: tags and whether the candidate is valid."""
        return cls(tags=notes[:, :3], valid=notes[:, 3] > 0)


def anchor_notes(tags: Tensor, valid: Tensor) -> Tensor:
    """int64 [A, 5] of anchors with ``tags`` [A, 3] (-1: none): tags (-2: none) and the marks for
    their rows' validity, bool [A].
    """
    nothing = torch.zeros_like(valid, dtype=torch.int64)
    return torch.cat(
        [
            torch.where(tags < 0, -2, tags),
            nothing[:, None],
            torch.where(valid, nothing - 5, nothing + 1)[:, None],
        ],
        1,
    )


def excluded(
    anchors: Tensor,
    keys: Tensor,
    tags_in_use: tuple[int, ...],
    keys_padded: bool,
    rows_padded: bool,
) -> Tensor:
    """bool [A, C]: key c is no negative of anchor a, from both notes [.., 5]; with
    ``rows_padded`` invalid rows exclude all keys.
    """
    end = 5 if rows_padded else 4 if keys_padded else 3
    first = min(
        tags_in_use, default=3
    )  # a tag in between that is not in use is none in all anchors
    a, c = anchors.T[first:end, :, None], keys.T[first:end, None]
    found = a == c
    return found[0] if len(found) == 1 else found.any(0)


@lru_cache(maxsize=4)
def own_keys(n: int, count: int, start: int, device: torch.device) -> Tensor:
    """bool [n, count], True where key ``start`` + i meets row i: ``excluded`` where there are no
    ids and no padding.
    """
    columns = torch.arange(count).to(device)
    return columns == torch.arange(start, start + n).to(device)[:, None]


def negatives(anchor_tags: Tensor, candidates: Candidates, tags_in_use: tuple[int, ...]) -> Tensor:
    """bool [A, C]: candidate c is a negative of anchor a (by identity; scores are looked at
    elsewhere).
    """
    cached = candidates.valid.unsqueeze(0).expand(len(anchor_tags), -1).clone()
    for column in tags_in_use:
        mine = anchor_tags[:, column, None]
        same = candidates.tags[None, :, column] == mine
        cached &= same.logical_and_(mine >= 0).logical_not_()
    return cached


@lru_cache(maxsize=64)
def just_below(cosines: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[P] the highest numbers of a dtype below cosines, uploaded once for all calls."""
    found = torch.tensor(cosines, dtype=dtype)
    return torch.nextafter(found, torch.full_like(found, -torch.inf)).to(device)


def limits(
    positive: Tensor, highest: tuple[float, ...] | Tensor | None, options: InfoNCEOptions
) -> Tensor | None:
    """Cosines [P, n] above which a pair is no negative of its anchor; None: there is no limit.

    positive [P, n]: the anchors' own cosines; highest: their max_cosine, [n] or one a prefix, which
    a negative must stay below.
    """
    if not options.filters:
        return None
    found: list[Tensor] = []
    if isinstance(highest, Tensor):
        found.append(
            torch.nextafter(highest, torch.full_like(highest, -torch.inf)).expand_as(positive)
        )
    elif highest is not None:
        below = just_below(highest, positive.dtype, positive.device)
        found.append(below[:, None].expand_as(positive))
    if options.margin_absolute is not None:
        found.append(positive + options.margin_absolute)
    if options.margin_relative is not None:
        found.append(positive * options.margin_relative)
    return reduce(torch.minimum, found).contiguous()
