"""Which candidate is a negative of which anchor.

Everything that may stand in a denominator (keys, other queries, shared hard negatives; of all ranks) carries the
same three integers, its tags: the global index of the key it stands for, that key's id, and the id of the query it
belongs to. An anchor carries the tags of its positive and its own query id. A candidate is NOT a negative when it is
invalid or shares any tag with the anchor: the same key (so the positive itself, and in query-query blocks the row
itself and every query with the same positive), the same key id, the same query id. -1 is "none" and never matches.
Positives by id are no key in particular: their anchor's key index is none, and the id does it alone.
The relation is symmetric, so the same function serves the columns of the symmetric loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sailplan_kernels.infonce.options import InfoNCEOptions


@dataclass(frozen=True)
class Candidates:
    """Tags [C, 3] (key index, key id, query id) and validity [C] of candidates, all ranks in rank order."""

    tags: Tensor
    valid: Tensor


def negatives(anchor_tags: Tensor, candidates: Candidates, tags_in_use: tuple[int, ...]) -> Tensor:
    """bool [A, C]: candidate c is a negative of anchor a (by identity; scores are looked at elsewhere)."""
    keep = candidates.valid.unsqueeze(0).expand(len(anchor_tags), -1).clone()
    for column in tags_in_use:
        mine = anchor_tags[:, column, None]
        same = candidates.tags[None, :, column] == mine
        keep &= same.logical_and_(mine >= 0).logical_not_()
    return keep


def limits(positive: Tensor, highest: Tensor | None, options: InfoNCEOptions) -> Tensor | None:
    """Cosines [P, n] above which a pair is no negative of its anchor; None: there is no limit.

    positive [P, n]: the anchors' own cosines; highest [n]: their max_negative_score, which a negative must stay below.
    """
    if not options.filters:
        return None
    limit = torch.full_like(positive, torch.inf)
    if highest is not None:
        limit = torch.minimum(limit, torch.nextafter(highest, torch.full_like(highest, -torch.inf)))
    if options.margin_absolute is not None:
        limit = torch.minimum(limit, positive + options.margin_absolute)
    if options.margin_relative is not None:
        limit = torch.minimum(limit, positive * options.margin_relative)
    return limit
