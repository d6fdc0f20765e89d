"""What a newcomer gets wrong is answered in one line that says what to do, with the documented
exit code.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sailplan.train.testing import SMALL, run

PACK = Path(__file__).resolve().parents[2] / "data" / "quickstart"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["--hlep"], ["unknown flag --hlep"]),
        (["train", "--fast"], ["--fast", "key=value"]),
        (["report", "--run-foldr", "runs/x"], ["unknown flag --run-foldr"]),
        (["train", "quickstart"], ["quickstart", "experiment=quickstart"]),
        (["train", "experiment=quickstartt"], ["quickstartt", "quickstart"]),
        (["plan", "experiment=quickstart", "globl_batch=3"], ["globl_batch", "global_batch"]),
        (["plan", "experiment=quickstart", "parallel.tensor=3", "--ranks", "3"], ["tensor"]),
        (
            ["plan", "experiment=quickstart", "parallel.sharding=fully", "--ranks", "2"],
            ["parallel.sharding=fully", "shard, hybrid, replicate"],
        ),
        (
            [
                "plan",
                "experiment=quickstart",
                "parallel.sharding=hybrid",
                "parallel.replicas=3",
                "--ranks",
                "4",
            ],
            ["parallel.replicas=3", "size 4", "1, 2, 4"],
        ),
        (["train", "experiment=quickstart", "data.root=/nowhere"], ["/nowhere"]),
        (
            ["train", "experiment=quickstart", "model.weights.tower=/nowhere/weights"],
            ["model.weights.tower=/nowhere/weights", "no such folder"],
        ),
        (
            ["plan", "experiment=quickstart", "model.vocabulary=4096"],
            ["data.tokenizer=", "8192 tokens", "model.vocabulary is 4096"],
        ),
        (
            ["plan", "experiment=quickstart", "model.audio.backbone=whisper"],
            ["data.spectrogram=own", "expected whisper"],
        ),
        (
            ["plan", "experiment=quickstart", "data.spectrogram=whisper"],
            ["data.audio_rate=8000", "expected 16000"],
        ),
        (["evaluate", "--run-folder", "/nowhere"], ["/nowhere/config.yaml"]),
        (["report", "--run-folder", "/nowhere"], ["/nowhere/config.yaml"]),
        (["embed", "--run-folder", "x", "--dataset", "emoji"], ["--view"]),
    ],
)
def test_bad_usage_is_one_line_and_64(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    result = run(
        *arguments,
        *(
            ["name=bad", f"runs={tmp_path}"]
            if arguments[0] == "train" and "=" in arguments[-1]
            else []
        ),
    )
    assert result.returncode == 64, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sailplan: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for name in (
        "train",
        "plan",
        "check",
        "data",
        "mine",
        "balance",
        "evaluate",
        "embed",
        "export",
        "report",
    ):
        assert name in text


def test_a_damaged_shard_is_named_by_check_and_ends_training_without_a_hang(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(PACK, root, ignore=shutil.ignore_patterns(".index"))
    victim = sorted((root / "prompts").glob("*.tar"))[0]
    with victim.open("r+b") as file:
        file.truncate(victim.stat().st_size // 2)
    checked = run("check", *SMALL, f"data.root={root}")
    assert checked.returncode == 65 and victim.name in checked.stderr
    trained = run(
        "train", *SMALL, f"data.root={root}", "name=bad", f"runs={tmp_path}", ranks=2, timeout=180
    )
    assert trained.returncode == 65 and victim.name in trained.stderr


def test_check_tells_data_and_ranks() -> None:
    found = run("check", *SMALL, ranks=2)
    assert found.returncode == 0, found.stderr
    assert "1899 records" in found.stdout and "data-parallel 2" in found.stdout
