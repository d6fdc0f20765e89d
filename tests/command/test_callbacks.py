"""Risks: a callback of one's own that is not called, is called out of step on some rank or forgets
what it knew; an option that nobody reads; a loop that grows.
"""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from sailplan.cli.launched import launch
from sailplan.cli.testing import command, write_project
from sailplan.config.compose import compose, from_dict
from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError
from sailplan.train.callback import StepDone, build_callbacks
from sailplan.train.config import built_in_callbacks
from sailplan.train.run import train
from sailplan.train.testing import metrics
from sailplan.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
WATCHED = '''"""What docs/callbacks.md has, with a record of its calls in each step's line."""

from own_callbacks import StopBelow


class Watched(StopBelow):
    calls: str = ""

    def resumed(self, run, span):
        self.calls += f"resumed {run.step}, "

    def start_stage(self, run, stage):
        self.calls += f"start {stage.span.name}"

    def flags(self, run, stage, batches):
        return (run.parallel.rank == run.parallel.world_size - 1 and run.step == 0,)

    def values(self, run, done):
        return super().values(run, done) | {"own/calls": self.calls}

    def after_step(self, run, done, flags):
        self.calls += f", step {run.step} {flags[0]}"
        super().after_step(run, done, flags)
'''
LINE = (
    "train",
    "experiment=small",
    "+callback=stop_below",
    "allowed_targets=[sailplan., own_callbacks., watched.]",
    "resume=auto",
)
WATCH = "callbacks.stop_below._target_=watched.Watched"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("callbacks")
    write_project(root)
    (root / "conf" / "callback").mkdir()
    blocks = re.findall(
        r"`([\w/]+\.(?:yaml|py))`:\n\n```\w+\n(.*?)```",
        (ROOT / "docs" / "callbacks.md").read_text(),
        flags=re.DOTALL,
    )
    for name, content in [*blocks, ("watched.py", WATCHED)]:
        (root / name).write_text(content)
    return root


def test_a_callback_by_yaml_is_called_logs_stops_the_run_and_goes_on_with_what_it_knew(
    project: Path,
) -> None:
    settings = (
        WATCH,
        "callbacks.stop_below.bar=1e9",
        "stages.only.steps=3",
        "checkpoint.every_steps=0",
    )
    code, _, err = command(project, *LINE, *settings)
    assert code == 75 and "stopped at step 2 (stage only), saved" in err, err
    code, out, err = command(project, *LINE, *settings)
    assert code == 0 and "finished after" in out, err
    lines = metrics(project / "runs" / "small")
    assert [line["step"] for line in lines] == [1, 2, 3]
    # The request after step 1 travels with step 2; the third step is the resumed process's first.
    assert [line["own/below"] for line in lines] == [0, 1, 2]
    assert lines[1]["own/calls"] == "start only, step 1 True"
    assert lines[2]["own/calls"] == "resumed 2, start only"


def test_a_flag_of_one_rank_reaches_all_and_costs_no_message(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))

    def job(name: str, *more: str) -> Config:
        return compose(
            [
                "experiment=small",
                f"name={name}",
                f"runs={tmp_path}",
                "allowed_targets=[sailplan., own_callbacks., watched.]",
                *more,
            ]
        )

    def trained(config: Config) -> list[list[int]]:
        """Return, for each rank, the messages that were sent before the end of each step."""

        def work(rank: int) -> None:
            sent, counts, after_step = [0], list[int](), Trainer._after_step

            def count(self: Trainer, done: StepDone) -> None:
                after_step(self, done)
                counts.append(sent[0])

            def counting(former: Callable[..., object]) -> Callable[..., object]:
                def message(*arguments: object, **options: object) -> object:
                    sent[0] += 1
                    return former(*arguments, **options)

                return message

            for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"):
                setattr(dist, name, counting(getattr(dist, name)))
            Trainer._after_step = count  # type: ignore[method-assign]
            train(config)
            (tmp_path / f"{config.name}-{rank}").write_text(json.dumps(counts))

        ended = launch(work, 2, timeout=120)
        assert ended.codes == [0, 0], ended.said
        return [json.loads((tmp_path / f"{config.name}-{rank}").read_text()) for rank in (0, 1)]

    plain = trained(job("plain"))
    own = trained(job("own", "+callback=stop_below", WATCH, "callbacks.stop_below.bar=1e-9"))
    assert own == plain and len(own[0]) == 2, (own, plain)
    lines = metrics(tmp_path / "own")  # rank 0's, of a flag that rank 1 had alone
    assert lines[1]["own/calls"] == "start only, step 1 True"


