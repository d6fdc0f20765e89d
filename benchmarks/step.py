"""One training step against two others on the same weights, batch, micro-batch and dtype: time,
gradient error, peak memory.

    python benchmarks/step.py run --out benchmarks/results/step_cpu.json
    python benchmarks/step.py report --results benchmarks/results/step_cpu.json

`run` measures on the GPU where there is one, else on the CPU. A step is: encode, exchange, loss,
replay, clip, optimizer; the encoder is the quick start's tower on random tokens of one length, the
loss InfoNCE in both directions at a temperature of 0.05.

    sailplan               sailplan.step.TrainingStep as a run of one rank makes it, with the graph
    of one micro-batch kept sentence-transformers  its CachedMultipleNegativesRankingLoss around the
    same encoder open_clip-style        written here after open_clip's --accum-freq: features of all
    micro-batches without graphs, then for each
                           micro-batch of pairs its features anew with graphs in the place of the
                           old ones, and the whole loss
    whole batch            plain autograd, every graph kept: what the caches avoid

Times: the contenders take turns within every round; ratios are of the same round. On the CPU the
time that the process was on a core is told beside the wall's: other work on the machine stretches
the wall's more than a ratio can bear.
Gradient errors: distance to the whole batch's gradient in float64 over that gradient's length.
Memory: every point is a process of its own. CPU: bytes that torch's CPU allocator hands out in one
step after a small one, read from the profiler's allocation events (what libraries allocate past
torch is not seen); GPU: torch.cuda.max_memory_allocated. Both are above what stands before the
step: weights, optimizer state and the batch's tokens. `report` writes the table and the curve
beside the results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from sailplan.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PatternConfig,
    StepConfig,
    TransformerShape,
    ViewConfig,
)
from sailplan.data.packing import OmniInputs, Packing, SequenceLayout, pack
from sailplan.data.record import StepBatch, ViewBatch
from sailplan.model.parallelize import shard
from sailplan.model.tower import OmniEncoder
from sailplan.objective.registry import build_objectives
from sailplan.objective.temperature import Temperatures
from sailplan.runtime.process import Parallel
from sailplan.runtime.session import started
from sailplan.step.optimizer import build_optimizer
from sailplan.step.training_step import TrainingStep
from sailplan_kernels.exchange import AllGather

TEMPERATURE = 0.05
# Of sailplan: the first pass keeps the last micro-batch's graph, which a replay would need the
# memory of anyway
KEPT_GRAPHS = 1
CONTENDERS = ("sailplan", "sentence-transformers", "open_clip-style", "whole batch")
Pair = tuple[OmniInputs, OmniInputs]


# The quick start's tower, and the layers of the 1.5B shape with fewer of them and a small
# vocabulary.
SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {"embedding": 192, "prefixes": [192]},
    "sail": {
        "embedding": 1536,
        "prefixes": [1536],
        "tower": TransformerShape(
            layers=8,
            hidden=1536,
            heads=12,
            key_value_heads=2,
            feed_forward=8960,
            query_key_value_bias=True,
        ),
    },
}


def configuration(micro_batch: int, shape: str = "quickstart", kept_graphs: int = 0) -> Config:
    """Pairs of texts, InfoNCE at the full size in both directions."""
    text = ["text"]
    pairs = DatasetConfig(
        kind="pairs",
        views={"query": ViewConfig("query", text), "target": ViewConfig("target", text)},
        patterns={"pair": PatternConfig("query", "target")},
        temperature=TEMPERATURE,
        symmetric=True,
    )
    return Config(
        data=DataConfig(sets={"pairs": pairs}),
        model=ModelConfig(vocabulary=8192, **SHAPES[shape]),
        step=StepConfig(micro_batch=micro_batch, kept_graphs=kept_graphs),
        objectives={
            "infonce": {"_target_": "sailplan.objective.infonce.InfoNCE", "matryoshka": False}
        },
    )


def tokens(rows: int, length: int, seed: int, device: torch.device) -> OmniInputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 8192, (rows, length), generator=generator).to(device)
    present = torch.ones_like(ids, dtype=torch.bool)
    return OmniInputs(("text",), ids, present, present)


_PACKED: dict[tuple[Any, ...], Packing] = {}


def text_inputs(ids: Tensor, present: Tensor, layout: SequenceLayout) -> OmniInputs:
    """A micro-batch with its packing, which a loader makes once for all passes: made at the
    first call for these rows, for every contender alike.
    """
    inputs = OmniInputs(("text",), ids, present, present)
    key = (ids.data_ptr(), tuple(ids.shape), layout)
    if key not in _PACKED:
        _PACKED[key] = pack(inputs, layout).to(ids.device)
    return replace(inputs, packing=_PACKED[key])


def cut(inputs: OmniInputs, start: int, stop: int, layout: SequenceLayout) -> OmniInputs:
    return text_inputs(inputs.token_ids[start:stop], inputs.token_mask[start:stop], layout)


def contrastive(queries: Tensor, keys: Tensor) -> Tensor:
    """CLIP's loss: the mean of the cross-entropies of both directions (Radford et al., arXiv
    2103.00020).
    """
    logits = (
        functional.normalize(queries, dim=-1) @ functional.normalize(keys, dim=-1).T / TEMPERATURE
    )
    places = torch.arange(len(logits), device=logits.device)
    return (
        functional.cross_entropy(logits, places) + functional.cross_entropy(logits.T, places)
    ) / 2


class Contender:
    """A way to make the step: `gradients(pair)` leaves the full batch's gradients in `.grad`,
    `step(pair)` is the whole step.

    dtype: what the encoder computes in. sailplan keeps float32 parameters over it; the others'
    parameters are of that dtype themselves, which spares them the copies and half of the
    optimizer's traffic (megatron-core's layers do not go with autocast).
    """

    def __init__(
        self, config: Config, parallel: Parallel, dtype: torch.dtype = torch.float32
    ) -> None:
        self.micro_batch = config.step.micro_batch
        self.encoder: nn.Module = OmniEncoder(config.model, seed=config.seed, dtype=dtype).to(
            parallel.device
        )
        self.optimizer = build_optimizer(
            self.encoder, nn.ModuleDict(), Temperatures({}), OptimizerConfig()
        )

    @property
    def layout(self) -> SequenceLayout:
        return self.encoder.layout  # type: ignore[return-value]

    def prepare(self, pair: Pair) -> None:
        """Have ready what a loader hands over."""
        for inputs in pair:
            for start in range(0, inputs.rows, self.micro_batch):
                cut(inputs, start, start + self.micro_batch, self.layout)

    def gradients(self, pair: Pair) -> None:
        raise NotImplementedError

    def step(self, pair: Pair) -> None:
        self.gradients(pair)
        nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Sailplan(Contender):
    def __init__(
        self, config: Config, parallel: Parallel, dtype: torch.dtype = torch.float32
    ) -> None:
        self.micro_batch = config.step.micro_batch
        compute_dtype = None if dtype is torch.float32 else dtype
        self.encoder = shard(
            OmniEncoder(config.model, seed=config.seed),
            parallel,
            shard=True,
            compute_dtype=compute_dtype,
        )
        objectives = build_objectives(
            config.objectives, config.model.embedding, config.data.sets, seed=config.seed
        ).to(parallel.device)
        temperatures = Temperatures(config.data.sets).to(parallel.device)
        optimizer = build_optimizer(self.encoder, objectives, temperatures, OptimizerConfig())
        self.whole = TrainingStep(
            self.encoder,
            objectives,
            temperatures,
            optimizer,
            config,
            parallel,
            AllGather(parallel.data_parallel_group),
        )

    def _batch(self, pair: Pair) -> StepBatch:
        rows = pair[0].rows
        ids = torch.arange(rows, device=pair[0].token_ids.device)
        views = {
            name: ViewBatch(
                [
                    cut(inputs, start, start + self.micro_batch, self.layout)
                    for start in range(0, rows, self.micro_batch)
                ],
                ids,
                torch.ones_like(ids, dtype=torch.bool),
                ids + number * rows,
            )
            for number, (name, inputs) in enumerate(zip(("query", "target"), pair, strict=True))
        }
        return StepBatch(
            1, "pairs", [str(row) for row in range(rows)], views, patterns={"pair": 1.0}
        )

    def gradients(self, pair: Pair) -> None:
        self.whole.gradients([self._batch(pair)], {"infonce": 1.0}, step=1, stage="benchmark")

    def step(self, pair: Pair) -> None:
        self.whole.run([self._batch(pair)], {"infonce": 1.0}, step=1, stage="benchmark")


class _Features(nn.Module):
    """The encoder as sentence-transformers calls its models: a dictionary of features in and
    out.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        present = features["attention_mask"]
        return {
            "sentence_embedding": self.encoder(
                text_inputs(features["input_ids"], present, self.encoder.layout)
            ).fused
        }


