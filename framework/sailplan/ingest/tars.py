"""Tars as CLIP's tools and img2dataset make them are read where they lie: only what is in them
is found out, nothing is copied.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sailplan.data.kinds import choose
from sailplan.data.parse import parse_json
from sailplan.data.shard_files import Shard, open_shard, state_of
from sailplan.data.shards import resolve
from sailplan.data.stream.address import is_remote
from sailplan.data.tar import scan
from sailplan.errors import BadDataError, ConfigurationError

LOOKED_AT = 1000  # records


@dataclass
class TarContents:
    """What the records of the first shard have: media by role, text fields, and about how many
    records all shards have.
    """

    shards: list[Shard]
    records: int = 0  # of the first shard
    media: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)

    @property
    def estimate(self) -> int:
        """Return about how many records there are: the first shard's, by the bytes of all."""
        sizes = [state_of(shard)[0] for shard in self.shards]
        return self.records * sum(sizes) // max(sizes[0], 1)


def look_at_tars(shards: str) -> TarContents:
    """Return what the first of the shards holds.

    Raises ConfigurationError for no shards, BadDataError for one without records.
    """
    if is_remote(shards):
        raise ConfigurationError(
            f"data import {shards}: expected tars on this machine; for URLs write "
            "conf/data/NAME.yaml as docs/data.md shows"
        )
    found = TarContents(resolve("import", shards))
    places = scan(found.shards[0]).records
    found.records = len(places)
    with open_shard(found.shards[0]) as file:
        for place in places[:LOOKED_AT]:
            chosen, body = choose(place.members), {}
            if chosen.json is not None:
                try:
                    body = parse_json(file.read_at(chosen.json[1], chosen.json[2]))
                except ValueError:
                    continue  # a bad sample, which `data validate` names
            for role, has in (
                ("image", chosen.pictures),
                ("audio", chosen.sound),
                ("video", chosen.video),
            ):
                found.media[role] += bool(has)
            own = body.get("fields") if isinstance(body.get("fields"), dict) else {}
            found.fields.update(own.keys() if own else ())
            if chosen.text is not None and "title" not in (own or {}):
                found.fields["title"] += 1
            if isinstance(body.get("split"), str):
                found.splits[body["split"]] += 1
    found.media, found.fields = +found.media, +found.fields
    if not found.fields and not found.media:
        raise BadDataError(
            f"{found.shards[0]}: {len(places)} records, none with a picture, sound or text; "
            "expected webdataset: KEY.jpg beside KEY.txt"
        )
    return found
