"""`sailplan evaluate --model PATH --data FOLDER`: retrieval on a folder in BEIR's form, on all
ranks of the launch.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import partial
from pathlib import Path

from sailplan.errors import EXIT_DONE, ConfigurationError

ROLES = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}  # prompts that published models name so

WAIT = 3600.0  # seconds without a shard on any rank, after which all leave


def run(options: argparse.Namespace) -> int:
    from sailplan.evaluate.beir import evaluate_beir
    from sailplan.evaluate.beir_files import check_folder
    from sailplan.export.load import Model, Vectors, load
    from sailplan.runtime.config import ParallelConfig
    from sailplan.runtime.session import started

    for flag, found in (("--model", options.model), ("--data", options.data)):
        if not found:
            raise ConfigurationError(
                f"evaluate: {flag} is missing; give --model PATH and --data FOLDER together, or "
                "neither (a run's own tasks)"
            )
    if options.overrides or options.run_folder or options.checkpoint:
        other = options.overrides[0] if options.overrides else "--run-folder or --checkpoint"
        raise ConfigurationError(
            f"evaluate --model: found {other}, expected flags of the folder alone (see: sailplan "
            "evaluate --help)"
        )
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.at):
        raise ConfigurationError(f"--at {options.at}: expected numbers such as 1,10,100")
    for flag, value in (
        ("--batch", options.batch),
        ("--depth", options.depth),
        ("--shard-rows", options.shard_rows),
    ):
        if value < 1:
            raise ConfigurationError(f"{flag} {value}: expected at least 1")
    folder = Path(options.data)
    check_folder(folder, options.split)

    def encoding(model: Model, role: str) -> tuple[partial[Vectors], str]:
        view, prompt = getattr(options, f"{role}_view"), getattr(options, f"{role}_prompt")
        if view is not None and prompt is not None:
            raise ConfigurationError(
                f"--{role}-prompt {prompt}: found --{role}-view beside it, expected one of the two"
            )
        if view is None and prompt is None:
            view = next((name for name in ROLES[role] if name in model.prompts), None)
        said = str(model.prompts.get(view, view)) if view is not None else prompt or ""
        return partial(
            model.encode,
            view=view,
            prompt=prompt,
            dimension=options.dimension,
            batch_size=options.batch,
        ), said

    with started(ParallelConfig(timeout_seconds=WAIT)) as parallel:
        model = load(options.model, device=parallel.device)
        (queries, asked), (documents, told) = (encoding(model, role) for role in ROLES)
        found = evaluate_beir(
            queries,
            documents,
            folder,
            parallel=parallel,
            split=options.split,
            at=[int(k) for k in options.at.split(",")],
            depth=options.depth,
            shard_rows=options.shard_rows,
            same_ids=options.same_ids,
        )
        if parallel.is_main:
            about = {
                "model": model.origin,
                "data": str(folder),
                "split": options.split,
                "query_prompt": asked,
                "document_prompt": told,
            }
            print(json.dumps(about | found.metrics, indent=1), flush=True)
    return EXIT_DONE
