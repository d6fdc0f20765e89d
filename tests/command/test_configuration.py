"""Looking at and choosing the configuration from the command line: list, --cfg, --info,
completion, sweeps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sailplan.cli import completion
from sailplan.cli.sweep import expand
from sailplan.cli.testing import command
from sailplan.config.compose import TYPED_GROUPS, compose
from sailplan.errors import ConfigurationError

OWN = "# @package objectives.mine\n# A loss of this project. It does this.\n_target_: mine.Loss\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with one configuration file of its own."""
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    (tmp_path / "conf" / "objective" / "mine.yaml").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_names_our_files_and_the_project_s_own_with_what_they_are(project: Path) -> None:
    code, out, err = command(project, "list", "objective", "experiment")
    lines = dict(line.split("\t") for line in out.splitlines())
    assert code == 0, err
    assert lines["objective=mine"] == "A loss of this project."
    assert lines["experiment=quickstart"].startswith("The whole recipe") and all(lines.values())
    assert not any(name.startswith("model=") for name in lines)
    code, _, err = command(project, "list", "objectiv")
    assert code == 64 and "did you mean 'objective'" in err


def test_every_file_of_ours_says_what_it_is(project: Path) -> None:
    _, out, _ = command(project, "list")
    assert not [line for line in out.splitlines() if line.endswith("\t")]


def test_cfg_prints_what_the_run_folder_will_hold(project: Path) -> None:
    code, out, err = command(
        project, "train", "--cfg", "job", "experiment=quickstart", "seed=7", "+stages.hard.steps=3"
    )
    assert code == 0, err
    found = yaml.safe_load(out)
    assert (
        found["seed"] == 7
        and found["stages"]["hard"]["steps"] == 3
        and found["order"] == list(found["stages"])
    )
    code, _, err = command(project, "train", "--cfg", "job", "sed=7")
    assert code == 64 and err.count("\n") == 1 and "seed" in err


def test_info_prints_where_the_files_come_from(project: Path) -> None:
    code, out, err = command(
        project, "plan", "--info", "defaults", "experiment=quickstart", "seed=1", "+objective=mine"
    )
    assert code == 0, err
    assert "stage/seq2item" in out + err and "objectives.mine" in out + err


def test_a_file_without_its_package_line_is_named(project: Path) -> None:
    path = project / "conf" / "objective" / "mine.yaml"
    path.write_text(OWN.partition("\n")[2])
    code, _, err = command(project, "plan", "experiment=quickstart", "+objective=mine")
    assert code == 64 and err.count("\n") == 1, err
    assert str(path) in err and "# @package objectives.mine" in err


def test_one_more_loss_leaves_the_list_as_it_is(project: Path) -> None:
    config = compose(["experiment=quickstart", "+objective=mine"])
    assert "mine" in config.objectives and "infonce" in config.objectives


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("exp", {"experiment="}),
        ("experiment=qu", {"experiment=quickstart"}),
        ("objective=mi", {"objective=mine", "objective=micl"}),
        ("optimizer.lear", {"optimizer.learning_rate="}),
        ("step.", {"step.micro_batch=", "step.token_budget="}),
        ("+stages.new.", {"+stages.new.steps="}),
    ],
)
def test_completion_offers_files_and_settings(
    project: Path, prefix: str, expected: set[str]
) -> None:
    found = {one for one in completion.overrides(prefix) if one.startswith(prefix)}
    assert expected <= found, sorted(found)


def test_a_sweep_is_every_combination_under_a_name_of_its_values(project: Path) -> None:
    lines = [
        "experiment=quickstart",
        "seed=0,1",
        "optimizer.learning_rate=1e-3,2e-3",
        "stages.hard.steps=range(1,3)",
    ]
    runs = [compose(overrides) for overrides in expand(lines)]
    assert len(runs) == 8 and len({run.name for run in runs}) == 8
    assert runs[0].name == "quickstart-seed=0,optimizer.learning_rate=0.001,stages.hard.steps=1"
    assert {(run.seed, run.optimizer.learning_rate, run.stages["hard"].steps) for run in runs} == {
        (seed, rate, steps) for seed in (0, 1) for rate in (1e-3, 2e-3) for steps in (1, 2)
    }
    named = expand(["experiment=quickstart,pretrained", "name=choice('a b',other)"])
    assert [compose(overrides).name for overrides in named] == ["a b", "other"] * 2
    assert (
        compose(expand(["experiment=quickstart", "name=mine", "seed=0,1"])[1]).name == "mine-seed=1"
    )


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["seed=0"], "no setting has several values"),
        (["seed=interval(0,1)"], "expected key=A,B"),
        (["hydra/sweeper=optuna", "seed=0,1"], "hydra/sweeper"),
        (["hydra/launcher=nowhere", "seed=0,1", "experiment=quickstart"], "sailplan[slurm]"),
        (["seed=0,1", "sed=1"], "seed"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_starts(
    project: Path, lines: list[str], words: str
) -> None:
    code, _, err = command(project, "train", "--multirun", *lines)
    assert code == 64 and err.count("\n") == 1 and words in err, err


def test_a_sweep_inside_a_launch_of_several_ranks_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command(project, "train", "-m", "seed=0,1")
    assert code == 64 and "hydra.launcher.tasks_per_node" in err


def test_an_unreadable_override_of_one_run_names_the_way_to_a_sweep() -> None:
    with pytest.raises(ConfigurationError, match="--multirun"):
        compose(["seed=0,1"])


@pytest.mark.parametrize("group", sorted(TYPED_GROUPS))
def test_a_file_of_a_typed_group_may_begin_with_its_schema(project: Path, group: str) -> None:
    package = {"stage": "stages.mine", "data": "data.sets.mine"}.get(group)
    first = "# Ours." if package is None else f"# @package {package}"
    begin = f"{first}\ndefaults: [schema@_here_, _self_]\n"
    file = project / "conf" / group / "mine.yaml"
    file.parent.mkdir()
    file.write_text(begin)
    config = compose([f"{group}=mine" if package is None else f"+{group}=mine"])
    found = {"stage": config.stages, "data": config.data.sets}.get(group, {}).get("mine")
    assert (found or getattr(config, group)) == TYPED_GROUPS[group]()
    file.write_text(f"{begin}stepz: 3\n")
    with pytest.raises(ConfigurationError, match=rf"{group}/mine\.yaml: .*stepz"):
        compose([f"{group}=mine" if package is None else f"+{group}=mine"])


def test_a_stage_with_its_schema_still_takes_the_run_s_optimizer(project: Path) -> None:
    file = project / "conf" / "stage" / "mine.yaml"
    file.parent.mkdir()
    text = "# @package stages.mine\ndefaults: [schema@_here_, _self_]\n"
    file.write_text(f"{text}optimizer: {{warmup_steps: 3}}\n")
    config = compose(["+stage=mine", "optimizer.learning_rate=0.5"])
    optimizer = config.stages["mine"].optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (0.5, 3)
