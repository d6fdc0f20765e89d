"""Each alert fires once on its cause and again when that comes back; a clean run is quiet."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sailplan.data.exclusions import Exclusion, Exclusions
from sailplan.train.callbacks.alerts import Alerts

Values = dict[str, Any]
CLEAN = 120


class Stand:
    """A run as alerts see it: values of each step go in, what is told comes out."""

    def __init__(self, **options: Any) -> None:
        self.told: list[tuple[int, str, str]] = []
        self.exclusions = Exclusions()
        self.run: Any = SimpleNamespace(
            step=0,
            parallel=SimpleNamespace(is_main=True),
            exclusions=self.exclusions,
            config=SimpleNamespace(data=SimpleNamespace(bad_sample_limit=0.01)),
            writer=SimpleNamespace(log_alert=lambda *told: self.told.append(told)),
        )
        self.alerts = Alerts(**{"window": 10, "warmup": 20} | options)
        self.alerts.start_stage(self.run, None)  # type: ignore[arg-type]
        self.chance = random.Random(0)

    def step(self, skipped: bool = False, **values: Any) -> Values:
        self.run.step += 1
        chance, rise = self.chance, min(1.0, self.run.step / 100)
        usual = {
            "infonce/things/a/accuracy": 0.1 + 0.7 * rise + chance.uniform(-0.1, 0.1),
            "infonce/things/a/positive_score": 0.3 + 0.4 * rise + chance.uniform(-0.1, 0.1),
            "data/wait_share": chance.choice([0.01, 0.1, 0.9 if self.run.step % 9 == 0 else 0.0]),
        }
        if self.run.step % 5 == 0:
            usual |= {
                "ranks/slowest": 1,
                "ranks/slowest_in": "encode",
                "ranks/slowest_share": chance.uniform(0, 0.15),
                "data/modality/audio": chance.uniform(0.2, 0.4),
            }
        known = usual | {name.replace("__", "/"): value for name, value in values.items()}
        batch = SimpleNamespace(rank_rows=(64, 64), record_ids=[])
        done: Any = SimpleNamespace(
            values=known, result=SimpleNamespace(skipped=skipped), batches=[batch]
        )
        return dict(self.alerts.values(self.run, done))

    def steps(self, count: int, **values: Any) -> None:
        for _ in range(count):
            self.step(**values)


def names(stand: Stand) -> list[str]:
    return [name for _, name, _ in stand.told]


def test_a_clean_run_is_quiet() -> None:
    stand = Stand()
    stand.steps(3 * CLEAN)
    assert stand.told == []


COLLAPSED = {
    "infonce__things__a__accuracy": 0.01,
    "infonce__things__a__positive_score": 0.99,
}
CAUSES: dict[str, tuple[Callable[[Stand], object], str]] = {
    "collapse": (lambda stand: stand.steps(10, **COLLAPSED), "infonce/things/a: accuracy 0.010"),
    "starved_modality": (lambda stand: stand.steps(5, data__modality__audio=0.0), "audio in 0.0%"),
    "straggler": (
        lambda stand: stand.steps(
            5, ranks__slowest=3, ranks__slowest_in="data", ranks__slowest_share=0.4
        ),
        "rank 3 takes 40% of a step",
    ),
    "data_wait": (lambda stand: stand.steps(10, data__wait_share=0.5), "wait 50% of their time"),
    "not_finite": (lambda stand: stand.step(skipped=True), "the step is skipped"),
    "false_negatives": (
        lambda stand: stand.steps(
            10, infonce__things__a__accuracy=0.3, infonce__things__a__positive_score=0.75
        ),
        "accuracy 0.",
    ),
    "bad_samples": (
        lambda stand: (
            stand.exclusions.add(Exclusion("things", number, 500) for number in range(7)),
            stand.step(),
        ),
        "7 bad samples in the latest",
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_an_alert_fires_once_on_its_cause_and_again_when_it_comes_back(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cause, words = CAUSES[name]
    stand = Stand()
    stand.steps(CLEAN)
    cause(stand)
    if name == "collapse":  # on its way down, other rows come before positives that are as close
        stand.told = [one for one in stand.told if one[1] != "false_negatives"]
    assert names(stand) == [name], stand.told
    assert words in stand.told[0][2]
    assert f"alert: {name}: " in capsys.readouterr().err
    if name in ("not_finite", "straggler", "starved_modality"):
        cause(stand)
        stand.steps(10)
        assert names(stand).count(name) == 1, "as long as it lasts"
        cause(stand)
        assert names(stand) == [name, name]


def test_the_line_of_the_step_has_the_alert() -> None:
    stand = Stand()
    assert not any(name.startswith("alert/") for name in stand.step())
    assert "skipped" in stand.step(skipped=True)["alert/not_finite"]


def test_the_beginning_of_a_stage_is_no_collapse() -> None:
    stand = Stand(warmup=50)
    stand.steps(40, **COLLAPSED)
    assert stand.told == []
    stand.steps(20, **COLLAPSED)
    assert names(stand) == ["collapse"]
