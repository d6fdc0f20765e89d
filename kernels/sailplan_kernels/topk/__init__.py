"""Exact nearest keys, a tile at a time."""

from sailplan_kernels.topk.ranks import rank_of
from sailplan_kernels.topk.search import topk

__all__ = ["rank_of", "topk"]
