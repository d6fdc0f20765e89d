"""k-means the way the curriculum and the metrics need it: same input, same clusters.

One thread: with several, scikit-learn adds up in an order that depends on how many there are, and
ranks that share a machine would crowd each other out.
"""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from sailplan.runtime.seeds import derive

EXACT_UP_TO = 20_000  # rows; more are clustered by mini-batches


def k_means(
    vectors: np.ndarray, clusters: int, *seed: int | str, starts: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(labels int64 [n], centres float64 [k, D]) of the rows of `vectors` [n, D]; k =
    min(clusters, different rows).

    starts: how often k-means++ begins anew; the best result stays. Deterministic in (vectors,
    clusters, seed, starts).
    """
    rows = np.asarray(vectors, dtype=np.float64)
    k = min(clusters, len(np.unique(rows, axis=0)))
    state = derive("k-means", *seed) % 2**32
    algorithm: KMeans | MiniBatchKMeans = KMeans(k, n_init=starts, random_state=state)
    if len(rows) > EXACT_UP_TO:
        algorithm = MiniBatchKMeans(k, n_init=max(3, starts), batch_size=8192, random_state=state)
    with threadpool_limits(limits=1):
        found = algorithm.fit(rows)
        return found.predict(rows).astype(np.int64), found.cluster_centers_
