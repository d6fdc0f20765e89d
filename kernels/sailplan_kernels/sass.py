"""Count the instructions that a compiled kernel spends on a pair, without a GPU.

A processor issues ISSUED instructions of 32 threads a cycle and multiplies PRODUCTS pairs of
half-precision numbers meanwhile. What a kernel issues beside its matrix products is therefore the
time in which the matrix units may stand idle, and it can be read off the machine code: the flow of
control has the loop over dimensions as its innermost loop around a matrix instruction, the loop
over prefixes around it, and, where programs go from tile to tile, the loop over tiles around that.

Counted is the cheapest way through: that of a tile in which no pair is masked, as a branch around
the masks is the shorter way. Loops that hold no product (sums over prefixes) count as if they ran
once a prefix.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

# Instructions of one thread that a processor issues in a cycle: 4 schedulers of 32 threads (sm_80
# to sm_100)
ISSUED = 128
PRODUCTS = {
    80: 1024,
    90: 2048,
    100: 4096,
}  # multiplications of half-precision numbers in a cycle of a processor, from the data sheets
RECIPE = (128, 768, 1536)  # the prefixes that the share is predicted for
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCMMA")
_JUMPS = (
    "BRA",
    "CALL",
    "EXIT",
    "BRX",
    "JMP",
    "RET",
    "JMXU",
    "BRXU",
)  # CALL: how sm_80 leaves a loop; it does not come back


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other."""

    size: int
    products: int  # matrix instructions among them
    next: tuple[int, ...]  # addresses of the blocks that may follow
    leaves: bool  # the kernel may end here


