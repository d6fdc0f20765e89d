"""How fast hosts reach each other: an all-reduce between each two of them, many pairs at a time.

All ranks of two hosts take part, each with its counterpart, as each GPU may have a network card of
its own. An all-reduce of two ranks is an exchange: each sends its numbers and adds what it gets. So
no groups are formed. Rounds are those of a tournament: each host is in one pair at a time, W hosts
need W - 1 rounds. Above `EVERY_PAIR` hosts each one meets those 1, 2, 4, 8 ... places further:
every network card is used, in a number of rounds that grows with the logarithm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from sailplan.preflight.findings import Findings, names, size
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import from_all_ranks
from sailplan.runtime.watch import beat

EVERY_PAIR = 32  # hosts up to which each two are measured
BYTES = {"cpu": 2**22, "cuda": 2**26}  # that a rank sends
REPEATS = 3  # of which the fastest counts
SLOW = 0.5  # of the median pair

Pair = tuple[int, int]


def rounds(hosts: int) -> list[list[Pair]]:
    """Return pairs of hosts, in rounds in which each host is in one pair at most."""
    if hosts > EVERY_PAIR:
        found = []
        step = 1
        while step < hosts:
            pairs = [(one, (one + step) % hosts) for one in range(hosts)]
            found += _apart([(min(pair), max(pair)) for pair in pairs])
            step *= 2
        return found
    places = list(range(hosts + hosts % 2))  # the circle method; the last place may be nobody's
    found = []
    for _ in range(len(places) - 1):
        pairs = [(places[n], places[-1 - n]) for n in range(len(places) // 2)]
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < hosts])
        places[1:] = [places[-1], *places[1:-1]]
    return found


def _apart(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Return the pairs in rounds without a host in two pairs of one."""
    found: list[tuple[list[Pair], set[int]]] = []
    for pair in dict.fromkeys(pairs):
        for members, taken in found:
            if not taken & set(pair):
                members.append(pair)
                taken |= set(pair)
                break
        else:
            found.append(([pair], set(pair)))
    return [members for members, _ in found]


def measure(
    parallel: Parallel, hosts: Sequence[str], ranks: Sequence[Sequence[int]]
) -> dict[Pair, float]:
    """Return bytes a second of each pair of hosts, both directions at once and all ranks together;
    the same on all ranks. A collective.

    hosts: names. ranks: of each host, in the order of their local numbers.
    """
    own = next(number for number, members in enumerate(ranks) if parallel.rank in members)
    place = list(ranks[own]).index(parallel.rank)
    count = BYTES[parallel.device.type] // 4
    sent, got = (torch.ones(count, device=parallel.device) for _ in range(2))
    rates: dict[Pair, float] = {}
    for pairs in rounds(len(hosts)):
        mine = next((pair for pair in pairs if own in pair), None)
        other = None if mine is None else ranks[mine[0] + mine[1] - own]
        peer = None if other is None or place >= len(other) else other[place]
        best = 0.0
        for repeat in range(REPEATS + 1):
            parallel.barrier()
            beat()
            if peer is None:
                continue
            seconds = _exchange(sent, got, peer, parallel)
            if repeat:  # the first one opens the connections
                best = max(best, 4 * count / seconds)
        answers = from_all_ranks(parallel, (mine, best))
        for pair, rate in answers:
            if pair is not None and rate:
                rates[pair] = rates.get(pair, 0.0) + rate / 2  # both ends of a pair say it
    return rates


def _exchange(sent: torch.Tensor, got: torch.Tensor, peer: int, parallel: Parallel) -> float:
    """Return the seconds of an all-reduce with one other rank."""
    began = time.perf_counter()
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    got += sent
    if parallel.device.type == "cuda":
        torch.cuda.synchronize(parallel.device)
    return time.perf_counter() - began


def judge_bandwidth(hosts: Sequence[str], rates: dict[Pair, float], findings: Findings) -> None:
    """Add the row of bandwidth."""
    if not rates:
        findings.add("bandwidth", "note", "one host: nothing to measure between hosts")
        return
    middle = statistics.median(rates.values())
    slowest = min(rates, key=lambda pair: rates[pair])
    slow = sorted((pair for pair in rates if rates[pair] < SLOW * middle), key=rates.__getitem__)
    text = (
        f"all-reduce between {len(rates)} pairs of hosts: median {size(middle)}/s each way, slowest "
        f"{hosts[slowest[0]]} - {hosts[slowest[1]]} {size(rates[slowest])}/s"
    )
    named = [f"{hosts[one]} - {hosts[other]}" for one, other in slow]
    findings.add(
        "bandwidth",
        "warning" if slow else "ok",
        text + (f"; below half of the median: {names(named)}" if slow else ""),
    )
