"""A published model as an encoder: its hidden states pooled, or its towers' own features.

Shape legend: b rows, t tokens, h the model's size, D the vector's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.config.fields import Options
from sailplan.data.record import NamedInputs
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.alone import keep_statistics
from sailplan.model.encoders.transformers.config import PeftConfig, TransformersConfig
from sailplan.model.encoders.transformers.files import reads_media_as_text
from sailplan.model.encoders.transformers.pooling import POOLINGS
from sailplan.model.encoders.transformers.processor import LENGTHS, PRESENT, RECORDINGS, ROWS
from sailplan.model.protocol import Embeddings, Encoder, reach_backward

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutput


LORA = "lora_"  # in the names of peft's factors
FEATURES = {
    "text": "get_text_features",
    "vision": "get_image_features",
    "audio": "get_audio_features",
}  # of models with a tower for each
TOWERS = {
    "text": "text_",
    "vision": "vis",
    "audio": "audio_",
}  # what the names of such towers' parts begin with


class TransformersEncoder(Encoder):
    """The model of one source; vectors are float32 (float64 in a float64 model), not normalised.

    dtype: of the parameters.
    """

    def __init__(
        self, settings: TransformersConfig, model: nn.Module, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.settings, self.dtype = settings, dtype
        self.modalities, self.dimension = tuple(settings.modalities), settings.embedding
        self.gives_tokens = self.modalities == ("text",) and not hasattr(model, FEATURES["text"])
        self.model = model
        alone = list(settings.modalities) == ["text"]
        self.media_as_text = not alone and reads_media_as_text(settings)
        size = vector_size(model)
        self.projection = (
            nn.Linear(size, settings.embedding, bias=False) if settings.projection else None
        )
        if self.projection is None and size != settings.embedding:
            raise ConfigurationError(
                f"model.embedding is {settings.embedding}: expected {size}, the size of "
                f"{settings.source}; or set model.projection=true"
            )
        if settings.lora.rank:
            add_lora(model, settings.lora)
        self.to(dtype)
        keep_statistics(self)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {name: [] for name in self.settings.part_names()}
        for name, parameter in self.named_parameters():
            part = self._part(name)
            if part in found:
                found[part].append(parameter)
        return found

    def _part(self, name: str) -> str:
        if LORA in name:
            return "lora"
        if name.startswith("projection."):
            return "projection"
        towers = [
            modality
            for modality, begins in TOWERS.items()
            if name.removeprefix("model.").startswith(begins)
        ]
        apart = towers and (self.media_as_text or hasattr(self.model, FEATURES[towers[0]]))
        return towers[0] if apart else "text" if self.media_as_text else self.modalities[0]

    def used_parts(self, modalities: Iterable[str]) -> set[str]:
        return {"projection", "lora", *modalities, *(["text"] if self.media_as_text else [])}

    def checkpoint_activations(self) -> None:
        self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def forward(
        self, inputs: NamedInputs, *, per_modality: bool = False, tokens: bool = False
    ) -> Embeddings:
        """Encode one micro-batch; `tokens`, of a model of text alone, adds the vectors of all
        tokens, projected as the pooled ones are.

        One of 0 rows runs one row of padding, so that this rank meets the others in every
        collective.

        A view of several modalities gets the mean of the unit vectors of those that a row has; a
        row without any gets zeros.
        """
        named = inputs.named
        if ROWS in named:
            return Embeddings(reach_backward(self._sequences(named)))
        if not inputs.rows:
            named = {name: tensor.new_ones(1, *tensor.shape[1:]) for name, tensor in named.items()}
        positions: list[Tensor] = []
        vectors = {
            modality: self._text(named, positions if tokens else None)
            if modality == "text"
            else self.encode(modality, named)
            for modality in inputs.modalities
        }
        found = Embeddings(
            reach_backward(mean_of_units(list(vectors.values()))),
            vectors if per_modality else {},
            *positions,
        )
        return found if inputs.rows else found.without_rows()

    def encode(self, modality: str, named: dict[str, Tensor]) -> Tensor:
        """Return [b, D] of one modality."""
        if modality == "text":
            return self._text(named)
        name = {"vision": "pixel_values", "audio": RECORDINGS}[modality]
        return self._media(modality, named[name], named[PRESENT[modality]], named.get(LENGTHS))

    def _sequences(self, named: dict[str, Tensor]) -> Tensor:
        """Return [b, D] of rows whose media are positions of their text, also where the modalities'
        own vectors are asked for; there may be one row more than ROWS says, which fills up.
        """
        dtype, present = self.compute_dtype or self.dtype, named[ROWS]
        given = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in named.items()
            if name != ROWS
        }
        pooled = self._pooled(self.model(**given), given["attention_mask"])
        return self._read_out(pooled)[: len(present)].masked_fill(~present[:, None], 0.0)

    def _text(self, named: dict[str, Tensor], positions: list[Tensor] | None = None) -> Tensor:
        """Return [b, D]; zeros in rows that are said to have no text. positions: takes the tokens'
        vectors [b, t, D] and their mask.
        """
        given: dict[str, Tensor] = {
            name: named[name] for name in ("input_ids", "attention_mask") if name in named
        }
        if hasattr(self.model, FEATURES["text"]):
            pooled = self._features("text", given)
        else:
            mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
            output = self.model(**given)
            pooled = self._pooled(output, mask)
            if positions is not None:
                positions += [self._read_out(output.last_hidden_state), mask.bool()]
        vectors = self._read_out(pooled)
        present = named.get(PRESENT["text"])
        return vectors if present is None else vectors.masked_fill(~present[:, None], 0.0)

    def _media(
        self, modality: str, media: Tensor, present: Tensor, lengths: Tensor | None
    ) -> Tensor:
        """Return [b, D]: the mean over a row's pictures [b, f, 3, height, width] or chunks of
        sound [b, c, ...], of which bool [b, f or c] are there; zeros where there is none.

        lengths: int64 [b, c], the samples of a chunk that are not padding.
        """
        flat = media.flatten(0, 1).to(self.compute_dtype or self.dtype)
        given = {self._input_name(modality): flat}
        if modality == "audio":
            given |= self._about_sound(flat, lengths)
        if hasattr(self.model, FEATURES[modality]):
            pooled = self._features(modality, given)
        else:
            pooled = self._pooled(self.model(**given), None, given.get("attention_mask"))
        vectors = (
            self._read_out(pooled).unflatten(0, present.shape).masked_fill(~present[..., None], 0.0)
        )
        return vectors.sum(1) / present.sum(1, keepdim=True).clamp(min=1)

    def _input_name(self, modality: str) -> str:
        """Return the name that the model's forward has for its pictures or recordings."""
        if modality == "vision":
            return "pixel_values"
        own = str(getattr(self.model, "main_input_name", "input_features"))
        return own if own.startswith("input_") and own != "input_ids" else "input_features"

    def _about_sound(self, chunks: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
        """Return what a model wants to know of chunks [b * c, ...] beside their features."""
        config = self.model.config
        fusion = getattr(getattr(config, "audio_config", config), "enable_fusion", False)
        told: dict[str, Tensor] = {}
        if fusion:  # no chunk is longer than what the model takes whole
            told["is_longer"] = chunks.new_zeros(len(chunks), 1, dtype=torch.bool)
        if lengths is not None:
            places = torch.arange(chunks.size(1), device=chunks.device)
            told["attention_mask"] = (places < lengths.flatten()[:, None]).long()
        return told

    def _features(self, modality: str, given: dict[str, Tensor]) -> Tensor:
        found = getattr(self.model, FEATURES[modality])(**given)
        return getattr(found, "pooler_output", found)  # type: ignore[no-any-return]

    def _pooled(
        self, output: BaseModelOutput, mask: Tensor | None, samples: Tensor | None = None
    ) -> Tensor:
        """Return [b, h] of a model's output; mask [b, t] of its tokens, None: all are there, or
        of raw sound those that its mask of samples leaves.
        """
        if self.settings.pooling == "model":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ConfigurationError(
                    f"model.pooling=model: {self.settings.source} has no pooler; expected one of "
                    f"{', '.join(POOLINGS)}; choose one"
                )
            return pooled.flatten(1)
        hidden: Tensor = output.last_hidden_state  # type: ignore[assignment]
        if hidden.ndim == 4:  # a grid of features [b, h, down, across]
            hidden = hidden.flatten(2).transpose(1, 2)
        if samples is not None:
            reduce: Any = self.model._get_feature_vector_attention_mask
            mask = reduce(hidden.size(1), samples)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return POOLINGS[self.settings.pooling](hidden.to(_wide(hidden)), mask)

    def _read_out(self, pooled: Tensor) -> Tensor:
        if self.projection is not None:
            pooled = self.projection(pooled.to(self.compute_dtype or pooled.dtype))
        return pooled.to(_wide(pooled))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mean_of_units(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean of the unit vectors, each [b, D], of those that a row has, zeros where
    none; a single one as it is.
    """
    if len(vectors) == 1:
        return vectors[0]
    present = torch.stack([(vector != 0).any(1) for vector in vectors], 1).to(vectors[0].dtype)
    units = torch.stack([F.normalize(vector, dim=1) for vector in vectors], 1)
    return units.sum(1) / present.sum(1, keepdim=True).clamp(min=1)


def vector_size(model: Any) -> int:
    """Return h, the size of a model's vectors."""
    config = model.config
    found = getattr(config, "projection_dim", None) if hasattr(model, "get_text_features") else None
    text = config.get_text_config()
    sizes = (
        getattr(text, name, None) for name in ("projection_size", "hidden_size", "hidden_dim")
    )  # the last: of convolutional models
    found = found or next((size for size in sizes if size), None) or text.hidden_sizes[-1]
    return int(found)


def add_lora(model: nn.Module, lora: PeftConfig) -> None:
    """Put peft's updates beside the targeted linear layers, in place."""
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            f"model.lora.rank={lora.rank}: expected peft for it, which is not installed; pip "
            "install peft"
        ) from error
    targets = "all-linear" if "all-linear" in lora.targets else list(lora.targets)
    options: Options = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
    }
    settings = peft.LoraConfig(target_modules=targets, **options)
    try:
        peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigurationError(
            f"model.lora.targets={lora.targets}: {str(error).splitlines()[0]}"
        ) from error


def merged(weights: dict[str, Tensor], lora: PeftConfig) -> dict[str, Tensor]:
    """Return whole tensors with the updates added to their matrices, under the names of a model
    without LoRA.
    """
    result = {
        name.replace(".base_layer.", "."): value
        for name, value in weights.items()
        if LORA not in name
    }
    for name in weights:
        if ".lora_A." in name:
            base = name.split(".lora_A.")[0] + ".weight"
            update = (
                weights[name.replace(".lora_A.", ".lora_B.")].double()
                @ weights[name].double()
                * (lora.alpha / lora.rank)
            )
            result[base] = (result[base].double() + update).to(result[base].dtype)
    return result
