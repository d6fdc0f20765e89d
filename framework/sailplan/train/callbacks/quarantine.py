"""Records that a run no longer uses: named once in quarantine.jsonl, left out from then on.

What one rank meets becomes known to all in the step's own message (a flag); only in a step with
something new are the records' numbers gathered. So the list, its file and the limit are the same at
any number of ranks, and a resumed run reads its list back from the file. A step whose loss or
gradient was not finite is a line of skipped_steps.jsonl; a record whose own vectors were not finite
in `OFFENCES` of them is left out, too.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sailplan.config.fields import JsonObject
from sailplan.data import exclusions
from sailplan.data.exclusions import Exclusion
from sailplan.data.record import StepBatch
from sailplan.errors import BadDataError
from sailplan.observe.logger import Value
from sailplan.observe.run_files import read_lines
from sailplan.runtime.leaving import say
from sailplan.train.callback import Callback, Run, StageRun, StepDone

RECENT_ROWS = 1000  # over which data.bad_sample_limit counts
REASON_BYTES = 320  # of a reason that travels
OFFENCES = 2  # steps with vectors of a record that are not finite, after which it is left out
MOST_NAMED = 1000  # records of a skipped step


class _Found(NamedTuple):
    dataset: str
    position: int
    reason: str


class Quarantine(Callback):
    """Leave out what cannot be used; raise BadDataError on all ranks where more than
    data.bad_sample_limit of the latest 1,000 rows of all ranks were new to the list.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[int, int]] = deque()  # (rows, new records) of the latest steps
        self._offences: Counter[tuple[str, int]] = Counter()
        self._limit = 0.0

    def state(self) -> JsonObject:
        return {"recent": [list(one) for one in self._recent]} if self._recent else {}

    def load_state(self, state: JsonObject) -> None:
        self._recent = deque((rows, bad) for rows, bad in state["recent"])

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Record what made the data unusable when it ends the run, too; any rank may be the one
        that meets it.
        """
        try:
            yield
        except BadDataError as error:
            if run.stage is not None and run.parallel.tensor_parallel_rank == 0:
                _write(
                    run.folder.quarantine,
                    [
                        _line(run.step + 1, run.stage) | {"id": name, "reason": reason}
                        for name, reason in error.samples
                    ],
                )
            raise

    def start_stage(self, run: Run, stage: StageRun) -> None:
        """Read back what is known of the stage's data sets, where they are still the same."""
        self._limit = run.config.data.bad_sample_limit
        sets = {name: run.context.readers[name].identity for name in sorted(stage.state.weights)}
        rows = _read_back(run, sets) if run.parallel.is_main else []
        empty = torch.empty(0, 3, dtype=torch.int64)
        found = run.parallel.gather_rows(torch.tensor(rows) if rows else empty).tolist()
        names = list(sets)
        run.exclusions.add(
            Exclusion(names[number], position, step) for number, position, step in found if step
        )
        for name in names:
            for record in [one for one in self._offences if one[0] == name]:
                del self._offences[record]
        self._offences.update((names[one[0]], one[1]) for one in found if not one[2])

    def flags(self, run: Run, stage: StageRun, batches: Sequence[StepBatch]) -> Sequence[bool]:
        return (bool(_new(run, batches)),)

    def values(self, run: Run, done: StepDone) -> Mapping[str, Value]:
        return {"data/excluded": len(run.exclusions)} if len(run.exclusions) else {}

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        found = _of_all_ranks(run, _new(run, done.batches)) if flags[0] else []
        if done.result.skipped:
            found += self._offenders(run, done)
        rows = sum(sum(batch.rank_rows or (len(batch.record_ids),)) for batch in done.batches)
        self._recent.append((rows, len(found)))
        while len(self._recent) > 1 and _sum(self._recent, 0) - self._recent[0][0] >= RECENT_ROWS:
            self._recent.popleft()
        if found:
            self._leave_out(run, done, found)

    # ---------------------------------------------------------------- parts
    def _leave_out(self, run: Run, done: StepDone, found: list[_Found]) -> None:
        step = run.step + exclusions.AFTER
        run.exclusions.add(Exclusion(one.dataset, one.position, step) for one in found)
        if run.parallel.is_main:
            _write(
                run.folder.quarantine,
                [
                    _line(run.step, done.stage)
                    | {"set": one.dataset, "id": _id(run, one), "reason": one.reason}
                    | {"position": one.position, "data": run.context.readers[one.dataset].identity}
                    | {"excluded_from": step}
                    for one in found
                ],
            )
        rows, bad = _sum(self._recent, 0), _sum(self._recent, 1)
        # never over a base smaller than RECENT_ROWS: one bad sample in the first small batch is no
        # reason to stop
        if bad > self._limit * max(rows, RECENT_ROWS):
            raise BadDataError(
                f"{bad} bad samples in the latest {rows} rows, the limit is "
                f"data.bad_sample_limit={self._limit}; last: {_id(run, found[-1])}: {found[-1].reason}; "
                "run `sailplan data validate`"
            )

    def _offenders(self, run: Run, done: StepDone) -> list[_Found]:
        """Record a skipped step; return the records that are left out for their vectors."""
        local = {_Found(one.dataset, one.position, "") for one in done.result.suspects}
        suspects = _of_all_ranks(run, sorted(local))
        rows = sum(sum(batch.rank_rows or (len(batch.record_ids),)) for batch in done.batches)
        # Where most rows are not finite, it is the weights and not a record
        offence = done.result.guilty and 2 * len(suspects) <= rows
        if run.parallel.is_main:
            named = [
                {"set": one.dataset, "id": _id(run, one), "position": one.position}
                for one in suspects[:MOST_NAMED]
            ]
            sets = sorted({one.dataset for one in suspects})
            line = _line(run.step, done.stage) | {
                "not_finite": "vectors" if done.result.guilty else "loss or gradient",
                "rows": rows,
                "suspects": len(suspects),
                "offence": offence,
                "records": named,
                "data": {name: run.context.readers[name].identity for name in sets},
            }
            _write(run.folder.skipped, [line])
        if not offence:
            return []
        self._offences.update((one.dataset, one.position) for one in suspects)
        return [
            one._replace(reason=f"its vectors were not finite in {OFFENCES} steps")
            for one in suspects
            if self._offences[one.dataset, one.position] >= OFFENCES
            and (one.dataset, one.position) not in run.exclusions
        ]


