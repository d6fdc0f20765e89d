"""The omni-modal encoder: whatever an item has of sound, pictures and text becomes one vector.

Sound is one token, pictures are a few latents (of Qwen3-VL's image tower: its tokens), text is its
tokens; they stand in this order in one sequence that bidirectional (or causal) blocks read. The
vector is the mean over the present positions of tanh(hidden), or another pooling that the
configuration names, without an output projection: the similarity of two items is the cosine of
their vectors (SAIL-Embedding, arXiv 2510.12709).

Which towers run is decided by the view's declared modalities, never by what a row really has: the
ranks must meet in the same collectives. An absent part is masked out of attention and pooling.

Shape legend: b rows, t text tokens, s positions of the sequence, h hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn

from sailplan.config.fields import Options
from sailplan.config.schema import AudioConfig, ModelConfig, VisionConfig
from sailplan.data.config import MODALITIES
from sailplan.data.packing import (
    OWN_TEXT,
    READ_OUTS,
    SOUND_TOKEN,
    VISUAL,
    OmniInputs,
    Packing,
    SequenceLayout,
    pack,
)
from sailplan.model.attention import Sequences
from sailplan.model.audio import AudioAdapter, AudioEncoder
from sailplan.model.backbones.clap import ClapAudioEncoder
from sailplan.model.backbones.clap_fusion import FusedClapAudioEncoder
from sailplan.model.backbones.naflex import NaflexVisionEncoder
from sailplan.model.backbones.qwen_vl import QwenVisionEncoder
from sailplan.model.backbones.whisper import WhisperAudioEncoder
from sailplan.model.blocks import (
    Blocks,
    initial_deviation,
    interleaved_angles,
    process_groups,
    rotary_angles,
    transformer_config,
    uncut,
)
from sailplan.model.check import check_model
from sailplan.model.encoders.omni.published import PublishedVisionEncoder
from sailplan.model.lora import add_lora, is_lora
from sailplan.model.parallelize import checkpoint_activations, layers_of
from sailplan.model.pixels import normalise
from sailplan.model.pooling import LatentAttention, last_positions, row_means, unpacked_rows
from sailplan.model.protocol import Embeddings, Encoder, reach_backward
from sailplan.model.sharing import encode_own_rows, mark_shared
from sailplan.model.vision import PackedRows, Perceiver, VisionEncoder

VISION: dict[str, Callable[[VisionConfig, torch.dtype], nn.Module]] = {
    "own": VisionEncoder,
    "published": PublishedVisionEncoder,
    "siglip2": NaflexVisionEncoder,
}
SOUND: dict[
    str, Callable[[AudioConfig, torch.dtype, AbstractContextManager[object]], nn.Module]
] = {
    "whisper": WhisperAudioEncoder,
    "clap": ClapAudioEncoder,
    "clap_fusion": FusedClapAudioEncoder,
}
PARTS = ("text", "vision", "perceiver", "audio", "tower")
ENCODERS = ("vision", "perceiver", "audio")  # the parts whose rows tensor-parallel peers can share


def _meta_if(published: bool) -> AbstractContextManager[object]:
    return torch.device("meta") if published else nullcontext()


class Tower(nn.Module):
    """The shared blocks over the joint sequence, and what tells its parts from each other."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        blocks_on: AbstractContextManager[object],
        *,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        # From zero: what all rows share would make them alike at the start, and contrastive
        # learning slow to leave it.
        self.kinds = nn.Parameter(
            torch.zeros(3, config.tower.hidden, dtype=dtype)
        )  # text, vision, audio
        with blocks_on:
            self.blocks = Blocks(
                config.tower, dtype, config.rope_base, sequence_parallel=sequence_parallel
            )
        self.rope_base, self.sections = config.rope_base, config.rope_sections
        latent = config.pooling == "latent_attention"
        self.pooling = (
            LatentAttention(
                config.tower.hidden, config.pooling_latents, config.pooling_heads, dtype
            )
            if latent
            else None
        )

    def forward(
        self,
        sequence: Tensor,
        rows: Sequences,
        places: Tensor,
        added: Sequence[Tensor] = (),
        at: Tensor | None = None,
    ) -> Tensor:
        """sequence packed [p, h], with `kinds` added. Returns [p, h].

        places: int64 [p], or with `rope_sections` [3, p]. added: [n, h] for each of the first
        layers, added to its output at the packed positions `at` int64 [n].
        """
        size, base = self.blocks.head_size, self.rope_base
        angles = (
            interleaved_angles(places, size, base, self.sections)
            if self.sections
            else rotary_angles(places, size, base)
        )
        after = (
            (
                lambda layer, hidden: (
                    hidden.index_add(0, at, added[layer]) if layer < len(added) else hidden
                )
            )
            if added
            else None
        )
        hidden = self.blocks(sequence, rows, angles, after)
        return hidden if self.pooling is None else self.pooling(hidden)


