"""The prompts of a run's views by name, and the modules of a folder that brings its own code."""

from __future__ import annotations

from sailplan.config.schema import Config, ViewConfig

Written = tuple[
    list[dict[str, str]], dict[str, str]
]  # entries of modules.json, and prompts by name


def named_views(config: Config) -> dict[str, ViewConfig]:
    """Return views by name: DATASET.VIEW, and the view's name alone where all data sets that
    have it agree on its prompt.
    """
    found = {
        f"{name}.{view}": shown
        for name, dataset in config.data.sets.items()
        for view, shown in dataset.views.items()
    }
    short: dict[str, list[ViewConfig]] = {}
    for name, shown in found.items():
        short.setdefault(name.split(".", 1)[1], []).append(shown)
    return {
        name: views[0] for name, views in short.items() if len({view.prompt for view in views}) == 1
    } | found


def own_modules(encoder: str) -> list[dict[str, str]]:
    """Return the modules of a folder whose code has the class `encoder`."""
    return [
        {"path": "", "type": encoder},
        {"path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
