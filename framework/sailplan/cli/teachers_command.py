"""`sailplan teachers`: ID embeddings from training histories as files, one way to make what
`data.teachers` takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sailplan.config.compose import compose
from sailplan.config.schema import ARTIFACT
from sailplan.errors import EXIT_DONE, ConfigurationError
from sailplan.runtime.environment import is_main_by_environment


def run(options: argparse.Namespace) -> int:
    """Write OUT/NAME.npy float32 [items, dimension] of each factorisation, and OUT/ids.txt;
    print the setting that reads them.
    """
    from sailplan.curriculum.histories import read_histories
    from sailplan.curriculum.teachers import FACTORISATIONS, factorise
    from sailplan.data.datasets import open_datasets

    if options.dimension < 1:
        raise ConfigurationError(f"--dimension {options.dimension}: expected at least 1")
    config, out = compose(options.overrides), Path(options.out)
    if out.is_file():
        raise ConfigurationError(f"--out {out}: is a file; expected a folder")
    recorded = [
        name
        for name, found in config.data.sets.items()
        if found.kind == "sequences" and not found.shards.startswith(ARTIFACT)
    ]
    if options.dataset not in recorded:
        raise ConfigurationError(
            f"--dataset {options.dataset}: expected sequences with recorded histories: "
            f"{', '.join(recorded) or 'there are none'}"
        )
    if not is_main_by_environment():
        return EXIT_DONE
    reader = open_datasets(config, names=[options.dataset])[options.dataset]
    assert reader.catalogue is not None, "sequences have a catalogue"
    histories = read_histories(reader, "train")
    used = histories.used()
    matrix = histories.matrix(used)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ids.txt").write_text(
        "".join(f"{name}\n" for name in reader.catalogue.ids(used)), encoding="utf-8"
    )
    print(f"# {len(histories.users)} training users, {len(used)} items\ndata:\n  teachers:")
    for name in FACTORISATIONS:
        vectors = factorise(matrix, name, options.dimension, config.seed).astype(np.float32)
        np.save(out / f"{name}.npy", vectors)
        print(
            f"    {name}: {{path: {out / name}.npy, ids: {out / 'ids.txt'}, dimension: "
            f"{vectors.shape[1]}}}",
            flush=True,
        )
    return EXIT_DONE
