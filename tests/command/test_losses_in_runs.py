"""Risks: a loss that composes and does not train, whose learned numbers are lost at a resume, whose
labels or scores do not come from the data that people have.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sailplan.cli.testing import command, write_project
from sailplan.data.testing import json_member, png, write_set
from sailplan.train.testing import metrics

TEXTS = {"modalities": ["text"], "fields": ["text"]}
SCORED = {
    "shards": "scored",
    "kind": "pairs",
    "negatives": 2,
    "teacher_scores": "scores",
    "views": {"query": {"of": "query", **TEXTS}, "target": {"of": "target", **TEXTS}},
    "patterns": {"q2t": {"query": "query", "target": "target"}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("losses")
    write_project(root)
    pairs = [
        {
            "id": str(number),
            "query": f"want {number}",
            "target": f"red {number}",
            "negatives": [f"blue {number}", "low"][: number % 3],
            "scores": [3.0, 1.0, -1.0][: 1 + number % 3],
        }
        for number in range(24)
    ]
    write_set(root / "scored", [[json_member(str(n), one)] for n, one in enumerate(pairs)])
    (root / "conf" / "data").mkdir(exist_ok=True)
    (root / "conf" / "data" / "scored.yaml").write_text(
        "# @package data.sets.scored\n" + yaml.safe_dump(SCORED)
    )
    return root


def trained(project: Path, name: str, *lines: str) -> list[dict[str, Any]]:
    code, _, err = command(project, "train", f"name={name}", *lines)
    assert code == 0, err
    return metrics(project / "runs" / name)


def test_scale_and_bias_of_the_sigmoid_loss_are_learned_saved_and_resumed(project: Path) -> None:
    lines = [
        "experiment=small",
        "+objective=sigmoid",
        "objectives.sigmoid.bias=-5.0",
        "objectives.sigmoid.matryoshka=true",
        "stages.only.objectives={sigmoid:1.0,infonce:0.5}",
        "stages.only.steps=4",
        "data.temperature_by=modality",
        "optimizer.temperature_learning_rate=0.1",
        "optimizer.warmup_steps=1",
    ]
    whole = trained(project, "sigmoid", *lines)
    place = "sigmoid/things/image_to_name"
    for number in ("bias", "temperature"):
        learned = [line[f"{place}/{number}"] for line in whole]
        assert learned[0] == pytest.approx({"bias": -5.0, "temperature": 0.1}[number], rel=1e-5)
        assert len(set(learned)) == 4, learned
    assert all("temperature/vision_to_text" in line for line in whole)
    for step in ("step-00000003", "step-00000004"):
        shutil.rmtree(project / "runs" / "sigmoid" / "checkpoints" / step)
    again = trained(project, "sigmoid", *lines, "resume=auto")[-2:]
    for name in ("loss/sigmoid", f"{place}/bias", f"{place}/temperature", "loss/total"):
        found = [line[name] for line in again]
        assert found == pytest.approx([line[name] for line in whole[2:]], rel=1e-6), name
    code, _, err = command(
        project, "train", "name=sigmoid", *lines, "data.temperature_by=pattern", "resume=auto"
    )
    assert code == 64 and "temperature_by" in err


def test_a_table_of_pictures_with_classes_trains_the_multi_positive_loss(project: Path) -> None:
    folder = project / "animals"
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label", "caption"])
        for number in range(24):
            (folder / f"{number}.png").write_bytes(png(number))
            label = "" if number % 8 == 7 else ["red", "green", "blue"][number % 3]
            table.writerow([f"{number}.png", label, f"low {number}"])
    code, _, err = command(
        project, "data", "import", "animals", "--name", "animals", "--held-out", "0"
    )
    assert code == 0, err
    declared = yaml.safe_load((project / "conf" / "data" / "animals.yaml").read_text())
    (pattern, *_), record = declared["patterns"], json.dumps(declared)
    assert "label" not in declared["patterns"][pattern].values(), record
    lines = [
        "experiment=small",
        "+data=animals",
        "+objective=multi_positive",
        "data.sets.animals.label=label",
        "+stages.only.objectives.multi_positive=1.0",
        "~stages.only.objectives.infonce",
        "~stages.only.data.things",
        "+stages.only.data.animals=1.0",
        "~stages.only.patterns.things",
        "global_batch=24",
    ]
    found = trained(project, "classes", *lines)
    assert [line["multi_positive/animals/labelled_rows"] for line in found] == [21, 21]
    assert all(math.isfinite(line["loss/multi_positive"]) for line in found)
    code, _, err = command(project, "train", "name=typo", *lines, "data.sets.animals.label=labell")
    assert code == 64 and "data.sets.animals.label=labell: none of 24 records" in err
    unlabelled = [one for one in lines if "animals.label" not in one]
    code, _, err = command(project, "train", "name=typo", *unlabelled)
    assert code == 64 and "none of multi_positive applies to 'animals'" in err


def test_a_teachers_scores_of_varying_numbers_of_negatives_are_distilled(project: Path) -> None:
    lines = [
        "experiment=small",
        "+data=scored",
        "+objective=score_distillation",
        "+stages.only.objectives.score_distillation=1.0",
        "~stages.only.objectives.infonce",
        "~stages.only.data.things",
        "+stages.only.data.scored=1.0",
        "~stages.only.patterns.things",
        "global_batch=24",
    ]
    found = trained(project, "distilled", *lines)
    assert [line["score_distillation/scored/q2t/scored_rows"] for line in found] == [16, 16]
    assert all(line["loss/score_distillation"] > 0 for line in found)
    assert found[0]["backend/score_distillation"] == "torch float32"
    code, _, err = command(
        project, "train", "name=no", *lines, "data.sets.scored.teacher_scores=null"
    )
    assert code == 64 and "none of score_distillation applies to 'scored'" in err
    code, _, err = command(project, "train", "name=no", *lines, "data.sets.scored.negatives=0")
    assert code == 64 and "teacher_scores=scores: has no effect" in err


def test_late_interaction_trains_where_the_encoder_gives_tokens(project: Path) -> None:
    lines = ["+objective=late_interaction", "+stages.only.objectives.late_interaction=1.0"]
    found = trained(project, "tokens", "experiment=small", *lines)
    assert len({line["loss/late_interaction"] for line in found}) == 2
    assert all(0 <= line["late_interaction/things/image_to_name/accuracy"] <= 1 for line in found)
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (project / "bag.py").write_text(text.split("`bag.py`:\n\n```python\n")[1].split("```")[0])
    (project / "conf" / "model").mkdir(exist_ok=True)
    (project / "conf" / "model" / "bag.yaml").write_text(
        "_target_: bag.Bag\nembedding: 12\nprefixes: [6, 12]\nbuckets: 50\n"
    )
    code, _, err = command(
        project,
        "plan",
        "experiment=texts",
        "model=bag",
        "allowed_targets=[sailplan., bag.]",
        *lines,
    )
    assert code == 64 and "LateInteraction scores the vectors of tokens" in err


def test_a_mistake_names_the_entry_as_it_is_called(project: Path) -> None:
    lines = [
        "+objectives.mine={_target_:sailplan.objective.infonce.InfoNCE,margin_absolute:-1.0}",
        "+stages.only.objectives.mine=1.0",
    ]
    code, _, err = command(project, "plan", "experiment=small", *lines)
    assert code == 64 and "objectives.mine.margin_absolute=-1.0" in err
