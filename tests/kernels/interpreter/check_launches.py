"""What a launch compiles is what ahead-of-time compilation has judged, down to the last
instruction.

Run by test_triton.py as a program, with the interpreter off. There is no device: tensors are a
CPU's, the driver only names the target, and launches stop after compiling.
"""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sailplan_kernels import aot
from sailplan_kernels.tiling import triton_engine
from sailplan_kernels.tiling.tile import Coefficients, MaskConfig, TileOperand
from sailplan_kernels.triton_kernels.configurations import TABLES

N, M, D = 300, 501, 64


class Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a launch remembers the target of a device

    def get_current_stream(self, device: int) -> int:
        return 0


def tile_on(capability: int) -> type[triton_engine.TritonTile]:
    class Tile(triton_engine.TritonTile):
        def _configuration(self, schedule: str):
            return TABLES[schedule](self.rows.vectors.dtype, self.kind, self.masks, capability)

    return Tile


def side(rows: int, prefixes: int, limits: bool) -> TileOperand:
    ones = torch.ones(prefixes, rows)
    return TileOperand(
        torch.randn(rows, D).bfloat16(),
        ones,
        torch.zeros(rows, 3, dtype=torch.int64),
        ones[0] > 0,
        ones if limits else None,
        ones[0],
    )


def main() -> None:
    launched: list[tuple[JITFunction, object]] = []
    run = JITFunction.run

    def compile_only(self, *given, grid, warmup, **named):
        launched.append((self, run(self, *given, grid=grid, warmup=True, **named)))

    JITFunction.run = compile_only
    for capability, kind, limits, cached, schedule, prefixes in (
        (90, "plain", False, True, "persistent", (D,)),
        (90, "columns", True, False, "persistent", (D,)),
        (90, "symmetric", False, False, "persistent", (D // 2, D)),
        (90, "sigmoid", False, False, "persistent", (D,)),
        (90, "symmetric", False, False, "tiles", (D // 2, D)),
        (100, "moments", False, True, "persistent", (D // 2, D)),
    ):
        driver.set_active(Target(capability))
        launched.clear()
        both, one = kind in ("columns", "symmetric"), kind == "symmetric"
        rule = MaskConfig(
            prefixes,
            (0, 1),
            columns=both,
            moments=kind == "moments",
            one_temperature=one,
            sigmoid=kind == "sigmoid",
        )
        tile = tile_on(capability)(
            side(N, len(prefixes), limits), side(M, len(prefixes), limits), rule, cached, schedule
        )
        tile.statistics()
        rows, columns = torch.zeros(len(prefixes), N), torch.zeros(len(prefixes), M)
        tile.gradient(Coefficients(rows, rows, columns, columns))
        assert len(launched) == 2
        for function, kernel in launched:
            name = function.__name__.removesuffix("_kernel")
            case = aot.Case(
                name,
                torch.bfloat16,
                tile.kind,
                tile.masks,
                capability,
                tile.cached and name == "statistics",
                schedule,
            )
            print(case, flush=True)
            assert kernel.asm["ptx"] == aot.compiled(case).asm["ptx"], case


if __name__ == "__main__":
    triton_engine._processors = lambda device: 132
    main()
