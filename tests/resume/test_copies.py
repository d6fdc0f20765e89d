"""Copies of checkpoints elsewhere: whole ones alone count, whatever ended the others."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sailplan.checkpoint import loading, seal, store
from sailplan.checkpoint.background import Saver
from sailplan.checkpoint.copies import Copies
from sailplan.checkpoint.target import Target
from sailplan.errors import ConfigurationError, UnavailableError
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import RankFailure, run_ranks

FAST = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server in a process of its own: obstore's threads would not survive the ranks' fork."""
    pytest.importorskip("moto.server")
    code = (
        "import time; from moto.server import ThreadedMotoServer as S; "
        "s = S(ip_address='127.0.0.1', port=0, verbose=False); s.start(); "
        "print(s.get_host_and_port()[1], flush=True); time.sleep(600)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdout is not None
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    settings = FAST | {"AWS_ENDPOINT_URL": url}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        import boto3

        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="far")
        yield "s3://far"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def saved(
    root: Path,
    url: str,
    steps: range,
    *,
    asynchronous: bool = True,
    keep: int = 2,
    own_folders: bool = False,
) -> None:
    """Save so many steps of a model whose weights are the step."""
    parallel, model = join_layout(1), nn.Linear(3, 3)
    copies = Copies(f"{url}/run", keep=keep, keep_every=4)
    with Saver(
        parallel,
        asynchronous=asynchronous,
        keep=keep,
        keep_every=4,
        copies=copies,
        own_folders=own_folders,
    ) as one:
        for step in steps:
            with torch.no_grad():
                model.weight.fill_(step)
            folder = store.folder_of(root / "run", step)
            one.save(folder, model=model, optimizer=None, extra={"step": step})


def on_nodes_of_their_own(rank: int) -> None:
    """Let this rank be the only one of its node."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def fetched(url: str, root: Path, *, known: str = "", own: bool = False) -> tuple[str, float]:
    """Fetch the newest copy and load it: its step's name and the weight. A collective."""
    parallel, model = join_layout(1), nn.Linear(3, 3)
    share = (0, 1) if own else (parallel.rank, parallel.world_size)
    found = Copies(f"{url}/run").fetch_newer(root, known, parallel, share)
    if found is None:
        return "", 0.0
    loading.load(found, model=model, optimizer=None, parallel=parallel, verified=True)
    assert seal.first_damage(found) == ""
    return found.name, float(model.weight[0, 0])


def test_copies_follow_the_run_folder_and_load_elsewhere(tmp_path):
    url = f"file://{tmp_path}/far"

    def work(rank, size):
        saved(tmp_path, url, range(1, 8))

    run_ranks(work, 2, timeout=60)
    assert Copies(f"{url}/run").steps() == ["step-00000004", "step-00000006", "step-00000007"]

    def elsewhere(rank, size):
        place = tmp_path / "elsewhere"
        return fetched(url, place, known="step-00000007"), fetched(url, place)

    assert run_ranks(elsewhere, 2, timeout=60) == [(("", 0.0), ("step-00000007", 7.0))] * 2


@pytest.mark.parametrize("own", [False, True])
def test_an_object_store(tmp_path, bucket, own):
    url = f"{bucket}/{'own' if own else 'shared'}"

    def work(rank, size):
        root = tmp_path / f"node-{rank}" if own else tmp_path
        if own:
            on_nodes_of_their_own(rank)
        saved(root, url, range(1, 7), own_folders=own)
        names = Copies(f"{url}/run").steps()
        return names, fetched(url, tmp_path / (f"fresh-{rank}" if own else "fresh"), own=own)

    names = ["step-00000004", "step-00000005", "step-00000006"]
    assert run_ranks(work, 2, timeout=90) == [(names, ("step-00000006", 6.0))] * 2


def test_a_file_system_in_memory(tmp_path):
    def work(rank, size):
        saved(tmp_path, "memory://far", range(1, 4), asynchronous=False)
        return Copies("memory://far/run").steps(), fetched("memory://far", tmp_path / "elsewhere")

    names = ["step-00000002", "step-00000003"]
    assert run_ranks(work, 1, timeout=60) == [(names, ("step-00000003", 3.0))]


