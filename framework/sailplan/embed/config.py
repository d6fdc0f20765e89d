"""Configuration of the embedding store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailplan.config.fields import Size


@dataclass
class StoreConfig:
    """How vectors are kept on disk while a stage is prepared, mined or evaluated."""

    precision: Literal["float32", "float16"] = "float32"  # float16: half the disk and its reading
    shard_rows: Size = 8192  # a kill costs each rank one shard
