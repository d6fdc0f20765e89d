"""The results file of benchmarks/gpu.py: where it comes from, and rows that are never lost again
once they are there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_parts as parts
import kernels
from isolated import Isolated, Lost

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (*kernels.PACKAGES, "megatron-core", "open_clip_torch", "numpy")


class Record:
    """The results on disk: written whole beside the old file, then renamed over it."""

    def __init__(
        self, path: Path, header: dict[str, Any], begin_with: Path | None, again: bool
    ) -> None:
        self.path = path
        self.whole: dict[str, Any] = {"header": header, "rows": {}}
        old = path if path.is_file() else begin_with
        if old is not None and old.is_file():
            found = json.loads(old.read_text())
            for key in ("device", "commit", "quick"):
                if found["header"].get(key) != header.get(key):
                    sys.exit(
                        f"{old}: found rows of {key} {found['header'].get(key)!r}, expected "
                        f"{header.get(key)!r}; give another --out"
                    )
            self.whole = {
                "header": found["header"]
                | {"calls": [*found["header"].get("calls", []), header["calls"][0]]},
                "rows": found["rows"],
            }
            if again:
                self.whole["rows"] = {
                    key: row for key, row in found["rows"].items() if "error" not in row
                }
        self.write()

    def __contains__(self, key: str) -> bool:
        return key in self.whole["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.whole["rows"][key] = row
        self.write()
        print(f"{key}: {row.get('error') or json.dumps(row)[:160]}", flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=self.path.parent, prefix=self.path.name, suffix=".new", delete=False
        ) as file:
            json.dump(self.whole, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)


def query(fields: str) -> list[str]:
    """nvidia-smi's answer, [] where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [x.strip() for x in done.stdout.splitlines()[0].split(",")]
        if done.returncode == 0 and done.stdout
        else []
    )


def header(options: argparse.Namespace, log: Path) -> dict[str, Any]:
    commit = options.commit
    if commit is None:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        commit = done.stdout.strip() or "unknown"
    machine = Isolated(parts.describe, options.device, log=log)
    try:
        found = machine.ask(120)
    except Lost as lost:
        sys.exit(f"--device {options.device}: {lost}")
    machine.close()
    driver = (
        query("driver_version,clocks.max.sm,clocks.max.mem,power.limit")
        if options.device == "cuda"
        else []
    )
    call = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": options.seconds,
        "load_average": found.pop("load_average"),
    }
    return {
        "what": "correctness, kernels beside their peers, split by kernel, training steps",
        "commit": commit,
        "quick": options.quick,
        **found,
        "driver, highest clocks (SM, memory; MHz), power limit (W)": driver,
        "versions": {name: version for name in PACKAGES if (version := kernels.installed(name))},
        "l2_flush_bytes": parts.FLUSH_BYTES if options.device == "cuda" else 0,
        "calls": [call],
    }


def lines(path: Path) -> Iterator[str]:
    """One for each row."""
    record = json.loads(path.read_text())
    yield json.dumps(
        {key: value for key, value in record["header"].items() if key != "calls"}, indent=1
    )
    for key, row in record["rows"].items():
        if "median_seconds" in row:
            peak = (
                f", {row['peak_bytes'] / 2**20:,.0f} MiB" if row["peak_bytes"] is not None else ""
            )
            yield f"{key}: {row['median_seconds'] * 1e3:.3g} ms{peak}, gradient error {row['gradient_error']:.1e}"
        else:
            yield f"{key}: {row.get('error') or json.dumps(row)}"
