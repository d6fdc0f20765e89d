"""A fresh run that starts from another one's weights: `initialise_from`, `initialise_parts`.

Weights only: the step, the optimizer's state and the place in the data are a fresh run's. The run's
own checkpoints, once there are any, win over this, so that a job may be started again with the same
line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sailplan.checkpoint.loading import load_model_only
from sailplan.errors import ConfigurationError
from sailplan.model.lora import is_lora
from sailplan.runtime.process import Parallel
from sailplan.train.bundle import ModelBundle


def initialise(bundle: ModelBundle, source: Path, parts: Sequence[str], parallel: Parallel) -> None:
    """Fill the named parts of a run's bundle, at any layout and in any dtype. All ranks call it.

    Each part must be the source's, tensor for tensor; but LoRA factors that the source lacks stay
    as drawn, which changes no vector. Raises ConfigurationError on all ranks where it is not.
    """
    for part in parts:
        try:
            load_model_only(
                source,
                model=bundle.module[part],
                parallel=parallel,
                prefix=f"{part}.",
                exact=True,
                may_lack=is_lora,
            )
        except ConfigurationError as error:
            raise ConfigurationError(
                f"initialise_from, part {part}: {error}; or leave the part out of initialise_parts"
            ) from error
