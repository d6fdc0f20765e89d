"""What records say beside their items, as tensors of a rank's rows for the losses."""

from __future__ import annotations

import torch

from sailplan.data.record import Record
from sailplan.runtime.seeds import derive


def teacher_scores(records: list[Record], negatives: int) -> torch.Tensor:
    """Return float32 [r, 1 + negatives]: a teacher's scores of target and negatives, NaN where unknown."""
    result = torch.full((len(records), 1 + negatives), torch.nan)
    for row, record in enumerate(records):
        found = record.teacher_scores
        result[row, : len(found)] = torch.tensor(found, dtype=torch.float32)
    return result


def labels(records: list[Record]) -> torch.Tensor:
    """Return int64 [r]: a number of each record's class, the same on all ranks without a table of the
    classes; -1 where there is none.
    """
    return torch.tensor(
        [-1 if record.label is None else derive("label", record.label) for record in records],
        dtype=torch.int64,
    )


def log_probabilities(records: list[Record], negatives: int) -> torch.Tensor | None:
    """Return float32 [r]: log of each record's target_probability; None unless every record has one.

    Of records that bring negatives with a known probability each, the log of the ratio: how often
    the target is a key of the batch for one time that a given item of the negatives' kind is one of
    its negatives.
    """
    found = [
        record.target_probability for record in records if record.target_probability is not None
    ]
    if len(found) != len(records):  # a rank without rows has it, too
        return None
    among = [negatives * (record.negative_probability or 0) or 1.0 for record in records]
    return (
        (torch.tensor(found, dtype=torch.float64) / torch.tensor(among, dtype=torch.float64))
        .log()
        .to(torch.float32)
    )