class SentenceTransformers(Contender):
    def __init__(
        self, config: Config, parallel: Parallel, dtype: torch.dtype = torch.float32
    ) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )

        super().__init__(config, parallel, dtype)
        self.loss = CachedMultipleNegativesRankingLoss(
            nn.Sequential(_Features(self.encoder)),
            scale=1 / TEMPERATURE,
            mini_batch_size=self.micro_batch,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )

    def gradients(self, pair: Pair) -> None:
        features = [
            {"input_ids": inputs.token_ids, "attention_mask": inputs.token_mask} for inputs in pair
        ]
        self.loss(features, torch.empty(0)).backward()


class OpenClipStyle(Contender):
    def gradients(self, pair: Pair) -> None:
        starts = range(0, pair[0].rows, self.micro_batch)
        with torch.no_grad():
            features = [
                [
                    self.encoder(cut(inputs, start, start + self.micro_batch, self.layout)).fused
                    for start in starts
                ]
                for inputs in pair
            ]
        for number, start in enumerate(starts):
            views = []
            for inputs, old in zip(pair, features, strict=True):
                fresh = self.encoder(
                    cut(inputs, start, start + self.micro_batch, self.layout)
                ).fused
                views.append(torch.cat([*old[:number], fresh, *old[number + 1 :]]))
            contrastive(*views).backward()


