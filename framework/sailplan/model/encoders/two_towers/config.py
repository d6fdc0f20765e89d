"""Settings of published towers: each as `encoder: transformers` has them, and the size that all are
projected to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from sailplan.config.encoders import encoder
from sailplan.config.fields import Options
from sailplan.config.whole import WholeConfig
from sailplan.data.config import MODALITIES, Modality
from sailplan.errors import ConfigurationError
from sailplan.model.config import EncoderConfig
from sailplan.model.encoders.transformers.config import TransformersConfig, check_views


@encoder("two_towers")
@dataclass
class TwoTowersConfig(EncoderConfig):
    """At least two towers; `embedding`, `prefixes`, `projection` and `modalities` of theirs are
    set from here.
    """

    encoder: str = "two_towers"
    text: TransformersConfig | None = None
    vision: TransformersConfig | None = None
    audio: TransformersConfig | None = None

    component_path: ClassVar[str] = (
        "sailplan.model.encoders.two_towers.component.TwoTowersComponent"
    )

    @property
    def towers(self) -> tuple[Modality, ...]:
        """Return the modalities that have a tower, in the order of MODALITIES."""
        every: tuple[Modality, ...] = ("text", "vision", "audio")
        return tuple(name for name in every if getattr(self, name) is not None)

    def pretrained(self) -> bool:
        return any(self.tower(modality).pretrained() for modality in self.towers)

    def validate(self, path: str) -> None:
        super().validate(path)
        if len(self.towers) < 2:
            raise ConfigurationError(
                f"{path} has {' and '.join(self.towers) or 'no tower'}: expected two or more of "
                f"{', '.join(MODALITIES)}; name {path}.text.source and another, or use "
                "encoder=transformers"
            )

    def tower(self, modality: Modality) -> TransformersConfig:
        """Return the settings of one tower: text, vision or audio."""
        own: TransformersConfig = getattr(self, modality)
        shared: Options = {
            "embedding": self.embedding,
            "prefixes": self.prefixes,
            "projection": True,
        }
        return replace(own, modalities=[modality], **shared)

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for settings of a tower that stand above all."""
        default = TransformersConfig()
        for modality in self.towers:
            tower: TransformersConfig = getattr(self, modality)
            for name in ("encoder", "embedding", "prefixes", "projection", "modalities"):
                found = getattr(tower, name)
                if found not in (getattr(default, name), getattr(self.tower(modality), name)):
                    raise ConfigurationError(
                        f"{path}.{modality}.{name}={found}: has no effect in a tower; leave it "
                        f"out, {path}.embedding and {path}.prefixes are for all"
                    )

    def check_lora_of_towers(self, config: WholeConfig) -> None:
        """Raise ConfigurationError for low-rank updates of a tower that no stage trains."""
        for modality in self.towers:
            rank = self.tower(modality).lora.rank
            self.check_lora(config, f"model.{modality}.lora.rank", rank)

    def part_names(self) -> tuple[str, ...]:
        lora = any(self.tower(modality).lora.rank for modality in self.towers)
        return (
            *self.towers,
            *(f"{modality}_projection" for modality in self.towers),
            *(["lora"] if lora else []),
        )

    def check_run(self, config: WholeConfig) -> None:
        super().check_run(config)
        self.check_lora_of_towers(config)
        check_views(config, self.encoder, self.towers)
