"""An engine that goes on where a compiler or a device refuses a kernel: with simpler kernels,
and in the end without kernels.

A Triton that no test has seen may reject a kernel, or a device may have too little of something for
it: that must cost time, never a run. The engines given are tried in order, best first; each says
the same of a tile, up to rounding, so a tile may take its statistics from one and its gradient from
the next. What was refused once is not compiled again in this process, for tiles of that kind: the
compiler would say the same, after some more seconds. The first refusal is one warning, later ones
are logged.

Only what a compiler or a launch says of the kernel itself counts: an error of ours, memory that ran
out or a broken device is raised as it is.
"""

from __future__ import annotations

import logging
import re
import subprocess
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from sailplan_kernels.tiling.tile import (
    Coefficients,
    Engine,
    Gradient,
    MaskConfig,
    Statistics,
    Tile,
    TileOperand,
)

Found = TypeVar("Found", Statistics, Gradient)
_log = logging.getLogger(__name__)
# Of RuntimeErrors: Triton's passes, its search for a C compiler, its assembler, and what the driver
# says of a kernel it cannot start.
_REFUSALS = re.compile(
    r"PassManager::run failed|Failed to find C compiler|Cannot find (ptxas|cuobjdump|nvdisasm)|failed to translate module"
    r"|Triton Error \[CUDA\]: (out of resource|too many resources requested|no kernel image|device kernel image is invalid|invalid device function|a PTX JIT)"
)
_refused: set[tuple[object, ...]] = set()
_warned = False


def is_refusal(error: Exception) -> bool:
    """Whether ``error`` says that a kernel could not be compiled or started here, whatever it
    was given.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, torch.OutOfMemoryError):
        return False
    known = (CompilationError, OutOfResources, PTXASError, subprocess.CalledProcessError)
    return isinstance(error, known) or (
        isinstance(error, RuntimeError) and _REFUSALS.search(str(error)) is not None
    )


class FallbackEngine:
    """``engines``, best first; see this file.

    Sizes are the first one's: what is planned does not change in the middle of a step.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.ran: set[str] = set()  # names of the engines that tiles went through
        self.pair_bytes, self.kept_bytes = engines[0].pair_bytes, engines[0].kept_bytes

    @property
    def name(self) -> str:
        """Of what tiles have gone through, "a + b" of several; before any, of the best."""
        return " + ".join(sorted(self.ran)) or self.engines[0].name

    def tile(self, rows: TileOperand, columns: TileOperand, rule: MaskConfig, cached: bool) -> Tile:
        """Raises what the first engine raises for vectors that it does not take."""
        return _FallbackTile(self.engines, self.ran, rows, columns, rule, cached)


class _FallbackTile:
    def __init__(
        self,
        engines: Sequence[Engine],
        ran: set[str],
        rows: TileOperand,
        columns: TileOperand,
        rule: MaskConfig,
        cached: bool,
    ) -> None:
        limits = rows.max_cosine is not None, columns.max_cosine is not None
        vectors = rows.vectors
        self.kind = (vectors.device, vectors.dtype, rule, limits)
        self.engines, self.ran, self.given, self.cached = (
            engines,
            ran,
            (rows, columns, rule),
            cached,
        )
        self.place = 0
        self.tile = engines[0].tile(
            rows, columns, rule, cached
        )  # always: it checks what it is given
        while self._key("statistics") in _refused and self.place + 1 < len(engines):
            self._next(cached)

    def statistics(self) -> Statistics:
        return self._tried("statistics", lambda: self.tile.statistics(), self.cached)

    def gradient(self, coefficients: Coefficients) -> Gradient:
        return self._tried("gradient", lambda: self.tile.gradient(coefficients), False)

    def _key(self, question: str) -> tuple[object, ...]:
        return (self.place, question, *self.kind)

    def _next(self, cached: bool) -> None:
        """The next engine whose kernels are other ones: a schedule may be what the one before it
        had chosen.
        """
        refused, (rows, _, rule) = getattr(self.tile, "config", None), self.given
        most = self.engines[0].kept_bytes(
            rule, rows.vectors.dtype
        )  # memory was planned for the first
        while True:
            self.place += 1
            engine = self.engines[self.place]
            self.tile = engine.tile(
                *self.given, cached and engine.kept_bytes(rule, rows.vectors.dtype) <= most
            )
            if refused is None or getattr(self.tile, "config", None) != refused:
                return

    def _tried(self, question: str, work: Callable[[], Found], cached: bool) -> Found:
        while True:
            last, key = self.place + 1 == len(self.engines), self._key(question)
            if key not in _refused:
                try:
                    found = work()
                    self.ran.add(self.engines[self.place].name)
                    return found
                except Exception as error:
                    if last or not is_refusal(error):
                        raise
                    _refused.add(key)
                    self._next(cached)
                    _tell(question, self.engines[self.place], error)
            else:
                self._next(cached)


def _tell(question: str, instead: Engine, error: Exception) -> None:
    global _warned
    import triton

    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}{': ' if lines else ''}{lines[-1][:200] if lines else ''}"
    schedule = getattr(instead, "schedule", None)
    other = f"schedule {schedule!r}" if schedule else f"backend {instead.name!r}"
    text = f"infonce: a kernel of the {question} does not compile or start here (triton {triton.__version__}: {said}); going on with {other}, which is slower"
    _log.info(text)
    if not _warned:
        _warned = True
        warnings.warn(text, RuntimeWarning, stacklevel=2)