class WholeBatch(Contender):
    def gradients(self, pair: Pair) -> None:
        contrastive(
            *(self.encoder(cut(inputs, 0, inputs.rows, self.layout)).fused for inputs in pair)
        ).backward()


BUILDERS: dict[str, type[Contender]] = dict(
    zip(CONTENDERS, (Sailplan, SentenceTransformers, OpenClipStyle, WholeBatch), strict=True)
)


def missing(name: str) -> str | None:
    """Why a contender cannot take part, or None."""
    if (
        name == "sentence-transformers"
        and importlib.util.find_spec("sentence_transformers") is None
    ):
        return "not installed: requirements/benchmarks.txt"
    return None


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole_gradients(encoder: nn.Module) -> dict[str, Tensor]:
    """The gradients that exist, whole and in float64, and none left behind."""
    found = {
        name: parameter.grad
        for name, parameter in encoder.named_parameters()
        if parameter.grad is not None
    }
    whole = {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).double().clone()
        for name, grad in found.items()
    }
    encoder.zero_grad(set_to_none=True)
    return whole


def true_gradients(config: Config, pair: Pair, device: torch.device) -> dict[str, Tensor]:
    """The whole batch's gradients in float64 from the contenders' float32 weights."""
    exact = OmniEncoder(config.model, seed=config.seed, dtype=torch.float64)
    exact.load_state_dict(OmniEncoder(config.model, seed=config.seed).state_dict())
    exact.to(device)
    contrastive(exact(pair[0]).fused, exact(pair[1]).fused).backward()
    return whole_gradients(exact)


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        return math.inf
    off = sum(float((found[name] - true).square().sum()) for name, true in expected.items())
    return math.sqrt(off / sum(float(true.square().sum()) for true in expected.values()))


def measure_times(options: argparse.Namespace) -> dict[str, Any]:
    """Contender -> seconds of each round, gradient error."""
    with started(ParallelConfig(threads=options.threads)) as parallel:
        config = configuration(options.micro_batch, kept_graphs=KEPT_GRAPHS)
        pair = (
            tokens(options.rows, options.length, 1, parallel.device),
            tokens(options.rows, options.length, 2, parallel.device),
        )
        expected = true_gradients(config, pair, parallel.device)
        contenders: dict[str, Contender] = {}
        found: dict[str, Any] = {}
        for name in CONTENDERS:
            if (reason := missing(name)) is not None:
                found[name] = {"missing": reason}
                continue
            contenders[name] = BUILDERS[name](config, parallel)
            contenders[name].gradients(pair)
            found[name] = {
                "gradient_error": relative_error(
                    whole_gradients(contenders[name].encoder), expected
                ),
                "seconds": [],
                "core_seconds": [],
            }
            contenders[name].step(pair)  # makes the optimizer's state; warms up
        for number in range(options.rounds):
            order = list(contenders)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                synchronise(parallel.device)
                began, on_core = time.perf_counter(), time.process_time()
                contenders[name].step(pair)
                synchronise(parallel.device)
                found[name]["seconds"].append(time.perf_counter() - began)
                found[name]["core_seconds"].append(time.process_time() - on_core)
    return found


