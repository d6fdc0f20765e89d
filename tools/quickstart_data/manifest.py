"""Say what was written: records and bytes a set, sha256 of every shard, sources and encoder
versions. No dates.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from sailplan.data.writer import Record

ENCODERS = ("pillow", "soundfile", "tokenizers")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe_set(records: Sequence[Record], shards: Sequence[Path], root: Path) -> dict[str, Any]:
    """`content_bytes` is what the records hold; `bytes` the tar files, with USTAR's padding."""
    from sailplan.data.writer import members

    return {
        "records": len(records),
        "splits": dict(sorted(Counter(record.body["split"] for record in records).items())),
        "bytes": sum(path.stat().st_size for path in shards),
        "content_bytes": sum(len(content) for record in records for _, content in members(record)),
        "shards": {str(path.relative_to(root)): sha256(path) for path in shards},
    }


def write_manifest(
    root: Path, sets: dict[str, Any], counts: dict[str, int], sources: list[dict[str, str]]
) -> None:
    versions = {name: importlib.metadata.version(name) for name in ENCODERS}
    manifest = {
        "format": 1,
        "sets": sets,
        "counts": counts,
        "tokenizer": {"file": "tokenizer.json", "sha256": sha256(root / "tokenizer.json")},
        "sources": sources,
        "encoders": versions | {"libsndfile": soundfile.__libsndfile_version__},
    }
    (root / "manifest.json").write_text(
        json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )
