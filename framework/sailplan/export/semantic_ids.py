"""Semantic IDs: an item's embedding as a short tuple of codes, coarse to fine, by residual
k-means (recipe section 5).

Level 1 clusters the unit vectors; every further level clusters what the levels before it left over.
Items that share the first codes are alike; the tuple is what a ranking or a generative model uses
in place of an arbitrary item id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sailplan.embed.clustering import k_means
from sailplan.errors import ConfigurationError
from sailplan.runtime.files import write_whole


@dataclass(frozen=True)
class SemanticIds:
    """Codes, the code books that decode them, and how well they do."""

    codes: np.ndarray  # int64 [n, levels]
    books: list[
        np.ndarray
    ]  # per level float64 [size, D]; the sum of the chosen rows rebuilds the unit vector
    errors: list[float]  # per level: mean squared residual after it; a unit vector starts at 1
    statistics: dict[
        str, Any
    ]  # unique, collision_rate, largest_bucket, used (codes in use per level)

    def rebuild(self, codes: np.ndarray) -> np.ndarray:
        """Vectors float64 [k, D] of codes int64 [k, levels]."""
        return np.sum([book[codes[:, level]] for level, book in enumerate(self.books)], axis=0)


def semantic_ids(vectors: np.ndarray, sizes: Sequence[int], seed: int = 0) -> SemanticIds:
    """Residual k-means of the unit vectors of `vectors` [n, D] with code books of `sizes`, e.g.

    [64, 64, 64].

    Deterministic in (vectors, sizes, seed). Books are cut where fewer different residuals are left.
    Raises ConfigurationError for an empty list of sizes, a size below 1, or no vectors.
    """
    if not sizes or min(sizes) < 1 or not len(vectors):
        raise ConfigurationError(
            f"semantic ids: found sizes {list(sizes)} for {len(vectors)} vectors; expected sizes "
            "of at least 1 and some vectors"
        )
    residual = np.asarray(vectors, dtype=np.float64)
    residual = residual / np.maximum(np.linalg.norm(residual, axis=1, keepdims=True), 1e-12)
    codes, books, errors = [], [], []
    for level, size in enumerate(sizes):
        labels, centres = k_means(residual.round(12), size, "semantic ids", seed, level)
        codes.append(labels)
        books.append(centres)
        residual = residual - books[-1][codes[-1]]
        errors.append(float(np.square(residual).sum(1).mean()))
    table = np.stack(codes, axis=1)
    return SemanticIds(table, books, errors, collisions(table))


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """How far the tuples int64 [n, levels] identify the items: unique tuples, collision_rate =
    share of items whose tuple another item has too, largest_bucket = most items on one tuple, used
    = codes in use per level.
    """
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return {
        "unique": len(counts),
        "collision_rate": float((counts[inverse.ravel()] > 1).mean()),
        "largest_bucket": int(counts.max()),
        "used": [len(np.unique(codes[:, level])) for level in range(codes.shape[1])],
    }


def write_semantic_ids(found: SemanticIds, ids: Sequence[str], folder: Path) -> None:
    """semantic_ids.json ({id: [codes]}, errors, statistics) and code_books.npz (level_0,
    level_1, ...) in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "statistics": found.statistics,
        "errors": found.errors,
        "codes": dict(zip(ids, found.codes.tolist(), strict=True)),
    }
    np.savez(
        folder / "code_books.npz",
        allow_pickle=False,
        **{f"level_{level}": book for level, book in enumerate(found.books)},
    )
    write_whole(folder / "semantic_ids.json", json.dumps(body, ensure_ascii=False))
