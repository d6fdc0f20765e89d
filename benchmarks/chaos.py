"""Kill ranks of a training job, or all of it, at random moments, start it again, and compare what
comes out with an undisturbed run.

The job has two stages, mining, evaluations and saves over a made-up pack with broken records, in
float32 on forked ranks of one machine. A kill is SIGKILL, of one rank or of all, at a moment drawn
uniformly from the length of the undisturbed run; a quarter of them is drawn from its saves. Every
start is the same line with resume=auto. A run that ends between two kills is compared, and the next
one begins. Equal means bit for bit: parameters, optimizer, samples' digests, metrics (but for
times), evaluations and quarantine; and nothing is left over: no process, temporary file or unfinished
checkpoint.

    python benchmarks/chaos.py --kills 20 --seed 0 [--ranks 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from jobs import job  # noqa: E402

from sailplan.checkpoint.index import IndexReader  # noqa: E402
from sailplan.checkpoint.store import SMALL, latest  # noqa: E402
from sailplan.cli.launched import Ended, launch  # noqa: E402
from sailplan.config.schema import Config  # noqa: E402
from sailplan.curriculum.testing import write_pack  # noqa: E402
from sailplan.data.datasets import open_datasets  # noqa: E402
from sailplan.train.run import train  # noqa: E402
from sailplan.train.testing import MEASURED, metrics  # noqa: E402

TOGETHER = ("parameters and optimizer", "metrics", "evaluations", "quarantine", "left over")


@dataclass
class Report:
    """What a series of kills did."""

    kills: Counter[str] = field(default_factory=Counter)  # of one rank, of all
    phases: Counter[str] = field(default_factory=Counter)  # in which rank 0 was, as far as known
    codes: Counter[str] = field(default_factory=Counter)  # of ranks that were not killed
    starts: int = 0
    runs: int = 0
    different: list[str] = field(default_factory=list)

    def as_dict(self, **more: Any) -> dict[str, Any]:
        counted = {
            key: dict(value) for key, value in vars(self).items() if isinstance(value, Counter)
        }
        return vars(self) | counted | more


def broken_pack(root: Path) -> None:
    """Write the made-up pack, and break the pictures of three of its records."""
    write_pack(root)
    for shard in sorted((root / "things").glob("*.tar")):
        content = bytearray(shard.read_bytes())
        place = content.find(
            b"WEBP", content.find(b"WEBP") + 4
        )  # the second: the first is held out
        content[place : place + 24] = bytes(24)
        shard.write_bytes(content)
    open_datasets(job(root, root / "runs"), names=["things", "choices"])


def configuration(pack: Path, runs: Path) -> Config:
    """The faults' job with a save every two steps; a hang would be one of a minute."""
    return job(
        pack,
        runs,
        checkpoint__every_steps=2,
        evaluation__every_steps=2,
        data__bad_sample_limit=0.9,
        parallel__timeout_seconds=60.0,
    )


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything of a finished run that must not depend on kills."""
    newest = latest(folder / "checkpoints")
    assert newest is not None, f"{folder} has no whole checkpoint"
    reader = IndexReader(newest)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    small = torch.load(newest / SMALL, weights_only=True)
    lines = [
        {k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in metrics(folder)
    ]
    evaluations = {
        p.name: json.loads(p.read_text()) for p in (folder / "evaluation").glob("*.json")
    }
    unfinished = [
        str(path.relative_to(folder))
        for pattern in ("*.tmp", "*.old", ".shared-*", "*.partial")
        for path in folder.rglob(pattern)
    ]
    quarantine = (folder / "quarantine.jsonl").read_text().splitlines()
    return {
        "parameters and optimizer": (newest.name, tensors, small["scalars"]),
        "metrics": lines,
        "evaluations": evaluations,
        "quarantine": quarantine,
        "left over": unfinished,
    }


def unlike(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return a line for each part that differs."""
    lines = [
        f"{part}: {str(found[part])[:200]}"
        for part in TOGETHER[1:]
        if json.dumps(found[part]) != json.dumps(expected[part])
    ]
    one, other = found[TOGETHER[0]], expected[TOGETHER[0]]
    names = sorted(
        name
        for name in {*one[1], *other[1]}
        if name not in one[1]
        or name not in other[1]
        or not torch.equal(one[1][name], other[1][name])
    )
    if names or one[0] != other[0] or one[2] != other[2]:
        lines.append(f"{TOGETHER[0]}: {one[0]}, {other[0]}; {names[:3]}")
    return lines


