"""Which option works on which backend, found out by calling every one of them.

    python -m sailplan_kernels.options              # the matrix in Markdown
    python -m sailplan_kernels.options --write kernels/README.md

A cell says "ok" if loss and gradients are those of the reference, and otherwise what the call said.
Everything runs on a
CPU: Triton in its interpreter, exchanges on two ranks. An argument of a loss that no row names is
an error, so that the matrix cannot fall behind.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from sailplan_kernels.arguments import GROUPS, Call, grouped
from sailplan_kernels.exchange import EXCHANGES, Local
from sailplan_kernels.infonce import InfoNCEOutput, infonce
from sailplan_kernels.sigmoid import SigmoidOutput, sigmoid
from sailplan_kernels.testing import run_ranks

BEGIN, END = "<!-- options:begin -->", "<!-- options:end -->"
N, M, D, H = 6, 8, 16, 2
BACKENDS = ("reference", "chunked", "triton")
LOSSES: dict[str, Callable[..., InfoNCEOutput | SigmoidOutput]] = {
    "infonce": infonce,
    "sigmoid": sigmoid,
}
LEAVES = ("queries", "keys", "hard_negatives", "temperature", "bias")
ALWAYS = {
    "queries",
    "keys",
    "temperature",
    "bias",
    "exchange",
    "options.backend",
}  # in every row, or rows or columns themselves


def samples(n: int = N, m: int = M, d: int = D) -> list[tuple[str, Call]]:
    """(what the table calls it, arguments), for n queries and m keys of d dimensions (a multiple
    of 4).
    """
    g = torch.Generator().manual_seed(0)
    flags = lambda *shape: torch.rand(*shape, generator=g) < 0.8  # noqa: E731
    ids = lambda count: torch.randint(-1, 5, (count,), generator=g)  # noqa: E731
    hard = torch.randn(n, H, d, generator=g)
    by_id = {
        "positive_ids": torch.randint(0, 4, (n,), generator=g),
        "key_ids": torch.randint(0, 4, (m,), generator=g),
    }
    positives = torch.tensor([3, 1, -1, 1, 0, 7]).repeat(-(-n // N))[:n]
    return [
        ("no option", {}),
        ("`temperature` [N]", {"temperature": 0.1 + 0.1 * torch.rand(n, generator=g)}),
        ("`positives`, shared and -1", {"positives": positives}),
        ("`masks.query_ids`", {"query_ids": ids(n)}),
        (
            "`masks.query_ids`, `masks.key_query_ids`",
            {"query_ids": ids(n), "key_query_ids": ids(m)},
        ),
        ("`masks.key_ids`", {"key_ids": ids(m)}),
        (
            "`masks.query_valid`, `masks.key_valid`",
            {"query_valid": flags(n), "key_valid": flags(m)},
        ),
        ("`negatives.hard`", {"hard_negatives": hard}),
        (
            "`negatives.hard`, `negatives.hard_valid`",
            {"hard_negatives": hard, "hard_negative_valid": flags(n, H)},
        ),
        (
            "`negatives.hard`, `negatives.shared`",
            {"hard_negatives": hard, "shared_hard_negatives": True},
        ),
        (
            "`key_log_probability`",
            {"key_log_probability": (torch.rand(m, generator=g) + 0.01).log()},
        ),
        ("`positives` by id", by_id),
        (
            "`positives` by id, `symmetric`, `negatives.keys`",
            {**by_id, "symmetric": True, "key_negatives": True},
        ),
        ("`negatives.max_cosine`", {"max_cosine": 0.3}),
        (
            "`negatives.max_cosine` of each prefix",
            {"prefixes": (d // 4, d), "max_cosine": {d // 4: 0.6, d: 0.3}},
        ),
        ("`negatives.max_cosine` [N]", {"max_cosine": torch.rand(n, generator=g)}),
        ("`negatives.margin_absolute`", {"margin_absolute": 0.1}),
        ("`negatives.margin_relative`", {"margin_relative": 0.95}),
        ("`symmetric`", {"symmetric": True}),
        ("`negatives.queries`", {"query_negatives": True}),
        ("`negatives.keys`", {"key_negatives": True}),
        ("`prefixes`", {"prefixes": (d // 4, d // 2, d)}),
        ("`prefixes` with weights", {"prefixes": (d // 4, d), "prefix_weights": (0.5, 1.0)}),
        ("`options.sizes`", {"sizes": [(N, M)]}),
        ("`options.memory_budget` of one byte", {"memory_budget": 1}),
        ("`options.score_dtype` float64", {"score_dtype": torch.float64}),
        ("float64", {"dtype": torch.float64}),
        ("bfloat16", {"dtype": torch.bfloat16}),
        ("float16", {"dtype": torch.float16}),
    ]


def arguments(loss: str, options: Call, n: int = N, m: int = M, d: int = D) -> Call:
    """A whole call; trained-like embeddings, every float input a leaf that wants its gradient.

    Sizes as in `samples`.
    """
    g = torch.Generator().manual_seed(1)
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    queries = torch.randn(n, d, generator=g)
    keys = torch.cat(
        [queries + 0.5 * torch.randn(n, d, generator=g), torch.randn(m - n, d, generator=g)]
    )
    call = {
        "queries": queries.to(dtype),
        "keys": keys.to(dtype),
        "temperature": torch.tensor(0.2),
        **options,
    }
    if loss == "sigmoid":
        call["bias"] = torch.tensor(-3.0)
    return {
        name: x.clone().requires_grad_() if name in LEAVES and isinstance(x, Tensor) else x
        for name, x in call.items()
    }


def outcome(loss: str, call: Call, **more: object) -> list[Tensor]:
    """Loss and gradients, detached, in float64."""
    out = LOSSES[loss](**grouped(call | more))
    out.loss.backward()
    return [
        x.double()
        for x in (out.loss.detach(), *(call[name].grad for name in LEAVES if name in call))
    ]


def same(found: list[Tensor], expected: list[Tensor], half: bool) -> bool:
    near = 1e-2 if half else 1e-4
    return all(
        float((a - b).norm()) <= near * float(b.norm()) + 1e-6
        for a, b in zip(found, expected, strict=True)
    )


def knows(loss: str, options: Mapping[str, object]) -> bool:
    """Whether the loss has all these arguments."""
    by_id = loss == "infonce"
    return set(grouped(dict(options))) <= {
        *inspect.signature(LOSSES[loss]).parameters,
        "dtype",
    } and (by_id or "positive_ids" not in options)


def cell(loss: str, backend: str, options: dict[str, object]) -> str:
    """ "ok", "-" where the loss has no such argument, or the error's text."""
    if not knows(loss, options):
        return "-"
    try:
        found = outcome(loss, arguments(loss, options), backend=backend)
        expected = outcome(loss, arguments(loss, options), backend="reference")
    except Exception as error:
        return first_line(error)
    return (
        "ok"
        if same(found, expected, options.get("dtype") in (torch.bfloat16, torch.float16))
        else "WRONG: loss or gradients differ from the reference"
    )


