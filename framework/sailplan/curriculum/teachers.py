"""What recommenders know about items: ID embeddings from factorised histories, and pairs of
items that are used together.

The teachers of id2item are two classic factorisations of the user-item matrix of the *training*
users: a truncated SVD (signed, global structure) and a non-negative one (parts). They see no
content at all, so what the embedding model learns from them is collaborative. Items that no
training user used have no teacher.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.decomposition import NMF, TruncatedSVD
from sklearn.preprocessing import normalize

from sailplan.config.fields import JsonObject
from sailplan.curriculum.balance import unit_rows
from sailplan.errors import BadDataError
from sailplan.runtime.seeds import derive

FACTORISATIONS = ("svd", "nmf")


def factorise(
    matrix: sparse.csr_matrix, teacher: str, dimensions: int, seed: int = 0
) -> np.ndarray:
    """Item factors float64 [m, d], unit rows, of a binary user-item matrix [users, m]; d =
    min(dimensions, what the matrix allows).

    Users are scaled to unit length first, so that one who used everything does not rule. teacher:
    svd | nmf.
    """
    scaled = normalize(matrix)
    d = max(1, min(dimensions, min(matrix.shape) - 1))
    state = derive("teachers", teacher, seed) % 2**32
    if teacher == "svd":
        model = TruncatedSVD(n_components=d, random_state=state).fit(scaled)
        factors = model.components_.T * model.singular_values_
    elif teacher == "nmf":
        factors = (
            NMF(n_components=d, init="nndsvda", max_iter=400, tol=1e-3, random_state=state)
            .fit(scaled)
            .components_.T
        )
    else:
        raise ValueError(f"teacher={teacher}: expected one of {', '.join(FACTORISATIONS)}")
    return unit_rows(factors)


def co_occurrence(
    matrix: sparse.csr_matrix, *, per_item: int = 10, minimum_users: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Item pairs that at least `minimum_users` users share: (int64 [p, 2] with first < second,
    Jaccard float64 [p]).

    Kept: pairs with positive pointwise mutual information log(n_ij * users / (n_i * n_j)), the best
    `per_item` of each item by Jaccard n_ij / (n_i + n_j - n_ij); a pair stays if either of its
    items keeps it.
    Raises BadDataError when no pair is left.
    """
    shared = sparse.coo_matrix(sparse.triu(matrix.T @ matrix, k=1))
    enough = shared.data >= minimum_users
    first, second, both = shared.row[enough], shared.col[enough], shared.data[enough]
    sizes = np.asarray(matrix.sum(0)).ravel()
    positive = both * matrix.shape[0] > sizes[first] * sizes[second]
    first, second, both = first[positive], second[positive], both[positive]
    if not len(first):
        raise BadDataError(
            f"histories: no two items share {minimum_users} training users; expected overlapping "
            "histories, else leave co_occurrence out"
        )
    score = both / (sizes[first] + sizes[second] - both)
    kept = np.zeros(len(first), dtype=bool)
    for side in (first, second):
        order = np.lexsort((second, first, -score, side))
        starts = np.flatnonzero(np.r_[True, np.diff(side[order]) > 0])
        place = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        kept[order[place < per_item]] = True
    return np.stack([first[kept], second[kept]], axis=1).astype(np.int64), score[kept]


def pair_records(pairs: np.ndarray, scores: np.ndarray, ids: list[str]) -> list[JsonObject]:
    """Pair records {"id", "split", "query": item id, "item": item id, "score"}; ids[c] names
    column c of the matrix.
    """
    return [
        {
            "id": f"co_occurrence/{number:06d}",
            "split": "train",
            "query": ids[first],
            "item": ids[second],
            "score": round(float(score), 4),
        }
        for number, ((first, second), score) in enumerate(
            zip(pairs.tolist(), scores.tolist(), strict=True)
        )
    ]
