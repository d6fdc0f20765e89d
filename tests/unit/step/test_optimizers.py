"""Risks: an optimizer that needs code, whose decay groups or resume are lost, or of which a
setting has no effect.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sailplan.checkpoint.loading import load
from sailplan.checkpoint.store import save
from sailplan.cli.testing import command, write_project
from sailplan.config.compose import compose
from sailplan.config.schema import Config, OptimizerConfig, StageOptimizerConfig
from sailplan.errors import ConfigurationError
from sailplan.model.parallelize import shard
from sailplan.model.testing import join_layout
from sailplan.parity.testing import build_modules, step_config
from sailplan.step.optimizer import (
    build_optimizer,
    check_optimizer,
    configure,
    optimizer_state_size,
    set_learning_rate,
)
from sailplan.step.schedules import learning_rate_scale
from sailplan.train.testing import metrics
from sailplan_kernels.testing import run_ranks

OWN = '''"""An optimizer that counts its steps in its groups, as apex's does."""

import torch


class Counting(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0, sign=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "sign": sign})

    def zero_grad(self):
        raise AssertionError("takes no argument, so nobody may call it with one")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"] * group["sign"] / group["step"])
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optimizers")
    write_project(root)
    (root / "own_optimizer.py").write_text(OWN)
    (root / "conf" / "optimizer").mkdir()
    (root / "conf" / "optimizer" / "momentum.yaml").write_text(
        "_target_: torch.optim.SGD\nlearning_rate: 0.05\noptions: {momentum: 0.9, nesterov: true}\n"
    )
    (root / "conf" / "optimizer" / "own.yaml").write_text(
        "_target_: own_optimizer.Counting\nlearning_rate: 0.05\noptions: {sign: 1.0}\n"
    )
    return root


@pytest.mark.parametrize("name", ["momentum", "own"])
def test_one_yaml_chooses_an_optimizer_and_a_run_of_it_resumes_with_the_same_numbers(
    project: Path, name: str
) -> None:
    lines = [
        "train",
        "experiment=small",
        f"optimizer={name}",
        "optimizer.warmup_steps=1",
        "allowed_targets=[sailplan., own_optimizer.]",
    ]
    code, _, err = command(project, *lines, f"name={name}", "stages.only.steps=4")
    assert code == 0, err
    whole = [line["loss/total"] for line in metrics(project / "runs" / name)]
    assert len(set(whole)) == 4 and all(map(math.isfinite, whole))
    for step in ("step-00000003", "step-00000004"):
        for path in (project / "runs" / name / "checkpoints" / step).iterdir():
            path.unlink()
        (project / "runs" / name / "checkpoints" / step).rmdir()
    code, _, err = command(project, *lines, f"name={name}", "stages.only.steps=4", "resume=auto")
    assert code == 0, err
    assert [line["loss/total"] for line in metrics(project / "runs" / name)][-2:] == pytest.approx(
        whole[2:], rel=1e-6
    )
    code, _, err = command(
        project, "train", "experiment=small", f"name={name}", "resume=auto", "stages.only.steps=4"
    )
    assert code == 64 and "optimizer._target_" in err, (
        "a run may not go on with another optimizer's state"
    )


def _layouts(rank: int, world_size: int, config: OptimizerConfig, folder: Path) -> None:
    """State of sharded parameters comes back as it was, and the next update with it."""

    def made() -> tuple[torch.nn.ModuleDict, torch.optim.Optimizer]:
        encoder, objectives, temperatures = build_modules(step_config())
        encoder = shard(encoder, parallel, shard=True)
        optimizer = build_optimizer(encoder, objectives, temperatures, config)
        return torch.nn.ModuleDict(
            {"encoder": encoder, "objectives": objectives, "temperatures": temperatures}
        ), optimizer

    def step(module: torch.nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
        for number, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, 0.01 * (1 + number % 5))
        optimizer.step()

    parallel = join_layout(1)
    module, optimizer = made()
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert (
        decays["encoder_decay"] == 0.1
        and decays["encoder_no_decay"] == decays["temperatures"] == 0.0
    )
    for _ in range(2):
        step(module, optimizer)
    save(folder / "step-00000002", model=module, optimizer=optimizer, extra={}, parallel=parallel)
    step(module, optimizer)
    again, other = made()
    load(folder / "step-00000002", model=again, optimizer=other, parallel=parallel)
    step(again, other)
    for (name, first), second in zip(module.named_parameters(), again.parameters(), strict=True):
        local = [
            each.to_local() if hasattr(each, "to_local") else each
            for each in (first.detach(), second.detach())
        ]
        assert torch.allclose(*local, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(weight_decay=0.1),
        OptimizerConfig(weight_decay=0.1, _target_="torch.optim.SGD", options={"momentum": 0.9}),
        OptimizerConfig(weight_decay=0.1, _target_="torch.optim.NAdam"),
    ],
    ids=lambda config: config._target_,
)
def test_decay_groups_and_saved_state_of_sharded_parameters(
    config: OptimizerConfig, tmp_path: Path
) -> None:
    run_ranks(_layouts, 2, config, tmp_path)


