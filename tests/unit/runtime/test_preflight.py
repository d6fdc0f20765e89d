"""A preflight that takes hours on many hosts, or that calls a sick cluster ready, helps nobody."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from sailplan.errors import BadDataError, ConfigurationError
from sailplan.preflight.bandwidth import judge_bandwidth, rounds
from sailplan.preflight.findings import Findings
from sailplan.preflight.gpus import GpuFacts, judge_gpus
from sailplan.preflight.hosts import RankFacts, judge_hosts
from sailplan.preflight.shards import SHARDS, chosen

RANK = RankFacts(
    rank=0,
    host="a",
    local_rank=0,
    address="10.0.0.1",
    interface="eth0",
    descriptors=4096,
    free_runs=10**12,
    free_temporary=10**9,
    shared_memory=2**33,
    clock=0.0,
)
GPU = GpuFacts("H200", 8, 10**11, 10**11, 6e14, True, 0)


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 7, 32])
def test_each_two_hosts_meet_once_and_a_host_is_in_one_pair_at_a_time(hosts: int) -> None:
    found = rounds(hosts)
    pairs = Counter(pair for one in found for pair in one)
    assert pairs == Counter({(a, b): 1 for b in range(hosts) for a in range(b)})
    assert all(len({host for pair in one for host in pair}) == 2 * len(one) for one in found)
    assert len(found) <= hosts


@pytest.mark.parametrize("hosts", [33, 128, 1024])
def test_many_hosts_are_measured_in_few_rounds(hosts: int) -> None:
    found = rounds(hosts)
    assert all(len({host for pair in one for host in pair}) == 2 * len(one) for one in found)
    assert {host for one in found for pair in one for host in pair} == set(range(hosts))
    assert len(found) <= 30, len(found)


def test_a_hosts_share_of_many_shards_is_bounded_and_hosts_look_at_different_ones() -> None:
    assert chosen(7, 3, 8) == list(range(7))
    looked = [chosen(100_000, host, 8) for host in range(8)]
    assert all(len(each) == SHARDS and each[-1] < 100_000 for each in looked)
    assert len(set().union(*looked)) == 8 * SHARDS


def states(facts: list[RankFacts], needed: int = 0) -> dict[str, str]:
    findings = Findings()
    judge_hosts(facts, findings, needed)
    return {row.what: row.state for row in findings.rows}


def test_what_is_wrong_with_a_host_is_found() -> None:
    other = replace(RANK, rank=1, host="b")
    well = states([RANK, other])
    assert set(well.values()) == {"ok"}, well
    ill = {
        "clocks": [RANK, replace(other, clock=-2.0)],
        "descriptors": [RANK, replace(other, descriptors=256)],
        "local space": [RANK, replace(other, shared_memory=2**26)],
        "communication": [RANK, replace(other, settings={"NCCL_ALGO": "Ring"})],
    }
    for what, facts in ill.items():
        changed = {name for name, state in states(facts).items() if state != well[name]}
        assert changed == {what}, (what, changed)
    assert states([RANK, other], needed=10**13)["free space"] == "warning"


def test_a_sick_or_slow_gpu_is_found() -> None:
    def state(*gpus: GpuFacts | None) -> str:
        findings = Findings()
        judge_gpus([("a", rank, gpu) for rank, gpu in enumerate(gpus)], 8, findings)
        return findings.rows[-1].state

    assert state(None, None) == "note" and state(GPU, GPU) == "ok"
    assert state(GPU, None) == "failed" and state(GPU, replace(GPU, same_bits=False)) == "failed"
    assert state(GPU, replace(GPU, errors=2)) == "failed"
    assert state(GPU, GPU, replace(GPU, rate=3e14)) == "warning"
    assert state(GPU, replace(GPU, free=5 * 10**10)) == "warning"


def test_a_slow_link_is_named() -> None:
    findings = Findings()
    judge_bandwidth(["a", "b", "c"], {(0, 1): 1e10, (0, 2): 1e9, (1, 2): 9e9}, findings)
    assert findings.rows[0].state == "warning" and "a - c 1 GB/s" in findings.rows[0].text


def test_the_worst_code_ends_the_check_with_everything_that_was_found() -> None:
    findings = Findings()
    findings.add("ranks", "ok", "2")
    assert findings.verdict("check: 2 ranks") == "check: 2 ranks: ready"
    findings.refuse("data set x", BadDataError("x.tar: cut"))
    with pytest.raises(BadDataError):
        findings.verdict("check")
    findings.refuse("descriptors", ConfigurationError("ulimit -n: found 256"))
    with pytest.raises(ConfigurationError, match=r"2 problems: x.tar: cut; ulimit -n"):
        findings.verdict("check")