def disassembled(cubin: bytes) -> str:
    """The machine code of a kernel, by the disassembler that Triton brings along."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
        return subprocess.run(
            [str(tool), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout


def blocks(sass: str) -> dict[int, Block]:
    """Basic blocks by their address, the first being the kernel's entry.

    Padding behind the last instruction is not among them.
    """
    lines = [(int(at, 16), guard, name, rest) for at, guard, name, rest in _LINE.findall(sass)]
    starts = {lines[0][0]} if lines else set()
    targets: dict[int, int] = {}
    for (at, _, name, rest), after in zip(lines, [*lines[1:], None], strict=True):
        if name.split(".")[0] in _JUMPS:
            found = re.search(r"0x([0-9a-f]+)", rest) if name.startswith(("BRA", "CALL")) else None
            if found is not None:
                targets[at] = int(found[1], 16)
                starts.add(targets[at])
            if after is not None:
                starts.add(after[0])
    found_blocks: dict[int, Block] = {}
    first, size, products = lines[0][0] if lines else 0, 0, 0
    for (at, guard, name, rest), after in zip(lines, [*lines[1:], None], strict=True):
        size, products = size + (name != "NOP"), products + name.startswith(_MATRIX)
        if after is None or after[0] in starts:
            jump = name.split(".")[0] in _JUMPS
            follows = [targets[at]] if at in targets else []
            if after is not None and (
                not jump or guard or re.search(r"\bU?P\d", rest)
            ):  # a condition in front or among the operands
                follows.append(after[0])
            found_blocks[first] = Block(size, products, tuple(follows), name == "EXIT")
            first, size, products = after[0] if after is not None else 0, 0, 0
    return found_blocks


def loops(graph: dict[int, Block], inside: frozenset[int]) -> list[frozenset[int]]:
    """The outermost loops of a part of the graph: strongly connected components with more than
    one block or a jump to itself.
    """
    order, seen = [], set()
    for root in sorted(inside):
        stack = [(root, iter(graph[root].next))] if root not in seen else []
        seen.add(root)
        while stack:
            at, rest = stack[-1]
            for to in rest:
                if to in inside and to not in seen:
                    seen.add(to)
                    stack.append((to, iter(graph[to].next)))
                    break
            else:
                order.append(at)
                stack.pop()
    before: dict[int, list[int]] = {at: [] for at in inside}
    for at in inside:
        for to in graph[at].next:
            if to in inside:
                before[to].append(at)
    found, taken = [], set()
    for root in reversed(order):
        if root in taken:
            continue
        component, queue = {root}, [root]
        while queue:
            for at in before[queue.pop()]:
                if at not in taken and at not in component:
                    component.add(at)
                    queue.append(at)
        taken |= component
        if len(component) > 1 or root in graph[root].next:
            found.append(frozenset(component))
    return found


def _cheapest(
    graph: dict[int, Block],
    inside: frozenset[int],
    free: frozenset[int],
    start: set[int],
    end: set[int],
) -> int:
    """Fewest instructions from a block of ``start`` to one of ``end``, both counted, through
    blocks of ``inside``; ``free`` ones cost nothing.
    """
    cost = {at: 0 if at in free else graph[at].size for at in start}
    queue = sorted((c, at) for at, c in cost.items())
    while queue:
        so_far, at = heappop(queue)
        if at in end:
            return so_far
        if so_far > cost[at]:
            continue
        for to in graph[at].next:
            there = so_far + (0 if to in free else graph[to].size if to in inside else 0)
            if to in inside and there < cost.get(to, there + 1):
                cost[to] = there
                heappush(queue, (there, to))
    raise ValueError(
        "a kernel's flow of control: found no way through its product loop, expected one"
    )


def _pass(
    graph: dict[int, Block],
    inside: frozenset[int],
    around: frozenset[int],
    start: set[int],
    end: set[int],
    others: frozenset[int] = frozenset(),
) -> int:
    """Fewest instructions of one pass through ``inside`` that goes through the loop ``around``,
    whose own do not count, nor those of ``others``.
    """
    free = around | others
    return _cheapest(graph, inside, free, start, set(around)) + _cheapest(
        graph, inside, free, set(around), end
    )


def count(sass: str, pairs: int, levels: int) -> tuple[float, float] | None:
    """(a prefix, a tile): instructions of one pair of a thread, beside the matrix products, that
    every prefix costs and that come once.

    ``pairs`` of a tile that each thread holds; ``levels``: loops around the loop over dimensions, 2
    where programs go from tile to tile, else 1. None: a kernel without matrix instructions in loops
    of that kind.
    """
    graph = blocks(sass)
    region = frozenset(graph)
    nest: list[frozenset[int]] = []
    for _ in range(levels + 1):
        entry = {
            to
            for at, block in graph.items()
            if at not in region
            for to in block.next
            if to in region
        } or {min(region)}
        around = [
            x
            for x in loops(graph, region - (entry if nest else set()))
            if any(graph[at].products for at in x)
        ]
        if len(around) != 1:
            return None
        region = around[0]
        nest.append(region)
    product, prefix = nest[-1], nest[-2]
    whole = nest[-3] if levels == 2 else frozenset(graph)

    def ends(loop: frozenset[int]) -> tuple[set[int], set[int]]:
        heads = {
            to for at, block in graph.items() if at not in loop for to in block.next if to in loop
        }
        return heads, {at for at in loop if heads & set(graph[at].next)}

    a_prefix = _pass(graph, prefix, product, *ends(prefix))
    start, end = (
        ends(whole)
        if levels == 2
        else ({min(graph)}, {at for at, block in graph.items() if block.leaves})
    )
    others = [
        x
        for x in loops(graph, whole - prefix - (start if levels == 2 else set()))
        if len(x) > 1 or sum(graph[at].size for at in x) > 16
    ]
    summing = frozenset().union(*others)
    a_prefix += sum(graph[at].size for at in summing)
    return a_prefix / pairs, _pass(graph, whole, prefix, start, end, summing) / pairs


def share(
    instructions: tuple[float, float], capability: int, prefixes: tuple[int, ...] = RECIPE
) -> float:
    """Of the time, how much the matrix units multiply, where nothing else runs while they do and
    issuing is all that the rest takes.
    """
    a_prefix, a_tile = instructions
    products = prefixes[-1] / PRODUCTS[capability]
    return products / (products + (a_prefix * len(prefixes) + a_tile) / ISSUED)