def peak_of(action: Callable[[], None], device: torch.device) -> int:
    """Bytes at the highest point of `action` above those that stand before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    height = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        height += event.nbytes()
        peak = max(peak, height)
    return peak


def measure_memory(options: argparse.Namespace, name: str, rows: int) -> int:
    with started(ParallelConfig(threads=options.threads)) as parallel:
        contender = BUILDERS[name](
            configuration(options.micro_batch, kept_graphs=KEPT_GRAPHS), parallel
        )
        first, pair = (
            (
                tokens(count, options.length, 1, parallel.device),
                tokens(count, options.length, 2, parallel.device),
            )
            for count in (options.micro_batch, rows)
        )
        contender.prepare(pair)
        contender.step(first)  # makes the optimizer's state
        return peak_of(lambda: contender.step(pair), parallel.device)


def _answer(connection: Any, action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(action(*arguments))


def alone(action: Callable[..., Any], *arguments: Any) -> Any:
    """Runs in a process of its own: nothing allocated before, nothing left after.

    A fork cannot use a GPU that its parent has looked at.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, action, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(
            f"step.py: {action.__name__}{arguments[1:]} ended without a result"
        ) from None
    finally:
        process.join()


def describe_device() -> dict[str, Any]:
    if torch.cuda.is_available():
        return {
            "device": torch.cuda.get_device_name(0),
            "kind": "gpu",
            "memory_measure": "torch.cuda.max_memory_allocated",
        }
    return {
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "kind": "cpu",
        "memory_measure": "allocation events of torch's CPU allocator",
    }


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "megatron-core", "sentence-transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def slope_per_doubling(rows: list[int], peaks: list[float]) -> float:
    """Least-squares slope of log(peak) over log2(rows), as a relative change for each doubling."""
    x, y = [math.log2(row) for row in rows], [math.log(peak) for peak in peaks]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    return math.exp(slope) - 1


def run(options: argparse.Namespace) -> None:
    """Measures; the file is written anew after every part, so that an interrupted run leaves
    what it measured.

    `--parts times`, `--parts memory` and `--memory-of` keep the rest of a file that is there.
    """
    out = Path(options.out)
    whole = len(options.parts) == 2 and len(options.memory_of) == len(CONTENDERS)
    record: dict[str, Any] = (
        json.loads(out.read_text()) if out.is_file() and not whole else {"times": {}, "memory": {}}
    )
    record |= {
        "what": "one training step on equal weights, batch, micro-batch and dtype",
        "date": datetime.date.today().isoformat(),
        **describe_device(),
        "python": platform.python_version(),
        "versions": versions(),
        "threads": options.threads,
        "dtype": "float32",
        "micro_batch": options.micro_batch,
        "kept_graphs": KEPT_GRAPHS,
        "tokens": options.length,
        "embedding": 192,
    }
    if "times" in options.parts:
        before = os.getloadavg()
        record |= {
            "rows": options.rows,
            "times": alone(measure_times, options),
            "load_average": {"before": before, "after": os.getloadavg()},
        }
        out.write_text(json.dumps(record, indent=1) + "\n")
    for name in options.memory_of if "memory" in options.parts else ():
        if (reason := missing(name)) is not None:
            record["memory"][name] = {"missing": reason}
            continue
        rows = [
            count
            for count in options.memory_rows
            if name != "whole batch" or count <= options.whole_batch_limit
        ]
        record["memory"][name] = {
            "rows": rows,
            "peak_bytes": [alone(measure_memory, options, name, count) for count in rows],
        }
        out.write_text(json.dumps(record, indent=1) + "\n")


def growth(record: dict[str, Any], name: str, vectors: int) -> str:
    """Slope of the peak per doubling, less `vectors` float32 vectors for each of the two views'
    rows.
    """
    found = record["memory"][name]
    each = vectors * 2 * 4 * record["embedding"]
    slope = slope_per_doubling(
        found["rows"],
        [peak - each * rows for rows, peak in zip(found["rows"], found["peak_bytes"], strict=True)],
    )
    return f"{100 * slope:+.1f} %"


