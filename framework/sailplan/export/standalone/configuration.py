"""Configuration of a trained omni-modal embedding model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class SailplanConfig(PreTrainedConfig):
    """settings: shapes of the towers; prefixes: sizes at which the vector may be cut
    (Matryoshka).
    """

    model_type = "sailplan_omni"

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        prefixes: list[int] | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings or {}
        self.prefixes = prefixes or []
        self.hidden_size = self.settings.get("embedding")
        super().__init__(**options)
