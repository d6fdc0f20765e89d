"""Where the tokens of a micro-batch lie when nothing is filled up: lists of whole numbers, made
on the CPU before the upload.

The tower reads one long sequence: the kept positions of all rows, one row behind the other, the
shortest rows first, so that rows of equal length are neighbours. Which positions are kept is known
from the masks before they leave the CPU; a device that had to look for them would make the host
wait. All lists of a micro-batch are one tensor: one upload.

Pictures are treated alike: absent frames are not encoded, patches that fill a picture up
(SigLIP2's) neither, and the perceiver reads its latents and the present tokens alone. Where
tensor-parallel peers encode a part of the rows each, every peer's part has lists of its own.

A micro-batch with nothing in it keeps one filler position (and a peer without a picture one filler
frame), whose result no read-out takes: all ranks must run the same parts of the model.

Shape legend: b rows, s positions of a padded row, p kept positions in all, f frames a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import ModelConfig, ParallelConfig
from sailplan.data.record import EncoderInputs
from sailplan.runtime.transfer import to_device

Numbers = NDArray[np.int64]
Runs = tuple[
    tuple[int, int], ...
]  # (rows, length) of neighbouring rows of equal length, shortest first
READ_OUTS = ("fused", "vision", "text", "audio")
OTHER, VISUAL, OWN_TEXT, SOUND_TOKEN = 0, 1, 2, 3  # what a position counts as in the read-outs


@dataclass(frozen=True)
class SequenceLayout:
    """What a model's sequences look like, as far as their lengths depend on it."""

    latents: (
        int | None
        # Visual tokens of a row, however many pictures it has; None: every picture has its own
        # tokens
    )
    side: int  # pixels of the square that is one token of the image encoder
    in_ratio: bool  # pictures come as patches of their own grid (image_sizes)
    marks: tuple[int, ...]  # token ids before and behind each picture
    dimensions: int  # of a place: 1, or 3 (frame, row, column)
    peers: int  # tensor-parallel peers that encode a part of a view's rows each

    @classmethod
    def of(cls, model: ModelConfig, peers: int = 1) -> SequenceLayout:
        """The layout of a model whose image and sound encoders `peers` tensor-parallel ranks
        share out.
        """
        vision = model.vision
        own = vision.backbone == "qwen3_vl"
        return cls(
            latents=None if own else vision.latents,
            side=vision.patch * (vision.merge if own else 1),
            in_ratio=vision.backbone == "siglip2",
            marks=tuple(vision.marks) if own else (),
            dimensions=3 if model.rope_sections else 1,
            peers=peers,
        )

    @classmethod
    def planned(cls, model: ModelConfig, parallel: ParallelConfig) -> SequenceLayout:
        """The layout of the model that a run builds."""
        return cls.of(model, parallel.tensor if parallel.encoders == "share" else 1)


@dataclass(frozen=True)
class Packing:
    """The lists of one micro-batch. `numbers` holds them all; `lists` gives them by name.

    Of the tower (k = 1, or 3 places):

        ids      token ids of the marks, then of the kept text positions in packed order (never
        none) source   [p] each packed position in cat(audio [b], visual [b * v], text); missing
        where all is text place    [k * p] the position within its row, gaps of absent parts
        included counts   [4 * b] kept positions of each read-out (all, visual, own text, sound), by
        row last     [4 * b] the last one in the pack, -1 where there is none
        what     [p] OTHER, VISUAL, OWN_TEXT or SOUND_TOKEN
        visual   [..] packed positions of visual tokens
        offsets  [b + 1] where rows begin in the pack, shortest first, absent ones too
        slot     [b] which of them each row is
        ends     [n + 1] the same of the n rows that have something, and the filler: cumulative
        lengths of `runs`

    Of the peer g's pictures, missing where all frames are present: `frames g` those to encode (of
    all its frames; of a picture in its own ratio, `patches g` of all its patches, with `patch ends
    g`), `source g` the perceiver's positions in cat(latents, tokens), `latents g` where the latents
    are in its pack, `ends g` its cumulative lengths.
    """

    layout: SequenceLayout
    numbers: Tensor  # int64 [..]
    spans: tuple[tuple[str, int], ...]  # name and length of each list, in order
    runs: dict[
        str, Runs
    ]  # of the tower ("tower"), and of the peer g's perceiver ("rows g") and patches ("patches g")
    absent: frozenset[int]  # peers without a picture, whose one frame is a filler

    def to(self, device: torch.device | str) -> Packing:
        return replace(self, numbers=to_device(self.numbers, torch.device(device)))

    def lists(self) -> dict[str, Tensor]:
        """int64 each, views of `numbers`."""
        return dict(
            zip(
                [name for name, _ in self.spans],
                self.numbers.split([size for _, size in self.spans]),
                strict=True,
            )
        )