class Chaos:
    """One series of kills in a folder."""

    def __init__(self, folder: Path, ranks: int, seed: int) -> None:
        self.folder, self.ranks, self.draw = folder, ranks, random.Random(seed)
        self.report, self.pack, self.temporary = Report(), folder / "pack", folder / "temporary"
        self.temporary.mkdir(parents=True)
        broken_pack(self.pack)
        began = time.monotonic()
        self.expected = self._undisturbed()
        self.seconds = time.monotonic() - began
        assert self.expected["quarantine"], "no record was broken: nothing to compare"

    def _undisturbed(self) -> dict[str, Any]:
        ended = self._start(self.folder / "whole", [], lambda pids: None)
        assert set(ended.codes) == {0}, ended.said
        return outcome(self.folder / "whole" / "job")

    def _start(self, runs: Path, killed: list[int], during: Any) -> Ended:
        self.report.starts += 1
        former, tempfile.tempdir = tempfile.tempdir, None
        os.environ["TMPDIR"] = str(self.temporary)
        try:
            config = configuration(self.pack, runs)
            return launch(
                lambda rank: train(config) and None,
                self.ranks,
                timeout=120,
                killed=killed,
                during=during,
            )
        finally:
            tempfile.tempdir = former
            os.environ.pop("TMPDIR", None)

    def run(self, kills: int, minutes: float = float("inf")) -> Report:
        """Kill until there were so many kills, or for so long; finish the last run; return the
        report.
        """
        deadline = time.monotonic() + 60 * minutes
        others = set(psutil.Process().children())
        while True:
            more = sum(self.report.kills.values()) < kills and time.monotonic() < deadline
            if not more and not (self.folder / "runs").exists():
                return self.report
            ended, hit = self._once(more)
            if hit:
                continue
            assert set(ended.codes) == {0}, (ended.codes, ended.said)
            self.report.runs += 1
            found = outcome(self.folder / "runs" / "job")
            left = [p.name for p in self.temporary.iterdir() if not p.name.startswith("launch-")]
            self.report.different += unlike(found, self.expected)
            self.report.different += [f"temporary files: {left[:3]}"] if left else []
            left_over = set(psutil.Process().children()) - others
            self.report.different += [f"process {child}" for child in left_over]
            shutil.rmtree(self.folder / "runs")

    def _once(self, kill: bool) -> tuple[Ended, bool]:
        """Start the job once; return how it ended, and whether a kill struck it."""
        whole = self.draw.random() < 0.4
        victims = list(range(self.ranks)) if whole else [self.draw.randrange(self.ranks)]
        pause, saving = self.draw.uniform(0, self.seconds), self.draw.random() < 0.25
        struck: list[bool] = []

        def strike(pids: list[int]) -> None:
            deadline = time.monotonic() + (self.seconds if saving else pause)
            while kill and time.monotonic() < deadline and any(map(_lives, pids)):
                time.sleep(0.005)
                if saving and list((self.folder / "runs").glob("job/checkpoints/*.tmp")):
                    time.sleep(self.draw.uniform(0, 0.1))
                    break
            if not kill or not all(map(_lives, pids)):
                return
            for victim in victims:
                with suppress(ProcessLookupError):
                    os.kill(pids[victim], signal.SIGKILL)
            struck.append(True)
            self.report.kills["all ranks" if whole else "one rank"] += 1
            self.report.phases["in a save" if saving else "anywhere"] += 1

        ended = self._start(self.folder / "runs", victims if kill else [], strike)
        if struck:
            rest = [code for rank, code in enumerate(ended.codes) if rank not in victims]
            self.report.codes.update(map(str, rest))
            wrong = [code for code in rest if code not in (0, 70)]
            self.report.different += [f"a rank left with {code}: {ended.said}" for code in wrong]
        return ended, bool(struck)


def _lives(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="at most")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        began, used = time.monotonic(), time.process_time()
        chaos = Chaos(Path(folder), options.ranks, options.seed)
        report = chaos.run(options.kills, options.minutes)
        times = os.times()
        found = report.as_dict(
            seed=options.seed,
            ranks=options.ranks,
            undisturbed_seconds=round(chaos.seconds, 1),
            seconds=round(time.monotonic() - began),
            cpu_seconds=round(
                time.process_time() - used + times.children_user + times.children_system
            ),
            quarantined=len(chaos.expected["quarantine"]),
            compared=list(TOGETHER),
        )
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    return 1 if report.different else 0


if __name__ == "__main__":
    sys.exit(main())
