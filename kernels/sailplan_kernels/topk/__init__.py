"""Exact nearest keys, a tile at a time."""

from sailplan_kernels.topk.search import topk
from sailplan_kernels.topk.ranks import rank_of

__all__ = ["rank_of", "topk"]
