"""Settings of two published towers: each as `encoder: transformers` has them, and the size that
both are projected to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from sailplan.config.encoders import encoder
from sailplan.data.config import Modality
from sailplan.errors import ConfigurationError
from sailplan.model.config import EncoderConfig
from sailplan.model.encoders.transformers.config import TransformersConfig, check_views

TOWERS: tuple[Modality, ...] = ("text", "vision")


@encoder("two_towers")
@dataclass
class TwoTowersConfig(EncoderConfig):
    """A text tower and a picture tower; `embedding`, `prefixes`, `projection` and `modalities`
    of theirs are set from here.
    """

    encoder: str = "two_towers"
    text: TransformersConfig = field(default_factory=TransformersConfig)
    vision: TransformersConfig = field(default_factory=TransformersConfig)

    component_path: ClassVar[str] = (
        "sailplan.model.encoders.two_towers.component.TwoTowersComponent"
    )

    def tower(self, modality: Modality) -> TransformersConfig:
        """Return the settings of one tower: text or vision."""
        own: TransformersConfig = getattr(self, modality)
        shared: dict[str, Any] = {
            "embedding": self.embedding,
            "prefixes": self.prefixes,
            "projection": True,
        }
        return replace(own, modalities=[modality], **shared)

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for settings of a tower that stand above both."""
        default = TransformersConfig()
        for modality in TOWERS:
            tower: TransformersConfig = getattr(self, modality)
            for name in ("encoder", "embedding", "prefixes", "projection", "modalities"):
                found = getattr(tower, name)
                if found != getattr(default, name):
                    raise ConfigurationError(
                        f"{path}.{modality}.{name}={found}: has no effect in a tower; leave it "
                        f"out, {path}.embedding and {path}.prefixes are for both"
                    )

    def check_lora_of_towers(self, config: Any) -> None:
        """Raise ConfigurationError for low-rank updates of a tower that no stage trains."""
        for modality in TOWERS:
            rank = self.tower(modality).lora.rank
            self.check_lora(config, f"model.{modality}.lora.rank", rank)

    def part_names(self) -> tuple[str, ...]:
        lora = any(self.tower(modality).lora.rank for modality in TOWERS)
        return (
            *TOWERS,
            *(f"{modality}_projection" for modality in TOWERS),
            *(["lora"] if lora else []),
        )

    def check_run(self, config: Any) -> None:
        super().check_run(config)
        self.check_lora_of_towers(config)
        check_views(config, self.encoder, TOWERS)
