"""The prompts of a run's views by name."""

from __future__ import annotations

from sailplan.config.schema import Config, ViewConfig


def named_views(config: Config) -> dict[str, ViewConfig]:
    """Return views by name: DATASET.VIEW, and the view's name alone where all data sets that have it agree on its prompt."""
    found = {f"{name}.{view}": shown for name, dataset in config.data.sets.items() for view, shown in dataset.views.items()}
    short: dict[str, list[ViewConfig]] = {}
    for name, shown in found.items():
        short.setdefault(name.split(".", 1)[1], []).append(shown)
    return {name: views[0] for name, views in short.items() if len({view.prompt for view in views}) == 1} | found


def named_prompts(config: Config) -> dict[str, str]:
    """Return the prompts of `named_views`."""
    return {name: view.prompt for name, view in named_views(config).items()}
