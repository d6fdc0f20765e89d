"""`emoji_pairs`: graded similarity between emoji, from the overlap of their English training
keywords.

The score is the Jaccard overlap of two keyword sets. Every emoji proposes its closest relations
(same subgroup, or a score of at least 0.2), one more of its subgroup, and strangers of its group
with a score near zero, so that a ranking loss sees the whole scale. Both emoji of a pair are of the
same split.
"""

from __future__ import annotations

from collections.abc import Sequence

from quickstart_data.splits import fraction, normal
from sailplan.data.writer import Record

CLOSEST, SAME_SUBGROUP, STRANGERS = 3, 1, 1  # proposals of one emoji
# Pairs that touch one emoji: without it a few emoji with two keywords would be everybody's
# neighbour
MOST = 10
NEAR, STRANGE = 0.2, 0.05


def jaccard(first: set[str], second: set[str]) -> float:
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def _partners(index: int, records: Sequence[Record], tags: Sequence[set[str]]) -> list[list[int]]:
    """Candidates in order of preference: the closest, others of the subgroup, strangers of the
    group.

    Ties are broken by a hash of both ids, so that no emoji is a favourite by its place in the list.
    """
    mine = records[index].body
    near: list[tuple[float, float, int]] = []
    same: list[tuple[float, int]] = []
    strange: list[tuple[float, int]] = []
    for other, record in enumerate(records):
        if other == index or record.body["split"] != mine["split"] or len(tags[other]) < 2:
            continue
        in_group = record.body["group"] == mine["group"]
        in_subgroup = record.body["subgroup"] == mine["subgroup"]
        score = jaccard(tags[index], tags[other])
        if not in_group and score < NEAR:
            continue
        luck = fraction("|".join(sorted((mine["id"], record.id))), "pair")
        if in_subgroup or score >= NEAR:
            near.append((-score, luck, other))
        if in_subgroup:
            same.append((luck, other))
        elif score < STRANGE:
            strange.append((luck, other))
    return [
        [best[2] for best in sorted(near)],
        [best[1] for best in sorted(same)],
        [best[1] for best in sorted(strange)],
    ]


def choose_pairs(records: Sequence[Record], tags: Sequence[set[str]]) -> set[tuple[int, int]]:
    """Index pairs (first < second): everybody takes one partner in turn, until all have what
    they propose or are full.
    """
    partners = {
        index: _partners(index, records, tags)
        for index in range(len(records))
        if len(tags[index]) >= 2
    }
    chosen: set[tuple[int, int]] = set()
    touching = [0] * len(records)
    for kind, count in enumerate((CLOSEST, SAME_SUBGROUP, STRANGERS)):
        for _ in range(count):
            for index, kinds in partners.items():
                for other in kinds[kind]:
                    pair = (min(index, other), max(index, other))
                    if pair not in chosen and max(touching[index], touching[other]) < MOST:
                        chosen.add(pair)
                        touching[index] += 1
                        touching[other] += 1
                        break
    return chosen


def emoji_pairs(emoji: Sequence[Record]) -> list[Record]:
    """Pair records, each unordered pair once; emoji with fewer than two training keywords are
    left out.
    """
    tags = [set(map(normal, record.body["fields"]["tags"].get("en", []))) for record in emoji]
    records = []
    for first, second in sorted(choose_pairs(emoji, tags)):
        query, item = emoji[first].body, emoji[second].body
        body = {
            "id": f"emoji_pairs/{query['id'].split('/')[1]}_{item['id'].split('/')[1]}",
            "split": query["split"],
            "query": query["id"],
            "item": item["id"],
            "score": round(jaccard(tags[first], tags[second]), 4),
        }
        records.append(Record(body))
    return records
