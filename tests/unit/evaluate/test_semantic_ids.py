"""Residual codes: each level rebuilds better, the same input gives the same codes, collisions
are counted right.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sailplan.errors import ConfigurationError
from sailplan.export.semantic_ids import collisions, semantic_ids, write_semantic_ids


def test_levels_refine_and_codes_rebuild_the_vectors(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((8, 16))[
        random.integers(0, 8, 120)
    ] + 0.3 * random.standard_normal((120, 16))
    found = semantic_ids(vectors, [8, 8, 8])
    assert found.errors[0] > found.errors[1] > found.errors[2]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.square(unit - found.rebuild(found.codes)).sum(1).mean() == pytest.approx(
        found.errors[2]
    )
    assert np.array_equal(found.codes, semantic_ids(vectors, [8, 8, 8]).codes)
    write_semantic_ids(found, [f"set/{row}" for row in range(120)], tmp_path)
    assert (
        json.loads((tmp_path / "semantic_ids.json").read_text())["codes"]["set/5"]
        == found.codes[5].tolist()
    )
    assert sorted(np.load(tmp_path / "code_books.npz")) == ["level_0", "level_1", "level_2"]


def test_equal_vectors_share_their_codes() -> None:
    found = semantic_ids(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), [4, 4])
    assert found.codes[0].tolist() == found.codes[1].tolist() != found.codes[2].tolist()
    assert found.errors[-1] < 1e-12
    assert found.statistics == {
        "unique": 2,
        "collision_rate": pytest.approx(2 / 3),
        "largest_bucket": 2,
        "used": [2, 1],
    }


def test_collisions_and_bad_sizes() -> None:
    assert collisions(np.array([[0, 1], [0, 1], [1, 0], [1, 1]]))["collision_rate"] == 0.5
    with pytest.raises(ConfigurationError, match="semantic ids"):
        semantic_ids(np.ones((3, 2)), [])