def _sum(recent: deque[tuple[int, int]], place: int) -> int:
    return sum(one[place] for one in recent)


def _line(step: int, stage: StageRun) -> JsonObject:
    return {"step": step, "stage": stage.span.name}


def _id(run: Run, one: _Found) -> str:
    return run.context.readers[one.dataset].ids([one.position])[0]


def _new(run: Run, batches: Sequence[StepBatch]) -> list[_Found]:
    """Return what this rank met that is not on the list: loaders read ahead, and meet a record
    again before all of them know.
    """
    return [
        _Found(batch.dataset, bad.position, bad.reason)
        for batch in batches
        for bad in batch.quarantined
        if (batch.dataset, bad.position) not in run.exclusions
    ]


def _of_all_ranks(run: Run, local: Sequence[_Found]) -> list[_Found]:
    """Return what all ranks found, each record once, in an order that knows nothing of ranks."""
    names = sorted(run.config.data.sets)
    if run.parallel.tensor_parallel_rank != 0:  # peers met the same
        local = []
    rows = np.zeros((len(local), 2 + REASON_BYTES // 8), dtype=np.int64)
    for row, one in zip(rows, local, strict=True):
        text = one.reason.encode()[:REASON_BYTES]
        row[:2] = names.index(one.dataset), one.position
        row[2:] = np.frombuffer(text.ljust(REASON_BYTES, b"\0"), dtype="<i8")
    found = {
        _Found(
            names[int(row[0])],
            int(row[1]),
            row[2:].astype("<i8").tobytes().rstrip(b"\0").decode(errors="ignore"),
        )
        for row in run.parallel.gather_rows(torch.from_numpy(rows)).numpy()
    }
    first = {(one.dataset, one.position): one for one in sorted(found, reverse=True)}
    return sorted(first.values())


def _read_back(run: Run, sets: Mapping[str, str]) -> list[tuple[int, int, int]]:
    """Return (data set, position, first step without it; 0: an offence) of the run's files.

    sets: name -> identity; lines of sets that were others are passed over.
    """
    numbers = {name: number for number, name in enumerate(sets)}
    rows: list[tuple[int, int, int]] = []
    for line in read_lines(run.folder.quarantine):
        name = str(line.get("set"))
        if name in sets and line["data"] == sets[name]:
            rows.append((numbers[name], int(line["position"]), int(line["excluded_from"])))
    for line in read_lines(run.folder.skipped):
        for record in line["records"] if line["offence"] else []:
            name = str(record["set"])
            if name in sets and line["data"][name] == sets[name]:
                rows.append((numbers[name], int(record["position"]), 0))
    return rows


def _write(path: Path, lines: Sequence[JsonObject]) -> None:
    """Add lines to a file; where the disk refuses, say so and go on."""
    if not lines:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        say(
            f"{path}: {len(lines)} lines cannot be written ({error.strerror or error}), the first "
            f"names {lines[0].get('id', lines[0]['step'])}; training goes on"
        )