def test_each_nodes_own_folder_has_its_ranks_parts_and_the_copy_is_whole(tmp_path):
    url = f"file://{tmp_path}/far"

    def work(rank, size):
        on_nodes_of_their_own(rank)
        saved(tmp_path / f"node-{rank}", url, range(1, 7), own_folders=True)

    run_ranks(work, 2, timeout=60)
    kept = {
        rank: sorted(one.name for one in (tmp_path / f"node-{rank}/run").iterdir())
        for rank in (0, 1)
    }
    assert kept == {rank: ["step-00000005", "step-00000006"] for rank in (0, 1)}
    parts = [set(os.listdir(tmp_path / f"node-{rank}/run/step-00000006")) for rank in (0, 1)]
    assert not any(name.startswith("__1") for name in parts[0])
    assert all(name.startswith("__1") for name in parts[1]), parts
    copy = tmp_path / "far/run/step-00000006"
    assert set(os.listdir(copy)) == parts[0] | parts[1] and seal.first_damage(copy) == ""
    # A node whose disk is new, and one that has its own parts, with a bit turned over.
    for file in (tmp_path / "node-0/run/step-00000006").glob("__0*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def again(rank, size):
        on_nodes_of_their_own(rank)
        place = tmp_path / ("fresh" if rank else "node-0/run")
        return fetched(url, place, own=True)

    assert run_ranks(again, 2, timeout=60) == [("step-00000006", 6.0)] * 2


@pytest.mark.parametrize("harm", ["flip", "delete", "seal", "outside"])
def test_a_damaged_copy_is_said_and_the_one_before_is_taken(tmp_path, capfd, harm):
    url = f"file://{tmp_path}/far"
    copy = tmp_path / "far/run/step-00000002"

    def work(rank, size):
        saved(tmp_path, url, range(1, 3))

    run_ranks(work, 2, timeout=60)
    file = next(copy.glob("__0*"))
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[7] ^= 4
        file.write_bytes(content)
    elif harm == "delete":
        file.unlink()
    elif harm == "seal":
        os.truncate(copy / seal.COMPLETE, 40)
    else:
        text = (copy / seal.COMPLETE).read_text()
        (copy / seal.COMPLETE).write_text(text.replace(file.name, f"../../{file.name}"))

    def again(rank, size):
        return fetched(url, tmp_path / "elsewhere")

    assert run_ranks(again, 2, timeout=60) == [("step-00000001", 1.0)] * 2
    said = [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line]
    assert len(said) == 1 and "looking at the one before" in said[0], said
    assert ("COMPLETE" if harm in ("seal", "outside") else file.name) in said[0]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("moment", ["before a file", "before the seal"])
def test_killed_while_a_copy_is_made_the_one_before_is_taken(tmp_path, moment, own):
    url = f"file://{tmp_path}/far"

    def root(rank):
        if own:
            on_nodes_of_their_own(rank)
        return tmp_path / f"node-{rank}" if own else tmp_path

    def work(rank, size):
        saved(root(rank), url, range(1, 2), own_folders=own)
        former = Target.put

        def put(self, file, name):
            if file.name == ("COMPLETE" if moment == "before the seal" else "__0_0.distcp"):
                os.kill(os.getpid(), signal.SIGKILL)
            former(self, file, name)

        Target.put = put
        saved(root(rank), url, range(2, 3), asynchronous=False, own_folders=own)

    with pytest.raises(RankFailure):  # of a rank that was killed, or of one that lost it
        run_ranks(work, 2, timeout=60)
    assert Copies(f"{url}/run").steps() == ["step-00000001"]

    def again(rank, size):
        place = root(rank) / "run" if own else tmp_path / "elsewhere"
        found = fetched(url, place, own=own)
        saved(root(rank), url, range(2, 4), own_folders=own)
        return found

    assert run_ranks(again, 2, timeout=60) == [("step-00000001", 1.0)] * 2
    assert Copies(f"{url}/run").steps() == ["step-00000002", "step-00000003"]


def test_a_target_that_refuses_is_said_and_the_checkpoint_stays(tmp_path, capfd):
    (tmp_path / "far").write_text("a file where a folder is needed")

    def work(rank, size):
        saved(tmp_path, f"file://{tmp_path}/far", range(1, 3))

    run_ranks(work, 2, timeout=60)
    assert store.latest(tmp_path / "run") == store.folder_of(tmp_path / "run", 2)
    said = [line for line in capfd.readouterr().err.splitlines() if "could not be copied" in line]
    assert len(said) == 2 and "the run folder has it" in said[0]


def test_a_server_that_is_gone_is_one_line_on_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("sailplan.checkpoint.target.RETRIES", 1)
    for name, value in (FAST | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()

    def work(rank, size):
        with pytest.raises(UnavailableError) as found:
            fetched("s3://nobody", tmp_path / "elsewhere")
        return str(found.value)

    first, second = run_ranks(work, 2, timeout=60)
    assert first == second and "\n" not in first and time.monotonic() - began < 40
    assert re.match(r"s3://nobody/run cannot be read \(.*start again$", first), first


def test_a_url_that_nothing_opens_is_one_line():
    with pytest.raises(ConfigurationError, match=r"checkpoint\.copy_to=nowhere://x: "):
        Copies("nowhere://x")


def test_copies_that_stay_for_good_are_not_looked_at_again(tmp_path, monkeypatch):
    """With keep_every they become many: a save that looked at each would cost ever more requests."""
    looked = []
    copies = Copies(f"file://{tmp_path}/far", keep=1, keep_every=1)
    names = copies._target.names
    monkeypatch.setattr(
        copies._target, "names", lambda folder="": looked.append(folder) or names(folder)
    )
    for step in range(1, 201):
        folder = tmp_path / "far" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / seal.COMPLETE).write_text("{}")
        before = len(looked)
        assert len(copies.steps()) == step
        assert len(looked) - before == 2  # what is there, and the new one
    shutil.rmtree(tmp_path / "far" / "step-00000007")
    assert "step-00000007" not in copies.steps()
