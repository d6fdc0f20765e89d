"""The omni-modal encoder: whatever an item has of sound, pictures and text becomes one vector.

Sound is one token, pictures are a few latents (of Qwen3-VL's image tower: its tokens), text is its tokens; they stand
in this order in one sequence that bidirectional (or causal) blocks read. The vector is the mean over the present
positions of tanh(hidden), or another pooling that the configuration names, without an output projection: the similarity
of two items is the cosine of their vectors (SAIL-Embedding, arXiv 2510.12709).

Which towers run is decided by the view's declared modalities, never by what a row really has: the ranks
must meet in the same collectives. An absent part is masked out of attention and pooling.

Shape legend: b rows, t text tokens, s positions of the sequence, h hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn
from torch.utils import _pytree

from sailplan.config.schema import AudioConfig, ModelConfig, VisionConfig
from sailplan.data.record import EncoderInputs
from sailplan.model.audio import AudioAdapter, AudioEncoder
from sailplan.model.backbones.clap import ClapAudioEncoder
from sailplan.model.backbones.clap_fusion import FusedClapAudioEncoder
from sailplan.model.backbones.naflex import NaflexVisionEncoder, present_patches
from sailplan.model.backbones.qwen_vl import QwenVisionEncoder
from sailplan.model.backbones.siglip import SiglipVisionEncoder
from sailplan.model.backbones.whisper import WhisperAudioEncoder
from sailplan.model.blocks import Blocks, initial_deviation, interleaved_angles, process_groups, transformer_config, uncut
from sailplan.model.check import check_model
from sailplan.model.lora import add_lora, is_lora
from sailplan.model.pixels import normalise
from sailplan.model.pooling import LatentAttention, last_position, masked_mean
from sailplan.model.protocol import Embeddings
from sailplan.model.sharing import encode_own_rows, mark_shared
from sailplan.model.vision import Perceiver, VisionEncoder

VISION: dict[str, Callable[[VisionConfig, torch.dtype], nn.Module]] = {
    "own": VisionEncoder,
    "siglip": SiglipVisionEncoder,
    "siglip2": NaflexVisionEncoder,
}
SOUND: dict[str, Callable[[AudioConfig, torch.dtype, AbstractContextManager[object]], nn.Module]] = {
    "whisper": WhisperAudioEncoder,
    "clap": ClapAudioEncoder,
    "clap_fusion": FusedClapAudioEncoder,
}
PARTS = ("text", "vision", "perceiver", "audio", "tower")
ENCODERS = ("vision", "perceiver", "audio")  # the parts whose rows tensor-parallel peers can share

# FSDP2 looks for the outputs that need gradients through pytree: it must see into our dataclass.
_pytree.register_dataclass(Embeddings)


def _meta_if(published: bool) -> AbstractContextManager[object]:
    return torch.device("meta") if published else nullcontext()


class Tower(nn.Module):
    """The shared blocks over the joint sequence, and what tells its parts from each other."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, blocks_on: AbstractContextManager[object], *, sequence_parallel: bool) -> None:
        super().__init__()
        # From zero: what all rows share would make them alike at the start, and contrastive learning slow to leave it.
        self.kinds = nn.Parameter(torch.zeros(3, config.tower.hidden, dtype=dtype))  # text, vision, audio
        with blocks_on:
            self.blocks = Blocks(config.tower, dtype, config.rope_base, sequence_parallel=sequence_parallel)
        self.rope_base, self.sections = config.rope_base, config.rope_sections
        latent = config.pooling == "latent_attention"
        self.pooling = LatentAttention(config.tower.hidden, config.pooling_latents, config.pooling_heads, dtype) if latent else None

    def forward(self, sequence: Tensor, kind: Tensor, keep: Tensor, places: Tensor | None = None, added: Sequence[Tensor] = ()) -> Tensor:
        """sequence [b, s, h], kind int64 [s], keep bool [b, s]. Returns [b, s, h].

        places: int64 [3, b, s], with `rope_sections` (None: 0, 1, 2, ... in all three). added: [b, s, h] for each of the first
        layers, added to its output.
        """
        angles = None
        if self.sections and places is not None:
            angles = interleaved_angles(places, self.blocks.head_size, self.rope_base, self.sections)
        after = (lambda layer, hidden: hidden + added[layer] if layer < len(added) else hidden) if added else None
        hidden = self.blocks(sequence + self.kinds[kind], keep, angles, after)
        return hidden if self.pooling is None else self.pooling(hidden)