@dataclass
class OmniInputs(EncoderInputs):
    """Inputs of the omni tower; absent parts are masked."""

    token_ids: Tensor  # int64 [b, t]; prompt then text, padded with 0
    token_mask: Tensor  # bool [b, t]; True at real tokens
    # Bool [b, t]; True at tokens of the item's own text (no prompt): read-out of the text vector
    text_mask: Tensor
    images: Tensor | None = (
        # uint8 [b, f, 3, height, width] (of a floating dtype: normalised already, values in [-1,
        # 1])
        None
    )
    image_mask: Tensor | None = None  # bool [b, f]
    # With data.image_patches, int64 [b, f, 2]: patches of each picture down and across; `images`
    # are then its patches, row by row, uint8 [b, f, p, 3 * patch * patch] (a patch's rows, columns,
    # colours), filled up to the same p.
    image_sizes: Tensor | None = None
    image_augmentation: Tensor | None = (
        None  # float32 [b, 10]: data.image.draw_augmentation of each row; None: nothing is changed
    )
    audio: Tensor | None = (
        None  # float16 [b, c, frames, mel_bins] log-mel; any floating dtype is taken
    )
    audio_mask: Tensor | None = None  # bool [b, c]
    # Where the kept positions lie (`pack`), made on the CPU; None: the encoder packs, which waits
    # for masks on a device.
    packing: Packing | None = None

    @property
    def rows(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device | str) -> Self:
        return replace(
            super().to(device), packing=None if self.packing is None else self.packing.to(device)
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(super().mapped(change), packing=None)


def pack(inputs: OmniInputs, layout: SequenceLayout) -> Packing:
    """The lists of a micro-batch, on its device.

    To be called before the upload: masks on a device make the host wait.

    A micro-batch of no rows is packed as one row with nothing present.
    """
    rows = max(inputs.rows, 1)

    def known(mask: Tensor | None, width: int = 0) -> NDArray[np.bool_]:
        assert mask is not None
        return (
            mask.cpu().numpy()
            if inputs.rows
            else np.zeros((1, max(width, mask.shape[1])), dtype=bool)
        )

    lists: dict[str, Numbers] = {}
    runs: dict[str, Runs] = {}
    absent: set[int] = set()
    keeps: list[Any] = []  # bool [b, n] of each piece
    first_visual = text = 0  # columns
    frame: Numbers | None = None
    if "audio" in inputs.modalities:
        keeps.append(known(inputs.audio_mask).any(1, keepdims=True))
        first_visual = text = 1
    if "vision" in inputs.modalities:
        assert inputs.images is not None
        present = known(inputs.image_mask)
        if layout.latents is None:
            grid = (inputs.images.shape[-2] // layout.side, inputs.images.shape[-1] // layout.side)
            frame = _frame_places(grid, bool(layout.marks))
            keeps.append(present.repeat(frame.shape[1], 1))
        else:
            keeps.append(present.any(1, keepdims=True).repeat(layout.latents, 1))
        text = first_visual + keeps[-1].shape[1]
        sizes = (
            None
            if inputs.image_sizes is None
            else inputs.image_sizes.cpu().numpy().reshape(-1, present.shape[1], 2)
        )
        _pack_pictures(lists, runs, absent, layout, present, tuple(inputs.images.shape), sizes)
    keeps.append(known(inputs.token_mask, 1))
    keep = np.concatenate(keeps, 1)

    lengths = keep.sum(1)
    order = np.argsort(lengths, kind="stable")
    slot, column = np.nonzero(keep[order])
    row = order[slot]
    is_text = column >= text
    ids = (
        inputs.token_ids.cpu().numpy()[row[is_text], column[is_text] - text]
        if is_text.any()
        else np.zeros(1, dtype=np.int64)
    )
    own = np.zeros_like(keep)
    own[:, text:] = known(inputs.text_mask, 1) & keeps[-1]
    medium = np.where(column >= first_visual, VISUAL, SOUND_TOKEN)
    what = np.where(own[row, column], OWN_TEXT, np.where(is_text, OTHER, medium))
    # Sources: the sound of each row, its visual tokens, the text in packed order.
    source = np.where(
        column < first_visual,
        row,
        first_visual * rows + row * (text - first_visual) + column - first_visual,
    )
    source[is_text] = rows * text + np.arange(is_text.sum())
    places = np.broadcast_to(np.arange(keep.shape[1]), (rows, keep.shape[1]))[None]
    if layout.dimensions == 3:
        places = (
            np.broadcast_to(places, (3, *places.shape[1:]))
            if frame is None
            else _places(keep, first_visual, text, frame)
        )
    place = places[:, row, column]
    if not len(row):  # the filler is the first text token
        what, place, source = (
            np.zeros(1, dtype=np.int64),
            np.zeros((len(places), 1), dtype=np.int64),
            np.full(1, rows * text),
        )

    offsets = np.concatenate([[0], lengths[order].cumsum()])
    chosen = (np.ones_like(what), what == VISUAL, what == OWN_TEXT, what == SOUND_TOKEN)
    counts, last = np.zeros((len(chosen), rows), dtype=np.int64), np.full((len(chosen), rows), -1)
    for number, mask in enumerate(chosen):
        at = np.flatnonzero(mask[: len(row)])
        counts[number] = np.bincount(row[at], minlength=rows)
        last[number, row[at]] = at  # positions ascend: the last one stays
    lists["ids"] = np.concatenate(
        [np.array(layout.marks if frame is not None else (), dtype=np.int64), ids]
    )
    if text:
        lists["source"] = source
    lists |= {
        "place": place.ravel(),
        "counts": counts.ravel(),
        "last": last.ravel(),
        "what": what,
        "visual": np.flatnonzero(what == VISUAL),
    }
    lists |= {"offsets": offsets, "slot": np.argsort(order, kind="stable")}
    runs["tower"], lists["ends"] = _runs(lengths)
    numbers = torch.from_numpy(
        np.concatenate([each.astype(np.int64, copy=False) for each in lists.values()])
    )
    spans = tuple((name, len(each)) for name, each in lists.items())
    return Packing(layout, numbers.to(inputs.token_ids.device), spans, runs, frozenset(absent))


def _runs(lengths: Numbers) -> tuple[Runs, Numbers]:
    """Runs and cumulative lengths of rows, those of length 0 left out; where no row is left, of
    one filler position.
    """
    lengths = np.sort(lengths[lengths > 0]) if lengths.any() else np.ones(1, dtype=np.int64)
    distinct, counts = np.unique(lengths, return_counts=True)
    return tuple(zip(counts.tolist(), distinct.tolist(), strict=True)), np.concatenate(
        [[0], lengths.cumsum()]
    )


def _pack_pictures(
    lists: dict[str, Numbers],
    runs: dict[str, Runs],
    absent: set[int],
    layout: SequenceLayout,
    present: NDArray[np.bool_],
    shape: tuple[int, ...],
    sizes: Numbers | None,
) -> None:
    """Adds each peer's lists.

    present [b, f]; shape of the images; sizes [b, f, 2] of pictures in their own ratio.
    """
    rows, frames = present.shape
    each = -(-rows // layout.peers)
    if layout.in_ratio and sizes is not None:
        patches = shape[2]
        counts = (
            sizes.prod(-1).clip(max=patches)
            if len(sizes)
            else np.zeros((1, frames), dtype=np.int64)
        )
    else:
        patches = (shape[-2] // layout.side) * (shape[-1] // layout.side)
        counts = np.full((rows, frames), patches)
    counts = np.where(present, counts, 0)
    for peer in range(layout.peers):
        own = counts[peer * each : (peer + 1) * each]
        own = np.concatenate([own, np.zeros((each - len(own), frames), dtype=own.dtype)])
        if own.all() and sizes is None:
            continue
        flat = own.ravel()
        if not flat.any():
            absent.add(peer)
            flat = np.concatenate(
                [[1 if layout.in_ratio else patches], np.zeros(flat.size - 1, dtype=np.int64)]
            )
        if layout.in_ratio:
            order = np.argsort(flat, kind="stable")
            slot, number = np.nonzero(np.arange(patches) < flat[order, None])
            lists[f"patches {peer}"] = order[slot] * patches + number
            runs[f"patches {peer}"], lists[f"patch ends {peer}"] = _runs(flat)
            picture = order[slot]
        else:
            lists[f"frames {peer}"] = encoded = np.flatnonzero(flat)
            picture = encoded.repeat(patches)
        if layout.latents is None:
            continue
        # The perceiver's rows: latents, then the tokens of their present pictures, in any order.
        taken = np.flatnonzero(own.ravel()[picture])  # not the filler
        token_row = picture[taken] // frames
        row = np.concatenate([np.arange(each).repeat(layout.latents), token_row])
        source = np.concatenate([np.arange(each * layout.latents), each * layout.latents + taken])
        lengths = np.bincount(row, minlength=each)
        rank = np.argsort(np.argsort(lengths, kind="stable"), kind="stable")
        packed = np.argsort(rank[row], kind="stable")
        lists[f"source {peer}"] = source[packed]
        where = np.empty(len(packed), dtype=np.int64)
        where[packed] = np.arange(len(packed))
        lists[f"latents {peer}"] = where[: each * layout.latents]
        runs[f"rows {peer}"], lists[f"ends {peer}"] = _runs(lengths)


def _frame_places(grid: tuple[int, int], marked: bool) -> Numbers:
    """Frame, row and column of a picture's tokens relative to its beginning [3, tokens], marks
    included.
    """
    tokens = np.stack(
        [
            np.zeros(grid, dtype=np.int64),
            *np.meshgrid(*[np.arange(side) for side in grid], indexing="ij"),
        ]
    ).reshape(3, -1)
    if not marked:
        return tokens
    return np.concatenate(
        [np.zeros((3, 1), dtype=np.int64), tokens + 1, np.full((3, 1), max(grid) + 1)], 1
    )


def _places(keep: NDArray[np.bool_], first: int, text: int, frame: Numbers) -> Numbers:
    """Frame, row and column of each position [3, b, s], as Qwen3-VL counts them.

    A position that is no visual token is one further on in all three. A frame's tokens begin
    together where the frame begins and count rows and columns from there; what follows begins
    behind its longer side; its marks count as text. A frame that a row lacks takes no room: the
    row's vector must not depend on how many frames its neighbours have.
    """
    start = np.full(len(keep), first)
    parts = [np.broadcast_to(np.arange(first), (3, len(keep), first))]
    for begin in range(first, text, frame.shape[1]):
        parts.append(start[None, :, None] + frame[:, None])
        start = start + (frame.max() + 1) * keep[:, begin]
    parts.append(
        np.broadcast_to(
            start[:, None] + np.arange(keep.shape[1] - text), (3, len(keep), keep.shape[1] - text)
        )
    )
    return np.concatenate(parts, 2)
