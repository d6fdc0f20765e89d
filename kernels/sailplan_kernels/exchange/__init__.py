"""How ranks show each other their embeddings: one interface, several ways."""

from sailplan_kernels.exchange.all_gather import AllGather
from sailplan_kernels.exchange.base import Exchange
from sailplan_kernels.exchange.local import Local

__all__ = ["AllGather", "Exchange", "Local"]
