"""The metrics against naive definitions and scikit-learn, and equal integers on any number of
ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from sailplan.embed import scoring
from sailplan.embed.scoring import Pairs, pair_scores
from sailplan.embed.sides import InMemory, unit
from sailplan.evaluate import metrics
from sailplan_kernels.exchange import AllGather
from sailplan_kernels.testing import run_ranks


def data(
    n: int = 23, m: int = 31, dimensions: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, dimensions, generator=random)
    candidates = torch.randn(m, dimensions, generator=random)
    candidates[7] = candidates[3]  # an exact tie
    rows = torch.randint(0, n - 2, (40,), generator=random)  # the last two queries have no positive
    return queries, candidates, Pairs.of(rows, torch.randint(0, m, (40,), generator=random))


def cosines(queries: torch.Tensor, candidates: torch.Tensor) -> np.ndarray:
    return (unit(queries) @ unit(candidates).T).float().numpy()


def test_ranks_and_recall_equal_the_naive_definition() -> None:
    queries, candidates, positives = data()
    excluded = Pairs.of(torch.tensor([0, 0, 4]), torch.tensor([1, 2, 30]))
    right = set(zip(positives.rows.tolist(), positives.columns.tolist(), strict=True))
    assert not right & set(zip(excluded.rows.tolist(), excluded.columns.tolist(), strict=True))
    scores = cosines(queries, candidates)
    wanted = []
    for query in range(len(queries)):
        own = {
            c
            for r, c in zip(positives.rows.tolist(), positives.columns.tolist(), strict=True)
            if r == query
        }
        left_out = {
            c
            for r, c in zip(excluded.rows.tolist(), excluded.columns.tolist(), strict=True)
            if r == query
        }
        best = max((scores[query, c] for c in own), default=None)
        wanted.append(
            0
            if best is None
            else 1
            + sum(
                scores[query, c] >= best for c in range(len(candidates)) if c not in own | left_out
            )
        )
    ranks = metrics.best_positive_ranks(queries, candidates, positives, excluded)
    assert ranks.tolist() == wanted
    found = [rank for rank in wanted if rank]
    result = metrics.recall(ranks, [1, 5])
    assert result["recall@5"] == sum(rank <= 5 for rank in found) / len(found)
    assert result["mrr"] == pytest.approx(sum(1 / rank for rank in found) / len(found))
    assert result["queries"] == len(found)


def test_a_collapsed_model_does_not_look_good() -> None:
    vectors = torch.ones(20, 4)
    ranks = metrics.best_positive_ranks(
        vectors, vectors, Pairs.of(torch.arange(20), torch.arange(20))
    )
    assert set(ranks.tolist()) == {20}
    assert metrics.auc(vectors, vectors, Pairs.of(torch.arange(20), torch.arange(20))) == 0.5


def test_equal_labels_make_all_pairs() -> None:
    first, second = torch.tensor([5, 9, 5, 1]), torch.tensor([9, 5, 5, 7])
    pairs = Pairs.equal(first, second)
    assert list(zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 0),
        (2, 1),
        (2, 2),
    ]


def test_auc_equals_scikit_learn_with_ties() -> None:
    queries, candidates, positives = data()
    queries = queries.round()  # many equal scores
    labels = np.zeros((len(queries), len(candidates)), dtype=int)
    labels[positives.rows, positives.columns] = 1
    wanted = roc_auc_score(labels.ravel(), cosines(queries, candidates).ravel())
    assert metrics.auc(queries, candidates, positives) == pytest.approx(wanted, abs=1e-12)


def test_gap_equals_the_direct_formula() -> None:
    queries, candidates, positives = data()
    scores = cosines(queries, candidates).astype(float)
    mask = np.zeros(scores.shape, dtype=bool)
    mask[positives.rows, positives.columns] = True
    result = metrics.gap(queries, candidates, positives)
    wanted = scores[mask].mean() - scores[~mask].mean()
    assert result["gap"] == pytest.approx(wanted, abs=1e-9)
    assert result["d_prime"] == pytest.approx(
        wanted / np.sqrt((scores[mask].var() + scores[~mask].var()) / 2), abs=1e-9
    )


def test_bijection_counts_round_trips() -> None:
    queries, candidates, _ = data()
    scores = cosines(queries, candidates)
    wanted = np.mean([scores[:, scores[q].argmax()].argmax() == q for q in range(len(queries))])
    assert metrics.bijection(queries, candidates) == wanted
    assert metrics.bijection(queries, queries) == 1.0


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_integers(world_size: int) -> None:
    queries, candidates, positives = data(n=29)
    excluded = Pairs.of(torch.tensor([1, 8]), torch.tensor([0, 5]))

    def everything(exchange: object) -> tuple[list[int], float, float, float]:
        return (
            metrics.best_positive_ranks(
                queries, candidates, positives, excluded, exchange
            ).tolist(),
            metrics.auc(queries, candidates, positives, exchange),
            metrics.bijection(queries, candidates, None, exchange),
            metrics.gap(queries, candidates, positives, exchange)["d_prime"],
        )

    alone = everything(metrics.ALONE)
    for ranks, area, round_trip, d_prime in run_ranks(
        lambda rank, world: everything(AllGather()), world_size
    ):
        assert (ranks, area, round_trip) == alone[:3]
        assert d_prime == pytest.approx(alone[3], abs=1e-12)


def test_tile_shape_does_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, candidates, positives = data(n=50, m=60, dimensions=192)
    whole = (
        metrics.auc(queries, candidates, positives),
        metrics.best_positive_ranks(queries, candidates, positives).tolist(),
    )
    original = metrics.tiles
    monkeypatch.setattr(metrics, "tiles", lambda *arguments: original(*arguments, scores=60))
    monkeypatch.setattr(scoring, "CANDIDATES", 7)
    assert metrics.best_positive_ranks(queries, candidates, positives).tolist() == whole[1]
    right = (unit(queries) @ unit(candidates).T).float()[positives.rows, positives.columns]
    torch.testing.assert_close(
        pair_scores(InMemory(queries), InMemory(candidates), positives), right, rtol=2**-23, atol=0
    )  # one rounding apart


def test_overlap_of_similarity_orders() -> None:
    random = torch.Generator().manual_seed(1)
    vectors = torch.randn(30, 6, generator=random)
    assert metrics.neighbour_overlap(vectors, 3 * vectors, 5) == 1.0
    unrelated = metrics.neighbour_overlap(vectors, torch.randn(30, 6, generator=random), 5)
    assert 0.0 < unrelated < 0.5


def test_graded_order() -> None:
    scores = np.linspace(0, 1, 50)
    assert metrics.graded_order(scores, scores) == {"kendall": pytest.approx(1.0), "overlap": 1.0}
    assert metrics.graded_order(-scores, scores) == {"kendall": pytest.approx(-1.0), "overlap": 0.0}


def test_clusters_find_separated_labels() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(4)
    vectors = np.concatenate(
        [centre + 0.05 * random.standard_normal((10, 4)) for centre in centres]
    )
    labels = [str(index) for index in range(4) for _ in range(10)]
    assert metrics.cluster_agreement(vectors, labels)["nmi"] == pytest.approx(1.0)


def test_popularity_leaves_the_history_out() -> None:
    counts = np.array([9.0, 8.0, 7.0, 0.0])
    ranks = metrics.popularity_ranks(
        counts, np.array([2, 2, 3]), [np.array([], dtype=int), np.array([0, 1]), np.array([0])]
    )
    assert ranks.tolist() == [3, 1, 3]


def test_set_completion_never_shows_its_target() -> None:
    histories = {"a": [1, 2, 3, 3], "b": [4], "c": list(range(10, 40))}
    shown, wanted = metrics.set_completion(histories, length=10)
    assert len(wanted) == 3 + 5
    assert all(
        target not in history and 1 <= len(history) <= 10
        for history, target in zip(shown, wanted, strict=True)
    )
    assert (shown, wanted) == metrics.set_completion(dict(reversed(histories.items())), length=10)
