"""`sailplan semantic-ids`: code books over the vectors that `sailplan embed` wrote, and the codes of
all items; no model is needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sailplan.config.compose import compose
from sailplan.errors import EXIT_DONE, ConfigurationError
from sailplan.export.semantic_ids import parse_sizes, semantic_ids
from sailplan.runtime.session import started


def run(options: argparse.Namespace) -> int:
    """Fit code books, or take those given, write the codes, print the statistics."""
    sizes = parse_sizes("--sizes", options.sizes)
    books, vectors = [Path(path) for path in options.code_books], Path(options.vectors)
    if not sizes and not books:
        raise ConfigurationError(
            "semantic-ids: found neither --sizes nor --code-books, expected one, such as --sizes "
            "64,64,64"
        )
    out = Path(options.out) if options.out else vectors / "semantic_ids"
    with started(compose(options.overrides).parallel) as parallel:
        found = semantic_ids(parallel, vectors, out, sizes=sizes, books=books, seed=options.seed)
        if parallel.is_main:
            print(json.dumps(found, indent=1), flush=True)
    return EXIT_DONE
