"""What the tests of exported folders share: tiny runs of every kind of encoder, items, and a
reader without sailplan.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor, nn

from sailplan.checkpoint.store import folder_of, save
from sailplan.config.schema import Config, DatasetConfig, ViewConfig
from sailplan.data.processor import Processor
from sailplan.data.record import Item
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "grey",
    "boot",
    "snow",
    "rain",
    "walking",
    "in",
    "the",
    "low",
    "high",
    "want",
    "twin",
    "find",
    "item",
    "name",
]
ROWS = 35
VIEWS = {
    "text": ViewConfig(modalities=["text"], fields=["title"], prompt="find the item"),
    "vision": ViewConfig(modalities=["vision"], prompt="name"),
    "audio": ViewConfig(modalities=["audio"], prompt="name"),
    "text_vision": ViewConfig(modalities=["vision", "text"], fields=["title"], prompt="item"),
    "all": ViewConfig(modalities=["text", "vision", "audio"], fields=["title"]),
}
KEYS = {"text": "text", "vision": "image", "audio": "audio"}
BLOCKED = (
    "sailplan",
    "sailplan_kernels",
    "megatron",
    "wandb",
    "hydra",
    "omegaconf",
    "webdataset",
    "peft",
)
READER = """
import json, sys
for name in {blocked}: sys.modules[name] = None
import numpy as np, torch
from sentence_transformers import SentenceTransformer
asked = json.load(open(sys.argv[1]))
found = {{}}
for folder, trust, asks in asked:
    model = SentenceTransformer(folder, trust_remote_code=trust, device="cpu")
    for key, items, options in asks:
        found[key] = model.encode(items, convert_to_numpy=True, **options)
np.savez(sys.argv[2], **found)
"""
needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed: pip install -r requirements/test.txt; the exported folders were NOT checked",
)


@cache
def items(count: int = ROWS) -> list[Item]:
    """Texts of several lengths, pictures of several shapes, sound of several lengths; every
    seventh lacks one of them.
    """
    source = np.random.default_rng(0)
    found = []
    for number in range(count):
        text = " ".join(source.choice(WORDS, source.integers(1, 9)))
        picture, sound = io.BytesIO(), io.BytesIO()
        Image.fromarray(
            source.integers(0, 255, (9 + number % 5, 8 + number % 3, 3), dtype=np.uint8)
        ).save(picture, "PNG")
        soundfile.write(
            sound, 0.1 * source.standard_normal(6000 + 3000 * (number % 9)), 16000, format="WAV"
        )
        lacks = number % 7 == 3
        fields = {} if lacks and number % 2 else {"title": {"en": text}}
        found.append(
            Item(
                str(number),
                fields,
                () if lacks and not number % 2 else (picture.getvalue(),),
                sound.getvalue(),
            )
        )
    return found


def shown(item: Item, view: ViewConfig, folder: Path) -> Any:
    """Return the item as a user writes it down in JSON: a text, or a dict of a text and paths."""
    values: dict[str, Any] = {}
    for modality in view.modalities:
        if modality == "text":
            values["text"] = item.fields["title"]["en"] if item.fields else ""
            continue
        content = (item.images[0] if item.images else None) if modality == "vision" else item.audio
        path = folder / f"{item.id}.{'png' if modality == 'vision' else 'wav'}"
        if content is not None:
            path.write_bytes(content)
        values[KEYS[modality]] = str(path) if content is not None else None
    return values["text"] if list(values) == ["text"] else values


def valid(view: ViewConfig) -> list[int]:
    """Return the rows that have something of the view."""
    has = {
        "text": lambda item: bool(item.fields),
        "vision": lambda item: bool(item.images),
        "audio": lambda item: item.audio is not None,
    }
    return [
        number
        for number, item in enumerate(items())
        if any(has[modality](item) for modality in view.modalities)
    ]


def trained(
    config: Config, folder: Path, views: Sequence[str], *, tensor: int = 1, seed: int = 3
) -> tuple[Path, dict[str, Tensor]]:
    """Save a checkpoint of a run whose weights have all moved; return it and the run's own
    vectors of `views`.
    """
    config.data.sets = {
        "things": DatasetConfig(shards=str(folder), views={name: VIEWS[name] for name in views})
    }
    checkpoint = folder_of(folder, 7)

    def run(rank: int, world: int) -> dict[str, Tensor]:
        parallel = join_layout(tensor)
        encoder = build_encoder(
            config.model, dataclasses.replace(config.parallel, tensor=tensor), parallel, seed=seed
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                # The same on every peer, and so no longer the same model at another tensor-parallel
                # size where it is cut: saved as it is.
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                if "lora" in name or "kinds" in name or "norm" in name:
                    local.add_(0.2 * torch.randn(local.shape, generator=generator))
        save(
            checkpoint,
            model=nn.ModuleDict({"encoder": encoder}),
            optimizer=None,
            extra={"step": 7},
            parallel=parallel,
        )
        here = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, tensor=tensor)
        )
        processor: Processor = config.model.component().processor(here)
        encoder.eval()
        with torch.no_grad():
            return {name: _encoded(encoder, processor, VIEWS[name]) for name in views}

    return checkpoint, run_ranks(run, tensor)[0]


def _encoded(encoder: nn.Module, processor: Processor, view: ViewConfig) -> Tensor:
    rows = [processor.row(item, view, DatasetConfig()) for item in items()]
    found: Tensor = encoder(processor.batch(rows, processor.tokens(rows, view), view)).fused
    return found


def read_without_sailplan(asked: list[Any], folder: Path) -> Mapping[str, np.ndarray]:
    """Encode in a process that cannot import sailplan or what only it needs.

    asked: (folder, trust, [(key, items, options)]).
    """
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "reader.py").write_text(READER.format(blocked=BLOCKED))
    around = {
        **os.environ,
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        str(folder / "reader.py"),
        str(folder / "asked.json"),
        str(folder / "found.npz"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=around)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "found.npz"))


def least_cosine(found: Any, wanted: Any) -> float:
    """Return the least cosine of rows."""
    left, right = (
        nn.functional.normalize(torch.as_tensor(np.asarray(each)).double(), dim=-1)
        for each in (found, wanted)
    )
    assert left.shape == right.shape
    return float((left * right).sum(-1).min())
