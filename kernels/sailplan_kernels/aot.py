"""Compile the Triton kernels ahead of time, without a GPU, and judge what comes out: `python -m
sailplan_kernels.aot`.

For every launch configuration and target it prints, as Markdown, registers, stack, spills, shared
memory, matrix instructions, TMA copies, and PASS or REJECT; the exit status is 1 on a REJECT.
Rejected is what spills or uses a stack, needs more shared or tensor memory than the target has (the
compiler itself does not look), multiplies half-precision operands on sm_90 without WGMMA or on
sm_100 without tcgen05, or is meant to copy by TMA and does not.

Of half-precision kernels it counts what a pair costs beside its products (sass.py): instructions a
prefix, instructions a tile, and the share of the time in which the matrix units would multiply at
the recipe's prefixes, if nothing ran beside anything else. That is a figure of the code, not a
time: it compares kernels with each other and with what they were.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from sailplan_kernels import sass
from sailplan_kernels.triton_kernels import versions
from sailplan_kernels.triton_kernels.configurations import (
    KINDS,
    MASKS,
    RESCALE_WARPS,
    TABLES,
    Configuration,
    asked_for,
    switches,
)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_COLUMNS = 512  # of tensor memory, on sm_100
HEAD = (
    "| target | dtype | schedule | kernel | tile of | masks | BM x BN x BK "
    "| registers | stack | spills | shared | WGMMA | other MMA | TMA | a prefix | a tile | share | "
    "verdict |"
)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel as the engine may launch it.

    The number of prefixes and all lengths are arguments at run time.
    """

    kernel: str
    dtype: torch.dtype
    kind: str
    masks: str
    capability: int
    cached: bool = False  # statistics that also write what the rescale kernel reads
    schedule: str = "tiles"

    @property
    def configuration(self) -> Configuration:
        found = TABLES[self.schedule](self.dtype, self.kind, self.masks, self.capability)
        if found is None:
            raise ValueError(
                f"Case: found {self}, expected one that configurations.py has a kernel for"
            )
        return found


@dataclass(frozen=True)
class Verdict:
    registers: int
    stack: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    tma: int
    a_prefix: (
        float | None
    )  # instructions of a pair beside its products, that every prefix costs; None: not counted
    a_tile: float | None  # those that come once, whatever the number of prefixes
    share: float | None  # of the matrix units, as sass.share
    reason: str  # empty: PASS


def cases(capabilities: list[int], dtypes=tuple(TYPES)) -> list[Case]:
    """Everything the engine can launch with this Triton, each compiled kernel once: several
    kinds of tiles may share one, under the first's name.
    """
    wanted = []
    for capability, dtype, schedule in itertools.product(
        capabilities, dtypes, versions.schedules(versions.installed())
    ):
        for kind, masks in itertools.product(KINDS, MASKS):
            tile = (dtype, kind, masks, capability)
            if TABLES[schedule](*tile) is None or not asked_for(kind, masks):
                continue
            wanted.append(Case("statistics", *tile, schedule=schedule))
            wanted.append(
                Case(
                    "sigmoid" if kind.startswith("sigmoid") else "gradient",
                    *tile,
                    schedule=schedule,
                )
            )
            if kind == "plain":
                wanted += [
                    Case("statistics", *tile, cached=True, schedule=schedule),
                    Case("rescale", *tile, schedule=schedule),
                ]
    different: dict[tuple, Case] = {}
    for case in wanted:
        config = case.configuration
        rescale = case.kernel == "rescale"
        aligned = case.masks != "odd" or rescale
        launch = (config.warps, config.stages, case.schedule) if not rescale else ()
        different.setdefault(
            (
                case.kernel,
                case.dtype,
                case.capability,
                aligned,
                launch,
                *_constants(case, config).items(),
            ),
            case,
        )
    return list(different.values())


def _function(case: Case):
    from sailplan_kernels.triton_kernels import persistent, sigmoid_tiles, tiles

    modules = {
        "tiles": sigmoid_tiles if case.kernel == "sigmoid" else tiles,
        "persistent": persistent,
    }
    return getattr(
        tiles if case.kernel == "rescale" else modules[case.schedule], f"{case.kernel}_kernel"
    )


def _constants(case: Case, config: Configuration) -> dict[str, object]:
    """What the kernel is compiled for, of what the engine decides by kind and masks."""
    known: dict[str, object] = {
        **switches(case.kind, case.masks),
        "CACHED": case.cached,
        "PRECISION": "ieee",
        **asdict(config),
    }
    known["MOMENTS"] = case.kind not in ("plain", "sigmoid")
    return {name: value for name, value in known.items() if name in _function(case).arg_names}


def compiled(case: Case, config: Configuration | None = None):
    """The compiled kernel of a case, as a launch would make it, in this process, which must not
    have the interpreter on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _function(case)
    config = config or case.configuration
    constants = _constants(case, config)
    kinds = {
        name: f"*{TYPES[case.dtype]}"
        for name in (
            "rows",
            "columns",
            "weights",
            *["kept"] * (case.cached or case.kernel == "rescale"),
        )
    }
    kinds |= {
        **dict.fromkeys(("row_tags", "column_tags", "bounds"), "*i32"),
        **dict.fromkeys(("n", "m", "N", "M", "D", "pitch", "prefixes", "tags"), "i32"),
    }
    if config.schedule != "tiles" and case.kernel != "rescale":
        kinds |= {
            "rows": _descriptor(case, config.BM, config.BK),
            "columns": _descriptor(case, config.BN, config.BK),
        }
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32")
        for name in function.arg_names
    }
    free = {
        function.arg_names[i] if isinstance(i, int) else i for i in function.do_not_specialize
    } | ({"D"} if case.masks == "odd" else set())
    free |= {
        name
        for name, kind in signature.items()
        if kind == "constexpr" or kind.startswith("tensordesc")
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in free
    }
    launch = {
        "num_warps": RESCALE_WARPS if case.kernel == "rescale" else config.warps,
        "num_stages": config.stages,
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=launch)


def compile_case(case: Case, config: Configuration | None = None) -> Verdict:
    """Compile and judge. A compiler's error is a REJECT with its first line."""
    try:
        return _judge(case, config or case.configuration, compiled(case, config))
    except (
        Exception
    ) as error:  # whatever a compiler throws is a verdict on this case, the others go on
        first = next(iter(str(error).strip().splitlines()), "")
        return Verdict(
            0, 0, 0, 0, 0, 0, 0, None, None, None, f"{type(error).__name__}: {first}"[:120]
        )


