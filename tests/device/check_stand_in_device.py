"""The losses, the searches, a training step and the whole recipe with every tensor on a device
that is not the CPU.

Not collected by name: test_stand_in_device.py runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from stand_in_device import DEVICE, There, serve, stand_in_device
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import Traffic

from sailplan.cli.main import main
from sailplan.data.packing import OmniInputs, pack
from sailplan.data.record import StepBatch
from sailplan.model.parallelize import shard
from sailplan.model.testing import (
    PUBLISHED,
    join_layout,
    published_config,
    published_inputs,
    random_inputs,
    small_config,
)
from sailplan.model.tower import OmniEncoder
from sailplan.parity import testing as steps
from sailplan.runtime.process import Parallel
from sailplan.step.training_step import TrainingStep
from sailplan.train import run
from sailplan.train.callbacks.checkpoint import Checkpoint
from sailplan.train.testing import SMALL
from sailplan_kernels import LossOptions, infonce, rank_of, topk
from sailplan_kernels import options as matrix
from sailplan_kernels.exchange import EXCHANGES, AllGather, RowSplit
from sailplan_kernels.testing import run_ranks
from sailplan_kernels.tiling.products import add_product

torch.set_num_threads(1)


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_of_two_ranks(name):
    """Over gloo, which is told that it serves the device too.

    First in this file: ranks are forked, and a backward starts threads.
    """
    options = {
        "symmetric": True,
        "query_negatives": True,
        "shared_hard_negatives": True,
        "prefixes": (4, 16),
    }
    rows = ("queries", "keys", "hard_negatives")
    whole = matrix.arguments(
        "infonce", {**options, "hard_negatives": torch.randn(matrix.N, 2, matrix.D)}
    )
    whole["keys"] = whole["keys"].detach()[: matrix.N].requires_grad_()

    def work(rank: int, world_size: int) -> list[Tensor]:
        serve(dist.distributed_c10d._get_default_group())
        with stand_in_device() as device:
            mine = {
                **whole,
                **{
                    key: whole[key].detach().chunk(world_size)[rank].requires_grad_()
                    for key in rows
                },
            }
            call = {key: _moved(x, device) for key, x in mine.items()}
            return [
                x.cpu()
                for x in matrix.outcome(
                    "infonce", call, backend="chunked", exchange=EXCHANGES[name]()
                )
            ]

    (alone,) = run_ranks(lambda *_: matrix.outcome("infonce", whole, backend="reference"), 1)
    loss, queries, keys, hard, temperature = zip(*run_ranks(work, 2), strict=True)
    together = (
        torch.stack(loss).mean(),
        torch.cat(queries) / 2,
        torch.cat(keys) / 2,
        torch.cat(hard) / 2,
        torch.stack(temperature).mean(),
    )
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def small_step(parallel: Parallel, kept_graphs: int = 1) -> TrainingStep:
    """A training step with every objective over the small encoder, sharded."""
    config = steps.step_config(kept_graphs=kept_graphs)
    modules = steps.build_modules(config, torch.float32)
    shard(modules[0], parallel, shard=True)
    for module in modules[1:]:
        module.to(parallel.device)
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=1e-3)
    exchange = RowSplit(
        AllGather(parallel.data_parallel_group), AllGather(parallel.tensor_parallel_group)
    )
    return TrainingStep(*modules, optimizer, config, parallel, exchange)


def batches_of(step: TrainingStep, number: int) -> list[StepBatch]:
    place = step.parallel
    whole = steps.global_batches(step.config, number)
    batches = [
        steps.share(
            batch, place.data_parallel_rank, place.data_parallel_size, 3, dtype=torch.float32
        )
        for batch in whole
    ]
    for inputs in (
        inputs
        for batch in batches
        for view in batch.views.values()
        for inputs in view.micro_batches
    ):
        inputs.packing = pack(inputs, step.encoder.layout)  # as the loader does
    return batches


def three_steps(parallel: Parallel) -> list[tuple[float, float]]:
    """FSDP2, encoding with and without kept graphs, every objective, replay, clipping, guard and
    optimizer: losses and gradient norms.
    """
    step, found = small_step(parallel), []
    for number in (1, 2, 3):
        result = step.run(
            batches_of(step, number),
            steps.WEIGHTS,
            step=number,
            stage="one",
            thresholds=steps.THRESHOLDS,
        )
        assert not result.skipped and all(
            isinstance(p.grad, There) for p in step.objectives.parameters() if p.grad is not None
        )
        found.append((result.loss, result.grad_norm))
    return found


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_steps_of_two_ranks_with_all_losses(tensor_parallel):
    """As on the CPU."""

    def work(rank: int, world_size: int) -> bool:
        here = join_layout(tensor_parallel)
        expected = three_steps(here)
        there = dataclasses.replace(here, device=DEVICE)
        for group in {
            dist.distributed_c10d._get_default_group(),
            here.data_parallel_group,
            here.tensor_parallel_group,
        }:
            serve(group)
        with stand_in_device():
            return three_steps(there) == [pytest.approx(pair, rel=1e-4) for pair in expected]

    assert run_ranks(work, 2, timeout=300) == [True, True]


def test_a_step_waits_for_its_device_once():
    """Whatever number of metrics, temperatures, wishes, data sets and micro-batches it has; the
    losses and the encoder have counts of their own.
    """

    def work(rank: int, world_size: int) -> tuple[dict[str, int], list[bool], set[str]]:
        there = dataclasses.replace(join_layout(1), device=DEVICE)
        for group in {dist.distributed_c10d._get_default_group(), there.data_parallel_group}:
            serve(group)
        with stand_in_device():
            step = small_step(there)
            batches = batches_of(step, 1)
            with Traffic("_loss_stage") as traffic:
                result = step.run(
                    batches, steps.WEIGHTS, step=1, stage="one", wishes=lambda: [rank == 1, False]
                )
        return dict(traffic.waits), result.wishes, set(result.temperatures)

    for waits, wishes, temperatures in run_ranks(work, 2, timeout=300):
        assert waits == {"_to_copy down": 1}, waits
        assert wishes == [True, False] and "items/name_to_item" in temperatures


@pytest.mark.parametrize("kept_graphs", [0, 1])
def test_two_micro_batches_at_most_are_on_the_device(kept_graphs):
    """One that computes and one that is on its way, in both passes; each is sent once a pass,
    pixels as bytes.
    """

    def work(rank: int, world_size: int) -> tuple[int, int, int, int]:
        there = dataclasses.replace(join_layout(1), device=DEVICE)
        for group in {dist.distributed_c10d._get_default_group(), there.data_parallel_group}:
            serve(group)
        with stand_in_device():
            step = small_step(there, kept_graphs)
            batches = [with_pixels(batch) for batch in batches_of(step, 1)]
            # The second pass goes from the last to the first; a micro-batch whose graph was kept is
            # not sent again.
            sizes = [
                size_of(inputs)
                for batch in batches
                for _, view in sorted(batch.views.items(), key=lambda item: str(item[0]))
                for inputs in view.micro_batches
            ]
            passes = sizes + sizes[: len(sizes) - kept_graphs][::-1]
            with Traffic(uploads_in="_start") as traffic:
                step.run(batches, steps.WEIGHTS, step=1, stage="one")
        pairs = max(sum(passes[place : place + 2]) for place in range(len(passes)))
        return traffic.most_alive, pairs, traffic.uploaded, sum(passes)

    for most, pairs, uploaded, expected in run_ranks(work, 2, timeout=300):
        assert 0 < most <= pairs and uploaded == expected


def with_pixels(batch: StepBatch) -> StepBatch:
    """The batch with bytes in place of its random images, augmented."""
    for view in batch.views.values():
        for inputs in view.micro_batches:
            if inputs.images is not None:
                inputs.images = inputs.images.mul(64).add(128).clamp(0, 255).to(torch.uint8)
                inputs.image_augmentation = torch.tensor(
                    [[0.9, 0.1, 0.0, -0.1, 1.1, 0.1, 1.1, 0.1, 0.0, -0.1]] * inputs.rows
                ).view(-1, 10)
    return batch


def size_of(inputs: OmniInputs) -> int:
    assert inputs.packing is not None
    return inputs.packing.numbers.nbytes + sum(
        x.nbytes for x in vars(inputs).values() if isinstance(x, Tensor)
    )


def test_tensors_of_two_devices_do_not_meet():
    with stand_in_device() as device:
        there, here = torch.ones(3, 4, device=device), torch.ones(3, 4)
        for wrong in (
            lambda: there + here,
            lambda: there @ here.T,
            lambda: torch.cat([there, here]),
            lambda: torch.where(here > 0, there, 0.0),
            lambda: here[torch.tensor([0, 1], device=device)],
            lambda: there.index_put_((torch.tensor([0]),), here[:1]),
            lambda: torch.ones(3, 4, device=device).add_(here),
        ):
            with pytest.raises(RuntimeError, match="expected all on one device"):
                wrong()
        assert isinstance(there + torch.tensor(2.0), There) and not isinstance(there.cpu(), There)
        assert there[torch.tensor([0, 2])].shape == (2, 4)
        leaf = here.to(device).requires_grad_()
        (leaf * 3).sum().backward()
        assert isinstance(leaf.grad, There) and leaf.grad.tolist() == (3 * here).tolist()


def test_half_precision_products_are_added_in_place():
    """By the product itself, as CUDA offers it, onto a part of a wider matrix: no temporary, no
    operation for the sum.
    """
    g = torch.Generator().manual_seed(0)
    a, b, start = (
        torch.randn(5, 7, generator=g).bfloat16(),
        torch.randn(7, 4, generator=g).bfloat16(),
        torch.randn(5, 6, generator=g),
    )
    with stand_in_device() as device:
        target = start.to(device)
        operands = a.to(device), b.to(device)
        add_product(target[:, :4], *operands)  # the first finds out what this torch offers
        with Calls() as calls:
            add_product(target[:, 1:5], *operands)
        found = target.cpu()
    assert calls.seen == ["aten.slice.Tensor", "aten.addmm.dtype_out"]
    start[:, :4] += a.float() @ b.float()
    start[:, 1:5] += a.float() @ b.float()
    torch.testing.assert_close(found, start)


class Calls(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("loss", list(matrix.LOSSES))
def test_losses_with_every_option(loss, backend):
    """Bit-equal to the CPU's: the same operations on the same numbers; in half precision, which
    is multiplied as it is, near.
    """
    for name, options in matrix.samples():
        if not matrix.knows(loss, options):
            continue
        expected = matrix.outcome(loss, matrix.arguments(loss, options), backend=backend)
        with stand_in_device() as device:
            call = {key: _moved(x, device) for key, x in matrix.arguments(loss, options).items()}
            found = matrix.outcome(loss, call, backend=backend)
            assert all(isinstance(x, There) for x in found), name
            half = call["queries"].dtype in (torch.bfloat16, torch.float16)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a.cpu(), b) or (
                    half and (a.cpu() - b).norm() <= 3e-2 * b.norm()
                ), name


@pytest.mark.parametrize("symmetric", [False, True], ids=["rows", "symmetric"])
@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.1])
@pytest.mark.parametrize(
    "prefixes, bar", [(None, 3e-3), ((16, 64), 5e-3)], ids=["whole", "prefixes"]
)
def test_gradient_error_of_half_precision_operands(temperature, symmetric, prefixes, bar):
    """Only a CPU widens bfloat16 embeddings before it multiplies; elsewhere they are normalised,
    rounded once and multiplied.
    """
    g = torch.Generator().manual_seed(0)
    topics = torch.randn(12, 64, generator=g)
    queries = (topics[torch.arange(96) % 12] + 0.5 * torch.randn(96, 64, generator=g)).bfloat16()
    others = topics[torch.arange(32) % 12] + 0.5 * torch.randn(32, 64, generator=g)
    keys = torch.cat([queries + 0.3 * torch.randn(96, 64, generator=g), others]).bfloat16()

    def gradients(q: Tensor, k: Tensor, backend: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        infonce(
            *leaves,
            temperature,
            symmetric=symmetric,
            prefixes=prefixes,
            options=LossOptions(backend=backend, memory_budget=20_000),
        ).loss.backward()
        return [x.grad.cpu().double() for x in leaves]

    expected = gradients(queries.double(), keys.double(), "reference")
    with stand_in_device() as device:
        found = gradients(queries.to(device), keys.to(device), "chunked")
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) <= bar


def _moved(x: Any, device: torch.device) -> Any:
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def test_searches():
    queries, keys, positive = torch.randn(7, 8), torch.randn(30, 8), torch.arange(7)
    ids = torch.arange(30) % 9
    expected = (
        topk(queries, keys, 4, max_score=0.5, exclude_ids=ids[:7, None], key_ids=ids, tile=8),
        rank_of(queries, keys, positive),
    )
    with stand_in_device() as device:
        q, k, p, i = (x.to(device) for x in (queries, keys, positive, ids))
        found = (
            topk(q, k, 4, max_score=0.5, exclude_ids=i[:7, None], key_ids=i, tile=8),
            rank_of(q, k, p),
        )
        for a, b in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
            assert isinstance(a, There) and torch.equal(a.cpu(), b)


@pytest.fixture
def alone(tmp_path) -> Iterator[Parallel]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    parallel = join_layout(1)
    for group in {dist.distributed_c10d._get_default_group(), parallel.data_parallel_group}:
        serve(group)
    yield parallel
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["own", *PUBLISHED])
def test_encoders(alone, kind):
    """Vectors and gradients of every image and sound encoder, as on the CPU, without a wait:
    padded rows are packed before the upload.
    """

    def found(device: torch.device) -> list[Tensor]:
        config = small_config() if kind == "own" else published_config(kind)
        encoder = OmniEncoder(config, dtype=torch.float64, seed=1).to(device)
        inputs = (
            random_inputs(("vision", "audio", "text"), 4, 3)
            if kind == "own"
            else published_inputs(kind, 4)
        )
        inputs = dataclasses.replace(inputs, packing=pack(inputs, encoder.layout)).to(device)
        with Traffic() as traffic:
            vectors = encoder(inputs, per_modality=True)
            (vectors.fused.square().sum() + vectors.by_modality["vision"].sum()).backward()
        assert not traffic.waits, traffic.waits
        made = [vectors.fused, *(p.grad for p in encoder.parameters() if p.grad is not None)]
        assert all(isinstance(x, There) == (device.type != "cpu") for x in made)
        return [x.detach().cpu() for x in made]

    expected = found(torch.device("cpu"))
    with stand_in_device() as device:
        for a, b in zip(found(device), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_whole_recipe(monkeypatch, tmp_path):
    """Five stages with balancing, subsets, mined hard negatives, teachers and evaluation;
    without checkpoints.
    """
    started, build_bundle, seen = run.started, run.build_bundle, []

    @contextlib.contextmanager
    def started_there(config):
        with started(config) as parallel:
            for group in {dist.distributed_c10d._get_default_group(), parallel.data_parallel_group}:
                serve(group)
            yield dataclasses.replace(parallel, device=torch.device("standin", 0))

    def assembled(*arguments):
        seen.append(build_bundle(*arguments))
        return seen[0]

    monkeypatch.setattr(run, "started", started_there)
    monkeypatch.setattr(run, "build_bundle", assembled)
    monkeypatch.setattr(Checkpoint, "save", lambda *_: None)
    with stand_in_device():
        assert (
            main(
                [
                    "train",
                    *SMALL,
                    "parallel.threads=1",
                    "data.workers=0",
                    "name=there",
                    f"runs={tmp_path}",
                ]
            )
            == 0
        )
        parameters = list(seen[0].module.parameters())
        assert parameters and all(
            isinstance(p.to_local() if isinstance(p, DTensor) else p, There) for p in parameters
        )
    lines = [
        json.loads(line)
        for line in Path(tmp_path, "there", "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 16)) and not any(
        line.get("skipped") for line in lines
    )
