"""The callbacks that every run has, unless its configuration says otherwise."""

from __future__ import annotations

from sailplan.config.fields import Options

ROOM = "sailplan.train.callbacks"


def built_in_callbacks() -> dict[str, Options]:
    """Return the callbacks of a configuration that names none, in the order of their calls: name
    -> {_target_: class}.

    Metrics come first, so that no checkpoint is newer than the records; evaluation comes after the
    checkpoint that it may cost.
    """
    return {
        name: {"_target_": f"{ROOM}.{name}.{cls}"}
        for name, cls in (
            ("metrics", "Metrics"),
            ("quarantine", "Quarantine"),
            ("checkpoint", "Checkpoint"),
            ("evaluation", "Evaluation"),
            ("hard_negatives", "MiningRefresh"),
            ("empty_patterns", "EmptyPatterns"),
            ("throughput", "Throughput"),
            ("alerts", "Alerts"),
        )
    }
