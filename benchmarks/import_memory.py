"""Measure the memory and time of `sailplan data import` at several sizes: memory must not grow
with the rows.

    python benchmarks/import_memory.py --rows 50000,200000,1000000 --out
    benchmarks/results/import_memory.json

Each size is an import of its own, as a user starts it. Memory is the largest sum, over the command
and its workers, of the memory that each has alone and its share of what they have in common (PSS),
sampled ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

FORMS = ("captions", "interactions")


def make(form: str, rows: int, folder: Path) -> list[str]:
    """Write a table of `rows` rows; return the arguments that import it."""
    with open(folder / "table.csv", "w", encoding="utf-8") as file:
        if form == "captions":
            file.write("id,title,description,price\n")
            file.writelines(
                f'{n},thing number {n},"a thing of kind {n % 97}, and {n * 7919 % 10007} of '
                f'it",{n % 50}\n'
                for n in range(rows)
            )
            return ["table.csv"]
        file.write("user,item,time\n")
        file.writelines(f"u{n * 7919 % (rows // 8 + 1)},{n % 5000},{n}\n" for n in range(rows))
    (folder / "items.csv").write_text(
        "id,title\n" + "".join(f"{n},thing {n}\n" for n in range(5000))
    )
    return ["table.csv", "--items", "items.csv"]


def measure(form: str, rows: int, workers: int) -> dict[str, float | int | str]:
    """Import a table of `rows` rows; return the peak memory in MB, and seconds."""
    with tempfile.TemporaryDirectory() as name:
        arguments = make(form, rows, Path(name))
        began, peak = time.monotonic(), 0
        line = [
            sys.executable,
            "-m",
            "sailplan",
            "data",
            "import",
            *arguments,
            "--name",
            "table",
            "--workers",
            str(workers),
        ]
        process = psutil.Popen(line, cwd=name, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None:
            total = 0
            for one in [process, *_children(process)]:
                try:
                    total += one.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak = max(peak, total)
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(process.stdout.read().decode())
        return {
            "form": form,
            "rows": rows,
            "workers": workers,
            "peak_mb": round(peak / 1e6),
            "seconds": round(time.monotonic() - began, 1),
        }


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="50000,200000,1000000")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    for form in options.forms.split(","):
        for rows in map(int, options.rows.split(",")):
            found.append(measure(form, rows, options.workers))
            print(json.dumps(found[-1] | {"load": round(os.getloadavg()[0], 1)}), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
