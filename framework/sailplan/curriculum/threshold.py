"""lambda*: the cosine above which a pair counts as a match, fitted by the best F1 (recipe 2.1).

Predict "positive" where score >= lambda. The best F1 is always reached at the score of some
positive: between two of them a lower threshold only adds false positives. So it is enough to sort
the positive scores once and to count how many negatives lie at or above each, which needs no N x N
matrix and sums over ranks as integers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from sailplan.embed.scoring import ALONE, Pairs, count_negatives
from sailplan_kernels.exchange.base import Exchange

TILE = 1 << 16  # scores at once: some 2 MB


@dataclass(frozen=True)
class Threshold:
    """lambda* and the confusion counts of `score >= value` over the fitting sample."""

    value: float
    f1: float
    precision: float
    recall: float
    tp: int
    fp: int
    fn: int
    tn: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def f1_threshold(
    queries: Tensor, targets: Tensor, positives: Pairs, exchange: Exchange = ALONE
) -> Threshold:
    """argmax over lambda of F1 for `cosine >= lambda` over the Cartesian product of queries [n,
    D] and targets [m, D].

    F1 = 2 TP / (2 TP + FP + FN). Exact; of equal maxima the highest threshold wins (fewer false
    positives). F1's optimum moves with n * m, so callers keep the sample's size fixed. The same
    tensors on all ranks; the same result.
    Raises ValueError when there is no positive pair.
    """
    counts = count_negatives(queries, targets, positives, exchange, TILE)
    true_positives = counts.positives.flip(0).cumsum(0).flip(0)
    total = int(counts.positives.sum())
    f1 = 2 * true_positives.double() / (true_positives + counts.at_or_above + total).double()
    best = len(f1) - 1 - int(f1.flip(0).argmax())
    tp, fp = int(true_positives[best]), int(counts.at_or_above[best])
    return Threshold(
        value=float(counts.values[best]),
        f1=float(f1[best]),
        precision=tp / (tp + fp),
        recall=tp / total,
        tp=tp,
        fp=fp,
        fn=total - tp,
        tn=counts.negatives - fp,
    )