@pytest.mark.parametrize("name", ["plan", "check", "train"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("+callbacks.stop_below.brr=2", "StopBelow has no such option; did you mean 'bar'?"),
        ("callbacks.stop_below.bar=-1", "callbacks.stop_below.bar=-1: expected a number above 0"),
        ("+callbacks.other.every=2", "callbacks.other._target_: found None"),
        ("~callbacks.hard_negatives", "no callback mines again; add +callback=hard_negatives"),
        ("allowed_targets=[sailplan.]", "add your module to allowed_targets"),
    ],
)
def test_what_no_callback_takes_is_refused_by_every_command(
    project: Path, name: str, setting: str, words: str
) -> None:
    mined = "stages.only.hard_negatives={refresh_steps: 1}"
    code, _, err = command(project, name, *LINE[1:], "name=refused", mined, setting)
    assert code == 64 and err.count("\n") == 1 and words in err, err


def test_the_profiler_writes_a_trace_and_a_table_of_the_ranks_that_it_is_told(
    project: Path,
) -> None:
    code, _, err = command(
        project,
        "train",
        "experiment=small",
        "name=profiled",
        "stages.only.steps=3",
        "+callback=profiler",
        "callbacks.profiler.after=0",
        "callbacks.profiler.steps=1",
    )
    assert code == 0, err
    (trace,) = (project / "runs" / "profiled" / "profile").glob("*.gz")
    assert trace.name == "rank-00000-step-00000002.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("Optimizer.step" in str(event.get("name")) for event in events)
    table = trace.with_name(trace.name.replace(".json.gz", ".txt")).read_text()
    assert "Self CPU" in table


def test_the_group_has_a_file_for_each_and_lists_them_in_the_order_of_their_calls() -> None:
    config = compose(["experiment=quickstart"])
    targets = {name: {"_target_": one["_target_"]} for name, one in config.callbacks.items()}
    assert list(targets.items()) == list(built_in_callbacks().items())
    for name, one in build_callbacks(config).items():  # files say what the classes' defaults are
        options = {key: value for key, value in config.callbacks[name].items() if key != "_target_"}
        plain = type(one)()
        assert {key: getattr(plain, key) for key in options} == options, name
    shorter = compose(["experiment=quickstart", "callback=[metrics,checkpoint]"])
    assert list(build_callbacks(shorter)) == ["metrics", "checkpoint"]
    with_profiler = compose(["experiment=quickstart", "+callback=profiler"])
    assert list(build_callbacks(with_profiler))[-1] == "profiler"
    assert from_dict({}).callbacks == {}  # of a run folder that an older version wrote


def test_the_callback_of_the_docs_needs_no_file(project: Path) -> None:
    line = "+callbacks.mine._target_=own_callbacks.StopBelow"
    allowed = "allowed_targets=[sailplan., own_callbacks.]"
    code, _, err = command(project, "train", "experiment=small", "name=line", line, allowed)
    assert code == 0, err
    assert [line["own/below"] for line in metrics(project / "runs" / "line")] == [0, 0]


def test_an_own_callback_may_take_the_place_of_ours() -> None:
    lines = ["experiment=quickstart", "callbacks.evaluation._target_=own_callbacks.Other"]
    with pytest.raises(ConfigurationError, match=r"callbacks\.evaluation\._target_=own_callbacks"):
        build_callbacks(compose(lines))


def test_the_loop_stays_short() -> None:
    """Under 80 lines: what a reader must hold in mind to know in which order a run does what."""
    methods = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(Trainer))))  # type: ignore[arg-type]
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    loop = ("run", "_run_stage", "_run_steps", "_after_step")
    assert sum(methods[name] for name in loop) < 80, {name: methods[name] for name in loop}
