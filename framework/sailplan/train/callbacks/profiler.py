"""A few steps under torch's profiler: a trace for Perfetto or chrome://tracing, and a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile, schedule

from sailplan.config.fields import Count, Size
from sailplan.runtime.process import device_type
from sailplan.train.callback import Callback, Run, StepDone

ROWS = 40  # of the table


@dataclass
class Profiler(Callback):
    """Profile `steps` steps after `after` others, of this start of the run, on some ranks.

    Writes runs/NAME/profile/rank-RRRRR-step-SSSSSSSS.json.gz (SSSSSSSS: the last step of the trace)
    and the same with .txt, the operations that took longest. Ranks that are not named pay nothing.
    """

    after: Count = 5
    steps: Size = 3
    ranks: list[int] = field(default_factory=lambda: [0])
    shapes: bool = False  # of the operations' inputs
    memory: bool = False  # each operation's allocations

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        self._profile: profile | None = None
        if run.parallel.rank not in self.ranks:
            yield
            return
        cuda = device_type() == "cuda"

        def write(found: profile) -> None:
            folder = run.folder.root / "profile"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank-{run.parallel.rank:05d}-step-{run.step:08d}"
            found.export_chrome_trace(f"{path}.json.gz")
            order = f"self_{'cuda' if cuda else 'cpu'}_time_total"
            table = found.key_averages().table(sort_by=order, row_limit=ROWS)
            path.with_suffix(".txt").write_text(str(table), encoding="utf-8")

        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
            schedule=schedule(wait=self.after, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=write,
            record_shapes=self.shapes,
            profile_memory=self.memory,
        ) as self._profile:
            yield

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        if self._profile is not None:
            self._profile.step()
