"""The gradient cache: a contrastive loss over a batch of any size, in the memory of one
micro-batch.

The loss couples all rows, but the encoder does not: given the gradient of the loss with respect to
each embedding, a micro-batch's share of the parameters' gradient needs that micro-batch alone (Gao
et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv
2101.06983). So:

(A) encode all micro-batches without graphs, except the last few, whose graphs are kept
(step.kept_graphs says how many); (B) compute the loss on the embeddings as leaves, and their
gradients (the caller's part); (C) from the last micro-batch to the first, go backward with the
cached gradients, through the kept graphs and then through
    those of the others, which are encoded again.

The result is the gradient of the full batch, not an approximation: each micro-batch is encoded
under a seed of its own, so dropout in (C) repeats that in (A). The order of summation is the same
however many graphs are kept, which may therefore change at any step. Gradients are reduced over
data-parallel ranks in the last backward only.
Views whose towers are all frozen are not encoded a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sailplan.data.record import EncoderInputs, StepBatch, ViewKey
from sailplan.model.parallelize import set_gradient_sync
from sailplan.model.protocol import FUSED, TOKENS, Embeddings, Encoder
from sailplan.objective.protocol import EncodedStep, EncodedView
from sailplan.runtime.seeds import derive, seed_torch
from sailplan.runtime.transfer import to_device
from sailplan.step.kept_graphs import KeptGraphs
from sailplan.step.upload import Uploads


@dataclass
class MicroBatch:
    """One call of the encoder: where its rows belong, the seed of both passes, and what must be
    kept between them.

    inputs: as the loader made them; both passes upload them (step.upload).
    """

    batch: int
    view: ViewKey
    inputs: EncoderInputs
    per_modality: bool
    tokens: bool
    seed: int
    trainable: bool
    keep_graph: bool = False
    outputs: Embeddings | None = None  # with its graph, where kept
    leaves: dict[str, Tensor] = field(
        default_factory=dict
    )  # vector name -> [b, D], of tokens [b, t, D], what the losses see
    token_mask: Tensor | None = None  # bool [b, t]
    gradients: dict[str, Tensor | None] = field(
        default_factory=dict
    )  # of the leaves, once the losses are through


def view_is_trainable(encoder: nn.Module, modalities: Iterable[str]) -> bool:
    """Whether any part of the encoder that a view of these modalities runs through has a
    trainable parameter.

    A module that is no `Encoder` counts as one part.
    """
    if not isinstance(encoder, Encoder):
        return any(parameter.requires_grad for parameter in encoder.parameters())
    used = encoder.used_parts(modalities)
    return any(
        parameter.requires_grad
        for name, part in encoder.parts().items()
        if name in used
        for parameter in part
    )


class GradientCache:
    """Encodes the views of a step's batches (A), and carries gradients of the embeddings to the
    encoder (C).

    encoder: a model.protocol.Encoder, plain or sharded by model.parallelize.
    kept_graphs: how many trainable micro-batches, counted from the last, keep their graphs.
    """

    def __init__(self, encoder: nn.Module, kept_graphs: KeptGraphs) -> None:
        self.encoder = encoder
        self.kept_graphs = kept_graphs
        self.device = torch.device("cpu")
        self.micro_batches: list[MicroBatch] = []

    def encode(
        self,
        batches: Sequence[StepBatch],
        per_modality: Sequence[bool],
        tokens: Sequence[bool],
        device: torch.device,
        seed_parts: Sequence[int | str],
    ) -> list[EncodedStep]:
        """(A): the batches' views as leaves that require a gradient where their encoder does.

        per_modality, tokens: for each batch, whether its losses need the modalities' own vectors,
        and those of all positions.
        seed_parts: what the seeds are derived from, besides the micro-batch's own place: run seed,
        stage, step, data-parallel rank. The order of encoding is that of the batches and, inside,
        of the views' names: the same on all ranks.
        """
        self.device = device
        self.micro_batches = [
            MicroBatch(
                number,
                view,
                inputs,
                modalities,
                positions,
                derive(*seed_parts, number, str(view), index),
                trainable,
            )
            for number, (batch, modalities, positions) in enumerate(
                zip(batches, per_modality, tokens, strict=True)
            )
            for view, rows in sorted(batch.views.items(), key=lambda item: str(item[0]))
            if rows.encoded_with is None
            for trainable in [view_is_trainable(self.encoder, rows.micro_batches[0].modalities)]
            for index, inputs in enumerate(rows.micro_batches)
        ]
        trainable = [micro_batch for micro_batch in self.micro_batches if micro_batch.trainable]
        number = self.kept_graphs.begin([str(seed_parts[1]), *(batch.dataset for batch in batches)])
        kept = len(trainable) if number < 0 else min(number, len(trainable))
        for micro_batch in trainable[len(trainable) - kept :]:
            micro_batch.keep_graph = True
        uploads = Uploads((micro_batch.inputs for micro_batch in self.micro_batches), device)
        for micro_batch in self.micro_batches:
            outputs = self._run(micro_batch, next(uploads), micro_batch.keep_graph)
            for name, vector in outputs.named().items():
                micro_batch.leaves[name] = vector.detach().requires_grad_(micro_batch.trainable)
            micro_batch.token_mask = outputs.token_mask
            micro_batch.outputs = outputs if micro_batch.keep_graph else None
        return [self._assemble(number, batch, device) for number, batch in enumerate(batches)]

    def backward(self) -> int:
        """(C): accumulates the encoder's gradients from the leaves' gradients; returns how many
        micro-batches ran backward.

        The gradient reduction is on in the last of them only. Views that no loss used stay out;
        which ones is a matter of the losses' graphs, not of the data, so all ranks meet in the same
        collectives.
        """
        for micro_batch in self.micro_batches:
            # The leaves' own numbers are not needed any more: a step's memory for every row is one
            # vector and its gradient.
            micro_batch.gradients = {name: leaf.grad for name, leaf in micro_batch.leaves.items()}
            micro_batch.leaves = {}
        used = [
            m
            for m in self.micro_batches
            if m.trainable and any(gradient is not None for gradient in m.gradients.values())
        ]
        for micro_batch in self.micro_batches:
            if all(gradient is None for gradient in micro_batch.gradients.values()):
                micro_batch.outputs = None
        ordered = used[::-1]
        uploads = Uploads((m.inputs for m in ordered if not m.keep_graph), self.device)
        for number, micro_batch in enumerate(ordered):
            last = number == len(ordered) - 1
            if last or number == 0:
                set_gradient_sync(self.encoder, last)
            self._backward(micro_batch, uploads)
            micro_batch.gradients = {}
        self.micro_batches = []
        return len(ordered)

    def _backward(self, micro_batch: MicroBatch, uploads: Iterator[EncoderInputs]) -> None:
        """Go through the kept graph, or encodes again with a graph; the graph is gone when
        this returns.
        """
        outputs, micro_batch.outputs = micro_batch.outputs, None
        if outputs is None:
            outputs = self._run(micro_batch, next(uploads), True)
        vectors, gradients = [], []
        for name, vector in outputs.named().items():
            gradient = micro_batch.gradients[name]
            if vector.requires_grad:
                vectors.append(vector)
                gradients.append(torch.zeros_like(vector) if gradient is None else gradient)
        torch.autograd.backward(vectors, gradients)

    def _run(self, micro_batch: MicroBatch, inputs: EncoderInputs, graph: bool) -> Embeddings:
        """inputs: the micro-batch's, on the device."""
        seed_torch(micro_batch.seed, self.device)
        with (
            torch.set_grad_enabled(graph),
            self.kept_graphs.measuring() if graph else nullcontext(),
        ):
            asked = {"tokens": True} if micro_batch.tokens else {}  # few encoders know the word
            return self.encoder(inputs, per_modality=micro_batch.per_modality, **asked)

    def _assemble(self, number: int, batch: StepBatch, device: torch.device) -> EncodedStep:
        """One batch's encodings, rows back in the step's order."""
        parts: dict[ViewKey, list[MicroBatch]] = {}
        for micro_batch in self.micro_batches:
            if micro_batch.batch == number:
                parts.setdefault(micro_batch.view, []).append(micro_batch)
        encoded = {
            view: {
                vector: _joined([one.leaves[vector] for one in each]) for vector in each[0].leaves
            }
            for view, each in parts.items()
        }
        masks_of = {
            view: [one.token_mask for one in each if one.token_mask is not None]
            for view, each in parts.items()
        }
        views = {}
        for name, rows in batch.views.items():
            order = to_device(rows.order, device)
            held, masks = encoded[rows.encoded_with or name], masks_of[rows.encoded_with or name]
            vectors = {vector: every[order] for vector, every in held.items()}
            fused, valid, ids = (
                vectors.pop(FUSED),
                to_device(rows.valid, device),
                to_device(rows.ids, device),
            )
            views[name] = EncodedView(
                fused,
                valid,
                ids,
                rows.group,
                tokens=vectors.pop(TOKENS, None),
                token_mask=_joined(masks)[order] if masks else None,
                by_modality=vectors,
                host_valid=rows.valid,
                host_ids=rows.ids,
            )
        return EncodedStep(
            dataset=batch.dataset,
            views=views,
            patterns=batch.patterns,
            scores=None if batch.scores is None else to_device(batch.scores, device),
            target_log_probability=None
            if batch.target_log_probability is None
            else to_device(batch.target_log_probability, device),
            teacher_scores=None
            if batch.teacher_scores is None
            else to_device(batch.teacher_scores, device),
            labels=batch.labels,
            teachers={name: to_device(vectors, device) for name, vectors in batch.teachers.items()},
            host_scores=batch.scores,
            rank_rows=batch.rank_rows,
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all micro-batches, [b, ...] each; of those of positions [b, t, ...] the shorter ones
    padded with zeros.
    """
    if parts[0].ndim == 1 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    padding = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
    return torch.cat([pad(part, lengths) for part, lengths in zip(parts, padding, strict=True)])
