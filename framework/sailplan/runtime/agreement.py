"""What must be the same on all ranks, compared before the first step: one short digest a rank,
and more only where they differ.

Ranks that see other shards, run other code or were given other settings would train on, each a
little otherwise, and nobody would notice. What they differ in is said once, with ranks and hosts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from sailplan.errors import ConfigurationError
from sailplan.runtime.environment import host_name
from sailplan.runtime.process import Parallel
from sailplan.runtime.watch import meet

PACKAGES = (
    *(
        "torch",
        "numpy",
        "megatron-core",
        "transformers",
        "tokenizers",
        "safetensors",
        "pillow",
        "soundfile",
    ),
    *("scipy", "scikit-learn", "POT", "webdataset", "triton", "apex", "transformer-engine"),
)
SHOWN = 3  # differences of a rank, and ranks of one kind, that a message names
Facts = Mapping[str, object]  # nested mappings of JSON-able values


def software() -> dict[str, dict[str, str]]:
    """Return what is installed here: versions, and a hash of sailplan's and its kernels'
    sources.
    """
    found: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    import sailplan_kernels

    for folder in (Path(__file__).parents[1], Path(str(sailplan_kernels.__file__)).parent):
        found[f"code of {folder.name}"] = _sources(folder)
    return {"versions": found}


def agree(
    parallel: Parallel,
    what: str,
    facts: Facts | Callable[[], Facts],
    remedy: str,
    *,
    digest: str | None = None,
) -> None:
    """Return where all ranks give the same facts; otherwise raise ConfigurationError on all of
    them. A collective.

    what: the facts' name, as "data set prompts". digest: what differs where the facts do, for facts
    that take long to make.
    One all-gather of 32 bytes a rank; where ranks differ, rank 0's facts go to all, and each rank
    of another mind sends a line back: ranks that differ alike are named together.
    """

    def written() -> str:
        return json.dumps(facts() if callable(facts) else facts, sort_keys=True, default=str)

    own = torch.tensor(
        list(hashlib.sha256((written() if digest is None else digest).encode()).digest()),
        dtype=torch.uint8,
    )
    meet(f"comparing the {what}")
    rows = [
        torch.empty(32, dtype=torch.uint8, device=parallel.device)
        for _ in range(parallel.world_size)
    ]
    dist.all_gather(rows, own.to(parallel.device))
    if bool((torch.stack(rows) == rows[0]).all()):
        return
    text = written()
    first = json.loads(parallel.broadcast_text(text))
    answers: list[tuple[str, str]] = [("", "")] * parallel.world_size
    line = _line(first, json.loads(text))
    dist.all_gather_object(answers, (f"has {line}" if line else "", host_name()))
    lines, hosts = [line for line, _ in answers], [host for _, host in answers]
    raise ConfigurationError(
        f"{what}: ranks differ from rank 0 ({hosts[0]}): {named_ranks(lines, hosts)}; {remedy}"
    )


def differences(first: object, other: object, path: str = "") -> list[str]:
    """Return a line for each leaf that differs: "KEY: FIRST there, OTHER here"."""
    if isinstance(first, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted({*first, *other})
            for line in differences(
                first.get(key), other.get(key), f"{path}.{key}" if path else key
            )
        ]
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other) and path:
        return [
            line
            for number, pair in enumerate(zip(first, other, strict=True))
            for line in differences(*pair, f"{path}[{number}]")
        ]
    return [] if first == other else [f"{path}: {_shown(other)} instead of {_shown(first)}"]


def _shown(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(first: object, own: object) -> str:
    found = differences(first, own)
    return ", ".join(found[:SHOWN]) + (
        f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    )


def named_ranks(lines: list[str], hosts: list[str]) -> str:
    """Return the ranks that have a line, with hosts; those with the same line together."""
    alike: dict[str, list[int]] = {}
    for rank, line in enumerate(lines):
        if line:
            alike.setdefault(line, []).append(rank)
    told = []
    for line, ranks in alike.items():
        named = ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:SHOWN]) + (
            f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
        )
        told.append(f"rank {named} {line}")
    return "; ".join(told[:SHOWN])


def _sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
