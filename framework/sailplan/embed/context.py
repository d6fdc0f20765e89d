"""What every phase of a run works with: the configuration, this rank's place, the model as it is
now, the open data sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sailplan.config.schema import Config
from sailplan.data.reader import RecordReader
from sailplan.runtime.process import Parallel


@dataclass(frozen=True)
class RunContext:
    """Hold what stage preparation, mining, evaluation and export share.

    objectives: name -> loss; empty where a phase asks for none. readers: data set -> its open
    records; a stage that makes data sets of its own adds them.
    """

    config: Config
    parallel: Parallel
    encoder: nn.Module
    objectives: Mapping[str, nn.Module] | nn.ModuleDict
    readers: dict[str, RecordReader]
    store: Path | None = None  # of vectors on disk; None: a temporary folder of one node
