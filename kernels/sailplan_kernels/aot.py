"""Compile the Triton kernels ahead of time, without a GPU, and judge what comes out: `python -m sailplan_kernels.aot`.

For every launch configuration and target it prints, as Markdown, registers, stack, spills, shared memory and matrix instructions, and
PASS or REJECT; the exit status is 1 on a REJECT. Rejected is what spills or uses a stack, needs more shared memory than
the target has (the compiler itself does not look), or multiplies half-precision operands on sm_90 without WGMMA.
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

from sailplan_kernels.triton_kernels.configurations import KINDS, MASKS, Configuration, configuration, switches

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel as the engine may launch it. The number of prefixes and all lengths are arguments at run time."""

    kernel: str
    dtype: torch.dtype
    kind: str
    masks: str
    capability: int
    keep: bool = False  # statistics that also write what the rescale kernel reads


@dataclass(frozen=True)
class Verdict:
    registers: int
    stack: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    reason: str  # empty: PASS


def cases(capabilities: list[int], dtypes=tuple(TYPES)) -> list[Case]:
    """Everything the engine can launch, each compiled kernel once: several kinds of tiles may share one, under the first's name."""
    wanted = []
    for capability, dtype in itertools.product(capabilities, dtypes):
        for kind, masks in itertools.product(KINDS, MASKS):
            wanted.append(Case("statistics", dtype, kind, masks, capability))
            wanted.append(Case("sigmoid" if kind.startswith("sigmoid") else "gradient", dtype, kind, masks, capability))
        for masks in MASKS:
            wanted += [Case("statistics", dtype, "plain", masks, capability, keep=True), Case("rescale", dtype, "plain", masks, capability)]
    different: dict[tuple, Case] = {}
    for case in wanted:
        config = configuration(case.dtype, case.kind, case.masks, case.capability)
        aligned = case.masks != "odd" or case.kernel == "rescale"
        launch = (config.warps, config.stages) if case.kernel != "rescale" else ()
        different.setdefault((case.kernel, case.dtype, case.capability, aligned, launch, *_constants(case, config).items()), case)
    return list(different.values())


def _function(case: Case):
    from sailplan_kernels.triton_kernels import sigmoid_tiles, tiles

    return getattr(sigmoid_tiles if case.kernel == "sigmoid" else tiles, f"{case.kernel}_kernel")


def _constants(case: Case, config: Configuration) -> dict[str, object]:
    """What the kernel is compiled for, of what the engine decides by kind and masks."""
    known = {**switches(case.kind, case.masks), "MOMENTS": case.kind not in ("plain", "sigmoid"), "KEEP": case.keep, "PRECISION": "ieee", **asdict(config)}
    return {name: value for name, value in known.items() if name in _function(case).arg_names}


def compile_case(case: Case, config: Configuration | None = None) -> Verdict:
    """Compile in this process, which must not have the interpreter on. A compiler's error is a REJECT with its first line."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _function(case)
    config = config or configuration(case.dtype, case.kind, case.masks, case.capability)
    constants = _constants(case, config)
    kinds = {name: f"*{TYPES[case.dtype]}" for name in ("rows", "columns", "weights", "kept")}
    kinds |= {"row_tags": "*i64", "column_tags": "*i64", "bounds": "*i32", **dict.fromkeys(("n", "m", "D", "pitch", "prefixes", "moments"), "i32")}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in function.arg_names}
    free = {function.arg_names[i] if isinstance(i, int) else i for i in function.do_not_specialize} | ({"D"} if case.masks == "odd" else set())
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name not in constants and name not in free}
    try:
        source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
        launch = {"num_warps": config.warps, "num_stages": config.stages}
        return _judge(case, triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=launch))
    except Exception as error:  # whatever a compiler throws is a verdict on this case, the others go on
        return Verdict(0, 0, 0, 0, 0, 0, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:120])


def _judge(case: Case, compiled) -> Verdict:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(case.capability).path, "-v", f"-arch={_found(r'[.]target (sm_[0-9a-z]+)', ptx)}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack = int(_found(r"(\d+) bytes stack frame", said))
    spills = int(_found(r"(\d+) bytes spill stores", said)) + int(_found(r"(\d+) bytes spill loads", said))
    registers, shared = int(_found(r"Used (\d+) registers", said)), compiled.metadata.shared
    wgmma, mma = ptx.count("wgmma.mma_async"), len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx))
    half, products = case.dtype != torch.float32, case.kernel != "rescale"
    reasons = [
        f"stack {stack}" if stack else "",
        f"spills {spills}" if spills else "",
        f"shared {shared} > {SHARED_LIMIT[case.capability]}" if shared > SHARED_LIMIT[case.capability] else "",
        "no WGMMA" if case.capability == 90 and half and products and not wgmma else "",
        "no matrix instruction" if half and products and not wgmma + mma else "",
    ]
    return Verdict(registers, stack, spills, shared, wgmma, mma, ", ".join(filter(None, reasons)))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the assembler's report: found no {pattern!r}, expected it in {text[:200]!r}")
    return match[1]


def compile_all(wanted: list[Case], workers: int = 2) -> Iterator[tuple[Case, Verdict]]:
    """In worker processes, started afresh so that none inherits the interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(compile_case, wanted), strict=True)


def row(case: Case, v: Verdict) -> str:
    """One line of the table, in Markdown."""
    c = configuration(case.dtype, case.kind, case.masks, case.capability)
    tile = f"{c.BM}x{c.BN}x{c.BK}, {c.warps} warps, {c.stages} stages"
    kernel = case.kernel + (" keep" if case.keep else "")
    cells = (f"sm_{case.capability}", TYPES[case.dtype], kernel, case.kind, case.masks, tile, *astuple(v)[:-1], f"REJECT {v.reason}" if v.reason else "PASS")
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m sailplan_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=[f"sm_{c}" for c in SHARED_LIMIT], default=["sm_90", "sm_80", "sm_100"])
    parser.add_argument("--dtype", nargs="+", choices=list(TYPES.values()), default=list(TYPES.values()))
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    wanted = cases([int(target[3:]) for target in chosen.target], [dtype for dtype, name in TYPES.items() if name in chosen.dtype])
    print("# Kernels compiled ahead of time, without a GPU\n")
    print(f"`python -m sailplan_kernels.aot --target {' '.join(chosen.target)} --dtype {' '.join(chosen.dtype)}`, triton {triton.__version__}, ", end="")
    print(f"torch {torch.__version__}. What the columns mean: see README.md. No time is measured here.\n")
    print("| target | dtype | kernel | tile of | masks | BM x BN x BK | registers | stack | spills | shared | WGMMA | other MMA | verdict |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rejected = 0
    for case, verdict in compile_all(wanted, chosen.workers):
        rejected += bool(verdict.reason)
        print(row(case, verdict), flush=True)
    print(f"\n{len(wanted) - rejected} PASS, {rejected} REJECT")
    return int(rejected > 0)


if __name__ == "__main__":
    sys.exit(main())
