"""Faults of data, disks and servers in a small run on two ranks: how each ends, in how many seconds,
with which words. `python tests/faults/data_faults.py` prints the table of docs/cluster.md, `--write`
puts it there.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sailplan.cli.launched import launch
from sailplan.curriculum.testing import write_pack
from sailplan.data import shard_files
from sailplan.data.datasets import open_datasets
from sailplan.train.run import train
from sailplan.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "streams"))
from jobs import job
from servers import WebServer, files_of
from test_quarantine import poison

RANKS, STEPS = 2, 12
DOCS = Path(__file__).parents[2] / "docs" / "cluster.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
Prepare = Callable[[], None]


@dataclass
class Case:
    """A copy of the pack, where runs go, and settings that a fault changes."""

    pack: Path
    runs: Path
    changes: dict[str, Any]
    shards: str = ""  # of things, if they lie elsewhere
    before: Callable[[], None] = lambda: None  # in this process, before the first start
    between: Callable[[], None] | None = None  # between a stop after step 4 and a second start


@dataclass
class Outcome:
    code: int
    seconds: float
    said: list[str]
    quarantined: int
    skipped: int
    steps: int


def member(pack: Path, number: int, ending: str) -> tuple[Path, int, int]:
    """Shard, offset and size of the number-th member of things with an ending."""
    for shard in sorted((pack / "things").glob("*.tar")):
        with tarfile.open(shard) as archive:
            found = [one for one in archive if one.name.endswith(ending)]
        if number < len(found):
            return shard, found[number].offset_data, found[number].size
        number -= len(found)
    raise IndexError(number)


def overwrite(pack: Path, number: int, ending: str, content: bytes) -> None:
    shard, offset, size = member(pack, number, ending)
    assert len(content) <= size
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(content.ljust(size, b" " if ending == ".json" else b"\0"))


def infinite_picture() -> bytes:
    values = np.full((4, 4), np.inf, dtype=np.float32)
    file = io.BytesIO()
    Image.fromarray(values, mode="F").save(file, "TIFF")
    return file.getvalue()


def add_records(pack: Path, records: list[tuple[str, bytes]]) -> None:
    with tarfile.open(pack / "things" / "zz.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in records:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def broken_picture(case: Case) -> Prepare | None:
    overwrite(case.pack, 3, ".webp", b"")
    return None


def not_finite_picture(case: Case) -> Prepare | None:
    body = json.dumps({"id": "things/inf", "fields": {"title": {"en": "red low"}}}).encode()
    add_records(case.pack, [("inf.json", body), ("inf.tiff", infinite_picture())])
    return None


def broken_json(case: Case) -> Prepare | None:
    overwrite(case.pack, 3, ".json", b'{"id": "things/003"')
    return None


def disk_error_on_one_record(case: Case) -> Prepare | None:
    _, offset, _ = member(case.pack, 3, ".webp")

    def prepare() -> None:
        former = os.pread

        def refused(file: int, size: int, place: int) -> bytes:
            if place == offset:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return former(file, size, place)

        shard_files.os.pread = refused  # type: ignore[attr-defined]

    return prepare


def over_the_limit(case: Case) -> Prepare | None:
    case.changes["data__bad_sample_limit"] = 0.001
    for number in (3, 16):
        overwrite(case.pack, number, ".webp", b"")
    return None


def all_records_broken(case: Case) -> Prepare | None:
    for number in range(48):
        overwrite(case.pack, number, ".webp", b"")
    return None


def not_finite_vectors(case: Case) -> Prepare | None:
    return poison


def cut_shard(case: Case) -> Prepare | None:
    shard = sorted((case.pack / "things").glob("*.tar"))[1]
    case.before = lambda: os.truncate(shard, shard.stat().st_size // 2)
    return None


def rewritten_between_starts(case: Case) -> Prepare | None:
    def rewrite() -> None:
        time.sleep(0.05)
        overwrite(case.pack, 3, ".webp", b"")

    case.between = rewrite
    return None


def after_step(step: int, work: Callable[[], None]) -> Prepare:
    """Have rank 0 do something once, after a step."""

    def prepare() -> None:
        former = Trainer._after_step

        def worked(self: Trainer, done: Any) -> None:
            if self.state.step == step and self.parallel.is_main:
                work()
            former(self, done)

        Trainer._after_step = worked  # type: ignore[method-assign]

    return prepare


def written_while_in_use(case: Case) -> Prepare | None:
    return after_step(3, lambda: overwrite(case.pack, 3, ".webp", b""))


def deleted_while_in_use(case: Case) -> Prepare | None:
    """Of many shards a process has 128 open; here only one."""

    def delete() -> None:
        for shard in (case.pack / "things").glob("*.tar"):
            shard.unlink()

    def prepare() -> None:
        from sailplan.data import reader

        reader.FILES_OPEN = 1
        after_step(3, delete)()

    return prepare


def damaged_index(case: Case) -> Prepare | None:
    """The manifest says more than the file of tables holds."""

    def damage() -> None:
        (tables,) = (file for file in (case.pack / "things" / ".index").glob("shards-*.tables"))
        content = bytearray(tables.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        tables.write_bytes(content)

    case.before = damage
    return None


def full_disk(name: str) -> Callable[[Case], Prepare | None]:
    """No byte can be written to a file of the run folder."""

    def fault(case: Case) -> Prepare | None:
        if name == "quarantine.jsonl":
            overwrite(case.pack, 3, ".webp", b"")

        def prepare() -> None:
            former = Path.open

            def opened(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
                if self.name == name and "a" in mode:
                    if name == "quarantine.jsonl":
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return former(Path("/dev/full"), mode, *rest, **options)
                return former(self, mode, *rest, **options)

            Path.open = opened  # type: ignore[method-assign,assignment]

        return prepare

    return fault


def full_disk_under_a_save(case: Case) -> Prepare | None:
    """The second of the run's saves fails, on rank 1."""
    case.changes["checkpoint__every_steps"] = 4

    def prepare() -> None:
        import torch.distributed.checkpoint.filesystem as filesystem

        former, prefix = filesystem._write_item, "step-00000008"

        def refused(transforms: Any, stream: Any, *rest: Any, **options: Any) -> Any:
            if os.environ["RANK"] == "1" and prefix in str(getattr(stream, "name", "")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return former(transforms, stream, *rest, **options)

        filesystem._write_item = refused

    return prepare


def from_server(**options: Any) -> Callable[[Case], Iterator[Prepare | None]]:
    @contextmanager
    def fault(case: Case) -> Iterator[Prepare | None]:
        files = {f"things/{name}": body for name, body in files_of(case.pack / "things").items()}
        with WebServer(files).running() as server:
            case.shards = f"{server.url}/things/things-{{000000..{len(files) - 1:06d}}}.tar"
            case.changes |= {
                "data__cache": str(case.pack / "cache"),
                "data.stream__deadline_seconds": 3.0,
                "data.stream__timeout_seconds": 1.0,
            }

            def misbehave() -> None:
                # The index is kept, and nothing else of what was fetched
                case.changes["data.stream__folder"] = str(case.pack / "fetched")
                for key, value in options.items():
                    if key == "changed":
                        overwrite(case.pack, 3, ".webp", b"")
                        server.files |= {
                            f"things/{name}": body
                            for name, body in files_of(case.pack / "things").items()
                        }
                    else:
                        setattr(server, key, value)

            case.before = misbehave
            yield None

    return fault  # type: ignore[return-value]


FAULTS: dict[str, tuple[Callable[[Case], Any], str]] = {
    "a picture is broken": (broken_picture, "quarantined"),
    "a picture has values that are not finite": (not_finite_picture, "quarantined"),
    "a record's JSON is broken": (broken_json, "quarantined"),
    "the disk does not give a record (EIO)": (disk_error_on_one_record, "quarantined"),
    "a record's vectors are not finite": (not_finite_vectors, "skipped"),
    "more bad records than `data.bad_sample_limit`": (over_the_limit, "said"),
    "all records are broken": (all_records_broken, "said"),
    "a shard is cut off": (cut_shard, "said"),
    "a shard is written anew between two starts, same size and names": (
        rewritten_between_starts,
        "said",
    ),
    "a shard is written to while in use": (written_while_in_use, "said"),
    "shards are deleted while in use": (deleted_while_in_use, "said"),
    "the index's tables are damaged": (damaged_index, "said"),
    "the disk is full under quarantine.jsonl": (full_disk("quarantine.jsonl"), "said"),
    "the disk is full under metrics.jsonl": (full_disk("metrics.jsonl"), "said"),
    "the disk is full in a save, on one rank": (full_disk_under_a_save, "said"),
    "a server answers each third request with 500": (from_server(fail_every=3), "said"),
    "a server answers 500 alone": (from_server(fail_every=1), "said"),
    "a server stalls": (from_server(pause=30.0), "said"),
    "a server cuts each third answer": (from_server(drop_every=3), "said"),
    "what a server has changes after it was indexed": (from_server(changed=True), "said"),
}


def happen(name: str, root: Path) -> Outcome:
    """Run the job with a fault in a copy of the pack at root."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        pack, runs = Path(folder, "pack"), Path(folder, "runs")
        shutil.copytree(root, pack)
        fault, _ = FAULTS[name]
        case = Case(pack, runs, {})
        made = fault(case)
        if hasattr(made, "__enter__"):
            with made as prepare:
                return _run(case, prepare)
        return _run(case, made)


def _config(case: Case, stop: int) -> Any:
    changes = {"parallel__timeout_seconds": 60.0, "data__bad_sample_limit": 0.5} | {
        key: value for key, value in case.changes.items() if not key.startswith("data.stream")
    }
    changes.setdefault("checkpoint__every_steps", 0)
    config = job(case.pack, case.runs, **changes)
    for key, value in case.changes.items():
        if key.startswith("data.stream__"):
            setattr(config.data.stream, key.removeprefix("data.stream__"), value)
    config.order = ["first"]
    config.stages["first"].steps, config.evaluation.tasks = STEPS, {}
    if case.shards:
        config.data.sets["things"].shards = case.shards
    return config


def _run(case: Case, prepare: Prepare | None) -> Outcome:
    open_datasets(_config(case, 0), names=["things", "choices"])
    case.before()

    def work(rank: int, stop: bool) -> None:
        if prepare is not None:
            prepare()
        if stop:
            _stop_after(4)
        train(_config(case, stop))

    if case.between is not None:
        ended = launch(lambda rank: work(rank, True), RANKS, timeout=120)
        assert ended.codes == [75] * RANKS, ended.said
        case.between()
    ended = launch(lambda rank: work(rank, False), RANKS, timeout=120)
    assert len(set(ended.codes)) == 1, ended
    folder = case.runs / "job"
    return Outcome(
        ended.codes[0],
        ended.seconds,
        [_anonymous(line, case) for line in ended.said],
        len(_lines(folder / "quarantine.jsonl")),
        len(_lines(folder / "skipped_steps.jsonl")),
        len(_lines(folder / "metrics.jsonl")),
    )


def _stop_after(step: int) -> None:
    former = Trainer._after_step

    def stopping(self: Trainer, done: Any) -> None:
        if self.state.step == step:
            self.state.request_stop()
        former(self, done)

    Trainer._after_step = stopping  # type: ignore[method-assign]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _anonymous(line: str, case: Case) -> str:
    line = re.sub(r"^\[rank \d+ [^]]*\] ", "", line).removeprefix("sailplan: ")
    line = line.replace(str(case.runs), "runs").replace(str(case.pack), "data")
    return re.sub(r"http://127\.0\.0\.1:\d+", "http://host", line)


def row(name: str, outcome: Outcome) -> str:
    """Return the fault's line of the table."""
    found = outcome.said[0] if outcome.said else ""
    if FAULTS[name][1] == "quarantined":
        found = f"{outcome.quarantined} lines in quarantine.jsonl, nothing said"
    elif FAULTS[name][1] == "skipped":
        found = f"{outcome.skipped} lines in skipped_steps.jsonl, nothing said"
    elif not outcome.said:
        found = "nothing"
    text = found.replace("|", "\\|")
    return f"| {name} | {outcome.code} | {outcome.seconds:.0f} | {text} |"


def table(root: Path) -> str:
    """Run all faults; return the table."""
    rows = ["| fault | exit code | seconds | what is said |", "|---|---|---|---|"]
    for name in FAULTS:
        with contextlib.redirect_stderr(io.StringIO()):  # of the index that is made before
            outcome = happen(name, root)
        rows.append(row(name, outcome))
        print(rows[-1], flush=True)
        for line in outcome.said[1:]:
            print("    ", line, flush=True)
    return "\n".join(rows)


def pack(root: Path) -> Path:
    """Write the pack that faults strike, with its index."""
    write_pack(root)
    open_datasets(job(root, root / "runs"), names=["things", "choices"])
    return root


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="faults-") as made:
        found = table(pack(Path(made)))
    if "--write" in sys.argv:
        text = DOCS.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        DOCS.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}")
