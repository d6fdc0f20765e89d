"""The numbers that a setting may have, in one table; whatever is outside is refused before anything is read or built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError

# Dotted key, `*` for any entry -> words. A number is checked; null (where the schema has it) is none.
ABOVE_ZERO, AT_LEAST_ZERO, AT_LEAST_ONE = "above 0", "at least 0", "at least 1"
SHARE, SHARE_ABOVE_ZERO, SHARE_BELOW_ONE = "from 0 to 1", "above 0, at most 1", "at least 0, below 1"
FITS = {
    ABOVE_ZERO: lambda value: value > 0,
    AT_LEAST_ZERO: lambda value: value >= 0,
    AT_LEAST_ONE: lambda value: value >= 1,
    SHARE: lambda value: 0 <= value <= 1,
    SHARE_ABOVE_ZERO: lambda value: 0 < value <= 1,
    SHARE_BELOW_ONE: lambda value: 0 <= value < 1,
    "at least -1 (-1: all)": lambda value: value >= -1,
}
OPTIMIZER = {
    "learning_rate": AT_LEAST_ZERO,
    "final_learning_rate": AT_LEAST_ZERO,
    "warmup_steps": AT_LEAST_ZERO,
    "weight_decay": AT_LEAST_ZERO,
    "betas.*": SHARE_BELOW_ONE,
    "epsilon": ABOVE_ZERO,
    "clip_norm": ABOVE_ZERO,
    "temperature_learning_rate": AT_LEAST_ZERO,
}
STAGE = {
    "steps": AT_LEAST_ONE,
    "mixed_fraction": SHARE,
    "data.*": ABOVE_ZERO,
    "objectives.*": AT_LEAST_ZERO,
    "balance.sample": AT_LEAST_ONE,
    "balance.clusters": AT_LEAST_ONE,
    "balance.epsilon": ABOVE_ZERO,
    "balance.iterations": AT_LEAST_ONE,
    "balance.temperature": ABOVE_ZERO,
    "subset.nearest": SHARE_ABOVE_ZERO,
    "subset.drop_noisy": SHARE_BELOW_ONE,
    "hard_negatives.per_query": AT_LEAST_ONE,
    "hard_negatives.sample": AT_LEAST_ONE,
    "hard_negatives.refresh_steps": AT_LEAST_ZERO,
}
DATASET = {
    "temperature": ABOVE_ZERO,
    "language_weights.*": SHARE,
    "field_drop": SHARE,
    "history_length": AT_LEAST_ONE,
    "image_augmentation": SHARE,
    "patterns.*.weight": AT_LEAST_ZERO,
}
DATA = {
    **dict.fromkeys(("lanes", "segment", "window", "prefetch", "max_tokens", "image_size", "frames", "audio_rate", "audio_chunks", "mel_bins"), AT_LEAST_ONE),
    "audio_chunk_seconds": ABOVE_ZERO,
    "workers": AT_LEAST_ZERO,
    "bad_sample_limit": SHARE,
}
RANGES = {
    **{f"optimizer.{key}": words for key, words in OPTIMIZER.items()},
    **{f"stages.*.optimizer.{key}": words for key, words in OPTIMIZER.items()},
    **{f"stages.*.{key}": words for key, words in STAGE.items()},
    **{f"data.sets.*.{key}": words for key, words in DATASET.items()},
    **{f"data.{key}": words for key, words in DATA.items()},
    "step.micro_batch": AT_LEAST_ONE,
    "step.token_budget": AT_LEAST_ZERO,
    "step.kept_graphs": "at least -1 (-1: all)",
    "parallel.timeout_seconds": ABOVE_ZERO,
    "parallel.threads": AT_LEAST_ZERO,
    "checkpoint.every_steps": AT_LEAST_ZERO,
    "checkpoint.every_minutes": ABOVE_ZERO,
    "checkpoint.keep": AT_LEAST_ONE,
    "evaluation.batch": AT_LEAST_ONE,
    "evaluation.every_steps": AT_LEAST_ZERO,
    "evaluation.tasks.*.recall_at.*": AT_LEAST_ONE,
    "evaluation.tasks.*.limit": AT_LEAST_ONE,
    "tracking.log_every": AT_LEAST_ONE,
}
WORDS = {"step.kept_graphs": ("auto",)}  # what a setting may be instead of a number


def check_ranges(config: Config) -> None:
    """Raises ConfigurationError naming the first key whose number is outside its range; nan and infinity always are."""
    for pattern, words in RANGES.items():
        for key, value in _values(config, pattern.split(".")):
            if isinstance(value, str) and value in WORDS.get(pattern, ()):
                continue
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and FITS[words](value)):
                beside = "".join(f", or {word}" for word in WORDS.get(pattern, ()))
                raise ConfigurationError(f"{key}={value}: expected a number {words}{beside}")


def _values(node: Any, pattern: list[str], key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that the pattern names below `node`; a section that is null has none."""
    if not pattern:
        yield key, node
        return
    if is_dataclass(node):
        entries: dict[Any, Any] = {field.name: getattr(node, field.name) for field in fields(node)}
    else:
        entries = node if isinstance(node, dict) else dict(enumerate(node or []))
    for name in entries if pattern[0] == "*" else pattern[:1]:
        if node is not None:
            yield from _values(entries[name], pattern[1:], f"{key}.{name}".lstrip("."))
