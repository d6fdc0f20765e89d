"""Retrieval sets in the form of BEIR and MTEB: a corpus, queries, and judgements of which
document answers which query.

The corpus becomes an items data set; each judgement above 0 a pair of a query's text and a
document's id. Documents judged 0 are the query's negatives. Queries and judgements meet in buckets,
so neither is held whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sailplan.config.fields import JsonValue
from sailplan.data.names import given, readable
from sailplan.data.tar import HeldOut
from sailplan.ingest.columns import number
from sailplan.ingest.known_ids import KnownIds
from sailplan.ingest.records import Record
from sailplan.ingest.rows import Dropped, Row
from sailplan.ingest.rows_to_shards import count
from sailplan.ingest.shards import write_shard
from sailplan.ingest.shuffle import Keyed, read_bucket
from sailplan.ingest.work import STATE, Drops, Outcome

QUERY, JUDGEMENT = "query", "judgement"
NAMES = {
    "query": ("query-id", "query_id", "qid", "queryid"),
    "document": ("corpus-id", "corpus_id", "docid", "doc_id", "pid", "document-id"),
    "score": ("score", "relevance", "rel", "label"),
    "id": ("_id", "id", "query-id", "query_id", "qid"),
    "text": ("text", "query", "question"),
}
MOST_NEGATIVES = 64  # of a record


def value_of(row: Row, what: str) -> object:
    """Return a row's value under the first of the names that such a column has; None where there
    is none.
    """
    return next((row.values[name] for name in NAMES[what] if name in row.values), None)


@dataclass(frozen=True)
class PickForJoin:
    """Return the query's id, and its text or the judgement [document, score, split]."""

    alone: bool  # one split only: nothing says what is held out, so the data set's rule does

    def __call__(self, tag: str, row: Row, split: str | None) -> tuple[str, JsonValue]:
        name = given(value_of(row, "id" if tag == QUERY else "query"))
        if name is None:
            raise Dropped("no query id")
        if tag == QUERY:
            text = value_of(row, "text")
            if not isinstance(text, str) or not text.strip():
                raise Dropped("the query has no text")
            return name, {"text": text}
        document, score = given(value_of(row, "document")), value_of(row, "score")
        if document is None:
            raise Dropped("no document id")
        found = 1 if given(score) is None else number(score)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise Dropped(f"score is {score!r:.60}, expected a number")
        return name, {"document": document, "score": found, "split": None if self.alone else split}


@dataclass(frozen=True)
class WritePairs:
    """Write the pairs of a bucket into folder/NAME-NUMBER.tar."""

    folder: Path
    phase: str
    joined: str  # the phase that sorted queries and judgements into buckets
    name: str
    known: Path
    held_out: HeldOut
    language: str = "en"

    def __call__(self, part_number: int, bucket: int) -> Outcome:
        outcome, known = Outcome(), KnownIds(self.known)
        with Drops(self.folder / STATE / self.phase / f"{part_number:06d}.dropped").opened(
            outcome
        ) as note:

            def records() -> Iterator[Mapping[str, bytes]]:
                for query, rows in read_bucket(self.folder, self.joined, bucket):
                    text = next((row.value["text"] for row in rows if "text" in row.value), None)
                    judged = [row for row in rows if "document" in row.value]
                    if not judged:
                        outcome.notes["queries without a judgement"] = (
                            outcome.notes.get("queries without a judgement", 0) + 1
                        )
                    kept = []
                    for row in judged:
                        if text is None:
                            note(
                                row.file, row.line, f"query {query!r:.100} is not among the queries"
                            )
                        elif row.value["document"] not in known:
                            note(
                                row.file,
                                row.line,
                                f"document {row.value['document']!r:.100} is not in the corpus",
                            )
                        else:
                            kept.append(row)
                    for record in self._records(query, text or "", kept):
                        count(record, outcome, self.held_out)
                        yield record.members()

            outcome.files = write_shard(
                self.folder, f"{self.name}-{part_number:06d}.tar", records()
            )
        return outcome

    def _records(self, query: str, text: str, judged: list[Keyed]) -> Iterator[Record]:
        for split in dict.fromkeys(row.value["split"] for row in judged):
            own = [row.value for row in judged if row.value["split"] == split]
            negatives = list(dict.fromkeys(one["document"] for one in own if one["score"] <= 0))[
                :MOST_NEGATIVES
            ]
            for one in {one["document"]: one for one in own if one["score"] > 0}.values():
                body = {
                    "id": readable(f"{query}/{one['document']}"),
                    "query_id": query,
                    "text": {self.language: text},
                    "item": one["document"],
                }
                body["relevance"] = one["score"]
                if split is not None:
                    body |= {"split": split, "id": f"{split}/{body['id']}"}
                if negatives:
                    body["negatives"] = negatives
                yield Record(body, {})
