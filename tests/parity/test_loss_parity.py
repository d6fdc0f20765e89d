"""The parity check of a loss that is handed over: right ones pass, the usual mistakes are told
apart, nothing hangs.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sailplan.cli.main import main
from sailplan.objective.cosent import CoSENT
from sailplan.objective.infonce import InfoNCE
from sailplan.objective.micl import MICL
from sailplan.objective.protocol import Objective, ObjectiveOutput
from sailplan.parity import example_losses
from sailplan.parity.losses import check_loss, of_objective


@pytest.mark.parametrize("world_size", [2, 4])
def test_our_loss_is_exact(world_size: int) -> None:
    found = check_loss(example_losses.exact, world_size)
    assert found.exact and found.error < 1e-13
    assert found.scale == pytest.approx(1) and found.cosine == pytest.approx(1)
    assert found.loss == pytest.approx(found.full_batch_loss)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_factor_of_a_scaled_loss_is_found(world_size: int) -> None:
    found = check_loss(example_losses.scaled_by_world, world_size)
    assert not found.exact
    assert found.scale == pytest.approx(world_size) and found.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    "loss", [example_losses.local_only, example_losses.gathered_without_gradient]
)
def test_a_gradient_in_another_direction_is_found(loss) -> None:
    found = check_loss(loss, 2)
    assert not found.exact and 0.3 < found.cosine < 0.99


class Unscaled(InfoNCE):
    """Wrong: every rank's loss divided by their number."""

    def forward(self, encoded, context):
        output = super().forward(encoded, context)
        return ObjectiveOutput(output.loss / context.exchange.world_size)


@pytest.mark.parametrize(
    ("objective", "scale"), [(InfoNCE, 1), (CoSENT, 1), (MICL, 1), (Unscaled, 1 / 3)]
)
def test_an_objective_class_is_checked_as_it_is(objective: type[Objective], scale: float) -> None:
    found = check_loss(of_objective(objective), 3)
    assert not found.problem and found.exact == (scale == 1) and found.scale == pytest.approx(scale)


def one_rank_without(queries, keys):
    loss = example_losses.exact(queries, keys)
    return loss.detach() if dist.get_rank() == 1 else loss


def not_finite(queries, keys):
    return example_losses.exact(queries, keys) * (float("nan") if dist.get_rank() == 1 else 1.0)


def one_rank_waits(queries, keys):
    if dist.get_rank() == 1:
        time.sleep(60)
    return example_losses.exact(queries, keys)


def raises_on_several(queries, keys):
    if dist.get_world_size() > 1:
        raise KeyError("peer")
    return example_losses.exact(queries, keys)


@pytest.mark.parametrize(
    ("loss", "words", "timeout"),
    [
        (one_rank_without, "rank 1: queries get no gradient", 30),
        (not_finite, "rank 1: the loss or the gradient of queries is not finite", 30),
        (one_rank_waits, "did not finish within 3", 3),
        (raises_on_several, "KeyError: 'peer'", 30),
        (lambda queries, keys: queries, "expected a tensor of one element", 30),
        (lambda queries, keys: (queries + keys).sum() * 0, "gradient is zero everywhere", 30),
    ],
)
def test_what_cannot_be_compared_is_named(loss, words: str, timeout: float) -> None:
    found = check_loss(loss, 2, timeout)
    assert not found.exact and words in str(found)


def test_the_command_has_the_documented_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "handed_over.py").write_text(
        "from sailplan.parity.example_losses import exact, scaled_by_world\ndef mine(queries, "
        "keys):\n    return exact(queries, keys)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["check", "parity", "--loss", "handed_over:mine", "--world-size", "2"]) == 0
    assert (
        main(["check", "parity", "--loss", "handed_over:scaled_by_world", "--world-size", "2"]) == 1
    )
    assert "scale factor 2, cosine 1.0" in capsys.readouterr().out
    unusable = (
        ["--loss", "handed_over:nope"],
        ["--loss", "nowhere:loss"],
        ["--loss", "handed_over"],
        [],
        ["--loss", "a:b", "--world-size", "1"],
        ["seed=1"],
    )
    for arguments in unusable:
        assert main(["check", "parity", *arguments]) == 64
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["check", "--loss", "handed_over:mine"]) == 64


def test_the_batch_is_float64_and_shared_out() -> None:
    def looks(queries, keys):
        assert (
            queries.dtype == keys.dtype == torch.float64
            and len(queries) == len(keys) == 12 // dist.get_world_size()
        )
        return example_losses.exact(queries, keys)

    assert check_loss(looks, 2).exact
