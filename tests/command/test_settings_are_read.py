"""Risk: a setting that is accepted and that nothing reads.

A plan, a model of each kind and a small run of every phase are made while each read of a setting is
noted, except those of the configuration's own rules. What is read nowhere there must be in a list
that says which file reads it, and that file must; a new setting that nobody reads fails here.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import sailplan
from sailplan.cli.launched import launch
from sailplan.config.compose import compose
from sailplan.config.schema import (
    BalanceConfig,
    Config,
    HardNegativeConfig,
    StageConfig,
    StageOptimizerConfig,
    SubsetConfig,
)
from sailplan.curriculum.testing import write_pack
from sailplan.model.config import EncoderConfig, ModelConfig
from sailplan.model.count import count_parameters
from sailplan.objective.registry import build_objectives
from sailplan.train.plan import describe
from sailplan.train.run import train

PACKAGE = Path(sailplan.__file__).parent
# Files and functions that read settings to check, compose or write them, which is no use of them.
RULES = {f"{PACKAGE}/config/{name}.py" for name in ("components", "compose", "overrides", "rules")}
CHECKS = re.compile(r"_?check|validate")
CACHE_KEY = (f"{PACKAGE}/data/processor.py", ("processor_of", "<dictcomp>"))
# Class.setting -> the file that reads it, where no small run can: "" is read by nothing, on purpose.
ELSEWHERE: dict[str, str] = {
    "Config.initialise_parts": "train/run.py",
    "Config.tracking": "config/compose.py",  # of version 0.1.0: carried over to `loggers`
    "DataConfig.lanes": "",  # of version 0.1.0: accepted, of no effect
    "DatasetConfig.field_drop": "data/text.py",  # of items that show several fields
    "StepConfig.dealing": "data/shares.py",  # on several ranks
    "DataConfig.root": "",  # in other settings of the YAML files, as ${data.root}
    "HeldOutConfig.by": "data/datasets.py",
    "HeldOutConfig.fraction": "data/datasets.py",
    "ModelConfig.encoder": "config/encoders.py",  # says which class the settings are of
    "ParallelConfig.cuda_graphs": "model/build.py",
}
ELSEWHERE |= {
    f"InterestsConfig.{name}": f"{file}.py"
    for file, names in {
        "curriculum/interests": "clusters content_similarity draw jaccard multi_peak_behaviours "
        "single_peak_behaviours views",
        "curriculum/timed": "content_clusters events max_events",
        "data/events": "item labels time user",
        "data/config": "positive",
    }.items()
    for name in names.split()
}
ELSEWHERE |= {
    f"TeacherConfig.{name}": "data/teacher_files.py"
    for name in ("dimension", "ids", "path", "vector")
}
ELSEWHERE |= {
    f"StreamConfig.{name}": "data/stream/client.py"
    for name in ("cache_bytes", "deadline_seconds", "folder", "in_flight", "timeout_seconds")
}
# The run's values of these are the stages' own where a stage has none.
INHERITED = {"clip_norm", "final_learning_rate", "schedule", "warmup_steps"}
ELSEWHERE |= {f"OptimizerConfig.{name}": "" for name in INHERITED}


def sections(cls: type) -> Iterator[type]:
    """Yield the dataclasses of a configuration, from its root."""
    yield cls
    for hint in get_type_hints(cls).values():
        for found in (hint, *get_args(hint), *(x for y in get_args(hint) for x in get_args(y))):
            if isinstance(found, type) and dataclasses.is_dataclass(found):
                yield from sections(found)


SECTIONS = {cls for root in (Config, ModelConfig) for cls in sections(root)}
SETTINGS = {f"{cls.__name__}.{one.name}" for cls in SECTIONS for one in dataclasses.fields(cls)}


@pytest.fixture
def reads() -> Iterator[set[str]]:
    """Class.setting of every read by a consumer."""
    found: set[str] = set()
    owners: dict[type, dict[str, str]] = {}
    for cls in SECTIONS:
        owners[cls] = {one.name: f"{cls.__name__}.{one.name}" for one in dataclasses.fields(cls)}

    def reading(self: Any, name: str) -> Any:
        setting = owners.get(type(self), {}).get(name)
        if setting is not None and setting not in found:
            code = sys._getframe(1).f_code
            if (
                code.co_filename.startswith(str(PACKAGE))
                and code.co_filename not in RULES
                and not CHECKS.match(code.co_name)
                and not (code.co_filename == CACHE_KEY[0] and code.co_name in CACHE_KEY[1])
            ):
                found.add(setting)
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        for cls in SECTIONS:
            patch.setattr(cls, "__getattribute__", reading, raising=False)
        yield found


def job(root: Path) -> Config:
    """Every phase of a run in a few steps."""
    config = write_pack(root)
    config.runs, config.name, config.global_batch = str(root / "runs"), "job", 8
    config.objectives = compose(["experiment=quickstart"]).objectives
    config.objectives["id2item"] = config.objectives["id2item"] | {"teachers": {"nmf": 15}}
    config.evaluation.tasks["names"].metrics += ["nmi"]
    config.evaluation.every_steps, config.checkpoint.every_steps = 2, 1
    config.loggers, config.step.micro_batch, config.step.token_budget = {}, 4, 4096
    config.parallel.threads = 1
    quick: dict[str, Any] = {"steps": 2, "optimizer": StageOptimizerConfig(warmup_steps=1)}
    items = {"things": 1.0, "choices": 1.0}
    config.stages = {
        "balanced": StageConfig(
            **quick,
            data=items,
            mixed_fraction=0.5,
            objectives={"infonce": 1.0, "cosent": 0.1, "micl": 0.1},
            balance=BalanceConfig(sample=16, clusters=2, bootstrap=2),
            subset=SubsetConfig(nearest=0.9, drop_noisy=0.1),
        ),
        "mined": StageConfig(
            **quick,
            data=items,
            objectives={"infonce": 1.0},
            hard_negatives=HardNegativeConfig(per_query=1, sample=16, refresh_steps=1),
        ),
        "users": StageConfig(
            **quick,
            data={"sequences": 1.0, "neighbours": 1.0},
            artifacts=["interests", "teachers", "co_occurrence"],
            objectives={"seq2item": 1.0, "id2item": 1.0, "infonce": 1.0},
        ),
    }
    config.order = list(config.stages)
    return config


MODELS = [
    ["vision=siglip2_naflex"],
    ["model=siglip2_qwen3_0b6"],
    ["audio=clap"],
    ["audio=clap_fusion"],
    ["audio=whisper_base"],
    ["model=qwen3_vl_2b"],
    ["model.pooling=latent_attention", "model.lora.rank=2"],
]


def test_every_setting_is_read_by_a_plan_a_model_or_a_run_or_has_its_reader_named(
    tmp_path: Path, reads: set[str]
) -> None:
    config = job(tmp_path)

    def work(rank: int) -> None:
        train(config)
        (tmp_path / "reads").write_text("\n".join(reads))

    ended = launch(work, 1, timeout=240)
    assert ended.codes == [0], ended.said
    reads |= set((tmp_path / "reads").read_text().split())
    described = compose(["experiment=quickstart", "parallel.sharding=hybrid"])
    describe(described, 4)
    for lines in MODELS:
        count_parameters(compose(lines).model)
    build_objectives(described.objectives, 192, described.data.sets)
    unread = SETTINGS - reads
    assert unread - set(ELSEWHERE) == set(), "nothing reads these settings"
    assert {f"StageOptimizerConfig.{name}" for name in INHERITED} <= reads
    assert set(ELSEWHERE) <= unread, f"read after all: {sorted(set(ELSEWHERE) - unread)}"


@pytest.mark.parametrize("setting", sorted(ELSEWHERE))
def test_the_named_reader_reads_it(setting: str) -> None:
    if ELSEWHERE[setting]:
        name = setting.rpartition(".")[2]
        assert re.search(rf"[.\"]{name}\b", (PACKAGE / ELSEWHERE[setting]).read_text()), setting


def test_every_section_is_watched() -> None:
    assert {ModelConfig, Config, StageConfig} <= SECTIONS and len(SECTIONS) > 25
    assert EncoderConfig not in SECTIONS
