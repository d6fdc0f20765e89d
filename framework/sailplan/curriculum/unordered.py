"""Training sequences from sets of items without time order: the fifth kind, beside the four
views of timed events.

A source that only says which items belong to a user (the quick start's, whose users are authors of
software) has no "most recent" item and nothing that comes "before" it. So a seeded random member is
the target, and up to `length` other members are shown in an order without meaning. This is set
completion, not next-item prediction, and records say so: their view is `unordered`. Which members
are shown is chosen by four rules:

| rule             | items are alike when                     | chosen                                       |
|------------------|------------------------------------------|----------------------------------------------|
| content_nearest  | their embeddings are                     | those nearest to the target                  |
| co_use_nearest   | the same users use them (Jaccard)        | those nearest to the target                  |
| content_clusters | k-means of embeddings puts them together | from every cluster in proportion to its size |
| co_use_clusters  | k-means of co-use vectors does           | from every cluster in proportion to its size |

Small sets look the same by every rule; the same (history, target) is written once. One process
holds all sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from sailplan.config.fields import JsonObject
from sailplan.curriculum.balance import unit_rows
from sailplan.curriculum.histories import Histories
from sailplan.curriculum.teachers import factorise
from sailplan.embed.clustering import k_means
from sailplan.runtime.seeds import generator

RULES = ("content_nearest", "co_use_nearest", "content_clusters", "co_use_clusters")


def jaccard_to(consumers: sparse.csc_matrix, item: int, others: np.ndarray) -> np.ndarray:
    """|users of both| / |users of either| between one column of the binary user-item matrix and
    others [k]: float64 [k].
    """
    both = np.asarray((consumers[:, [item]].T @ consumers[:, others]).todense()).ravel()
    sizes = np.asarray(consumers.sum(0)).ravel()
    return both / (sizes[item] + sizes[others] - both)


def in_proportion(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Indices of `count` of the labelled items [n], each label represented in proportion to its
    size (largest remainders),
    which items of a label at random; sorted. All of them if n <= count."""
    if len(labels) <= count:
        return np.arange(len(labels))
    names, sizes = np.unique(labels, return_counts=True)
    quota = sizes * count / len(labels)
    take = np.floor(quota).astype(int)
    for place in np.lexsort((names, -(quota - take)))[: count - take.sum()]:
        take[place] += 1
    chosen = [
        random.permutation(np.flatnonzero(labels == name))[:number]
        for name, number in zip(names, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def sequences(
    histories: Histories,
    used: np.ndarray,
    content: np.ndarray,
    *,
    length: int = 10,
    targets: int = 8,
    clusters: int = 32,
    seed: int = 0,
) -> list[JsonObject]:
    """One dict {"user", "history": [positions], "target": position, "rule"} per different sequence.

    used: sorted catalogue positions int64 [m] (Histories.used); content: the current model's
    embeddings [m, D] of them; targets: how many members of each history are a target, each by all
    four rules. Users with fewer than two items give nothing. The order of a history is random: it
    has no meaning.
    """
    matrix = histories.matrix(used)
    columns = matrix.tocsc()
    similar = unit_rows(content)
    clustered = {
        "content_clusters": k_means(similar, clusters, "interests", seed, "content")[0],
        "co_use_clusters": k_means(
            factorise(matrix, "svd", 32, seed), clusters, "interests", seed, "collaboration"
        )[0],
    }
    result, seen = [], set()
    for user, items in zip(histories.users, histories.items, strict=True):
        members = np.searchsorted(used, np.asarray(items))
        random = generator("interests", seed, user)
        for target in random.permutation(members)[:targets] if len(members) > 1 else []:
            rest = members[members != target]
            nearness = {
                "content_nearest": similar[rest] @ similar[target],
                "co_use_nearest": jaccard_to(columns, target, rest),
            }
            for rule in RULES:
                single = rule in nearness
                picked = (
                    np.lexsort((rest, -nearness[rule]))[:length]
                    if single
                    else in_proportion(clustered[rule][rest], length, random)
                )
                chosen = rest[picked]
                key = (frozenset(chosen.tolist()), int(target))
                if key not in seen:
                    seen.add(key)
                    shown = [int(used[place]) for place in random.permutation(chosen)]
                    result.append(
                        {"user": user, "history": shown, "target": int(used[target]), "rule": rule}
                    )
    return result


def records(
    found: list[dict[str, object]],
    ids: dict[int, str],
    *,
    negatives: int = 0,
    unused: Sequence[str] = (),
    seed: int = 0,
) -> list[JsonObject]:
    """Sequence records {"id", "split", "history": [ids], "target": id, "target_probability",
    "view": "unordered", "rule", "user"} in a shuffled, reproducible order; the probability is the
    target's share of all records (seq2item's sampling correction).

    negatives: so many of the `unused` ids, drawn at random, come with each record as {"negatives",
    "negative_probability"}.
    """
    targets = Counter(sequence["target"] for sequence in found)
    random = generator("interests", seed, "negatives")
    drawn = random.integers(0, len(unused), (len(found), negatives)) if len(unused) else None
    order = generator("interests", "order").permutation(len(found))
    return [
        {
            "id": f"interests/{number:06d}",
            "split": "train",
            "history": [ids[place] for place in found[index]["history"]],
            "target": ids[found[index]["target"]],
            "target_probability": targets[found[index]["target"]] / len(found),
            "view": "unordered",
            "rule": found[index]["rule"],
            "user": found[index]["user"],
        }
        | (
            {}
            if drawn is None
            else {
                "negatives": [unused[k] for k in drawn[number]],
                "negative_probability": 1 / len(unused),
            }
        )
        for number, index in enumerate(order)
    ]


def rules_count(found: list[dict[str, object]]) -> dict[str, int]:
    """Return how many different sequences each rule added."""
    counts = Counter(sequence["rule"] for sequence in found)
    return {rule: counts[rule] for rule in RULES}
