"""The pairwise sigmoid loss of SigLIP, with the same masks, prefixes and convention across ranks
as InfoNCE.
"""

from sailplan_kernels.sigmoid.api import SigmoidOutput, sigmoid, sigmoid_sum

__all__ = ["SigmoidOutput", "sigmoid", "sigmoid_sum"]