class OmniEncoder(nn.Module):
    """Encoder of any subset of {text, vision, audio}.

    config: shapes; refused with ConfigurationError where they cannot be built at this tensor-parallel size.
    dtype: of the parameters and the computation (`parallelize.shard` can compute in another one).
    seed: the weights are a function of (config, seed), the same at every tensor-parallel size and in every dtype
    up to rounding; torch's global generator is left as it was.
    published: parts that are laid out on the meta device instead of drawn, to be filled from published weights
    (`backbones.load`): "tower" (the text embedding and the tower's blocks), "vision" (the frame encoder), "audio" (the audio
    encoder without its projection).
    share_encoders: tensor-parallel ranks hold the vision encoder, the perceiver and the audio encoder whole and encode a
    part of the rows each (see `model.sharing`); False: these are cut like the tower, and every rank takes part in each row.
    sequence_parallel: of the tower's blocks (see `model.blocks.Blocks`).
    """

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
        self.sharing: dist.ProcessGroup | None = groups.tp if share_encoders and tensor_parallel > 1 else None
        self.config = config
        self.dtype = dtype
        hidden = config.tower.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with _meta_if("tower" in published):
                self.text = VocabParallelEmbedding(
                    config.vocabulary,
                    hidden,
                    init_method=lambda weight: nn.init.normal_(weight, std=initial_deviation(hidden)),
                    config=transformer_config(config.tower, dtype, tensor_parallel),
                    tp_group=groups.tp,
                )
            with uncut(share_encoders):
                with _meta_if("vision" in published):
                    if config.vision.backbone == "qwen3_vl":
                        self.vision: nn.Module = QwenVisionEncoder(config.vision, hidden, dtype)
                    else:
                        self.vision = VISION[config.vision.backbone](config.vision, dtype)
                self.perceiver = Perceiver(config.vision, hidden, dtype) if config.vision.backbone != "qwen3_vl" else nn.Module()  # nothing to condense
                if config.audio.backbone == "own":
                    sound: nn.Module = AudioEncoder(config.audio, config.rope_base, dtype)
                else:
                    sound = SOUND[config.audio.backbone](config.audio, dtype, _meta_if("audio" in published))
                self.audio = nn.ModuleDict({"encoder": sound, "adapter": AudioAdapter(config.audio.output, hidden, dtype)})
            self.tower = Tower(config, dtype, _meta_if("tower" in published), sequence_parallel=sequence_parallel)
            if config.lora.rank:
                add_lora({name: getattr(self, name) for name in PARTS}, config.lora)
        if self.sharing is not None:
            for name in ENCODERS:
                mark_shared(getattr(self, name))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that a stage's `trainable` list uses: text, vision, perceiver, audio, tower, and lora where there is any."""
        found = {name: [value for key, value in getattr(self, name).named_parameters() if not is_lora(key)] for name in PARTS}
        lora = [value for key, value in self.named_parameters() if is_lora(key)]
        return found | ({"lora": lora} if lora else {})

    def forward(self, inputs: EncoderInputs, *, per_modality: bool = False) -> Embeddings:
        """Encodes one micro-batch; vectors are float32 (float64 in a float64 model), not normalised.

        A row with nothing present gets a zero vector. `per_modality` adds the vectors pooled over the visual
        positions (None unless vision is declared) and over the item's own text positions (`text_mask`).
        A micro-batch of 0 rows runs one absent row, so that this rank meets the others in every collective.
        """
        if inputs.rows == 0:
            embeddings = self._encode(_one_absent_row(inputs), per_modality)
            return _pytree.tree_map(lambda vector: vector[:0], embeddings)
        return self._encode(inputs, per_modality)

    def _encode(self, inputs: EncoderInputs, per_modality: bool) -> Embeddings:
        pieces: list[tuple[int, Tensor, Tensor]] = []  # (kind, [b, n, h], present [b, n])
        features: Sequence[Tensor] = ()  # of visual tokens, to be added behind the tower's first layers
        grid: tuple[int, int] | None = None
        if "audio" in inputs.modalities:
            if inputs.audio is None or inputs.audio_mask is None:
                raise ValueError("the view declares audio, but the inputs hold none")
            (token,) = self._shared(self._hear, inputs.audio, inputs.audio_mask)
            pieces.append((2, token, inputs.audio_mask.any(1, keepdim=True)))
        if "vision" in inputs.modalities:
            if inputs.images is None or inputs.image_mask is None:
                raise ValueError("the view declares vision, but the inputs hold no images")
            sizes = [inputs.image_sizes] if inputs.image_sizes is not None else []
            if isinstance(self.vision, NaflexVisionEncoder) != bool(sizes):
                raise ValueError("pictures that keep their sides' ratio (data.image_patches) and model.vision.backbone=siglip2 go together")
            table = {} if inputs.image_augmentation is None else {"augmentation": inputs.image_augmentation}
            beside = ({"image_sizes": sizes[0]} if sizes else {}) | table

            def see(images: Tensor, image_mask: Tensor, *others: Tensor) -> Sequence[Tensor]:
                return self._see(images, image_mask, **dict(zip(beside, others, strict=True)))

            tokens, *features = self._shared(see, inputs.images, inputs.image_mask, *beside.values())
            present = inputs.image_mask.any(1, keepdim=True).expand(-1, tokens.size(1))
            if isinstance(self.vision, QwenVisionEncoder):
                grid = self.vision.grid(inputs.images)
                if self.config.vision.marks:  # of the text embedding, which all tensor-parallel ranks look up together
                    frames = inputs.image_mask.shape
                    before, behind = self.text(torch.tensor(self.config.vision.marks, device=tokens.device)).expand(*frames, -1, -1).split(1, 2)
                    tokens = torch.cat([before, tokens.unflatten(1, (frames[1], -1)), behind], 2).flatten(1, 2)
                    features = [F.pad(part.unflatten(1, (frames[1], -1)), (0, 0, 1, 1)).flatten(1, 2) for part in features]
                present = inputs.image_mask.repeat_interleave(tokens.size(1) // inputs.image_mask.size(1), 1)
            pieces.append((1, tokens, present))
        # Prompts are text: the embedding runs for every view.
        pieces.append((0, self.text(inputs.token_ids), inputs.token_mask))

        keep = torch.cat([present for _, _, present in pieces], 1)
        kinds = [kind for kind, tokens, _ in pieces for _ in range(tokens.size(1))]
        kind = torch.tensor(kinds, device=keep.device)
        first = kinds.index(1) if features else 0
        added = [F.pad(part, (0, 0, first, len(kinds) - first - part.size(1))) for part in features]
        places = None if grid is None else places_of(pieces, grid, bool(self.config.vision.marks))
        hidden = self.tower(torch.cat([tokens for _, tokens, _ in pieces], 1), kind, keep, places, added)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        hidden = hidden.to(wide)
        if self.config.pooling == "tanh_mean":
            hidden = hidden.tanh()

        pool = last_position if self.config.pooling == "last_token" else masked_mean
        fused = pool(hidden, keep)
        if torch.is_grad_enabled() and not fused.requires_grad:
            # Nothing that ran is trainable. The backward must reach FSDP2's hooks all the same: gradients of
            # earlier micro-batches are reduced in the step's last backward.
            fused = fused + torch.zeros((), dtype=wide, device=fused.device, requires_grad=True)
        vision = text = None
        if per_modality:
            if "vision" in inputs.modalities:
                vision = pool(hidden, keep & (kind == 1))
            own_text = torch.zeros_like(keep)
            own_text[:, keep.size(1) - inputs.text_mask.size(1) :] = inputs.text_mask & inputs.token_mask
            text = pool(hidden, own_text)
        return Embeddings(fused=fused, vision=vision, text=text)


    def _see(
        self, images: Tensor, image_mask: Tensor, image_sizes: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Sequence[Tensor]:
        """images [b, f, 3, height, width], or with image_sizes [b, f, 2] their patches, and image_mask bool [b, f]: latents
        [b, l, h]; of Qwen3-VL's image tower its tokens [b, f * p, h] and, in the same shape, what is added to them behind the
        tower's first layers."""
        images = normalise(images, augmentation, image_sizes)
        if isinstance(self.vision, QwenVisionEncoder):
            images = images.masked_fill(~image_mask[:, :, None, None, None], 0)
            return [part.unflatten(0, image_mask.shape).flatten(1, 2) for part in self.vision(images.flatten(0, 1))]
        if image_sizes is not None:
            patches = self.vision(images.flatten(0, 1), image_sizes.flatten(0, 1))
            return [self.perceiver(patches.unflatten(0, image_mask.shape), image_mask, present_patches(image_sizes, images.size(2)))]
        patches = self.vision(images.flatten(0, 1))
        return [self.perceiver(patches.unflatten(0, image_mask.shape), image_mask)]

    def _hear(self, audio: Tensor, audio_mask: Tensor) -> Sequence[Tensor]:
        """audio [b, c, frames, mel_bins], audio_mask bool [b, c]: one token, [b, 1, h]."""
        return [self.audio["adapter"](self.audio["encoder"](audio, audio_mask))]

    def _shared(self, encode: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
        shapes = (self.config.vision.encoder, self.config.vision.perceiver, self.config.audio.encoder)
        return encode_own_rows(encode, self.sharing, *inputs, dropout=self.training and any(shape.dropout > 0 for shape in shapes))


def places_of(pieces: Sequence[tuple[int, Tensor, Tensor]], grid: tuple[int, int], marked: bool) -> Tensor:
    """Frame, row and column of each position, int64 [3, b, s], as Qwen3-VL counts them. pieces: (kind, [b, n, h], present [b, n]).

    A position that is no visual token is one further on in all three. A frame's tokens [rows, columns] begin together
    where the frame begins and count rows and columns from there; what follows begins behind its longer side. marked: a
    frame's tokens stand between two marks, which count as text. A frame that a row lacks takes no room: the row's vector
    must not depend on how many frames its neighbours have.
    """
    device = pieces[0][1].device
    frame = torch.stack([torch.zeros(grid), *torch.meshgrid(*[torch.arange(float(side)) for side in grid], indexing="ij")]).flatten(1).long()
    length = max(grid)
    if marked:
        ends = torch.tensor([0, length + 1]).expand(3, -1)
        frame, length = torch.cat([ends[:, :1], frame + 1, ends[:, 1:]], 1), length + 2
    frame, places = frame.to(device), []
    start = torch.zeros(len(pieces[0][1]), dtype=torch.int64, device=device)
    for kind, tokens, present in pieces:
        if kind != 1:
            places.append((start[:, None] + torch.arange(tokens.size(1), device=device)).expand(3, -1, -1))
            start = start + tokens.size(1)
            continue
        for first in range(0, tokens.size(1), frame.size(1)):
            places.append(start[None, :, None] + frame[:, None])
            start = start + length * present[:, first]
    return torch.cat(places, 2)


def _one_absent_row(inputs: EncoderInputs) -> EncoderInputs:
    """One row with nothing present, in the shapes of an empty micro-batch (at least one token wide)."""
    tokens = max(1, inputs.token_ids.size(1))
    changes: dict[str, Any] = {
        "token_ids": inputs.token_ids.new_zeros(1, tokens),
        "token_mask": inputs.token_mask.new_zeros(1, tokens),
        "text_mask": inputs.text_mask.new_zeros(1, tokens),
    }
    for name in ("images", "image_mask", "image_sizes", "image_augmentation", "audio", "audio_mask"):
        value = getattr(inputs, name)
        if value is not None:
            changes[name] = value.new_zeros(1, *value.shape[1:])
    return dataclasses.replace(inputs, **changes)