def exchange_cell(loss: str, backend: str, exchange: type) -> str:
    """Two ranks with half of the rows each: the mean over ranks is the one process's result."""

    def work(rank: int, world_size: int) -> list[Tensor] | str:
        call = half_of(arguments(loss, {}), rank, world_size)
        try:
            return outcome(loss, call, backend=backend, exchange=exchange(None))
        except Exception as error:
            return first_line(error)

    parts = run_ranks(work, 2)
    for part in parts:
        if isinstance(part, str):
            return part
    together = [
        torch.cat(x) / 2 if x[0].dim() else torch.stack(x).mean(0) for x in zip(*parts, strict=True)
    ]
    whole = arguments(loss, {})
    whole["keys"] = whole["keys"].detach()[:N].requires_grad_()  # what the two ranks hold together
    expected = outcome(loss, whole, backend="reference", exchange=Local())
    return (
        "ok"
        if same(together, expected, False)
        else "WRONG: the mean over ranks differs from one process"
    )


def half_of(call: Call, rank: int, world_size: int) -> Call:
    rows = slice(rank * N // world_size, (rank + 1) * N // world_size)
    return {
        **call,
        **{
            name: call[name].detach()[rows].clone().requires_grad_() for name in ("queries", "keys")
        },
    }


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def matrix() -> str:
    """The table, errors below it by number."""
    rows = samples()
    calls = [grouped(options) for _, options in rows]
    named = {name for call in calls for name in call} | ALWAYS
    named |= {
        f"{name}.{field}"
        for call in calls
        for name in GROUPS
        if name in call
        for field, value in vars(call[name]).items()
        if value is not None
    }
    for loss in LOSSES.values():
        given = set(inspect.signature(loss).parameters) - {"former"}
        forgotten = (
            given
            | {
                f"{name}.{field.name}"
                for name in GROUPS
                if name in given
                for field in fields(GROUPS[name])
            }
        ) - named
        if forgotten:
            raise RuntimeError(
                f"options: found the arguments {sorted(forgotten)} in no row of "
                "sailplan_kernels/options.py, expected each in one"
            )
    columns = [(loss, backend) for loss in LOSSES for backend in BACKENDS]
    cells = [(label, [cell(*column, options) for column in columns]) for label, options in rows]
    cells += [
        (
            f"`exchange={exchange.__name__}`",
            [exchange_cell(*column, exchange) for column in columns],
        )
        for exchange in EXCHANGES.values()
    ]
    notes: list[str] = []
    lines = [
        "| option | " + " | ".join(f"{loss} {backend}" for loss, backend in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for label, found in cells:
        short = []
        for text in found:
            if text not in ("ok", "-") and text not in notes:
                notes.append(text)
            short.append(text if text in ("ok", "-") else f"error {notes.index(text) + 1}")
        lines.append(f"| {label} | " + " | ".join(short) + " |")
    lines += [
        "",
        "ok: loss and gradients equal the reference's, really called on a CPU, Triton in its "
        "interpreter. -: no such argument.",
    ]
    lines += ["", *(f"{number}. `{text}`" for number, text in enumerate(notes, 1))] if notes else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write",
        metavar="README",
        help="put the matrix between this file's markers instead of printing it",
    )
    options = parser.parse_args(argv)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    torch.set_num_threads(1)
    found = matrix()
    if options.write is None:
        print(found)
        return
    before, rest = Path(options.write).read_text().split(BEGIN)
    Path(options.write).write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
