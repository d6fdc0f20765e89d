"""The metrics of recipe section 5 as functions of two sides of embeddings; each says what it
measures.

All similarities are cosines. A side is a tensor, or rows of the store that are read in parts
(`embed.sides`). Functions over the full score matrix take an `exchange`: every rank passes the same
sides, scores its share of the query rows, and the counts are summed (see scoring.py).

Shape legend: n queries, m candidates, D dimensions, p positive pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import kendalltau
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from sailplan.embed.clustering import k_means
from sailplan.embed.scoring import (
    ALONE,
    Pairs,
    best_columns,
    count_negatives,
    pair_scores,
    share,
    shared_pair_scores,
    tiles,
)
from sailplan.embed.sides import InMemory, Side, side_of
from sailplan.runtime.seeds import derive, generator
from sailplan.runtime.watch import beat, together
from sailplan_kernels.exchange.base import Exchange

BACK = 1024  # candidates whose nearest queries are looked for at once


def best_positive_ranks(
    queries: Tensor | Side,
    candidates: Tensor | Side,
    positives: Pairs,
    excluded: Pairs | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """Rank (1 = first) of each query's best-scoring positive among the candidates: int64 [n], 0
    for a query without one.

    Other positives of the same query never push the best one down; `excluded` candidates (a
    history's own items) are not ranked. A negative that ties with the positive is ranked before it,
    so a collapsed model scores zero. queries [n, D] and candidates [m, D] are the same on all
    ranks, and so is the result; pairs are sorted by row.
    """
    left, right = side_of(queries), side_of(candidates)
    start, stop = share(len(left), exchange.rank, exchange.world_size)
    own = positives.slice(start, stop)
    best = torch.full((stop - start,), -torch.inf, device=left.device)
    best.scatter_reduce_(0, own.rows, pair_scores(left, right, own, start), "amax")
    before = torch.zeros(stop - start, dtype=torch.int64, device=left.device)
    for here, there, scores in tiles(left, right, exchange):
        for pairs in (positives, excluded):
            if pairs is not None:
                left_out = pairs.within(here, there)
                scores[left_out.rows, left_out.columns] = -torch.inf
        rows = slice(here.start - start, here.stop - start)
        before[rows] += (scores >= best[rows].unsqueeze(1)).sum(1)
    ranks = torch.zeros(len(left), dtype=torch.int64, device=left.device)
    ranks[start:stop] = torch.where(torch.isinf(best), 0, 1 + before)
    return exchange.sum(ranks)


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


def chance(positives: Pairs, candidates: int, at: Sequence[int]) -> dict[str, float]:
    """Return chance/recall@k: the recall that a random order of the candidates has, over queries
    with a positive.

    Of a query with p positives among m candidates it is 1 - C(m - p, k) / C(m, k).
    """
    counts = np.unique(positives.rows.cpu().numpy(), return_counts=True)[1].astype(np.float64)
    if not len(counts):
        return {}
    found = {}
    for k in at:
        left = candidates - counts - min(k, candidates)
        log_none = gammaln(candidates - counts + 1) - gammaln(np.maximum(left, 0) + 1)
        log_none -= gammaln(candidates + 1) - gammaln(candidates - min(k, candidates) + 1)
        none = np.where(left < 0, 0.0, np.exp(log_none))
        found[f"chance/recall@{k}"] = float((1 - none).mean())
    return found


def auc(
    queries: Tensor | Side,
    candidates: Tensor | Side,
    positives: Pairs,
    exchange: Exchange = ALONE,
) -> float:
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
    queries: Tensor | Side,
    candidates: Tensor | Side,
    positives: Pairs,
    exchange: Exchange = ALONE,
) -> dict[str, float]:
    """How far the positive and the negative cosine distributions lie apart: positive_mean,
    negative_mean, gap = their
    difference, d_prime = gap / sqrt(mean of the two variances)."""
    left, right = side_of(queries), side_of(candidates)
    own = shared_pair_scores(left, right, positives, exchange).double()
    sums = torch.zeros(2, dtype=torch.float64, device=left.device)
    for _, _, scores in tiles(left, right, exchange):
        sums += torch.stack([scores.double().sum(), scores.double().square().sum()])
    total, square = exchange.sum(sums).tolist()
    negatives = len(left) * len(right) - len(own)
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
    queries: Tensor | Side,
    candidates: Tensor | Side,
    query_labels: Tensor | None = None,
    exchange: Exchange = ALONE,
) -> float:
    """Bijective alignment: the share of queries q with q -> nearest candidate -> nearest query = q.

    With query_labels (int64 [n]) a return to an equal query (the same text twice) counts too.
    """
    left, right = side_of(queries), side_of(candidates)
    labels = torch.arange(len(left)) if query_labels is None else query_labels
    labels = labels.to(left.device)
    nearest = best_columns(left, right, 1, exchange)[1][:, 0]
    start, stop = share(len(left), exchange.rank, exchange.world_size)
    own, hits = labels[start:stop], torch.zeros((), dtype=torch.int64, device=left.device)
    for first in range(0, -(-len(left) // exchange.world_size), BACK):
        together()
        # Each candidate that is somebody's nearest looks back once a block
        asked, place = torch.unique(nearest[first : first + BACK], return_inverse=True)
        back = best_columns(InMemory(right.take(asked)), left, 1, None)[1][:, 0]
        hits += (labels[back[place]] == own[first : first + BACK]).sum()
    return int(exchange.sum(hits)) / max(1, len(left))


def neighbour_overlap(
    first: Tensor | Side, second: Tensor | Side, k: int, exchange: Exchange = ALONE
) -> float:
    """Top-k overlap of two similarity orders of the same n rows: mean over rows of |top-k by
    first ∩ top-k by second| / k,
    the row itself left out. first [n, D1], second [n, D2]; k is cut to n - 1, n is at least 2."""
    sides = side_of(first), side_of(second)
    n = len(sides[0])
    k = min(k, n - 1)
    rows = torch.arange(n, device=sides[0].device)
    itself = Pairs(rows, rows)
    one, two = (best_columns(side, side, k, exchange, itself)[1] for side in sides)
    return int(exchange.sum((one.unsqueeze(2) == two.unsqueeze(1)).sum())) / (n * k)


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


def cluster_agreement(vectors: NDArray[np.float64], labels: Sequence[str]) -> dict[str, float]:
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
    queries: Tensor | Side,
    targets: Tensor | Side,
    pairs: Pairs,
    clusters: int,
    most: int = 10_000,
) -> dict[str, float]:
    """Return nmi: normalised mutual information between the clusters that queries and their
    targets fall into, of pairs of a row of `queries` and one of `targets`.

    One k-means of all the unit vectors gives both assignments, so 1 means that every cluster of
    queries has its targets in one cluster of its own. clusters: at most one for four pairs; of more
    than `most` pairs a fixed random part is taken.
    """
    rows, columns = pairs.rows, pairs.columns
    count = len(rows)
    if count > most:
        chosen = np.sort(generator("evaluation", "nmi").permutation(count)[:most])
        rows, columns = (one[torch.from_numpy(chosen)] for one in (rows, columns))
        count = most
    both = torch.cat([side_of(queries).take(rows), side_of(targets).take(columns)]).cpu().numpy()
    found, _ = k_means(both, max(1, min(clusters, count // 4)), "nmi", starts=3)
    return {"nmi": float(normalized_mutual_info_score(found[:count], found[count:]))}


def ranking_agreement(
    queries: Tensor | Side,
    candidates: Tensor | Side,
    rankings: Rankings,
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
    left, right = side_of(queries), side_of(candidates)
    start, stop = share(len(left), exchange.rank, exchange.world_size)
    k = min(max(at), len(right))
    best = best_columns(left, right, k, exchange, excluded)[1].cpu().numpy()
    sums = np.zeros(len(at) + 3)
    for row in range(start, stop):
        ranking = rankings[row]
        if len(ranking):
            beat()
            listed = torch.from_numpy(np.ascontiguousarray(ranking))
            pairs = Pairs(torch.full_like(listed, row), listed)
            scores = pair_scores(left, right, pairs).cpu().numpy()
            if excluded is not None:
                hidden = excluded.slice(row, row + 1).columns.cpu().numpy()
                scores[np.isin(ranking, hidden)] = -np.inf
            sums += _agreement(scores, best[row - start], ranking, at)
    found = exchange.sum(torch.from_numpy(sums).to(left.device)).tolist()
    *overlaps, kendall, counted_pairs, counted = found
    result = {
        f"reference/overlap@{k}": value / max(counted, 1)
        for k, value in zip(at, overlaps, strict=True)
    }
    return result | {
        "reference/kendall": kendall / counted_pairs if counted_pairs else float("nan"),
        "reference/queries": counted,
    }


class Rankings(Protocol):
    """A ranking of each query: candidates int64 [r], best first; a list is one."""

    def __getitem__(self, row: int, /) -> NDArray[np.int64]: ...


def _agreement(
    scores: NDArray[np.float32],
    best: NDArray[np.int64],
    ranking: NDArray[np.int64],
    at: Sequence[int],
) -> NDArray[np.float64]:
    """Overlaps at each k, Kendall's tau-b (0 where there is none), whether there is one, and 1
    for the query.

    scores: of the listed candidates; best: all candidates as the model orders them.
    """
    sizes = [min(k, len(ranking)) for k in at]
    overlaps = [len(np.intersect1d(best[:size], ranking[:size])) / size for size in sizes]
    tau = (
        float(kendalltau(scores, -np.arange(len(ranking))).statistic)
        if len(ranking) > 1
        else float("nan")
    )
    return np.array([*overlaps, 0.0 if np.isnan(tau) else tau, float(not np.isnan(tau)), 1.0])


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
