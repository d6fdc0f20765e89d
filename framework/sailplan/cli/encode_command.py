"""`sailplan encode`: a file of items as vectors, with any model that `sailplan.load` opens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sailplan.errors import EXIT_DONE, ConfigurationError


def run(options: argparse.Namespace) -> int:
    from sailplan.export.encode import check_files, encode_file
    from sailplan.export.load import load

    if options.overrides:
        raise ConfigurationError(
            f"encode: found {options.overrides[0]}, expected flags alone (see: sailplan encode "
            "--help)"
        )
    source, output = Path(options.input), Path(options.output)
    check_files(source, output)
    for flag, value in (("--batch", options.batch), ("--shard-rows", options.shard_rows)):
        if value < 1:
            raise ConfigurationError(f"{flag} {value}: expected at least 1")
    model = load(options.model, device=options.device)
    told = encode_file(
        model,
        source,
        output,
        view=options.view,
        prompt=options.prompt,
        dimension=options.dimension,
        precision=options.precision,
        batch_size=options.batch,
        shard_rows=options.shard_rows,
        identity=model.origin,
    )
    print(json.dumps(told, indent=1), flush=True)
    return EXIT_DONE
