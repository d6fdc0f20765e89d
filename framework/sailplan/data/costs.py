"""What rows cost the model, in tokens: counted for rows that are here, foreseen for all rows of
a step.

A row's cost is its prompt and text tokens, and what its encoder's processor says of media: the
positions that they fill, and their own encoders' work in positions that cost as much.
Foreseen costs come from the shards' length tables and repeat the item's draws of language and
dropped fields. They are integers throughout, so that ranks on different machines foresee the same.
With them it is foreseen which rows show the same item, which a step encodes once.

Foreseen exactly but for: `pick: one`, whose entries count with their mean; a text that two fields
share; tokens that a tokenizer merges across fields; a sequence that draws from `items`; and a spare
in the place of a broken sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sailplan.config.schema import Config, DatasetConfig, ViewConfig
from sailplan.data.lengths import (
    MOST_REFERENCES,
    PICTURES,
    PICTURES_OF,
    ROLES,
    SOUND,
    SOUND_OF,
    Integers,
    LengthIndex,
    Lengths,
)
from sailplan.data.order import keyed, keyed_integer, seeds
from sailplan.data.processor import Processor
from sailplan.data.reader import RecordReader
from sailplan.data.record import Item
from sailplan.data.text import (
    DROP_DRAW,
    LANGUAGE_DRAW,
    PREFERRED_LANGUAGE,
    SEPARATOR,
    WEIGHT_UNITS,
    drop_threshold,
    label,
    weight_units,
)
from sailplan.runtime.seeds import derive

# Positions of the records that hold items, int64 [n], and which of their parts these are
# (record.Item.source) -> seeds of the items' draws, int64 [n]
Draws = Callable[[Integers, int], Integers]
ABSENT, UNKNOWN = -1, -2  # no item; an item of which the tables cannot tell which it will be


class Foreseen(NamedTuple):
    """What is known of the items that n records show, g each."""

    costs: Integers  # [n, g]
    items: Integers  # [n, g]; equal numbers from 0 on are the same item, else ABSENT or UNKNOWN


class RowCosts:
    """Costs of rows under a run's configuration."""

    def __init__(self, config: Config, processor: Processor) -> None:
        self.config, self.processor = config, processor
        self._labels: dict[str, int] = {}

    def longest(self, view: ViewConfig) -> int:
        """Return the most that a row of the view can cost."""
        processor = self.processor
        room = processor.max_tokens - processor.overhead(view) if "text" in view.modalities else 0
        pictures = processor.frames if "vision" in view.modalities else 0
        return processor.counted(
            room, pictures, processor.chunks if "audio" in view.modalities else 0, view
        )

    def foreseen(
        self, reader: RecordReader, view: ViewConfig, positions: Integers, draws: Draws | None
    ) -> Foreseen:
        """Return what each item costs that records show in a view: int64 [n] positions -> [n,
        g], g as in ViewBatch.

        draws: seeds of the items' draws; None: evaluation. Without length tables all rows cost the
        same.
        """
        group = reader.config.history_length if view.of == "history" else 1
        catalogue = reader.catalogue
        if reader.lengths is None or (catalogue is not None and catalogue.lengths is None):
            return self._unknown(len(positions), group, view)
        lengths = reader.lengths.lengths(positions)
        drawn = draws(positions, 0) if draws else None
        held = _held(reader, positions, 0)
        if reader.config.kind == "items" or (
            view.of == "query" and not (lengths.role == ROLES.index("query")).any()
        ):
            own = self._items(reader.lengths, lengths, len(positions), view, reader.config, drawn)
            return Foreseen(own[:, None], held[:, None])
        if (
            reader.config.kind == "pairs"
        ):  # the rows that hold the item themselves, or have a text instead
            part = "target" if view.of == "target" else ""
            own = self._items(
                reader.lengths, lengths, len(positions), view, reader.config, drawn, part
            )
            if catalogue is None:
                return Foreseen(own[:, None], held[:, None])
        named = _named(lengths, len(positions), view.of, group)
        costs, items = self._named_items(reader, lengths, named, view, draws)
        if reader.config.kind == "pairs":
            there = named >= 0
            return Foreseen(
                np.where(there, costs, own[:, None]), np.where(there, items, held[:, None])
            )
        return Foreseen(costs, items)

    def foreseen_mined(
        self, reader: RecordReader, view: ViewConfig, mined: Integers, draws: Draws
    ) -> Foreseen:
        """Return what mined negatives of n rows cost: int64 [n, k] positions, -1 for none, ->
        [n, k].
        """
        costs = np.full(mined.shape, self.processor.overhead(view), dtype=np.int64)
        items = np.full(mined.shape, ABSENT, dtype=np.int64)
        there = mined >= 0
        if there.any():
            found = self.foreseen(reader, view, mined[there], draws)
            costs[there], items[there] = found.costs[:, 0], found.items[:, 0]
        return Foreseen(costs, items)

    def foreseen_own(
        self,
        reader: RecordReader,
        view: ViewConfig,
        positions: Integers,
        count: int,
        draws: Draws,
    ) -> Foreseen:
        """Return what `count` negatives cost that each of n records names itself, [n, count]."""
        if not count or reader.lengths is None:
            return self._unknown(len(positions), count, view)
        lengths = reader.lengths.lengths(positions)
        if reader.catalogue is None:
            held = [
                self._items(
                    reader.lengths,
                    lengths,
                    len(positions),
                    view,
                    reader.config,
                    draws(positions, 1 + n),
                    f"negatives/{n}",
                )
                for n in range(count)
            ]
            items = [_held(reader, positions, 1 + n) for n in range(count)]
            return Foreseen(np.stack(held, axis=1), np.stack(items, axis=1))
        return self._named_items(
            reader, lengths, _ranked(lengths, len(positions), "negatives", count), view, draws
        )

    # ---------------------------------------------------------------- parts
    def _named_items(
        self,
        reader: RecordReader,
        lengths: Lengths,
        named: Integers,
        view: ViewConfig,
        draws: Draws | None,
    ) -> Foreseen:
        """What catalogue items cost that n records name: int64 [n, g] places among the references,
        -1 for none, -> [n, g].
        """
        catalogue = reader.catalogue
        assert catalogue is not None and catalogue.lengths is not None, (
            "pairs and sequences have a catalogue"
        )
        costs = np.full(named.shape, self.processor.overhead(view), dtype=np.int64)
        items = np.full(named.shape, ABSENT, dtype=np.int64)
        there = np.flatnonzero(named >= 0)
        places = catalogue.index.find_hashes(lengths.hash[named.flat[there]])
        there, places = there[places >= 0], places[places >= 0]
        # Each item once, however many records name it.
        places, which = np.unique(places, return_inverse=True)
        costs.flat[there] = self._items(
            catalogue.lengths,
            catalogue.lengths.lengths(places),
            len(places),
            view,
            reader.config,
            draws(places, 0) if draws else None,
        )[which]
        chosen = lengths.role[named.flat[there]] != ROLES.index("items")
        items.flat[there] = np.where(chosen, 2 * places[which], UNKNOWN)
        return Foreseen(costs, items)

    def _unknown(self, count: int, group: int, view: ViewConfig) -> Foreseen:
        return Foreseen(
            np.full((count, group), self.longest(view), dtype=np.int64),
            np.full((count, group), UNKNOWN, dtype=np.int64),
        )

    def _items(
        self,
        index: LengthIndex,
        lengths: Lengths,
        count: int,
        view: ViewConfig,
        dataset: DatasetConfig,
        drawn: Integers | None,
        part: str = "",
    ) -> Integers:
        """Cost of n items in a view, int64 [n].

        part: of pairs that hold their items, which; "" their query.
        """
        pictures_code, sound_code = (
            (index.field(f"{part}:{PICTURES_OF}"), index.field(f"{part}:{SOUND_OF}"))
            if part
            else (PICTURES, SOUND)
        )
        prompt, media = self.processor.overhead(view), self.processor.media
        costs = np.full(count, prompt, dtype=np.int64)
        if "text" in view.modalities:
            costs += np.minimum(
                self._text(index, lengths, count, view, dataset, drawn, part),
                self.processor.max_tokens - prompt,
            )
        if "vision" in view.modalities:
            pictures = np.minimum(_media(lengths, count, pictures_code), self.processor.frames)
            costs += media.first_picture * (pictures > 0) + media.picture * pictures
        if "audio" in view.modalities:  # how long a recording is, its header alone would tell
            costs += (media.sound + media.chunk) * (_media(lengths, count, sound_code) > 0)
        return costs

    def _text(
        self,
        index: LengthIndex,
        lengths: Lengths,
        count: int,
        view: ViewConfig,
        dataset: DatasetConfig,
        drawn: Integers | None,
        part: str,
    ) -> Integers:
        """Tokens of the text that `text.compose` makes, int64 [n]."""
        texts, tokens = (
            np.zeros((len(view.fields), count), dtype=np.int64),
            np.zeros((len(view.fields), count), dtype=np.int64),
        )
        for number, name in enumerate(view.fields):
            entries = np.flatnonzero(
                lengths.field == index.field(f"{part}:{name}" if part else name)
            )
            words = None if drawn is None else keyed(drawn, LANGUAGE_DRAW, number)
            chosen = entries[
                _choose(lengths.record[entries], lengths.language[entries], index, dataset, words)
            ]
            texts[number, lengths.record[chosen]], tokens[number, lengths.record[chosen]] = (
                lengths.texts[chosen],
                lengths.tokens[chosen],
            )
        kept = texts > 0
        if drawn is not None and view.pick == "one":
            commas = np.maximum(texts - 1, 0).sum(0) * self._label(",")
            return (tokens.sum(0) - commas + texts.sum(0) // 2) // np.maximum(texts.sum(0), 1)
        if drawn is not None and len(view.fields) > 1:
            draws = np.stack(
                [
                    keyed(drawn, DROP_DRAW, number) >> np.uint64(11)
                    for number in range(len(view.fields))
                ]
            ).astype(np.int64)
            staying = kept & (draws >= drop_threshold(dataset.field_drop))
            last = np.where(kept, draws, -1).argmax(0)
            staying[last, np.arange(count)] |= kept.any(0) & ~staying.any(0)
            kept = staying
        labels = np.array([self._label(label(name)) for name in view.fields], dtype=np.int64)[
            :, None
        ]
        joined = ((labels + self._label(SEPARATOR)) * kept).sum(0) - self._label(SEPARATOR)
        return (tokens * kept).sum(0) + np.where(kept.sum(0) > 1, joined, 0)

    def _label(self, text: str) -> int:
        if text not in self._labels:
            (self._labels[text],) = self.processor.tokenizer.counts([text.strip()])
        return self._labels[text]


def _choose(
    record: Integers,
    language: Integers,
    index: LengthIndex,
    dataset: DatasetConfig,
    words: NDArray[np.uint64] | None,
) -> Integers:
    """Which of the entries [k] of one field, sorted by record, each record shows:
    `text.choose_language` for all at once.
    """
    if not len(record):
        return record
    first = np.flatnonzero(np.diff(record, prepend=-1))
    run = np.repeat(np.arange(len(first)), np.diff(first, append=len(record)))  # of each entry
    sizes = np.bincount(run)
    preferred = first.copy()
    places = np.flatnonzero(language == index.language(PREFERRED_LANGUAGE))
    preferred[run[places]] = places
    if words is None:
        return preferred
    listed, rest = weight_units(dataset.language_weights)
    units = np.full(len(record), -1, dtype=np.int64)
    for name, unit in listed.items():
        units[language == index.language(name)] = unit
    unlisted = np.bincount(run, units < 0)
    units = np.where(units < 0, rest // np.maximum(unlisted.astype(np.int64), 1)[run], units)
    none = np.bincount(run, units) == 0
    units[none[run]] = 1
    upto = np.cumsum(units)
    before = (upto - units)[first]
    total = upto[first + sizes - 1] - before
    assert total.max() < WEIGHT_UNITS << 8, (
        "a product of 32 bits and a sum of weights must fit into 64"
    )
    left = (
        (words[record[first]] >> np.uint64(32)) * total.astype(np.uint64) >> np.uint64(32)
    ).astype(np.int64)
    passed = upto - before[run] > left[run]  # from the chosen entry of the run on
    chosen = first + sizes - np.bincount(run, passed).astype(np.int64)
    return np.where(sizes > 1, chosen, preferred)


def _media(lengths: Lengths, count: int, code: int) -> Integers:
    result = np.zeros(count, dtype=np.int64)
    chosen = lengths.field == code
    result[lengths.record[chosen]] = lengths.texts[chosen]
    return result


def _ranked(lengths: Lengths, count: int, role: str, most: int) -> Integers:
    """Place among the references of each record's first `most` of a role, int64 [n, most]; -1
    where it has fewer.
    """
    chosen = np.flatnonzero(lengths.role == ROLES.index(role))
    owner = lengths.owner[chosen]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    rank = np.arange(len(chosen)) - np.repeat(first, np.diff(first, append=len(chosen)))
    result = np.full((count, most), -1, dtype=np.int64)
    within = rank < most
    result[owner[within], rank[within]] = chosen[within]
    return result


def _named(lengths: Lengths, count: int, of: str, group: int) -> Integers:
    """Place among the references of the items that a view of records shows, int64 [n, g]; -1
    where there is none.

    Of a sequence that draws from its `items`, the first stands for the target and the others for
    the history.
    """
    if of == "query":
        return _ranked(lengths, count, "query", 1)
    if of == "target":
        found = [_ranked(lengths, count, role, 1) for role in ("item", "target", "items")]
        return np.where(found[0] >= 0, found[0], np.where(found[1] >= 0, found[1], found[2]))
    # the latest of a history: as many as there are, at most `group`
    history = _ranked(lengths, count, "history", MOST_REFERENCES)
    present = (history >= 0).sum(1)
    places = np.arange(group)[None] + np.maximum(present - group, 0)[:, None]
    latest = np.take_along_axis(
        np.pad(history, ((0, 0), (0, group)), constant_values=-1),
        np.minimum(places, history.shape[1] + group - 1),
        1,
    )
    drawn = _ranked(lengths, count, "items", group + 1)[:, 1:]
    return np.where((present > 0)[:, None], latest, drawn)


def _held(reader: RecordReader, positions: Integers, part: int) -> Integers:
    """Numbers of the items that records hold themselves; a catalogue's have the even ones."""
    return 2 * (positions * (1 + reader.config.negatives) + part) + 1


def item_draws(step_seed: int, view: str) -> Draws:
    """Return the seeds of items in a view, those of `item_seed`."""
    return lambda positions, part: seeds(step_seed, derive("view", view), positions, part)


def item_seed(step_seed: int, view: str, item: Item) -> int:
    """Return the seed of all that is drawn of an item in a view of a step: the same in every row
    that shows it.
    """
    return keyed_integer(*item.source, key=_draw_key(step_seed, view)) >> 1


@lru_cache(maxsize=1024)
def _draw_key(step_seed: int, view: str) -> int:
    return keyed_integer(step_seed, derive("view", view))
