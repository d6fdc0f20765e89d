"""Which arithmetic an objective's scores go through: said before the first step by the rule that
then decides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sailplan.errors import ConfigurationError
from sailplan.objective.protocol import Objective
from sailplan_kernels.infonce import backend_for


def described(backend: str, dtype: torch.dtype) -> str:
    """ "BACKEND DTYPE", such as "triton bfloat16": as plan, console and metrics show it."""
    return f"{backend} {str(dtype).removeprefix('torch.')}"


def planned_backends(
    objectives: Mapping[str, Objective | type[Objective]],
    backend: str,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> dict[str, str]:
    """Objective -> the backend and the dtype of its operands (see `described`) for embeddings on
    `device`; "torch" where no kernel is called.

    Raises ConfigurationError for a backend that cannot run there.
    """
    found = {}
    for name, objective in objectives.items():
        if objective.calls_kernels:
            try:
                found[name] = described(backend_for(backend, device, compute_dtype), compute_dtype)
            except ValueError as error:
                raise ConfigurationError(
                    f"step.backend={backend}: on {device.type} with "
                    f"parallel.dtype={compute_dtype}: {error}"
                ) from error
        else:
            found[name] = described("torch", torch.promote_types(compute_dtype, torch.float32))
    return found
