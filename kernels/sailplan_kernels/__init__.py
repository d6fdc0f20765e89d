"""Contrastive losses with exact gradients across ranks, and exact tiled search."""

from sailplan_kernels.arguments import LossOptions, Masks, Negatives, PositiveIds, Prefixes
from sailplan_kernels.exchange import (
    ALL_EXCHANGES,
    EXCHANGES,
    AllGather,
    Exchange,
    Grid,
    Local,
    Ring,
    RowSplit,
    SymmetricMemory,
)
from sailplan_kernels.infonce import InfoNCEOutput, infonce, infonce_sum
from sailplan_kernels.sigmoid import SigmoidOutput, sigmoid, sigmoid_sum
from sailplan_kernels.topk import rank_of, topk

__version__ = "0.2.0"

__all__ = [
    "ALL_EXCHANGES",
    "EXCHANGES",
    "AllGather",
    "Exchange",
    "Grid",
    "InfoNCEOutput",
    "Local",
    "LossOptions",
    "Masks",
    "Negatives",
    "PositiveIds",
    "Prefixes",
    "Ring",
    "RowSplit",
    "SigmoidOutput",
    "SymmetricMemory",
    "infonce",
    "infonce_sum",
    "rank_of",
    "sigmoid",
    "sigmoid_sum",
    "topk",
]
