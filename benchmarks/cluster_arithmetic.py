"""What a step of the full size moves and computes on 64 and 512 GPUs: arithmetic, no measurement.

Parameters are counted (the model is laid out without its numbers). FLOP are a formula, which a test
compares with torch's counter on a small model. Everything else is estimated from these, the machine
below, and two assumptions that the table names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sailplan.config.compose import compose
from sailplan.config.schema import ModelConfig, TransformerShape, VisionConfig
from sailplan.model.blocks import head_size
from sailplan.model.count import count_parameters
from sailplan.model.encoders.omni.published import published_config

# An H100 SXM node: peak of dense bfloat16, one direction of NVLink, a 400 Gb/s port for each GPU.
PEAK, NVLINK, NETWORK, NODE = 989e12, 450e9, 50e9, 8
MATRIX_SHARE = 0.5  # assumed: part of the peak that the encoders reach while they compute
PAIRS = {
    "query": {"modalities": ("text",), "tokens": 32},
    "target": {"modalities": ("vision", "text"), "tokens": 64},
}  # assumed: one frame


def _layer_flop(shape: TransformerShape, positions: int) -> float:
    query, key_value = (
        head_size(shape) * shape.heads,
        head_size(shape) * (shape.key_value_heads or shape.heads),
    )
    linear = shape.hidden * (
        2 * query + 2 * key_value + (3 if shape.gated else 2) * shape.feed_forward
    )
    return 2 * positions * linear + 4 * positions**2 * query


def picture_shape(vision: VisionConfig) -> TransformerShape:
    """Return the picture encoder's stack; of a published one what its config.json says."""
    if vision.backbone != "published":
        return vision.encoder
    said = published_config("model.vision.published", vision.published)
    return TransformerShape(
        layers=said.num_hidden_layers,
        hidden=said.hidden_size,
        heads=said.num_attention_heads,
        feed_forward=said.intermediate_size,
        gated=False,
    )


