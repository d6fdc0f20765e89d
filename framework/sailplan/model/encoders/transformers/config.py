"""Settings of a published model: where it lies, how its tokens become one vector, how texts are
put to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from sailplan.config.encoders import encoder
from sailplan.config.fields import Count, Options, Positive, ShareBelowOne, When
from sailplan.config.whole import WholeConfig
from sailplan.data.config import Modality
from sailplan.errors import ConfigurationError
from sailplan.model.config import EncoderConfig

Pooling = Literal["mean", "cls", "last_token", "max", "weighted_mean", "model"]


@dataclass
class PromptTemplate:
    """What stands round an item's text, to the letter: white space, line breaks and the
    tokenizer's added tokens are kept.
    """

    before: str = ""  # with chat_template: the system message
    middle: str = ""  # right before the text, behind media
    after: str = ""


@dataclass
class PeftConfig:
    """Low-rank updates by peft; stages train them as the part `lora`."""

    rank: Count = 0  # 0: none
    # The update is alpha / rank times the product of the two factors
    alpha: Annotated[Positive, When("rank")] = 16.0
    dropout: Annotated[ShareBelowOne, When("rank")] = 0.0
    # Ends of linear layers' names, or all-linear
    targets: Annotated[list[str], When("rank")] = field(default_factory=lambda: ["all-linear"])


@encoder("transformers")
@dataclass
class TransformersConfig(EncoderConfig):
    """A model of transformers' AutoModel; embedding: its vector's size, or with `projection`
    any.
    """

    encoder: str = "transformers"
    embedding: int = 768
    prefixes: list[int] = field(default_factory=lambda: [768])
    source: str = ""  # a folder in Hugging Face's format, or a model id of its hub
    revision: str | None = None  # of the hub's repository
    weights: Literal["published", "drawn"] = (
        "published"  # drawn: from the run's seed, in the shape of config.json
    )
    options: Options = field(
        default_factory=dict
    )  # changes to config.json, such as {is_causal: false}: a bidirectional decoder
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = (
        "auto"  # auto: what transformers chooses for the model
    )
    modalities: list[Modality] = field(default_factory=lambda: ["text"])  # type: ignore[arg-type]
    # mean | cls: the first token | last_token | max | weighted_mean: by position (SGPT, arXiv
    # 2202.08904) | model: its own pooler.
    # A model with towers for text and media pools by itself.
    pooling: Pooling = "mean"
    # A linear map without bias from the pooled vector to `embedding`, drawn from the seed
    projection: bool = False
    special_tokens: bool = True  # those that the tokenizer puts round a text by itself
    padding: Literal["longest", "max_length"] = (
        "longest"  # max_length: every row to data.max_tokens, as SigLIP was trained
    )
    prompts: dict[str, PromptTemplate] = field(
        default_factory=dict
    )  # name that a view's `prompt` has -> template; default: of other views
    chat_template: bool = (
        False  # the model's own: `before` is its system message, `middle` + text its user message
    )
    image_processor: str | None = (
        # The name of its class in transformers, one that ends in Pil; None: what the model names
        None
    )
    image_processor_options: Options = field(
        default_factory=dict
    )  # changes to its settings, such as {max_pixels: 262144}
    media_marks: dict[str, str] = field(
        default_factory=dict
    )  # vision | audio -> what stands for one in the text of a model that reads media as positions of it; by default its own token
    lora: PeftConfig = field(default_factory=PeftConfig)

    component_path: ClassVar[str] = "sailplan.model.encoders.transformers.component.Transformers"

    def pretrained(self) -> bool:
        return self.weights == "published"

    def validate(self, path: str) -> None:
        super().validate(path)
        if not self.source:
            raise ConfigurationError(
                f"{path}.source is empty: expected a folder with config.json, or a model id of the "
                "hub; name one"
            )
        if not self.modalities:
            raise ConfigurationError(
                f"{path}.modalities is empty: expected some of text, vision, audio; name what it "
                "encodes"
            )

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for a processor of pictures that nothing shows, and marks of
        what is not encoded.
        """
        for name in ("image_processor", "image_processor_options"):
            if getattr(self, name) and "vision" not in self.modalities:
                raise ConfigurationError(
                    f"{path}.{name}={getattr(self, name)}: has no effect with "
                    f"{path}.modalities={self.modalities}; leave it out, or add vision"
                )
        for modality in self.media_marks:
            if modality == "text" or modality not in self.modalities:
                raise ConfigurationError(
                    f"{path}.media_marks.{modality}: has no effect with "
                    f"{path}.modalities={self.modalities}; leave it out, or add {modality}"
                )

    def part_names(self) -> tuple[str, ...]:
        return (
            *self.modalities,
            *(["projection"] if self.projection else []),
            *(["lora"] if self.lora.rank else []),
        )

    def check_run(self, config: WholeConfig) -> None:
        super().check_run(config)
        self.check_lora(config, "model.lora.rank", self.lora.rank)
        check_views(config, self.encoder, self.modalities)


def check_views(config: WholeConfig, encoder: str, modalities: Sequence[str]) -> None:
    """Raise ConfigurationError for a view that shows what the encoder does not see, or pictures
    otherwise than its processor makes them.
    """
    for dataset, view in sorted(_shown(config)):
        shown = config.data.sets[dataset].views[view]
        missing = [modality for modality in shown.modalities if modality not in modalities]
        if missing:
            raise ConfigurationError(
                f"data.sets.{dataset}.views.{view} shows {', '.join(missing)}, but "
                f"model.modalities is {', '.join(modalities)}: "
                "expected what the model encodes; change the view, or name other ones in "
                f"stages.*.patterns.{dataset}"
            )
        augmentation = config.data.sets[dataset].image_augmentation
        if list(shown.modalities) != ["text"] and augmentation:
            raise ConfigurationError(
                f"data.sets.{dataset}.image_augmentation={augmentation}: expected 0 with "
                f"model.encoder={encoder}, which shows "
                "pictures and recordings as its own processor makes them; set 0"
            )


def _shown(config: WholeConfig) -> set[tuple[str, str]]:
    """Return (data set, view) of all that stages train and evaluations encode."""
    found = {
        (task.dataset, view)
        for task in config.evaluation.tasks.values()
        for view in (task.query, task.target)
        if view
    }
    for name in config.order:
        stage = config.stages[name]
        for dataset in stage.data:
            patterns = config.data.sets[dataset].patterns
            for pattern in stage.patterns.get(dataset) or patterns:
                found |= {(dataset, patterns[pattern].query), (dataset, patterns[pattern].target)}
    return found
