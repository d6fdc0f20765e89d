"""A checkpoint saved at one layout loads at any other, bit for bit, and a broken one never
loads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from sailplan.checkpoint import loading, seal, store
from sailplan.errors import ConfigurationError, SailplanError
from sailplan.model import parallelize
from sailplan.model.testing import join_layout, random_inputs, rows_of, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import RankFailure, run_ranks

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]  # (tensor, data)


class Bundle(nn.Module):
    """What a run keeps: the sharded encoder, and small replicated modules with a scalar
    parameter and a buffer.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.encoder = OmniEncoder(small_config(), dtype=torch.float64, seed=seed)
        self.temperatures = nn.ParameterDict(
            {"icons/image": nn.Parameter(torch.tensor(0.05, dtype=torch.float64))}
        )
        self.head = nn.Linear(16, 16, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))


def build(tensor, seed=1, sharded=True):
    parallel = join_layout(tensor)
    torch.manual_seed(seed)
    bundle = Bundle(seed)
    parallelize.shard(bundle.encoder, parallel, shard=sharded)
    encoder = list(bundle.encoder.parameters())
    plain = [p for name, p in bundle.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW(
        [{"params": encoder}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, fused=True
    )
    return parallel, bundle, optimizer


def train(parallel, bundle, optimizer, steps, views=(("vision", "text"), ("audio", "text"))):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        modalities = views[step % len(views)]
        each = 4 // parallel.data_parallel_size
        inputs = rows_of(
            random_inputs(modalities, 4, step),
            parallel.data_parallel_rank * each,
            (parallel.data_parallel_rank + 1) * each,
        )
        loss = (
            bundle.head(bundle.encoder(inputs).fused) * bundle.temperatures["icons/image"]
        ).square().sum() * parallel.data_parallel_size
        loss.backward()
        parallelize.finish_gradients(bundle.encoder, parallel)
        for parameter in (*bundle.head.parameters(), *bundle.temperatures.values()):
            torch.distributed.all_reduce(parameter.grad, group=parallel.data_parallel_group)
            parameter.grad /= parallel.data_parallel_size
        optimizer.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / parallel.world_size)
    bundle.seen += len(losses)
    return losses


def everything(parallel, bundle, optimizer):
    """All parameters, buffers and optimizer state as whole tensors by name."""
    parallelize.reshard(bundle)
    found = {"seen": bundle.seen.clone()}
    for name, parameter in bundle.named_parameters():
        found[name] = whole_tensor(parameter, parameter, parallel)
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}:{kind}"] = (
                value.clone() if kind == "step" else whole_tensor(parameter, value, parallel)
            )
    return found


def save_run(rank, world, tensor, folder, sharded):
    parallel, bundle, optimizer = build(tensor, sharded=sharded)
    train(
        parallel, bundle, optimizer, range(2), views=(("text",), ("vision", "text"))
    )  # the sound tower has no optimizer state
    extra = {
        "step": 2,
        "stages": ["one"],
        "thresholds": {"icons/image": 0.25},
        "centroids": torch.arange(3.0),
    }
    store.save(folder, model=bundle, optimizer=optimizer, extra=extra, parallel=parallel)
    state = everything(parallel, bundle, optimizer)
    return state, train(parallel, bundle, optimizer, range(2, 7))