def row_flop(
    config: ModelConfig, modalities: tuple[str, ...], tokens: int, image_size: int, frames: int = 1
) -> float:
    """FLOP of encoding one row (2 for a multiplication with its addition), matrix products and
    attention; stems, norms and audio left out.
    """
    vision, positions, flop = config.vision, tokens, 0.0
    if "vision" in modalities:
        patches = (image_size // vision.patch) ** 2
        encoder = picture_shape(vision)
        flop += frames * encoder.layers * _layer_flop(encoder, patches)
        joint = vision.latents + frames * patches
        flop += vision.perceiver.layers * _layer_flop(vision.perceiver, joint)
        flop += (
            2 * frames * patches * encoder.hidden * vision.perceiver.hidden
            + 2 * vision.latents * vision.perceiver.hidden * config.tower.hidden
        )
        positions += vision.latents
    return flop + config.tower.layers * _layer_flop(config.tower, positions)


@dataclass
class Layout:
    """A world, its batch and how parameters lie on it."""

    gpus: int
    batch: int
    hybrid: bool

    @property
    def name(self) -> str:
        return f"{self.gpus} GPUs, batch {self.batch:,}, {'a copy in each node' if self.hybrid else 'cut over all ranks'}"


LAYOUTS = [
    Layout(gpus, batch, hybrid)
    for gpus, batch in ((64, 2048), (512, 16384))
    for hybrid in (False, True)
]


def communication(parameters: int, layout: Layout) -> dict[str, float]:
    """Bytes a rank and step, and the seconds that they take: gathers in bfloat16 once a step,
    reductions in float32 once a step.

    Cut over all ranks: every byte crosses the slowest link, 2 P (W-1)/W and 4 P (W-1)/W. A copy in
    each node of 8: the same inside the node, and an all-reduce of the rank's eighth between the
    nodes, 2 x 4 P/8 (n-1)/n.
    """
    if not layout.hybrid:
        part = (layout.gpus - 1) / layout.gpus
        gather, reduce = 2 * parameters * part, 4 * parameters * part
        return {
            "gather": gather,
            "reduce": reduce,
            "network": gather + reduce,
            "gather_seconds": gather / NETWORK,
            "reduce_seconds": reduce / NETWORK,
        }
    nodes, part = layout.gpus / NODE, (NODE - 1) / NODE
    gather, reduce = 2 * parameters * part, 4 * parameters * part
    between = 2 * 4 * parameters / NODE * (nodes - 1) / nodes
    seconds = {
        "gather_seconds": gather / NVLINK,
        "reduce_seconds": reduce / NVLINK + between / NETWORK,
    }
    return {"gather": gather, "reduce": reduce + between, "network": between, **seconds}


def exchange(layout: Layout, embedding: int) -> dict[str, float]:
    """Of one pattern's keys: all-gather in bfloat16, reduce-scatter of their gradients in
    float32 (kernels.md, section 5).
    """
    rows = layout.batch / layout.gpus
    moved = (layout.gpus - 1) * rows * embedding * (2 + 4)
    return {"bytes": moved, "seconds": moved / NETWORK}


def estimate(
    layout: Layout, model: ModelConfig, image_size: int, micro_batch: int, forward_multiple: float
) -> dict[str, Any]:
    """forward_multiple: FLOP of a step over F, as counted."""
    parameters = count_parameters(model)["total"]
    rows = layout.batch / layout.gpus
    forward = rows * sum(
        row_flop(model, view["modalities"], view["tokens"], image_size) for view in PAIRS.values()
    )
    micro_batches = len(PAIRS) * math.ceil(rows / micro_batch)
    speed = PEAK * MATRIX_SHARE
    compute = forward_multiple * forward / speed
    moved = communication(parameters, layout)
    traded = exchange(layout, model.embedding)
    # A gather of the next layer hides under this layer of the first micro-batch's forward, a
    # reduction under the last micro-batch's backward.
    first, last = forward / micro_batches / speed, 2 * forward / micro_batches / speed
    exposed = max(0.0, moved["gather_seconds"] - first) + max(0.0, moved["reduce_seconds"] - last)
    loss = 8 * rows * layout.batch * model.embedding / speed
    step = compute + exposed + loss + traded["seconds"]
    return {
        "layout": layout.name,
        "rows": rows,
        "forward_flop": forward,
        "compute_seconds": compute,
        **moved,
        "exchange_bytes": traded["bytes"],
        "exchange_seconds": traded["seconds"],
        "loss_seconds": loss,
        "hidden_gather": min(moved["gather_seconds"], first),
        "hidden_reduce": min(moved["reduce_seconds"], last),
        "exposed_seconds": exposed,
        "step_seconds": step,
        "mfu": 3 * forward / step / PEAK,
    }


def table(forward_multiples: dict[str, float]) -> str:
    """In Markdown; forward_multiples: what the count of a step gave, by what it is."""
    config = compose(["experiment=sail_1b5"])
    parameters = count_parameters(config.model)
    sizes = ", ".join(
        f"{part} {count / 1e6:,.0f} M" for part, count in parameters.items() if part != "total"
    )
    lines = [
        f"The full size (`experiment=sail_1b5`): {parameters['total'] / 1e9:.2f} billion "
        f"parameters (counted: {sizes}). A pair is a query of "
        f"{PAIRS['query']['tokens']} tokens and a target of one {config.data.image_size}-pixel "
        f"frame and {PAIRS['target']['tokens']} tokens (assumed). Peak "
        f"{PEAK / 1e12:.0f} TFLOP/s, of which the encoders reach {MATRIX_SHARE:.0%} while they "
        "compute (assumed; no GPU has measured it), NVLink "
        f"{NVLINK / 1e9:.0f} GB/s, network {NETWORK / 1e9:.0f} GB/s a GPU, nodes of {NODE}.",
        "",
        "| layout | FLOP / F (counted) | arithmetic, s (est.) | gathers, GB (est.) | reductions, "
        "GB (est.) | over the network, GB (est.) | "
        "hidden / exposed, s (est.) | exchange of a pattern, MB and ms (est.) | loss, ms (est.) | "
        "step, s (est.) | MFU (est.) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for layout in LAYOUTS:
        for label, multiple in forward_multiples.items():
            x = estimate(
                layout, config.model, config.data.image_size, config.step.micro_batch, multiple
            )
            hidden = x["hidden_gather"] + x["hidden_reduce"]
            lines.append(
                f"| {x['layout']}, {label} | {multiple:.2f} | {x['compute_seconds']:.3f} | "
                f"{x['gather'] / 1e9:.1f} | {x['reduce'] / 1e9:.1f} | "
                f"{x['network'] / 1e9:.1f} | {hidden:.3f} / {x['exposed_seconds']:.3f} | "
                f"{x['exchange_bytes'] / 1e6:.0f}, {x['exchange_seconds'] * 1e3:.1f} | "
                f"{x['loss_seconds'] * 1e3:.2f} | "
                f"{x['step_seconds']:.3f} | {x['mfu']:.0%} |"
            )
    lines += [
        "",
        "Gathers: 2 P (W-1)/W bytes, once a step in bfloat16; the next layer's hides under a layer "
        "of the first micro-batch's forward. "
        "Reductions: 4 P (W-1)/W, once a step in float32, under the last micro-batch's backward (2 "
        "F of it). With a copy in each node both stay "
        "inside the node, and each rank's eighth of the gradients is summed between the nodes: P "
        "(n-1)/n bytes. An exchange: 6 (W-1) n D bytes for n rows "
        "a rank; it and the loss hide under nothing. MFU: 3 F over step and peak, so recomputed "
        "forwards count as loss. Not in it: stems, audio, the "
        "optimizer, rows that are filled up, launches, waits.",
    ]
    return "\n".join(lines)
