"""InfoNCE with false-negative masks, hard negatives, Matryoshka prefixes and exact gradients
across ranks.
"""

from sailplan_kernels.infonce.api import InfoNCEOutput, infonce, infonce_sum
from sailplan_kernels.infonce.checks import backend_for
from sailplan_kernels.infonce.options import InfoNCEOptions

__all__ = ["InfoNCEOptions", "InfoNCEOutput", "backend_for", "infonce", "infonce_sum"]