def test_memory_is_what_the_class_keeps() -> None:
    sizes = {
        ("torch.optim.AdamW", None): 2,
        ("torch.optim.AdamW", "amsgrad"): 3,
        ("torch.optim.SGD", None): 0,
        ("torch.optim.Adagrad", None): 1,
    }
    for (target, option), size in sizes.items():
        assert (
            optimizer_state_size(
                OptimizerConfig(_target_=target, options={option: True} if option else {})
            )
            == size
        )


def _refused(**settings: Any) -> str:
    config = Config(optimizer=OptimizerConfig(**settings))
    with pytest.raises(ConfigurationError) as caught:
        check_optimizer(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_no_step_could_use_is_one_line() -> None:
    assert "expected a class below sailplan., torch.optim., apex.optimizers." in _refused(
        _target_="shutil.rmtree"
    )
    assert "expected a subclass of torch.optim" in _refused(
        _target_="torch.optim.lr_scheduler.LambdaLR"
    )
    assert "optimizer.options.momentum: AdamW has no such option" in _refused(
        options={"momentum": 0.9}
    )
    assert "optimizer.options.lr" in _refused(options={"lr": 0.9})
    assert "SGD has no betas, so it would have no effect" in _refused(
        _target_="torch.optim.SGD", betas=[0.5, 0.5]
    )
    assert "row_var" in _refused(_target_="torch.optim.Adafactor")
    assert "Nesterov momentum requires" in _refused(
        _target_="torch.optim.SGD", options={"nesterov": True}
    )
    assert (
        "optimizer._target_=apex.optimizers.FusedAdam: the package apex is not installed"
        in _refused(_target_="apex.optimizers.FusedAdam")
    )


def test_schedules_begin_at_the_peak_and_end_at_the_final_rate() -> None:
    for name, middle in (
        ("WarmupCosine", 0.55),
        ("WarmupLinear", 0.55),
        ("WarmupStableDecay", 1.0),
    ):
        settings = StageOptimizerConfig(
            learning_rate=1.0,
            final_learning_rate=0.1,
            warmup_steps=4,
            schedule={"_target_": f"sailplan.step.schedules.{name}"},
        )
        scales = [learning_rate_scale(settings, step, 104) for step in range(105)]
        assert scales[:4] == [0.25, 0.5, 0.75, 1.0]
        assert (
            scales[4] == pytest.approx(1.0)
            and scales[54] == pytest.approx(middle)
            and scales[104] == pytest.approx(0.1)
        )
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(scales[4:]))


def test_a_stage_may_have_a_schedule_but_no_optimizer_of_its_own() -> None:
    linear = "stages.hard.optimizer.schedule._target_=sailplan.step.schedules.WarmupLinear"
    config = compose(["experiment=quickstart", linear])
    check_optimizer(config)
    found = {
        name: stage.optimizer.schedule["_target_"].rpartition(".")[2]
        for name, stage in config.stages.items()
    }
    assert found.pop("hard") == "WarmupLinear" and set(found.values()) == {"WarmupCosine"}
    with pytest.raises(ConfigurationError, match=r"unknown key 'stages.hard.optimizer._target_'"):
        compose(["experiment=quickstart", "+stages.hard.optimizer._target_=torch.optim.SGD"])


def test_a_stage_changes_rates_and_keeps_what_the_class_has_no_use_for_out() -> None:
    optimizer = torch.optim.SGD(
        [
            {
                "params": [torch.nn.Parameter(torch.ones(2, 2))],
                "name": "encoder_decay",
                "peak_learning_rate": 0.0,
            }
        ],
        lr=1.0,
    )
    configure(optimizer, StageOptimizerConfig(learning_rate=0.5, weight_decay=0.2))
    set_learning_rate(optimizer, 0.5)
    (group,) = optimizer.param_groups
    assert (
        (group["lr"], group["weight_decay"]) == (0.25, 0.2)
        and "betas" not in group
        and "eps" not in group
    )


def test_the_plan_says_what_the_optimizer_takes(project: Path) -> None:
    found = {}
    for name in ("adamw", "momentum"):
        code, out, err = command(project, "plan", "experiment=small", f"optimizer={name}", "--json")
        assert code == 0, err
        found[name] = json.loads(out)["memory_bytes"]["optimizer"]
    assert found["adamw"] == 2 * found["momentum"] > 0
