"""Published towers as one encoder: a view of several modalities gets the mean of their unit
vectors.

Shape legend: b rows, D the vector's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sailplan.data.config import Modality
from sailplan.data.record import NamedInputs
from sailplan.model.encoders.transformers.module import LORA, TransformersEncoder, mean_of_units
from sailplan.model.encoders.two_towers.config import TwoTowersConfig
from sailplan.model.protocol import Embeddings, Encoder, reach_backward


class TwoTowers(Encoder):
    """Vectors are float32 (float64 in a float64 model), not normalised.

    models: modality -> transformers' model.
    """

    def __init__(
        self,
        settings: TwoTowersConfig,
        models: Mapping[Modality, nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.settings, self.dimension = settings, settings.embedding
        self.modalities = settings.towers
        self.towers = nn.ModuleDict(
            {
                name: TransformersEncoder(settings.tower(name), models[name], dtype=dtype)
                for name in settings.towers
            }
        )

    def parts(self) -> dict[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {name: [] for name in self.settings.part_names()}
        for name, parameter in self.named_parameters():
            _, modality, own = name.split(".", 2)
            part = (
                "lora"
                if LORA in own
                else f"{modality}_projection"
                if own.startswith("projection.")
                else modality
            )
            found[part].append(parameter)
        return found

    def used_parts(self, modalities: Iterable[str]) -> set[str]:
        return {
            "lora",
            *(name for modality in modalities for name in (modality, f"{modality}_projection")),
        }

    def forward(self, inputs: NamedInputs, *, per_modality: bool = False) -> Embeddings:
        """Encode one micro-batch; as `TransformersEncoder.forward`, each modality by its own
        tower.
        """
        named = inputs.named
        if not inputs.rows:
            named = {name: tensor.new_ones(1, *tensor.shape[1:]) for name, tensor in named.items()}
        vectors = {}
        for modality in inputs.modalities:
            tower: Any = self.towers[modality]
            tower.compute_dtype = self.compute_dtype
            vectors[modality] = tower.encode(modality, named)
        found = Embeddings(
            reach_backward(mean_of_units(list(vectors.values()))), vectors if per_modality else {}
        )
        return found if inputs.rows else found.without_rows()
