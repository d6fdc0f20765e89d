"""Whether every host can read the shards: the last record of many of them is read on each.

A host's ranks share the work, and hosts begin at different shards, so that together they look at
more than any of them does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sailplan.data.reader import RecordReader
from sailplan.data.values import BadSample
from sailplan.errors import BadDataError
from sailplan.preflight.findings import Findings, names
from sailplan.runtime.agreement import named_ranks
from sailplan.runtime.environment import host_name
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import from_all_ranks
from sailplan.runtime.watch import alone, phase

SHARDS = 256  # of a data set that a host reads from


def chosen(shards: int, host: int, hosts: int) -> list[int]:
    """Return the shards that a host looks at: all of few, of many some, spread evenly."""
    if shards <= SHARDS:
        return list(range(shards))
    shift = host / max(1, hosts)
    return sorted({int((number + shift) * shards / SHARDS) for number in range(SHARDS)})


def check_shards(
    parallel: Parallel,
    readers: Mapping[str, RecordReader],
    ranks: Sequence[Sequence[int]],
    findings: Findings,
) -> None:
    """Add a row for each data set. A collective."""
    host = next(number for number, members in enumerate(ranks) if parallel.rank in members)
    place, peers = list(ranks[host]).index(parallel.rank), len(ranks[host])
    for name, reader in readers.items():
        starts = np.asarray(reader.index.starts)
        full = np.flatnonzero(np.diff(starts) > 0)
        looked = [int(full[number]) for number in chosen(len(full), host, len(ranks))][place::peers]
        with phase(f"reading shards of {name}", local=True):
            own = _read_last(reader, starts, looked)
        answers = from_all_ranks(parallel, (own, len(looked), host_name()))
        problems = [problem for problem, _, _ in answers]
        if any(problems):
            text = named_ranks(problems, [where for _, _, where in answers])
            findings.refuse(f"data set {name}", BadDataError(f"data.sets.{name}: {text}"))
            continue
        most = sum(answers[rank][1] for rank in ranks[0])
        text = f"{len(reader)} records in {len(starts) - 1} shards"
        findings.add(f"data set {name}", "ok", f"{text}, {most} of them read on each host")


def _read_last(reader: RecordReader, starts: np.ndarray, shards: Sequence[int]) -> str:
    """Return what is wrong with the shards, "" where their last records can be read."""
    broken = []
    for shard in shards:
        alone()
        try:
            reader.body(int(starts[shard + 1]) - 1)
        except BadSample:
            continue  # one record that training passes over
        except (BadDataError, OSError) as error:
            broken.append(str(error))
    return f"cannot read {names(broken)}" if broken else ""