def table(record: dict[str, Any]) -> str:
    """The results in Markdown."""
    times, memory = record["times"], record["memory"]
    clock, said = (
        ("core_seconds", "core seconds") if record["kind"] == "cpu" else ("seconds", "seconds")
    )
    smallest, largest = memory["sailplan"]["rows"][0], memory["sailplan"]["rows"][-1]
    lines = [
        f"| step | {said} | of sailplan's | wall seconds | gradient error | peak MiB at {smallest} "
        f"| at {largest} pairs | "
        "growth per doubling beyond the embeddings | and beyond their gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        gap = times[name].get("missing") or memory.get(
            name, {"missing": "memory not measured"}
        ).get("missing")
        if gap:
            lines.append(f"| {name} | {gap} | - | - | - | - | - | - | - |")
            continue
        ratios = [
            other / own
            for other, own in zip(times[name][clock], times["sailplan"][clock], strict=True)
        ]
        found = memory[name]
        last = f"{found['peak_bytes'][-1] / 2**20:.1f}" + (
            "" if found["rows"][-1] == largest else f" (at {found['rows'][-1]})"
        )
        lines.append(
            f"| {name} | {_spread(times[name][clock])} | {_spread(ratios)} | "
            f"{_spread(times[name]['seconds'])} | {times[name]['gradient_error']:.1e} | "
            f"{found['peak_bytes'][0] / 2**20:.1f} | {last} | {growth(record, name, 1)} | "
            f"{growth(record, name, 2)} |"
        )
    before, after = record["load_average"]["before"][0], record["load_average"]["after"][0]
    lines += [
        "",
        f"{record['date']}, {record['device']}, {record['threads']} thread, load average "
        f"{before:.1f} before and {after:.1f} after the times; "
        f"torch {record['versions']['torch']}, sentence-transformers "
        f"{record['versions']['sentence-transformers']}; {record['dtype']}, "
        f"times of {record['rows']} pairs of {record['tokens']} tokens in micro-batches of "
        f"{record['micro_batch']}, "
        f"medians of {len(times['sailplan']['seconds'])} interleaved rounds "
        "(lowest-highest; ratios within a round). Gradient error: to the whole batch's gradient in "
        "float64. "
        f"Memory: {record['memory_measure']}, above weights, optimizer state and tokens; growth is "
        "the slope of a line through "
        "the logarithms of all sizes, less the embeddings of both views, then less their gradients "
        "too. "
        "open_clip-style holds the graphs of a micro-batch of both views at once, the others of "
        "one view. "
        "Made by `benchmarks/step.py report`.",
    ]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, marker in zip(CONTENDERS, "osD^", strict=True):
        found = record["memory"].get(name, {"missing": "not measured"})
        if "missing" not in found:
            axes.plot(
                found["rows"],
                [peak / 2**20 for peak in found["peak_bytes"]],
                marker=marker,
                label=name,
            )
    rows = record["memory"]["sailplan"]["rows"]
    axes.plot(
        rows,
        [8 * record["embedding"] * count / 2**20 for count in rows],
        "k:",
        label="embeddings of both views",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(f"pairs in the batch (micro-batch {record['micro_batch']})")
    axes.set_ylabel("peak memory of a step, MiB")
    axes.set_title(f"{record['device']}, {record['date']}", fontsize=9)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def report(options: argparse.Namespace) -> None:
    results = Path(options.results)
    record = json.loads(results.read_text())
    results.with_suffix(".md").write_text(table(record) + "\n")
    draw(record, results.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--rows", type=int, default=512, help="pairs of the timed step")
    runner.add_argument("--micro-batch", type=int, default=128)
    runner.add_argument("--length", type=int, default=12, help="tokens of a text")
    runner.add_argument("--rounds", type=int, default=7)
    runner.add_argument("--memory-rows", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    runner.add_argument(
        "--whole-batch-limit",
        type=int,
        default=1024,
        help="the whole batch's memory is measured up to here",
    )
    runner.add_argument("--threads", type=int, default=1)
    runner.add_argument(
        "--parts", nargs="+", choices=["times", "memory"], default=["times", "memory"]
    )
    runner.add_argument("--memory-of", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    runner.add_argument("--out", required=True)
    reporter = commands.add_parser("report")
    reporter.add_argument("--results", required=True)
    options = parser.parse_args()
    (run if options.command == "run" else report)(options)


if __name__ == "__main__":
    main()
