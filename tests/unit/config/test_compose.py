"""Every YAML file composes, and a wrong key, type or size is one line that says what to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from sailplan.config.compose import (
    as_dict,
    changed,
    compose,
    config_hash,
    from_dict,
    identity,
    identity_difference,
)
from sailplan.config.rules import check
from sailplan.errors import ConfigurationError
from sailplan.runtime.config import ParallelConfig
from sailplan_kernels.exchange import ALL_EXCHANGES

CONF = Path(__file__).resolve().parents[3] / "conf"
SINGLE_GROUPS = ("model", "audio", "vision", "optimizer", "parallel", "checkpoint")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group in SINGLE_GROUPS for name in options(group)]
)
def test_every_choice_of_every_group_composes(choice: str) -> None:
    compose([choice])


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_passes_its_checks(name: str) -> None:
    config = compose([f"experiment={name}"])
    check(config, world_size=2)
    assert from_dict(as_dict(config)) == config


@pytest.mark.parametrize("name", options("audio"))
def test_every_sound_encoder_brings_its_front_end(name: str) -> None:
    config = compose(["experiment=quickstart", f"audio={name}"])
    check(config, world_size=2)
    assert config.data.spectrogram == config.model.audio.backbone != "own"


@pytest.mark.parametrize("name", options("vision"))
def test_every_image_tower_brings_its_front_end(name: str) -> None:
    config = compose(["experiment=quickstart", f"vision={name}"])
    check(config, world_size=2)
    assert config.data.image_patch == config.model.vision.patch and config.data.image_patches


@pytest.mark.parametrize("name", options("data"))
def test_every_data_set_is_used_by_the_quickstart(name: str) -> None:
    config = compose(["experiment=quickstart"])
    assert name == "reading" or name in config.data.sets


@pytest.mark.parametrize("name", options("objective"))
def test_every_objective_is_on_by_default_or_one_word_adds_it(name: str) -> None:
    default = compose([]).objectives
    if name not in default:
        assert {*default, name} == set(compose([f"+objective={name}"]).objectives)


def test_quickstart_is_short_enough_to_read() -> None:
    assert len((CONF / "experiment" / "quickstart.yaml").read_text().splitlines()) <= 80


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=quickstart", "global_batchh=3"], ["global_batchh", "global_batch"]),
        (["experiment=quickstart", "data.segmentt=4"], ["data.segmentt", "segment"]),
        (["experiment=quickstart", "stages.hard.stepz=4"], ["stages.hard.stepz", "steps"]),
        (["experiment=nothing"], ["experiment/nothing", "quickstart"]),
        (["experiment=quickstart", "seed=abc"], ["seed", "abc"]),
        (["experiment=quickstart", "global_batch=1"], ["global_batch=1", "2 data-parallel ranks"]),
        (["experiment=quickstart", "parallel.tensor=3"], ["parallel.tensor=3", "2 processes"]),
        (
            ["experiment=quickstart", "data.sets.emoji.views.image.modalities=[smell]"],
            ["smell", "text, vision, audio"],
        ),
        (["experiment=quickstart", "order=[diverse,missing]"], ["missing", "diverse"]),
        (
            ["experiment=quickstart", "+stages.hard.data.nowhere=1"],
            ["stages.hard.data", "nowhere", "emoji"],
        ),
        (
            ["experiment=quickstart", "data.sets.emoji.patterns.image_to_name.query=picture"],
            ["picture", "image"],
        ),
        (
            ["experiment=quickstart", "audio=clap", "data.audio_rate=16000"],
            ["data.audio_rate=16000", "48000", "clap"],
        ),
        (
            ["experiment=quickstart", "audio=clap", "data.audio_chunk_seconds=11"],
            ["data.audio_chunk_seconds=11", "at most 10.23"],
        ),
        (
            ["experiment=quickstart", "model.audio.backbone=clap"],
            ["data.spectrogram=own", "expected clap", "48000"],
        ),
        (
            ["experiment=quickstart", "stages.hard.trainable=[]"],
            ["stages.hard.trainable is empty", "expected all, or some of text"],
        ),
        (
            [
                "experiment=quickstart",
                "model.vision.backbone=qwen3_vl",
                "model.vision.merge=1",
                "stages.hard.trainable=[perceiver]",
            ],
            ["stages.hard.trainable", "qwen3_vl does not have", "vision or tower"],
        ),
        (
            ["experiment=quickstart", "vision=siglip2_naflex", "data.image_patches=null"],
            ["data.image_patches=None", "siglip2", "256"],
        ),
        (
            ["experiment=quickstart", "vision=siglip2_naflex", "data.image_patch=14"],
            ["data.image_patch=14", "model.vision.patch=16"],
        ),
        (
            ["experiment=quickstart", "data.image_patches=64"],
            ["data.image_patches=64", "expected null", "backbone=own", "data.image_size"],
        ),
        (["experiment=quickstart", "model.prefixes=[512]"], ["model.prefixes", "192"]),
        (["experiment=quickstart", "++foo=1"], ["++foo=1", "unknown key 'foo'"]),
        (
            ["experiment=quickstart", "+stages.hard.stepz=4"],
            ["unknown key 'stages.hard.stepz'", "steps"],
        ),
        (
            ["experiment=quickstart", "+data.sets.emoji.views.image.promt=a"],
            ["unknown key 'data.sets.emoji.views.image.promt'", "prompt"],
        ),
        (
            ["experiment=quickstart", "+stages.more={stepz: 4}"],
            ["unknown key 'stages.more.stepz'", "steps"],
        ),
        (
            ["experiment=quickstart", "stages.hardd.steps=4"],
            ["stages has no 'hardd'", "hard", "+stages.hardd.steps=4"],
        ),
        (
            ["experiment=quickstart", "stages.hard.steps=1.5"],
            ["stages.hard.steps=1.5", "a whole number"],
        ),
        (["experiment=quickstart", "stages.hard=3"], ["stages.hard=3", "KEY: VALUE", "steps"]),
        (
            ["experiment=quickstart", "checkpoint.asynchronous=maybe"],
            ["checkpoint.asynchronous=maybe", "true or false"],
        ),
        (["experiment=quickstart", "order=diverse"], ["order=diverse", "a list"]),
        (["experiment=quickstart", "seed={a"], ["seed={a", "key=value"]),
        (["experiment=quickstart", "seed=1,2"], ["seed=1,2", "seed=[A,B]"]),
        (["experiment=quickstart", "~stages.hardd"], ["~stages.hardd", "hard"]),
        (["experiment=quickstart", "~seed"], ["~seed", "cannot be deleted"]),
        (
            ["experiment=quickstart", "data=[reading,emojii]"],
            ["data/emojii.yaml", "did you mean 'emoji'"],
        ),
        (
            ["experiment=quickstart", "order=[diverse,diverse]"],
            ["order", "'diverse' more than once"],
        ),
        (["experiment=quickstart", "data.window=0"], ["data.window=0", "at least 1"]),
        (
            ["experiment=quickstart", "optimizer.learning_rate=-1"],
            ["optimizer.learning_rate=-1.0", "at least 0"],
        ),
        (
            ["experiment=quickstart", "stages.nearest.subset.nearest=1.5"],
            ["stages.nearest.subset.nearest=1.5", "at most 1"],
        ),
        (
            ["experiment=quickstart", "data.sets.emoji.temperature=0"],
            ["data.sets.emoji.temperature=0.0", "from 0.005 to 1"],
        ),
        (
            ["experiment=quickstart", "evaluation.tasks.icon_choice.kind=guess"],
            ["evaluation.tasks.icon_choice.kind=guess", "retrieval"],
        ),
        (
            ["experiment=quickstart", "evaluation.tasks.icon_choice.metrics=[accuracy]"],
            ["evaluation.tasks.icon_choice.metrics", "accuracy", "recall"],
        ),
        (
            ["experiment=quickstart", "evaluation.tasks.icon_choice.candidates=some"],
            ["evaluation.tasks.icon_choice.candidates=some", "split, all"],
        ),
        (
            ["experiment=quickstart", "evaluation.tasks.set_completion.kind=retrieval"],
            ["evaluation.tasks.set_completion.kind=retrieval", "sequences"],
        ),
        (
            ["experiment=quickstart", "evaluation.tasks.emoji_subgroups.label=null"],
            ["evaluation.tasks.emoji_subgroups.label", "empty"],
        ),
        (
            ["experiment=quickstart", "evaluation.tasks.icon_choice.dataset=icon_neighbours"],
            ["evaluation.tasks.icon_choice.dataset", "artifact:"],
        ),
        (
            ["experiment=quickstart", "evaluation.benchmark=[nothing]"],
            ["evaluation.benchmark=nothing", "icon_choice"],
        ),
        (
            ["experiment=quickstart", "initialise_parts=[optimizer]"],
            ["initialise_parts.0=optimizer", "encoder, objectives, temperatures"],
        ),
        (
            ["experiment=quickstart", "initialise_from=runs/other", "initialise_parts=[]"],
            ["initialise_parts", "initialise_from=runs/other", "encoder"],
        ),
    ],
)
def test_wrong_settings_are_one_line_that_names_key_and_expectation(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(compose(overrides), world_size=2)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_hash_follows_what_is_trained_and_not_how_it_is_read() -> None:
    base = compose(["experiment=quickstart"])
    assert config_hash(
        compose(
            ["experiment=quickstart", "data.workers=3", "name=other", "loggers.wandb.mode=online"]
        )
    ) == config_hash(base)
    changed = compose(["experiment=quickstart", "stages.hard.steps=1"])
    assert config_hash(changed) != config_hash(base)
    lines = identity_difference(identity(base), identity(changed))
    assert len(lines) == 1 and lines[0].startswith("stages.hard.steps: ")


def test_a_stage_takes_the_common_optimizer_and_its_own_values_win() -> None:
    config = compose(["experiment=quickstart", "optimizer.weight_decay=0.5"])
    assert all(stage.optimizer.weight_decay == 0.5 for stage in config.stages.values())
    assert config.stages["hard"].optimizer.learning_rate != config.optimizer.learning_rate


def test_new_entries_and_sections_that_were_null_can_be_set_on_the_command_line() -> None:
    lines = [
        "+stages.more={steps: 3}",
        "+stages.more.data.emoji=2",
        "stages.more.steps=4",
        "stages.hard.balance.sample=5",
        "stages.diverse.balance=null",
    ]
    config = compose(["experiment=quickstart", "optimizer.weight_decay=0.5", *lines])
    assert config.stages["more"].steps == 4 and config.stages["more"].data == {"emoji": 2.0}
    assert (
        config.stages["more"].optimizer.weight_decay == 0.5
    )  # a stage from the command line follows the common optimizer too
    assert config.stages["hard"].balance is not None and config.stages["hard"].balance.sample == 5
    assert config.stages["diverse"].balance is None
    saved = changed(config, ["~stages.more", "+stages.other.steps=7"])
    assert "more" not in saved.stages and saved.stages["other"].steps == 7
    with pytest.raises(ConfigurationError, match="parallel=tensor_2: a run keeps the files"):
        changed(config, ["parallel=tensor_2"])


def test_compose_itself_refuses_what_a_component_refuses() -> None:
    """No command can accept what another refuses: whoever has a configuration has a validated
    one.
    """
    for lines, words in {
        "data.sets.emoji.temperature=2": "data.sets.emoji.temperature=2.0: expected a number from 0.005 to 1",
        "step.kept_graphs=-2": "step.kept_graphs=-2: expected a number at least -1 (-1: all), or auto",
        "step.kept_graphs=all": "step.kept_graphs=all: expected a number at least -1 (-1: all), or auto",
        "optimizer.epsilon=nan": "optimizer.epsilon=nan: expected a number above 0",
        "optimizer.betas=[0.9,1.0]": "optimizer.betas.1=1.0: expected a number at least 0, below 1",
        "parallel.dtype=float16": "parallel.dtype=float16: expected one of float32, bfloat16, float64",
        "stages.hard.data.emoji=0": "stages.hard.data.emoji=0.0: expected a number above 0",
    }.items():
        with pytest.raises(ConfigurationError, match=re.escape(words)):
            compose(["experiment=quickstart", lines])
    saved = compose(["experiment=quickstart"])
    with pytest.raises(ConfigurationError, match=r"evaluation\.batch=0"):
        changed(saved, ["evaluation.batch=0"])
    with pytest.raises(ConfigurationError, match=r"checkpoint\.keep=0"):
        from_dict(as_dict(saved) | {"checkpoint": {"keep": 0}})


def test_the_choice_of_exchanges_is_that_of_the_kernels() -> None:
    assert set(get_args(get_type_hints(ParallelConfig)["exchange"])) == set(ALL_EXCHANGES)


def test_a_wrong_key_is_answered_before_anything_heavy_is_imported() -> None:
    """Importing torch, megatron-core and W&B takes ten seconds; a configuration is composed and
    checked without them.
    """
    code = (
        "import sys\nfrom sailplan.cli.main import main\n"
        "code = main(['train', 'experiment=quickstart', 'data.lanez=4'])\n"
        "found = [name for name in ('torch', 'megatron', 'wandb', 'transformers', 'sklearn', "
        "'scipy', 'matplotlib') if name in sys.modules]\n"
        "assert code == 64 and not found, (code, found)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {hard: {stepz: 3}}", ["experiment/mine.yaml", "stages.hard.stepz", "steps"]),
        (
            "stages: {hard: {steps: soon}}",
            ["experiment/mine.yaml", "stages.hard.steps", "'soon'", "a whole number"],
        ),
        ("stages: {hard: [1", ["experiment/mine.yaml, line 5", "not YAML"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(
    text: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAILPLAN_CONF", str(tmp_path))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [quickstart, _self_]\n\n{text}\n"
    )
    with pytest.raises(ConfigurationError) as caught:
        compose(["experiment=mine"])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_folder_of_ones_own_holds_its_own_files_only_and_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAILPLAN_CONF", str(tmp_path))
    for name, text in {
        "stage/warm.yaml": "steps: 7\ndata: {emoji: 1}\nobjectives: {infonce: 1.0}\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults: [quickstart, /stage@stages.first: warm, /stage@stages.again: warm, _self_]\n"
        "order: [first, again]\nstages: {again: {steps: 2}}\n",
        "checkpoint/default.yaml": "keep: 3\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    config = compose(["experiment=mine"])
    check(config, world_size=2)
    assert [config.stages[name].steps for name in config.order] == [7, 2] and config.stages[
        "again"
    ].data == {"emoji": 1.0}
    assert config.checkpoint.keep == 3