def load_runs(rank, world, tensor, folders, sharded):
    """Loads the folders one after the other into the same model and optimizer, training a little
    after each.
    """
    parallel, bundle, optimizer = build(tensor, seed=7, sharded=sharded)
    train(parallel, bundle, optimizer, range(1))  # other weights and other state, to be replaced
    results = []
    for folder in folders:
        with torch.no_grad():
            bundle.encoder(
                random_inputs(("vision", "text"), 2, 50)
            )  # gathered parameters must not be what is filled
        extra = loading.load(folder, model=bundle, optimizer=optimizer, parallel=parallel)
        assert (
            extra["step"] == 2
            and extra["thresholds"] == {"icons/image": 0.25}
            and torch.equal(extra["centroids"], torch.arange(3.0))
        )
        results.append(
            (
                everything(parallel, bundle, optimizer),
                train(parallel, bundle, optimizer, range(2, 7)),
            )
        )
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each layout, with the state it was made from and the losses of the steps
    that follow.
    """
    runs = {}
    for layout in LAYOUTS:
        folder = store.folder_of(tmp_path_factory.mktemp("checkpoints"), 2)
        runs[layout] = (
            folder,
            *run_ranks(save_run, layout[0] * layout[1], layout[0], folder, True)[0],
        )
    return runs


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("tensor", "data", "sharded"), [*((*layout, True) for layout in LAYOUTS), (1, 2, False)]
)
def test_state_is_bit_equal_and_training_goes_on(saved, tensor, data, sharded):
    sources = [saved[layout] for layout in (LAYOUTS if sharded else LAYOUTS[2:3])]
    assert (
        "encoder.vision.positions:exp_avg" in sources[0][1]
        and "encoder.audio.encoder.bin_gain:exp_avg" not in sources[0][1]
    )
    for results in run_ranks(
        load_runs, tensor * data, tensor, [folder for folder, _, _ in sources], sharded
    ):
        for (found, found_losses), (_, state, losses) in zip(results, sources, strict=True):
            assert_same(found, state)
            assert found_losses == pytest.approx(losses, rel=1e-10)


def test_encoder_alone_loads_in_another_dtype(saved):
    folder, state, _ = saved[(2, 2)]

    def load_encoder(rank, world):
        parallel = join_layout(1)
        encoder = OmniEncoder(small_config(), dtype=torch.float32, seed=3)
        extra = loading.load_model_only(folder, model=encoder, parallel=parallel, prefix="encoder.")
        return extra["step"], {name: p.detach() for name, p in encoder.named_parameters()}

    step, parameters = run_ranks(load_encoder, 1)[0]
    assert step == 2
    assert_same(parameters, {name: state[f"encoder.{name}"].float() for name in parameters})


def tiny_save(folder, weight=None):
    """A one-rank checkpoint of a small linear layer."""

    def work(rank, world):
        parallel = join_layout(1)
        model = nn.Linear(2, 2)
        if weight is not None:
            nn.init.constant_(model.weight, weight)
        return str(store.save(folder, model=model, optimizer=None, extra={}, parallel=parallel))

    return Path(run_ranks(work, 1)[0])


def tiny_load(folder, model):
    def work(rank, world):
        loading.load(folder, model=model, optimizer=None, parallel=join_layout(1))
        return model.weight.detach()

    return run_ranks(work, 1)[0]


def test_unfinished_and_damaged_checkpoints_are_passed_over(tmp_path):
    folders = [tiny_save(store.folder_of(tmp_path, step)) for step in (1, 2, 3, 4)]
    assert store.latest(tmp_path) == folders[3]
    (folders[3] / seal.COMPLETE).unlink()  # killed before the seal
    data = next(folders[2].glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])  # cut short
    (folders[1] / seal.INDEX).write_bytes(b"x" * (folders[1] / seal.INDEX).stat().st_size)
    os.mkdir(tmp_path / "step-00000009.tmp")
    assert store.latest(tmp_path) == folders[0]
    assert store.latest(tmp_path / "none") is None
    assert store.damaged(tmp_path) == folders[1:3]
    (folders[2] / seal.COMPLETE).write_text(
        '{"index_sha'
    )  # killed while it was sealed: unfinished, and no reason to ask for a repair
    assert store.damaged(tmp_path) == folders[1:2]
    with pytest.raises(RankFailure) as failure:
        tiny_load(folders[2], nn.Linear(2, 2))
    assert isinstance(
        failure.value.__cause__, ConfigurationError
    ) and "incomplete or damaged" in str(failure.value.__cause__)


def test_saving_again_replaces_and_prune_keeps_the_newest_complete(tmp_path):
    folders = [tiny_save(store.folder_of(tmp_path, step)) for step in (1, 2, 3)]
    tiny_save(folders[1], weight=5.0)
    assert (tiny_load(folders[1], nn.Linear(2, 2)) == 5).all()
    (folders[2] / seal.COMPLETE).unlink()
    assert store.prune(tmp_path, 1) == [folders[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 2), r"weight has the shape \(2, 2\)"),
        (nn.Linear(2, 2, bias=False), "bias, which the model lacks"),
        (nn.Bilinear(2, 2, 2), "weight has the shape"),
    ],
)
def test_another_model_is_refused_in_one_line(tmp_path, model, message):
    folder = tiny_save(store.folder_of(tmp_path, 1))
    with pytest.raises(RankFailure) as failure:
        tiny_load(folder, model)
    cause = failure.value.__cause__
    assert isinstance(cause, ConfigurationError) and "\n" not in str(cause)
    with pytest.raises(ConfigurationError, match=message):
        raise cause


def test_a_rank_that_cannot_write_stops_all(tmp_path):
    """Rank 1's disk is full: all ranks raise, nothing is left behind, and the older checkpoint
    stays.
    """
    older = tiny_save(store.folder_of(tmp_path, 1))

    def work(rank, world):
        parallel, bundle, optimizer = build(1)
        if rank == 1:
            import torch.distributed.checkpoint.filesystem as filesystem

            def full(*arguments, **options):
                raise OSError(28, "No space left on device")

            filesystem._write_item = full
        try:
            store.save(
                store.folder_of(tmp_path, 2),
                model=bundle,
                optimizer=optimizer,
                extra={},
                parallel=parallel,
            )
        except SailplanError as error:
            return str(error)
        return None

    for message in run_ranks(work, 2, timeout=30):
        assert (
            "could not be written" in message
            and "No space left" in message
            and "rank 1" in message
            and "\n" not in message
        )
    assert store.latest(tmp_path) == older
    assert [path.name for path in tmp_path.iterdir()] == [older.name]


def test_a_rank_that_cannot_read_stops_all(saved):
    folder = saved[(1, 2)][0]

    def work(rank, world):
        parallel, bundle, optimizer = build(1)
        path = folder if rank == 0 else folder.with_name("missing")
        try:
            loading.load(path, model=bundle, optimizer=optimizer, parallel=parallel)
        except ConfigurationError as error:
            return str(error)
        return None

    assert all("does not exist" in message for message in run_ranks(work, 2, timeout=30))


def test_the_seal_lists_every_file(tmp_path):
    folder = tiny_save(store.folder_of(tmp_path, 1))
    listed = json.loads((folder / seal.COMPLETE).read_text())
    assert set(listed["files"]) | {seal.COMPLETE} == {path.name for path in folder.iterdir()}
