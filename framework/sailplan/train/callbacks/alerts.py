"""Alerts: a run that goes wrong says so while somebody can still help it.

Rank 0 looks at the values of each step, those that `throughput` gathers from all ranks included. An
alert fires when its condition begins, and again only once that was over: on stderr, as
`alert/NAME` in the step's line of metrics.jsonl, and through the trackers that have alerts.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median

from sailplan.config.fields import Count, Share, ShareAboveZero, Size
from sailplan.observe.logger import Value
from sailplan.runtime import watch
from sailplan.runtime.leaving import say
from sailplan.train.callback import Callback, Run, StageRun, StepDone

RECENT_ROWS = 1000  # over which bad samples are counted, as data.bad_sample_limit does
LOOK_SECONDS = 1.0  # between two looks for a hang


@dataclass
class Alerts(Callback):
    """Fire on: collapse, starved_modality, false_negatives, straggler, data_wait, not_finite,
    bad_samples, hang.

    window: steps over which a condition must hold. warmup: steps of a stage in which neither
    collapse nor false negatives are looked for. The others are limits: see each one's comment.
    """

    window: Size = 20
    warmup: Count = 100
    collapse: ShareAboveZero = 0.95  # cosine of positives above this while ...
    collapsed_accuracy: Share = 0.05  # ... no more of them come first
    starved_modality: Share = 0.01  # of the rows that are to show a modality, those that have it
    false_negatives: Share = 0.6  # accuracy of a pattern, relative to before, at no lower cosine
    straggler: ShareAboveZero = 0.25  # of a step, that one rank takes longer than the middle one
    data_wait: ShareAboveZero = 0.3  # of a step
    bad_samples: ShareAboveZero = 0.5  # of data.bad_sample_limit
    hang: ShareAboveZero = 0.5  # of parallel.timeout_seconds without progress

    def __post_init__(self) -> None:
        self._active: set[str] = set()
        self._values: dict[str, deque[float]] = {}
        self._bad: deque[tuple[int, int]] = deque()  # (rows, records left out so far) of the latest
        self._steps = 0

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._look_for_hang, args=(run, done), daemon=True)
        if run.parallel.is_main:
            thread.start()
        try:
            yield
        finally:
            done.set()

    def start_stage(self, run: Run, stage: StageRun) -> None:
        self._steps = 0
        self._values = defaultdict(lambda: deque(maxlen=2 * self.window))

    def values(self, run: Run, done: StepDone) -> Mapping[str, Value]:
        if not run.parallel.is_main:
            return {}
        self._steps += 1
        known = done.values
        for name, value in known.items():
            if not isinstance(value, str):
                self._values[name].append(float(value))
        found = dict(self._found(run, done))
        fired = {name: text for name, text in found.items() if text and name not in self._active}
        self._active = (self._active | set(fired)) - {
            name for name, text in found.items() if text == ""
        }
        for name, text in fired.items():
            self._fire(run, name, text)
        return {f"alert/{name}": text for name, text in fired.items()}

    # ---------------------------------------------------------------- conditions
    def _found(self, run: Run, done: StepDone) -> Iterator[tuple[str, str]]:
        """Yield each alert's name and text, "" where its condition does not hold; none of those
        that this step says nothing about.
        """
        known = done.values
        skipped = done.result.skipped
        yield (
            "not_finite",
            (
                "loss or gradient is not finite, the step is skipped; skipped_steps.jsonl names its "
                "records"
                if skipped
                else ""
            ),
        )
        yield "bad_samples", self._bad_samples(run, done)
        if self._steps > self.warmup and not skipped:
            yield "collapse", self._collapse()
            yield "false_negatives", self._false_negatives()
        waits = self._latest("data/wait_share")
        if len(waits) == self.window:
            share = median(waits)
            over = share > self.data_wait
            yield (
                "data_wait",
                (
                    f"steps wait {share:.0%} of their time for data; raise data.workers, or look at "
                    "the disk"
                    if over
                    else ""
                ),
            )
        longer = known.get("ranks/slowest_share")
        if isinstance(longer, float):
            rank, phase = known["ranks/slowest"], known["ranks/slowest_in"]
            over = longer > self.straggler
            yield (
                "straggler",
                (
                    f"rank {rank} takes {longer:.0%} of a step longer than the middle rank for {phase}"
                    if over
                    else ""
                ),
            )
        starved = [
            f"{name.rpartition('/')[2]} in {value:.1%} of the rows that are to show it"
            for name, value in known.items()
            if name.startswith("data/modality/")
            and isinstance(value, float)
            and value < self.starved_modality
        ]
        if any(name.startswith("data/modality/") for name in known):
            yield "starved_modality", ", ".join(starved)

    def _latest(self, name: str) -> list[float]:
        return list(self._values[name])[-self.window :]

    def _patterns(self) -> Iterator[tuple[str, list[float], list[float]]]:
        """Yield patterns with their accuracies and positives' cosines, a full window of each."""
        for name in list(self._values):
            stem = name.removesuffix("/accuracy")
            if stem != name and f"{stem}/positive_score" in self._values:
                accuracies, scores = self._values[name], self._values[f"{stem}/positive_score"]
                if len(accuracies) >= self.window:
                    yield stem, list(accuracies), list(scores)

    def _collapse(self) -> str:
        fallen = [
            f"{name}: accuracy {fmean(accuracies[-self.window :]):.3f} at a cosine of "
            f"{fmean(scores[-self.window :]):.3f}"
            for name, accuracies, scores in self._patterns()
            if fmean(scores[-self.window :]) > self.collapse
            and fmean(accuracies[-self.window :]) <= self.collapsed_accuracy
        ]
        return f"embeddings collapse to one point: {'; '.join(fallen)}" if fallen else ""

    def _false_negatives(self) -> str:
        """Positives that are as close as before and come first less often: closer rows came, which
        may be answers as well.
        """
        fallen = []
        for name, accuracies, scores in self._patterns():
            if len(accuracies) < 2 * self.window:
                continue
            before, now = (
                fmean(accuracies[: self.window]),
                fmean(accuracies[-self.window :]),
            )
            score = fmean(scores[-self.window :])
            as_close = self.collapse > score >= 0.95 * fmean(scores[: self.window])
            if now < self.false_negatives * before and as_close:
                fallen.append(f"{name}: accuracy {before:.2f} -> {now:.2f}")
        return (
            f"negatives that may be answers: {'; '.join(fallen)}, at the same cosine of positives; "
            "look at the margins of the objectives and at how negatives are mined"
            if fallen
            else ""
        )

    def _bad_samples(self, run: Run, done: StepDone) -> str:
        rows = sum(sum(batch.rank_rows or (len(batch.record_ids),)) for batch in done.batches)
        self._bad.append((rows, len(run.exclusions)))
        while (
            len(self._bad) > 1 and sum(one[0] for one in self._bad) - self._bad[0][0] >= RECENT_ROWS
        ):
            self._bad.popleft()
        new = len(run.exclusions) - self._bad[0][1]
        rows, limit = sum(one[0] for one in self._bad), run.config.data.bad_sample_limit
        if new <= self.bad_samples * limit * max(rows, RECENT_ROWS):
            return ""
        return (
            f"{new} bad samples in the latest {rows} rows, the run ends at data.bad_sample_limit="
            f"{limit}; see quarantine.jsonl"
        )

    # ---------------------------------------------------------------- how they are told
    def _fire(self, run: Run, name: str, text: str) -> None:
        say(f"alert: {name}: {text} (step {run.step})")
        run.writer.log_alert(run.step, name, text)

    def _look_for_hang(self, run: Run, done: threading.Event) -> None:
        seconds, fired = self.hang * run.config.parallel.timeout_seconds, False
        while not done.wait(min(LOOK_SECONDS, seconds / 4)):
            one = watch.current()
            silent = 0.0 if one is None else one.silent()
            if silent > seconds and not fired:
                limit = run.config.parallel.timeout_seconds
                self._fire(
                    run,
                    "hang",
                    f"no progress on any rank for {silent:.0f} s, the job ends at "
                    f"parallel.timeout_seconds={limit:g}",
                )
            fired = silent > seconds
