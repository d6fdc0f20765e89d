"""The model card of an exported folder: how it is used, what trained it, how well it does."""

from __future__ import annotations

import json
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config
from sailplan.export.prompts import named_views


def model_card(config: Config, checkpoint: str, run: Path | None, *, remote_code: bool) -> str:
    """Return README.md. run: the run's folder; its newest evaluation is quoted.

    remote_code: whether the folder brings code.
    """
    trust = ", trust_remote_code=True" if remote_code else ""
    views = named_views(config)
    shown = [
        f"| `{name}` | {', '.join(view.modalities)} | {view.prompt or '(none)'} |"
        for name, view in views.items()
    ]
    modalities = sorted({modality for view in views.values() for modality in view.modalities})
    stages = []
    for name in config.order:
        stage = config.stages[name]
        losses = ", ".join(f"{loss} x {weight:g}" for loss, weight in stage.objectives.items())
        stages.append(f"| {name} | {stage.steps} | {', '.join(stage.data)} | {losses} |")
    lines = [
        *(
            "---",
            "library_name: sentence-transformers",
            "pipeline_tag: sentence-similarity",
            "license: other  # fill in",
            "license_name:",
        ),
        *(
            "license_link:",
            "tags:",
            "- sentence-transformers",
            "- feature-extraction",
            "- sailplan",
            *(f"- {each}" for each in modalities),
            "---",
        ),
        *(
            "",
            f"# {config.name}",
            "",
            f"An embedding model of {', '.join(modalities)}, trained by sailplan ({checkpoint} of "
            f"the run {config.name}).",
        ),
        f"Vectors have {config.model.embedding} dimensions and length 1, and are compared by their "
        "cosine. They may be cut to",
        f"{', '.join(map(str, config.model.prefixes))} dimensions (Matryoshka; normalise again "
        "after the cut).",
        *(
            "",
            "## Use",
            "",
            "```python",
            "from sentence_transformers import SentenceTransformer",
            "",
        ),
        f"model = SentenceTransformer(FOLDER{trust})",
        f'vectors = model.encode(["a text"], prompt_name="{next(iter(views), "")}", '
        f"truncate_dim={config.model.prefixes[0]}, normalize_embeddings=True)",
        *("```", "", "A vector is right with the prompt that its view was trained with:", ""),
        *("| prompt_name | shows | prompt |", "|---|---|---|", *shown),
        *(
            "",
            "## Training",
            "",
            "| stage | steps | data sets | losses |",
            "|---|---|---|---|",
            *stages,
            "",
        ),
        *_results(run),
        *(
            "## Licence",
            "",
            "Fill in: licence of the weights, and of the data that they were trained with.",
        ),
    ]
    return "\n".join(lines) + "\n"


def _results(run: Path | None) -> list[str]:
    files = sorted((run / "evaluation").glob("step-*.json")) if run is not None else []
    if not files:
        return []
    found: JsonObject = json.loads(files[-1].read_text(encoding="utf-8"))
    rows = [
        f"| {task} | {name} | {value:.4g} |"
        for task, metrics in found.get("tasks", {}).items()
        for name, value in _numbers(metrics)
    ]
    return (
        [
            "## Results",
            "",
            f"Of the run's own evaluation ({files[-1].stem}).",
            "",
            "| task | metric | value |",
            "|---|---|---|",
            *rows,
            "",
        ]
        if rows
        else []
    )


def _numbers(metrics: object, path: str = "") -> list[tuple[str, float]]:
    if isinstance(metrics, dict):
        return [
            pair
            for name, value in metrics.items()
            for pair in _numbers(value, f"{path}.{name}" if path else str(name))
        ]
    return (
        [(path, float(metrics))]
        if isinstance(metrics, (int, float)) and not isinstance(metrics, bool)
        else []
    )
