"""Items of a step, each decoded once for a view, however many rows show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sailplan.config.schema import DatasetConfig, ViewConfig
from sailplan.data.costs import item_seed
from sailplan.data.processor import Processor, ViewRow
from sailplan.data.record import HardNegatives, Item, Record, ViewKey


@dataclass(frozen=True)
class ItemDecoder:
    """Decodes the items of a data set's rows in one step."""

    processor: Processor
    dataset: DatasetConfig
    step_seed: int
    encoded: Mapping[ViewKey, str]  # view batch -> the view that has its micro-batches
    _known: dict[tuple[str, int, int], ViewRow] = field(default_factory=dict)

    def view(self, key: ViewKey) -> ViewConfig:
        """Return how a view batch shows items."""
        return self.dataset.views[self.encoded[key] if isinstance(key, HardNegatives) else key]

    def rows(
        self, items: Sequence[Item | None], key: ViewKey, count: int | None = None
    ) -> list[ViewRow]:
        """Decode items for a view batch; `count` of them, filled up with rows of nothing."""
        wanted = list(items[:count])
        wanted += [None] * ((count or 0) - len(wanted))
        return [ViewRow() if item is None else self._row(item, key) for item in wanted]

    def _row(self, item: Item, key: ViewKey) -> ViewRow:
        view = self.encoded[key]
        place = (view, *item.source)
        if place not in self._known:
            seed = item_seed(self.step_seed, view, item)
            self._known[place] = self.processor.row(item, self.view(key), self.dataset, seed)
        return self._known[place]

    def record(self, record: Record, name: str) -> list[ViewRow]:
        """Decode what a record shows in a view."""
        view = self.dataset.views[name]
        if view.of == "history":
            return self.rows(record.history, name, self.dataset.history_length)
        return self.rows([view_item(record, view)], name)


def view_item(record: Record, view: ViewConfig) -> Item | None:
    """The item of a record that a view shows (for `history` use record.history)."""
    assert view.of != "history", "a history is several items"
    if view.of == "query":
        return record.query
    return record.target if view.of == "target" else record.item


def media_of(views: Sequence[ViewConfig]) -> frozenset[str]:
    """Which bytes the views need to have read."""
    return frozenset(
        modality for view in views for modality in view.modalities if modality != "text"
    )
