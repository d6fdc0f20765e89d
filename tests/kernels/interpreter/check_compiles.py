"""A part of `python -m sailplan_kernels.aot` with the Triton that is first on the path.

Run by test_triton_versions.py as a program,
with the interpreter off."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sailplan_kernels import aot
from sailplan_kernels.tiling.fallback import is_refusal
from sailplan_kernels.triton_kernels import versions


@triton.jit
def specialised_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=True, num_stages=2):
        acc = tl.dot(a.load([tl.program_id(0) * BM, k]), b.load([0, k]).T, acc)
    tl.store(c + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


def what_specialising_says() -> Exception | None:
    """Warps specialised over descriptors of the host, in tiles of 128 rows: Triton rejects it on
    sm_90 from 3.7 on (versions.py).
    """
    sizes = {"BM": 128, "BN": 128, "BK": 64}
    kinds = {
        "a": "tensordesc<bf16[128, 64]>",
        "b": "tensordesc<bf16[128, 64]>",
        "c": "*fp32",
        "K": "i32",
        **dict.fromkeys(sizes, "constexpr"),
    }
    source = ASTSource(specialised_kernel, kinds, constexprs=sizes)
    try:
        triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2}
        )
    except Exception as error:
        return error
    return None


def part() -> list[aot.Case]:
    """bfloat16 on sm_90: one of every kernel and kind of tile, with the most masks it has.

    Else: one of every kernel.
    """
    different = {}
    for case in aot.cases([90, 80, 100], [torch.bfloat16, torch.float32]):
        if (
            case.kernel != "rescale"
            and not case.cached
            and (case.dtype != torch.float32 or case.capability == 90)
        ):
            first = (case.capability, case.dtype) == (90, torch.bfloat16)
            different[
                case.capability, case.dtype, case.schedule, case.kernel, case.kind if first else ""
            ] = case
    return list(different.values())


def main() -> None:
    print(f"triton {triton.__version__}", flush=True)
    error = what_specialising_says()
    refused = versions.installed() >= (3, 7)
    assert (error is not None) == refused and (error is None or is_refusal(error)), error
    for case, verdict in aot.compile_all(part(), workers=2):
        print(aot.row(case, verdict), flush=True)


if __name__ == "__main__":
    main()
