"""sailplan: distributed training of omni-modal contrastive embedding models.

From Python: `load` a trained or published model and `encode` with it; `compose` a configuration and
train it with `Trainer`; write a loss below `Objective`, or what is done around the loop below `Callback`. Nothing heavy is imported before it is
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from sailplan.config.compose import compose
    from sailplan.data.pairs import write_pairs
    from sailplan.export.load import Model, load
    from sailplan.objective.cosent import CoSENT
    from sailplan.objective.id2item import ID2Item
    from sailplan.objective.infonce import InfoNCE
    from sailplan.objective.late_fusion import LateFusion
    from sailplan.objective.late_interaction import LateInteraction
    from sailplan.objective.micl import MICL
    from sailplan.objective.multi_positive import MultiPositive
    from sailplan.objective.protocol import Objective
    from sailplan.objective.score_distillation import ScoreDistillation
    from sailplan.objective.seq2item import Seq2Item
    from sailplan.objective.sigmoid import Sigmoid
    from sailplan.train.callback import Callback
    from sailplan.train.python import Trainer

_HOMES = {
    "Callback": "sailplan.train.callback",
    "CoSENT": "sailplan.objective.cosent",
    "ID2Item": "sailplan.objective.id2item",
    "InfoNCE": "sailplan.objective.infonce",
    "LateFusion": "sailplan.objective.late_fusion",
    "LateInteraction": "sailplan.objective.late_interaction",
    "MICL": "sailplan.objective.micl",
    "Model": "sailplan.export.load",
    "MultiPositive": "sailplan.objective.multi_positive",
    "Objective": "sailplan.objective.protocol",
    "ScoreDistillation": "sailplan.objective.score_distillation",
    "Seq2Item": "sailplan.objective.seq2item",
    "Sigmoid": "sailplan.objective.sigmoid",
    "Trainer": "sailplan.train.python",
    "compose": "sailplan.config.compose",
    "load": "sailplan.export.load",
    "write_pairs": "sailplan.data.pairs",
}

__all__ = [
    "MICL",
    "Callback",
    "CoSENT",
    "ID2Item",
    "InfoNCE",
    "LateFusion",
    "LateInteraction",
    "Model",
    "MultiPositive",
    "Objective",
    "ScoreDistillation",
    "Seq2Item",
    "Sigmoid",
    "Trainer",
    "compose",
    "load",
    "write_pairs",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sailplan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
