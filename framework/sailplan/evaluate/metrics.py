"""The metrics of recipe section 5 as pure functions of embeddings; each says what it measures.

All similarities are cosines. Functions over the full score matrix take an `exchange`: every rank
passes the same full tensors, scores its share of the query rows, and the counts are summed (see
scoring.py).

Shape legend: n queries, m candidates, D dimensions, p positive pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import kendalltau
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from sailplan.embed.clustering import k_means
from sailplan.embed.scoring import ALONE, Pairs, count_negatives, pair_scores, share, tiles, unit
from sailplan.runtime.seeds import derive, generator
from sailplan_kernels.exchange.base import Exchange
from sailplan_kernels.topk import topk


def best_positive_ranks(
    queries: Tensor,
    candidates: Tensor,
    positives: Pairs,
    excluded: Pairs | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """Rank (1 = first) of each query's best-scoring positive among the candidates: int64 [n], 0
    for a query without one.

    Other positives of the same query never push the best one down; `excluded` candidates (a
    history's own items) are not ranked. A negative that ties with the positive is ranked before it,
    so a collapsed model scores zero. queries [n, D] and candidates [m, D] are the same on all
    ranks, and so is the result.
    """
    queries, candidates = unit(queries), unit(candidates)
    start, stop = share(len(queries), exchange.rank, exchange.world_size)
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for first, scores in tiles(queries, candidates, (start, stop)):
        ranks[first : first + len(scores)] = _ranks_in(
            scores, positives.slice(first, first + len(scores)), excluded, first
        )
    return exchange.sum(ranks)


def _ranks_in(scores: Tensor, positives: Pairs, excluded: Pairs | None, first: int) -> Tensor:
    scores = scores.clone()
    best = torch.full((len(scores),), -torch.inf, device=scores.device)
    best.scatter_reduce_(0, positives.rows, scores[positives.rows, positives.columns], "amax")
    if excluded is not None:
        left_out = excluded.slice(first, first + len(scores))
        scores[left_out.rows, left_out.columns] = -torch.inf
    scores[positives.rows, positives.columns] = -torch.inf
    ranks = 1 + (scores >= best.unsqueeze(1)).sum(1)
    return torch.where(torch.isinf(best), torch.zeros_like(ranks), ranks)


def recall(ranks: Tensor, at: Sequence[int]) -> dict[str, float]:
    """Summary of int64 ranks [n] (0: no positive, left out): recall@k = share of queries with a
    positive in the first k,
    mean_rank, mrr = mean of 1 / rank, and queries = how many were counted."""
    found = ranks[ranks > 0]
    count = len(found)
    if not count:
        return {"queries": 0.0}
    result = {f"recall@{k}": int((found <= k).sum()) / count for k in at}
    result["mean_rank"] = int(found.sum()) / count
    result["mrr"] = float((1.0 / found.double()).sum()) / count
    result["queries"] = float(count)
    return result


def auc(queries: Tensor, candidates: Tensor, positives: Pairs, exchange: Exchange = ALONE) -> float:
    """Area under the ROC curve with the cosine as score: P(positive > negative) + P(equal) / 2
    over all positive-negative
    pairs (Mann-Whitney). Exact, from integer counts; nan when every pair is positive."""
    counts = count_negatives(queries, candidates, positives, exchange)
    pairs = int(counts.positives.sum()) * counts.negatives
    if not pairs:
        return float("nan")
    twice_lost = int(
        (counts.positives * (counts.at_or_above + counts.above)).sum()
    )  # tied negatives count half
    return 1.0 - twice_lost / (2 * pairs)


def gap(
    queries: Tensor, candidates: Tensor, positives: Pairs, exchange: Exchange = ALONE
) -> dict[str, float]:
    """How far the positive and the negative cosine distributions lie apart: positive_mean,
    negative_mean, gap = their
    difference, d_prime = gap / sqrt(mean of the two variances)."""
    queries, candidates = unit(queries), unit(candidates)
    own = pair_scores(queries, candidates, positives).double()
    sums = torch.zeros(2, dtype=torch.float64, device=queries.device)
    for _, scores in tiles(
        queries, candidates, share(len(queries), exchange.rank, exchange.world_size)
    ):
        sums += torch.stack([scores.double().sum(), scores.double().square().sum()])
    total, square = exchange.sum(sums).tolist()
    negatives = len(queries) * len(candidates) - len(own)
    if not len(own) or negatives <= 0:
        return {"gap": float("nan"), "d_prime": float("nan")}
    negative_mean = (total - float(own.sum())) / negatives
    negative_variance = max(
        0.0, (square - float(own.square().sum())) / negatives - negative_mean**2
    )
    positive_mean, positive_variance = float(own.mean()), float(own.var(unbiased=False))
    spread = ((negative_variance + positive_variance) / 2) ** 0.5
    return {
        "positive_mean": positive_mean,
        "negative_mean": negative_mean,
        "gap": positive_mean - negative_mean,
        "d_prime": (positive_mean - negative_mean) / spread if spread > 0 else float("nan"),
    }


def bijection(
    queries: Tensor,
    candidates: Tensor,
    query_labels: Tensor | None = None,
    exchange: Exchange = ALONE,
) -> float:
    """Bijective alignment: the share of queries q with q -> nearest candidate -> nearest query = q.

    With query_labels (int64 [n]) a return to an equal query (the same text twice) counts too.
    """
    queries, candidates = unit(queries), unit(candidates)
    labels = (
        torch.arange(len(queries), device=queries.device) if query_labels is None else query_labels
    )
    hits = torch.zeros((), dtype=torch.int64, device=queries.device)
    for first, scores in tiles(
        queries, candidates, share(len(queries), exchange.rank, exchange.world_size)
    ):
        nearest = scores.argmax(1)
        back = torch.cat(
            [part.argmax(1) for _, part in tiles(candidates[nearest], queries, (0, len(nearest)))]
        )
        hits += (labels[back] == labels[first : first + len(scores)]).sum()
    return int(exchange.sum(hits)) / max(1, len(queries))


def neighbour_overlap(first: Tensor, second: Tensor, k: int) -> float:
    """Top-k overlap of two similarity orders of the same n rows: mean over rows of |top-k by
    first ∩ top-k by second| / k,
    the row itself left out. first [n, D1], second [n, D2]; k is cut to n - 1, n is at least 2."""
    n = len(first)
    k = min(k, n - 1)
    itself = torch.arange(n, device=first.device).unsqueeze(1)
    one, two = (topk(vectors, vectors, k, exclude_ids=itself)[1] for vectors in (first, second))
    return float((one.unsqueeze(2) == two.unsqueeze(1)).sum()) / (n * k)


def graded_order(
    cosines: np.ndarray, scores: np.ndarray, fraction: float = 0.1
) -> dict[str, float]:
    """Agreement of the cosines of graded pairs with their scores, both [p]: kendall = Kendall's
    tau-b; overlap = the share of the best `fraction` of pairs by cosine whose score is at least the
    score that the best
    `fraction` by score reaches."""
    if len(scores) < 2:
        return {"kendall": float("nan"), "overlap": float("nan")}
    k = max(1, round(len(scores) * fraction))
    reached = np.sort(scores)[-k]
    best = np.argsort(-cosines, kind="stable")[:k]
    return {
        "kendall": float(kendalltau(cosines, scores).statistic),
        "overlap": float((scores[best] >= reached).mean()),
    }


def cluster_agreement(vectors: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """nmi = normalised mutual information between k-means clusters of the unit vectors [n, D]
    and the labels;
    k = number of labels. Deterministic (fixed seed, three starts)."""
    unique, codes = np.unique(np.asarray(labels), return_inverse=True)
    unit_rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found, _ = k_means(unit_rows, len(unique), "nmi", starts=3)
    return {
        "nmi": float(normalized_mutual_info_score(codes, found)),
        "clusters": float(len(unique)),
    }


def pair_agreement(
    queries: np.ndarray, targets: np.ndarray, clusters: int, most: int = 10_000
) -> dict[str, float]:
    """Return nmi: normalised mutual information between the clusters that queries and their
    targets, both [p, D], fall into.

    One k-means of all the unit vectors gives both assignments, so 1 means that every cluster of
    queries has its targets in one cluster of its own. clusters: at most one for four pairs; of more
    than `most` pairs a fixed random part is taken.
    """
    if len(queries) > most:
        chosen = np.sort(generator("evaluation", "nmi").permutation(len(queries))[:most])
        queries, targets = queries[chosen], targets[chosen]
    both = np.concatenate([queries, targets]).astype(np.float64)
    both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    found, _ = k_means(both, max(1, min(clusters, len(queries) // 4)), "nmi", starts=3)
    return {
        "nmi": float(normalized_mutual_info_score(found[: len(queries)], found[len(queries) :]))
    }


def ranking_agreement(
    queries: Tensor,
    candidates: Tensor,
    rankings: Sequence[np.ndarray],
    at: Sequence[int],
    excluded: Pairs | None = None,
    exchange: Exchange = ALONE,
) -> dict[str, float]:
    """Return how the model's order of the candidates agrees with a reference's, as means over
    the queries that have one.

    rankings: per query the candidate indices in the reference's order, best first, each once;
    empty: left out. reference/overlap@k = |best k by the model and first k of the reference| / k,
    with k cut to what the reference lists. reference/kendall = Kendall's tau-b between the cosines
    of the listed candidates and the reference's order, over queries with at least two. `excluded`
    candidates are not ranked by the model.
    """
    queries, candidates = unit(queries), unit(candidates)
    sums = torch.zeros(len(at) + 3, dtype=torch.float64, device=queries.device)
    for first, scores in tiles(
        queries, candidates, share(len(queries), exchange.rank, exchange.world_size)
    ):
        listed = scores.cpu().numpy().copy()
        if excluded is not None:
            hidden = excluded.slice(first, first + len(scores))
            listed[hidden.rows.cpu().numpy(), hidden.columns.cpu().numpy()] = -np.inf
        for row, ranking in enumerate(rankings[first : first + len(scores)]):
            if len(ranking):
                sums += torch.tensor(
                    _agreement(listed[row], ranking, at), dtype=torch.float64, device=sums.device
                )
    *overlaps, kendall, pairs, counted = exchange.sum(sums).tolist()
    result = {
        f"reference/overlap@{k}": value / max(counted, 1)
        for k, value in zip(at, overlaps, strict=True)
    }
    return result | {
        "reference/kendall": kendall / pairs if pairs else float("nan"),
        "reference/queries": counted,
    }


def _agreement(scores: np.ndarray, ranking: np.ndarray, at: Sequence[int]) -> list[float]:
    """Overlaps at each k, Kendall's tau-b (0 where there is none), whether there is one, and 1
    for the query.
    """
    sizes = [min(k, len(ranking)) for k in at]
    best = np.argpartition(-scores, max(sizes) - 1)[: max(sizes)]
    best = best[np.lexsort((best, -scores[best]))]
    overlaps = [len(np.intersect1d(best[:size], ranking[:size])) / size for size in sizes]
    tau = (
        float(kendalltau(scores[ranking], -np.arange(len(ranking))).statistic)
        if len(ranking) > 1
        else float("nan")
    )
    return [*overlaps, 0.0 if np.isnan(tau) else tau, float(not np.isnan(tau)), 1.0]


def popularity_ranks(
    counts: np.ndarray, targets: np.ndarray, excluded: Sequence[np.ndarray]
) -> np.ndarray:
    """Ranks of targets int64 [n] when every query gets the candidates in order of popularity,
    its excluded ones left out.

    counts [m] are interactions of *training* users. Equal counts are ordered by a fixed random key.
    """
    score = counts + generator("evaluation", "popularity").random(len(counts))
    place = np.empty(len(counts), dtype=np.int64)
    place[np.argsort(-score)] = np.arange(len(counts))
    return np.array(
        [
            1 + place[target] - int((place[left_out] < place[target]).sum())
            for target, left_out in zip(targets, excluded, strict=True)
        ],
        dtype=np.int64,
    )


def set_completion(
    histories: dict[str, list[int]], length: int, targets: int = 5
) -> tuple[list[list[int]], list[int]]:
    """Leave-one-out queries from unordered histories: user -> distinct candidate indices; gives
    (history, target) lists.

    Up to `targets` members of each history are the target in turn, up to `length` of the others are
    shown. Which ones depends only on the user's name. Histories of fewer than two items give
    nothing.
    """
    shown, wanted = [], []
    for user in sorted(histories):
        members = list(dict.fromkeys(histories[user]))
        random = np.random.Generator(np.random.Philox(derive("evaluation", "set_completion", user)))
        for position in random.permutation(len(members))[:targets] if len(members) > 1 else []:
            others = [member for index, member in enumerate(members) if index != position]
            shown.append(
                [others[index] for index in sorted(random.permutation(len(others))[:length])]
            )
            wanted.append(members[position])
    return shown, wanted
