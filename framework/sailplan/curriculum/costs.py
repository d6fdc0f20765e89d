"""What a stage's start will cost, before any model is there: rows to embed, bytes of vectors, FLOP.

A view's vectors are made once for whoever asks for them (`embed.store`), so a view costs the most
positions that anybody wants of it, and samples. Pairs that name items of a catalogue share its items' vectors.
Numbers are upper bounds: records without the view's modalities, and items that many pairs name, cost
less.

FLOP of an encoder's forward pass are two a parameter and token, of a comparison two a dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict

from sailplan.config.schema import BalanceConfig, Config, StageConfig, ViewConfig
from sailplan.curriculum.artifact import artifact
from sailplan.curriculum.hard_negatives import chosen_patterns
from sailplan.curriculum.kinds import kind_views, pattern_views
from sailplan.data.processor import Processor
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import SIDES

MATCH_BYTES = 100  # of a record's match, see `curriculum.matches`


class StageCost(TypedDict):
    """Upper bounds; of one refresh of the hard negatives, too: its vectors are new."""

    rows: int  # to embed
    vector_bytes: int  # in the store
    encoder_flop: float
    search_flop: float
    disk_bytes: int  # at most at once: vectors, and what mining writes beside them
    refreshes: int  # of the hard negatives, each of which costs `refresh_rows` more
    refresh_rows: int


@dataclass(frozen=True)
class _Wanted:
    """Views and how many rows of each are embedded."""

    whole: dict[tuple[str, str], int] = field(default_factory=dict)
    drawn: dict[tuple[str, str], int] = field(default_factory=dict)  # samples, which differ
    most: dict[tuple[str, str], int] = field(default_factory=dict)
    views: dict[tuple[str, str], ViewConfig] = field(default_factory=dict)

    def ask(self, reader: RecordReader, name: str, count: int, sample: int | None = None) -> None:
        """Want all of `count` records in a view, or a sample of them."""
        self.ask_view(reader, reader.config.views[name], count, sample)

    def ask_view(
        self, reader: RecordReader, view: ViewConfig, count: int, sample: int | None = None
    ) -> None:
        """Want what `ask` does, in a view that may have no name."""
        place = reader.name
        if reader.config.kind == "pairs" and view.of in SIDES and reader.catalogue is not None:
            view, place = replace(view, of="item"), reader.catalogue.name
            count = min(count, len(reader.catalogue))
        key = place, repr(view)
        self.views[key], self.most[key] = view, max(count, self.most.get(key, 0))
        if sample is None:
            self.whole[key] = max(count, self.whole.get(key, 0))
        else:
            self.drawn[key] = min(count, sample) + self.drawn.get(key, 0)

    @property
    def rows(self) -> dict[tuple[str, str], int]:
        return {
            key: min(most, self.whole.get(key, 0) + self.drawn.get(key, 0))
            for key, most in self.most.items()
        }

    @property
    def total(self) -> int:
        return sum(self.rows.values())


def stage_cost(
    config: Config,
    stage: StageConfig,
    readers: Mapping[str, RecordReader],
    parameters: int,
    processor: Processor,
) -> StageCost:
    """Return what a stage's start costs with the model's parameters; data sets that it makes itself
    are left out.
    """
    wanted, mined, search = _Wanted(), _Wanted(), 0.0
    judged = wanted  # what the balancing's model embeds, which may be another
    dimension = config.model.embedding
    sizes = {name: readers[name].count("train") for name in stage.data if name in readers}
    for name in stage.artifacts:
        made = artifact(name, config.artifacts.get(name), config.allowed_targets)
        for dataset, shown in made.embedded(config, stage):
            wanted.ask_view(readers[dataset], shown, len(readers[dataset]))
    similarity = stage.balance is not None and stage.balance.weights == "similarity"
    nearest = stage.subset is not None and stage.subset.nearest is not None
    settings = stage.balance or BalanceConfig()
    if settings.initialise_from is not None:
        judged = _Wanted()
    asking = [judged] * similarity + [wanted] * (
        nearest and (judged is not wanted or not similarity)
    )
    if asking:
        for task in (config.evaluation.tasks[name] for name in config.evaluation.benchmark):
            reader = readers[task.dataset]
            count = reader.count("train") or len(reader)
            for view in kind_views(
                reader, [one for one in (task.query, task.target) if one]
            ).values():
                for each in asking:
                    each.ask(reader, view, count, settings.sample)
    for name, count in sizes.items():
        reader = readers[name]
        views = kind_views(
            reader, pattern_views(reader, stage.patterns.get(name) or list(reader.config.patterns))
        )
        if similarity:
            for view in views.values():
                judged.ask(reader, view, count, settings.sample)
        if nearest and (stage.subset is not None and name in (stage.subset.sets or sizes)):
            chosen = [views["fused"]] if "fused" in views else list(views.values())
            for view in chosen:
                wanted.ask(reader, view, count)
            centres = settings.clusters * len(config.evaluation.benchmark)
            search += 2.0 * count * centres * dimension * len(chosen)
    kept = dict(sizes)
    if stage.subset is not None:
        for name in stage.subset.sets or list(sizes):
            if name not in sizes:
                continue
            kept[name] = round(sizes[name] * (stage.subset.nearest or 1.0))
            if stage.subset.drop_noisy is not None:
                first = (stage.patterns.get(name) or list(readers[name].config.patterns))[0]
                pattern = readers[name].config.patterns[first]
                for view in (pattern.query, pattern.target):
                    wanted.ask(readers[name], view, kept[name])
                kept[name] = round(kept[name] * (1 - stage.subset.drop_noisy))
    written, refreshes = 0, 0
    hard = stage.hard_negatives
    if hard is not None:
        patterns = chosen_patterns(hard, stage.data, config.data.sets)
        refreshes = (stage.steps - 1) // hard.refresh_steps if hard.refresh_steps else 0
        given = hard.from_folder is not None
        for name, names in patterns.items():
            for pattern_name in names if name in sizes else ():
                pattern = readers[name].config.patterns[pattern_name]
                for view in (pattern.query, pattern.target):
                    mined.ask(readers[name], view, kept[name])
                    if not given:
                        wanted.ask(readers[name], view, kept[name])
                search += 0.0 if given else 2.0 * kept[name] ** 2 * dimension
                beside = 4 * dimension + MATCH_BYTES + 12 * hard.per_query
                written = max(written, kept[name] * beside)
    number = 2 if config.store.precision == "float16" else 4
    models = [wanted] if judged is wanted else [wanted, judged]
    total = sum(each.total for each in models)
    tokens = sum(
        rows * _tokens(processor, each.views[key])
        for each in models
        for key, rows in each.rows.items()
    )
    return {
        "rows": total,
        "vector_bytes": total * dimension * number,
        "encoder_flop": 2.0 * parameters * tokens,
        "search_flop": search,
        "disk_bytes": total * dimension * number + written,
        "refreshes": refreshes,
        "refresh_rows": mined.total if refreshes else 0,
    }


def _tokens(processor: Processor, view: ViewConfig) -> int:
    """Return the most tokens of a row of a view."""
    text = processor.max_tokens - processor.overhead(view) if "text" in view.modalities else 0
    pictures = processor.frames if "vision" in view.modalities else 0
    chunks = processor.chunks if "audio" in view.modalities else 0
    return processor.counted(max(0, text), pictures, chunks, view)
