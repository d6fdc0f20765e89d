"""The model as a module of sentence-transformers: text, pictures, sound, and dicts of them."""

# A template: what it lacks or overrides comes together when `export.bundle` writes it.
# mypy: disable-error-code="arg-type, attr-defined, override"
from __future__ import annotations

from itertools import permutations

from sentence_transformers.base.modules import InputModule
from torch import Tensor

from sailplan.export.standalone.items import KEYS
from sailplan.export.standalone.modeling import SailplanModel
from sailplan.export.standalone.processing import SailplanProcessor


class SailplanEncoder(InputModule):
    """Items to `sentence_embedding` [b, D]."""

    def __init__(self, model: SailplanModel, processor: SailplanProcessor) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer

    @property
    def modalities(self) -> list[str | tuple[str, ...]]:
        return [
            *KEYS,
            *(each for size in (2, 3) for each in permutations(KEYS, size)),
            "message",
        ]  # the last: unlike items in a batch

    @property
    def max_seq_length(self) -> int:
        return int(self.processor.max_tokens)

    def get_embedding_dimension(self) -> int:
        return int(self.model.config.hidden_size)

    def preprocess(
        self, inputs: list[object], prompt: str | None = None, **_: object
    ) -> dict[str, Tensor]:
        return dict(self.processor.items(inputs, prompt=prompt or ""))

    def forward(self, features: dict[str, Tensor], **_: object) -> dict[str, Tensor]:
        return features | {"sentence_embedding": self.model(**features).pooler_output}

    def save(self, output_path: str, *_: object, **__: object) -> None:
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **options: object) -> SailplanEncoder:
        taken = {
            name: options[name]
            for name in ("token", "revision", "local_files_only")
            if options.get(name) is not None
        }
        if options.get("cache_folder"):
            taken["cache_dir"] = options["cache_folder"]
        model = SailplanModel.from_pretrained(
            model_name_or_path, **taken, **(options.get("model_kwargs") or {})
        )
        return cls(
            model.eval(),
            SailplanProcessor.from_pretrained(model_name_or_path, trust_remote_code=True, **taken),
        )  # as this code is
