"""What a run gets out of its machines: tokens and FLOP a second, MFU, memory, and where ranks wait.

Each rank counts for itself; every few steps its numbers, a dozen, are gathered from all. FLOP are
counted, not computed from a formula: torch's counter looks at one step of each stage, the second,
forward and backward with what activation checkpointing and the gradient cache do twice, and the rows
of other steps are taken to cost the same. It is the stage's second step at any start, as torch may
round otherwise while it counts; a run that goes on later knows the number from its checkpoint. It sees matrix products, convolutions and attention of
torch; it does not see Triton kernels of the loss, or inside compiled layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sailplan.config.fields import JsonObject, NotNegative, Size
from sailplan.data.record import EncoderInputs, NamedInputs, StepBatch
from sailplan.observe.logger import Value
from sailplan.train.callback import Callback, Run, StageRun, StepDone

# Dense bfloat16 FLOP a second by the name of the device, of NVIDIA's data sheets
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
PHASES = ("data", "encode", "loss", "backward", "update")
MODALITIES = ("text", "vision", "audio")
MASKS = {"vision": "image_mask", "audio": "audio_mask", "text": "text_mask"}
MICRO = 1e6  # numbers travel as whole ones


def _addmm_flop(
    _: Sequence[int], a: Sequence[int], b: Sequence[int], *args: object, **options: object
) -> int:
    """Return 2 m k n of shapes [m, k] and [k, n], also where a product has another dtype than its
    factors, which torch 2.13's own formula does not take.
    """
    return 2 * a[0] * a[1] * b[1]


FORMULAS = {torch.ops.aten.addmm: _addmm_flop}


@dataclass
class Throughput(Callback):
    """Log every `every` steps of a stage what all ranks did since the last time.

    peak: FLOP a second of one rank's device in the compute dtype, for `mfu`; 0: as known of the
    GPU, none on a CPU. flop: count them.
    """

    every: Size = 10
    peak: NotNegative = 0.0
    flop: bool = True

    def __post_init__(self) -> None:
        self._counter: FlopCounterMode | None = None
        self._counted: dict[str, float] = {}  # stage -> FLOP a row
        self._flop_per_row = 0.0
        self._reset()

    def _reset(self) -> None:
        self._seconds = dict.fromkeys((*PHASES, "step"), 0.0)
        self._rows = self._tokens = self._steps = 0
        self._cpu = time.process_time()
        self._present = dict.fromkeys(MODALITIES, 0)
        self._shown = dict.fromkeys(MODALITIES, 0)

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        device = run.parallel.device
        if not self.peak and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self.peak = next((peak for known, peak in PEAKS.items() if known in name), 0.0)
        try:
            yield
        finally:
            self._stop_counting()

    def start_stage(self, run: Run, stage: StageRun) -> None:
        self._stop_counting()
        self._flop_per_row = self._counted.get(stage.span.name, 0.0)
        self._reset()
        if stage.span.steps > 1:
            self._count_second(run, stage)

    def values(self, run: Run, done: StepDone) -> Mapping[str, Value]:
        rows = sum(len(batch.record_ids) for batch in done.batches)
        flop = self._stop_counting()
        if flop is not None and rows:
            self._flop_per_row = self._counted[done.stage.span.name] = flop / rows
        self._add(done, rows)
        step = run.step - done.stage.span.first + 1  # of the stage, at any start alike
        if step % self.every and not done.is_last:
            return {}
        found = self._of_all_ranks(run)
        self._reset()
        return found

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        """Begin to count after a stage's first step; last of the list, so that nothing but the
        step is counted.
        """
        if not (done.is_last or done.stopping):
            self._count_second(run, done.stage)

    def state(self) -> JsonObject:
        return dict(self._counted)

    def load_state(self, state: JsonObject) -> None:
        self._counted = {name: float(value) for name, value in state.items()}

    # ---------------------------------------------------------------- parts
    def _count_second(self, run: Run, stage: StageRun) -> None:
        """Count the step to come where it is the stage's second."""
        eager = run.config.parallel.compile == "none"  # compiled layers would run as they are not
        if self.flop and eager and run.step + 1 - stage.span.first == 1:
            self._counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
            self._counter.__enter__()

    def _stop_counting(self) -> float | None:
        counter, self._counter = self._counter, None
        if counter is None:
            return None
        counter.__exit__(None, None, None)
        return float(counter.get_total_flops())

    def _add(self, done: StepDone, rows: int) -> None:
        for phase, seconds in {**done.result.seconds, "data": done.waited}.items():
            if phase in self._seconds:
                self._seconds[phase] += seconds
        self._seconds["step"] += done.seconds
        self._steps += 1
        self._rows += rows
        for batch in done.batches:
            for inputs in _inputs(batch):
                self._tokens += _tokens(inputs)
                for modality in set(inputs.modalities) & set(MODALITIES):
                    present = _present(inputs, modality)
                    if present is not None:
                        self._shown[modality] += inputs.rows
                        self._present[modality] += present

    def _work(self, device: torch.device) -> float:
        """Return the seconds that this rank worked: by the CPU's count; a GPU's kernels are
        started without a wait, so the time to start those of the encoders.
        """
        if device.type == "cuda":
            return self._seconds["encode"]
        return time.process_time() - self._cpu

    def _of_all_ranks(self, run: Run) -> Mapping[str, Value]:
        own = [
            *(round(MICRO * self._seconds[phase]) for phase in PHASES),
            self._tokens,
            round(self._flop_per_row * self._rows),
            _peak_memory(run.parallel.device),
            round(MICRO * self._work(run.parallel.device)),
            *(self._shown[modality] for modality in MODALITIES),
            *(self._present[modality] for modality in MODALITIES),
        ]
        table = run.parallel.gather_rows(torch.tensor([own], dtype=torch.int64)).double()
        spent = table[:, : len(PHASES)] / MICRO / self._steps
        tokens, flop, memory = table[:, len(PHASES) : len(PHASES) + 3].unbind(1)
        seconds = self._seconds["step"]
        values: dict[str, Value] = {
            "tokens_per_second": tokens.sum().item() / seconds,
            "memory/peak_bytes": int(memory.max()),
        }
        if flop.any():
            values["flop_per_step"] = flop.sum().item() / self._steps
            values["flop_per_second"] = flop.sum().item() / seconds
            if self.peak:
                values["mfu"] = flop.sum().item() / seconds / (self.peak * len(table))
        for column, phase in enumerate(PHASES):
            values[f"phase/{phase}/mean_seconds"] = spent[:, column].mean().item()
            values[f"phase/{phase}/most_seconds"] = spent[:, column].max().item()
        # What a rank does by itself: its clock runs in collectives, too, while it waits for others
        alone = torch.stack([spent[:, 0], table[:, -7] / MICRO / self._steps], dim=1)
        excess = alone - alone.median(0).values
        rank, column = divmod(int(excess.argmax()), 2)
        values["ranks/slowest"] = rank
        values["ranks/slowest_in"] = ("data", "compute")[column]
        values["ranks/slowest_share"] = excess.max().item() * self._steps / seconds
        shown, present = table[:, -6:].sum(0).view(2, 3).tolist()
        for name, all_rows, with_it in zip(MODALITIES, shown, present, strict=True):
            if all_rows:
                values[f"data/modality/{name}"] = with_it / all_rows
        return values


def _inputs(batch: StepBatch) -> Iterator[EncoderInputs]:
    for view in batch.views.values():
        yield from view.micro_batches


def _mask(inputs: EncoderInputs, name: str) -> Tensor | None:
    found = inputs.named.get(name) if isinstance(inputs, NamedInputs) else vars(inputs).get(name)
    return found if isinstance(found, Tensor) else None


def _tokens(inputs: EncoderInputs) -> int:
    """Return the text tokens of a micro-batch, prompts included, without filling."""
    for name in ("token_mask", "attention_mask"):
        mask = _mask(inputs, name)
        if mask is not None:
            return int(mask.sum())
    return 0


def _present(inputs: EncoderInputs, modality: str) -> int | None:
    """Return how many rows have a modality; None where the inputs do not say."""
    mask = _mask(inputs, MASKS[modality])
    return None if mask is None else int(mask.bool().flatten(1).any(1).sum())


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes of the device that tensors held so far; of a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