class OmniEncoder(Encoder):
    """Encoder of any subset of {text, vision, audio}.

    config: shapes; refused with ConfigurationError where they cannot be built at this
    tensor-parallel size.
    dtype: of the parameters and the computation (`parallelize.shard` can compute in another one).
    seed: the weights are a function of (config, seed), the same at every tensor-parallel size and
    in every dtype up to rounding; torch's global generator is left as it was.
    published: parts that are laid out on the meta device instead of drawn, to be filled from
    published weights (`backbones.load`): "tower" (the text embedding and the tower's blocks),
    "vision" (the frame encoder), "audio" (the audio encoder without its projection).
    share_encoders: tensor-parallel ranks hold the vision encoder, the perceiver and the audio
    encoder whole and encode a part of the rows each (see `model.sharing`); False: these are cut
    like the tower, and every rank takes part in each row.
    sequence_parallel: of the tower's blocks (see `model.blocks.Blocks`).
    """

    gives_tokens = True

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        published: Collection[str] = (),
        share_encoders: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        groups = process_groups()
        tensor_parallel = groups.tp.size() if groups.tp is not None else 1
        check_model(config, tensor_parallel, share_encoders=share_encoders)
        self.sharing: dist.ProcessGroup | None = (
            groups.tp if share_encoders and tensor_parallel > 1 else None
        )
        self.layout = SequenceLayout.of(config, tensor_parallel if share_encoders else 1)
        self.config = config
        self.dtype = dtype
        self.modalities, self.dimension = MODALITIES, config.embedding
        hidden = config.tower.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with _meta_if("tower" in published):
                self.text = VocabParallelEmbedding(
                    config.vocabulary,
                    hidden,
                    init_method=lambda weight: nn.init.normal_(
                        weight, std=initial_deviation(hidden)
                    ),
                    config=transformer_config(config.tower, dtype, tensor_parallel),
                    tp_group=groups.tp,
                )
            with uncut(share_encoders):
                with _meta_if("vision" in published):
                    if config.vision.backbone == "qwen3_vl":
                        self.vision: nn.Module = QwenVisionEncoder(config.vision, hidden, dtype)
                    else:
                        self.vision = VISION[config.vision.backbone](config.vision, dtype)
                self.perceiver = (
                    Perceiver(config.vision, self.vision.width, hidden, dtype)  # type: ignore[arg-type]
                    if config.vision.backbone != "qwen3_vl"
                    else nn.Module()
                )  # nothing to condense
                if config.audio.backbone == "own":
                    sound: nn.Module = AudioEncoder(config.audio, config.rope_base, dtype)
                else:
                    sound = SOUND[config.audio.backbone](
                        config.audio, dtype, _meta_if("audio" in published)
                    )
                self.audio = nn.ModuleDict(
                    {"encoder": sound, "adapter": AudioAdapter(config.audio.output, hidden, dtype)}
                )
            self.tower = Tower(
                config, dtype, _meta_if("tower" in published), sequence_parallel=sequence_parallel
            )
            if config.lora.rank:
                add_lora({name: getattr(self, name) for name in PARTS}, config.lora)
        if self.sharing is not None:
            for name in ENCODERS:
                mark_shared(getattr(self, name))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that a stage's `trainable` list uses: text, vision, perceiver,
        audio, tower, and lora where there is any.
        """
        found = {
            name: [
                value for key, value in getattr(self, name).named_parameters() if not is_lora(key)
            ]
            for name in PARTS
        }
        lora = [value for key, value in self.named_parameters() if is_lora(key)]
        return found | ({"lora": lora} if lora else {})

    def used_parts(self, modalities: Iterable[str]) -> set[str]:
        used = {"text", "tower", "lora"}  # prompts are text
        if "vision" in modalities:
            used |= {"vision", "perceiver"}
        return used | ({"audio"} if "audio" in modalities else set())

    def shard_units(self) -> list[nn.Module]:
        return layers_of(self)

    def checkpoint_activations(self) -> None:
        checkpoint_activations(self)

    def forward(
        self, inputs: OmniInputs, *, per_modality: bool = False, tokens: bool = False
    ) -> Embeddings:
        """Encodes one micro-batch; vectors are float32 (float64 in a float64 model), not
        normalised.

        A row with nothing present gets a zero vector. `per_modality` adds the vectors pooled over
        the visual positions and the sound's, where these are declared, and over the item's own text
        positions (`text_mask`). `tokens` adds those of all present positions: sound, pictures, text
        with its prompt.
        A micro-batch of 0 rows runs one absent row, so that this rank meets the others in every
        collective.
        Inputs without `packing` are packed here: where their masks are on a GPU, the host waits for
        it.
        """
        packing = inputs.packing or pack(inputs, self.layout)
        if packing.layout != self.layout:
            raise ValueError(
                f"inputs packed for {packing.layout}, but the model has {self.layout}: pack them "
                "with OmniEncoder.layout"
            )
        if inputs.rows == 0:
            one = _one_absent_row(inputs)
            return self._encode(one, packing, per_modality, tokens).without_rows()
        return self._encode(inputs, packing, per_modality, tokens)

    def _encode(
        self, inputs: OmniInputs, packing: Packing, per_modality: bool, per_token: bool
    ) -> Embeddings:
        lists = packing.lists()
        pieces: list[
            Tensor
            # [n, h]: sound of each row, visual tokens of each row, text; the pack takes what is
            # present
        ] = []
        features: Sequence[
            Tensor
        ] = ()  # [b, n, h] of visual tokens, to be added behind the tower's first layers
        sound, visual, text = self.tower.kinds[2], self.tower.kinds[1], self.tower.kinds[0]
        if "audio" in inputs.modalities:
            if inputs.audio is None or inputs.audio_mask is None:
                raise ValueError("the view declares audio, but the inputs hold none")
            (token,) = self._shared(self._hear, inputs.audio, inputs.audio_mask)
            pieces.append(token.flatten(0, 1) + sound)
        # Prompts are text: the embedding runs for every view.
        words = self.text(lists["ids"])
        if "vision" in inputs.modalities:
            if inputs.images is None or inputs.image_mask is None:
                raise ValueError("the view declares vision, but the inputs hold no images")
            sizes = [inputs.image_sizes] if inputs.image_sizes is not None else []
            if isinstance(self.vision, NaflexVisionEncoder) != bool(sizes):
                raise ValueError(
                    "pictures that keep their sides' ratio (data.image_patches) and "
                    "model.vision.backbone=siglip2 go together"
                )
            options = {"image_sizes": inputs.image_sizes, "augmentation": inputs.image_augmentation}
            beside = {name: tensor for name, tensor in options.items() if tensor is not None}

            def see(images: Tensor, *others: Tensor) -> Sequence[Tensor]:
                return self._see(packing, lists, images, **dict(zip(beside, others, strict=True)))

            tokens, *features = self._shared(see, inputs.images, *beside.values())
            if (
                self.layout.marks
            ):  # embedded with the text, which all tensor-parallel ranks look up together
                frames = inputs.image_mask.size(1)
                marks, words = words.split([2, len(words) - 2])
                before, behind = marks.expand(len(tokens), frames, -1, -1).split(1, 2)
                tokens = torch.cat([before, tokens.unflatten(1, (frames, -1)), behind], 2).flatten(
                    1, 2
                )
                features = [
                    F.pad(part.unflatten(1, (frames, -1)), (0, 0, 1, 1)).flatten(1, 2)
                    for part in features
                ]
            pieces.append(tokens.flatten(0, 1) + visual)
        pieces.append(words + text)
        sequence = (
            pieces[0]
            if "source" not in lists
            else torch.cat(pieces).index_select(0, lists["source"])
        )
        rows = Sequences.of(packing.runs["tower"], lists["ends"], sequence.device)
        places = lists["place"].unflatten(0, (self.layout.dimensions, -1))
        at = lists["visual"]
        if features:  # numbered among all visual tokens
            chosen = lists["source"].index_select(0, at) - (
                len(pieces[0]) if "audio" in inputs.modalities else 0
            )
            features = [part.flatten(0, 1).index_select(0, chosen) for part in features]
        hidden = self.tower(
            sequence, rows, places if self.layout.dimensions == 3 else places[0], features, at
        )
        longest = max(length for _, length in packing.runs["tower"]) if per_token else None
        return self._read_out(hidden, lists, inputs.modalities, per_modality, longest)

    def _read_out(
        self,
        hidden: Tensor,
        lists: dict[str, Tensor],
        modalities: Collection[str],
        per_modality: bool,
        longest: int | None,
    ) -> Embeddings:
        """hidden packed [p, h]; longest: positions of a row, where these are asked for."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        hidden = hidden.to(wide)
        if self.config.pooling == "tanh_mean":
            hidden = hidden.tanh()
        counts, last = (
            lists[name].unflatten(0, (len(READ_OUTS), -1)) for name in ("counts", "last")
        )

        def pooled(number: int, what: int | None) -> Tensor:
            if self.config.pooling == "last_token":
                return last_positions(hidden, last[number])
            return row_means(
                hidden,
                None if what is None else lists["what"] == what,
                counts[number],
                lists["offsets"],
                lists["slot"],
            )

        fused = pooled(0, None)
        fused = reach_backward(fused)
        read_outs = {"vision": (1, VISUAL), "text": (2, OWN_TEXT), "audio": (3, SOUND_TOKEN)}
        wanted = [
            name for name in read_outs if per_modality and (name in modalities or name == "text")
        ]
        by_modality = {name: pooled(*read_outs[name]) for name in wanted}
        if longest is None:
            return Embeddings(fused, by_modality)
        positions = unpacked_rows(hidden, lists["offsets"], lists["slot"], longest)
        return Embeddings(fused, by_modality, *positions)

    def _see(
        self,
        packing: Packing,
        lists: dict[str, Tensor],
        images: Tensor,
        image_sizes: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """images [b, f, 3, height, width], or with image_sizes [b, f, 2] their patches, of this
        peer's b rows: latents [b, l, h]; of Qwen3-VL's image tower its tokens [b, f * p, h] and, in
        the same shape, what is added to them behind the tower's
        first layers. Pictures that are absent are not encoded."""
        peer = 0 if self.sharing is None else self.sharing.rank()
        rows, frames = images.shape[:2]
        if peer in packing.absent:
            images = torch.zeros_like(images)  # the filler may hold anything, and 0 * inf is NaN
        images, present = (
            normalise(images, augmentation, image_sizes).flatten(0, 1),
            lists.get(f"frames {peer}"),
        )
        if image_sizes is not None:
            own = lists[f"patches {peer}"]
            pictures = Sequences.of(
                packing.runs[f"patches {peer}"], lists[f"patch ends {peer}"], images.device
            )
            present = own // images.size(1)
            tokens = self.vision(images, image_sizes.flatten(0, 1), own, pictures)
        else:
            tokens = self.vision(images if present is None else images.index_select(0, present))
        if isinstance(self.vision, QwenVisionEncoder):
            if present is not None:
                tokens = [
                    part.new_zeros(rows * frames, *part.shape[1:]).index_copy(0, present, part)
                    for part in tokens
                ]
            return [part.unflatten(0, (rows, frames)).flatten(1, 2) for part in tokens]
        packed = None
        if present is not None:
            joint = Sequences.of(packing.runs[f"rows {peer}"], lists[f"ends {peer}"], images.device)
            packed = PackedRows(
                present % frames, lists[f"source {peer}"], lists[f"latents {peer}"], joint
            )
        return [self.perceiver(tokens, rows, frames, packed)]

    def _hear(self, audio: Tensor, audio_mask: Tensor) -> Sequence[Tensor]:
        """audio [b, c, frames, mel_bins], audio_mask bool [b, c]: one token, [b, 1, h]."""
        return [self.audio["adapter"](self.audio["encoder"](audio, audio_mask))]

    def _shared(self, encode: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
        shapes = (
            self.config.vision.encoder,
            self.config.vision.perceiver,
            self.config.audio.encoder,
        )
        return encode_own_rows(
            encode,
            self.sharing,
            *inputs,
            dropout=self.training and any(shape.dropout > 0 for shape in shapes),
        )


def _one_absent_row(inputs: OmniInputs) -> OmniInputs:
    """One row with nothing present, in the shapes of an empty micro-batch."""
    changes: Options = {}
    for name in (
        "images",
        "image_mask",
        "image_sizes",
        "image_augmentation",
        "audio",
        "audio_mask",
    ):
        value = getattr(inputs, name)
        if value is not None:
            changes[name] = value.new_zeros(1, *value.shape[1:])
    return dataclasses.replace(inputs, **changes)