def _descriptor(case: Case, *block: int) -> str:
    """A descriptor argument's type, spelled as a launch spells it."""
    return f"tensordesc<{TYPES[case.dtype]}{list(block)}>"


def _judge(case: Case, config: Configuration, kernel) -> Verdict:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [
            get_ptxas(case.capability).path,
            "-v",
            f"-arch={_found(r'[.]target (sm_[0-9a-z]+)', ptx)}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack = int(_found(r"(\d+) bytes stack frame", said))
    spills = int(_found(r"(\d+) bytes spill stores", said)) + int(
        _found(r"(\d+) bytes spill loads", said)
    )
    registers, shared = int(_found(r"Used (\d+) registers", said)), kernel.metadata.shared
    wgmma, mma = ptx.count("wgmma.mma_async"), len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx))
    tma = ptx.count("cp.async.bulk.tensor")
    half, products = case.dtype != torch.float32, case.kernel != "rescale"
    persistent = products and config.schedule != "tiles"
    tensor_memory = kernel.metadata.tmem_size
    reasons = [
        f"stack {stack}" if stack else "",
        f"spills {spills}" if spills else "",
        f"shared {shared} > {SHARED_LIMIT[case.capability]}"
        if shared > SHARED_LIMIT[case.capability]
        else "",
        f"tensor memory {tensor_memory} > {TENSOR_COLUMNS}"
        if tensor_memory > TENSOR_COLUMNS
        else "",
        "no WGMMA" if case.capability == 90 and half and products and not wgmma else "",
        "no tcgen05"
        if case.capability == 100 and half and products and "tcgen05.mma" not in ptx
        else "",
        "no matrix instruction" if half and products and not wgmma + mma else "",
        "no TMA" if persistent and not tma else "",
    ]
    counted = None
    if half and products:
        levels = 2 if persistent else 1
        counted = sass.count(
            sass.disassembled(kernel.asm["cubin"]),
            config.BM * config.BN // (32 * config.warps),
            levels,
        )
    a_prefix, a_tile = counted or (None, None)
    share = None if counted is None else sass.share(counted, case.capability)
    return Verdict(
        registers,
        stack,
        spills,
        shared,
        wgmma,
        mma,
        tma,
        a_prefix,
        a_tile,
        share,
        ", ".join(filter(None, reasons)),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(
            f"the assembler's report: found no {pattern!r}, expected it in {text[:200]!r}"
        )
    return match[1]


def compile_all(wanted: list[Case], workers: int = 2) -> Iterator[tuple[Case, Verdict]]:
    """In worker processes, started afresh so that none inherits the interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(compile_case, wanted), strict=True)


def row(case: Case, v: Verdict) -> str:
    """One line of the table, in Markdown."""
    c = case.configuration
    tile = (
        f"{c.BM}x{c.BN}, {RESCALE_WARPS} warps"
        if case.kernel == "rescale"
        else f"{c.BM}x{c.BN}x{c.BK}, {c.warps} warps, {c.stages} stages"
    )
    what = (
        f"sm_{case.capability}",
        TYPES[case.dtype],
        case.schedule,
        case.kernel + (" cached" if case.cached else ""),
        case.kind,
        case.masks,
        tile,
    )
    figures = [
        f"{x:.1f}" if isinstance(x, float) else "" if x is None else str(x) for x in astuple(v)[:-2]
    ]
    share = "" if v.share is None else f"{v.share:.0%}"
    return (
        "| "
        + " | ".join((*what, *figures, share, f"REJECT {v.reason}" if v.reason else "PASS"))
        + " |"
    )


def main(arguments: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m sailplan_kernels.aot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--target",
        nargs="+",
        choices=[f"sm_{c}" for c in SHARED_LIMIT],
        default=["sm_90", "sm_80", "sm_100"],
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=list(TYPES.values()), default=list(TYPES.values())
    )
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    wanted = cases(
        [int(target[3:]) for target in chosen.target],
        [dtype for dtype, name in TYPES.items() if name in chosen.dtype],
    )
    print("# Kernels compiled ahead of time, without a GPU\n")
    print(
        f"`python -m sailplan_kernels.aot --target {' '.join(chosen.target)} --dtype "
        f"{' '.join(chosen.dtype)}`, triton {triton.__version__}, ",
        end="",
    )
    print(
        f"torch {torch.__version__}. What the columns mean: see README.md. No time is measured "
        "here.\n"
    )
    print(f"{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|", flush=True)
    rejected = 0
    for case, verdict in compile_all(wanted, chosen.workers):
        rejected += bool(verdict.reason)
        print(row(case, verdict), flush=True)
    print(f"\n{len(wanted) - rejected} PASS, {rejected} REJECT")
    return int(rejected > 0)


if __name__ == "__main__":
    sys.exit(main())
