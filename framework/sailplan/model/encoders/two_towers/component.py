"""Published towers as a component: each opened, saved and exported as `encoder:
transformers` does it, in a folder of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sailplan.config.fields import Options
from sailplan.config.schema import Config, ParallelConfig
from sailplan.data.processor import Processor
from sailplan.model.component import EncoderComponent
from sailplan.model.encoders.transformers.component import Transformers
from sailplan.model.encoders.transformers.files import drawn_model, published_model
from sailplan.model.encoders.transformers.processor import TransformersProcessor
from sailplan.model.encoders.two_towers.config import TwoTowersConfig
from sailplan.model.encoders.two_towers.module import TwoTowers
from sailplan.model.protocol import Encoder
from sailplan.runtime.process import Parallel


class TwoTowersComponent(EncoderComponent):
    """A tower for each of two or three modalities."""

    model: TwoTowersConfig

    def processor(self, config: Config) -> Processor:
        towers = {name: self.model.tower(name) for name in self.model.towers}
        first = towers.get("text") or towers["vision"]
        return TransformersProcessor(
            first, config, pictures=towers.get("vision"), recordings=towers.get("audio")
        )

    def module(self, dtype: torch.dtype) -> TwoTowers:
        return TwoTowers(
            self.model,
            {name: drawn_model(self.model.tower(name)) for name in self.model.towers},
            dtype=dtype,
        )

    def build(self, parallel_config: ParallelConfig, parallel: Parallel, seed: int) -> Encoder:
        """As `EncoderComponent.build`; every rank reads the published weights whole before they
        are cut.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            towers = {name: self.model.tower(name) for name in self.model.towers}
            models = {
                name: (published_model if tower.weights == "published" else drawn_model)(tower)
                for name, tower in towers.items()
            }
            dtype = torch.float64 if parallel_config.dtype == "float64" else torch.float32
            return TwoTowers(self.model, models, dtype=dtype).train()

    def check_files(self) -> None:
        self.skeleton(ParallelConfig())

    def exported(self, weights: dict[str, Tensor]) -> tuple[TwoTowersConfig, dict[str, Tensor]]:
        towers: Options = {}
        found: dict[str, Tensor] = {}
        for name in self.model.towers:
            begins = f"towers.{name}."
            own = {
                key.removeprefix(begins): value
                for key, value in weights.items()
                if key.startswith(begins)
            }
            towers[name], own = Transformers(self.model.tower(name)).exported(own)
            found |= {begins + key: value for key, value in own.items()}
        return replace(self.model, **towers), found

    def write_files(self, config: Config, weights: dict[str, Tensor], out: Path) -> None:
        for name in self.model.towers:
            Transformers(self.model.tower(name)).write_files(config, {}, out / name)

    def placed(self, folder: Path) -> TwoTowersConfig:
        towers: Options = {
            name: Transformers(self.model.tower(name)).placed(folder / name)
            for name in self.model.towers
        }
        return replace(self.model, **towers)
