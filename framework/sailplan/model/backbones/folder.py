"""A folder of published weights: its config.json, and tensors that are read slice by slice.

Nothing is read when a folder is opened but the files' headers: names, shapes and types. Every
problem is a ConfigurationError of one line that starts with the configuration's key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
PROCESSOR = "preprocessor_config.json"
DTYPES = ("F64", "F32", "BF16", "F16", "I64")  # the last: indices, which are compared or copied


def resolve(key: str, place: str) -> Path:
    """The local folder of a path, or of a hub id such as Qwen/Qwen3-0.6B, which is downloaded or
    taken from the hub's cache.
    """
    if Path(place).is_dir():
        return Path(place)
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise ConfigurationError(
            f"{key}={place}: no such folder; expected a folder with config.json and safetensors "
            "files, or a hub id OWNER/NAME"
        )
    try:
        return Path(
            snapshot_download(place, allow_patterns=[CONFIG, PROCESSOR, "*.safetensors", INDEX])
        )
    except Exception as error:  # of many kinds: offline, unknown id, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"{key}={place}: neither a folder here nor to be had from the hub ({reason}); give a "
            "local folder"
        ) from error


class PublishedFolder:
    """Headers of a folder's safetensors files, and access to slices of its tensors.

    bytes_read and largest_read count what `read` handed out: the proof that a rank reads its own
    part only.
    """

    def __init__(self, key: str, place: str) -> None:
        """Raises ConfigurationError for a folder without config.json, a missing or broken file,
        or another type than DTYPES.
        """
        self.key, self.path = key, resolve(key, place)
        self.config: JsonObject = self._json(CONFIG)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.bytes_read = self.largest_read = 0
        self._opened: JsonObject = {}
        if (self.path / INDEX).is_file():
            listed: dict[str, str] = self._json(INDEX)["weight_map"]
        elif (self.path / SINGLE).is_file():
            listed = dict.fromkeys(self._header(SINGLE), SINGLE)
        else:
            raise ConfigurationError(
                f"{key}={self.path}: found neither {SINGLE} nor {INDEX}; expected weights in "
                "safetensors format"
            )
        for file in sorted(set(listed.values())):
            held = self._header(file)
            for name in (name for name, where in listed.items() if where == file):
                if name not in held:
                    raise ConfigurationError(
                        f"{key}={self.path}: {INDEX} promises {name} in {file}, which lacks it; "
                        "download the folder again"
                    )
                self.files[name] = file
                self.dtypes[name], self.shapes[name] = held[name]
                if self.dtypes[name] not in DTYPES:
                    raise ConfigurationError(
                        f"{key}={self.path}: {name} has the type {self.dtypes[name]}; expected one "
                        f"of {', '.join(DTYPES)}"
                    )

    def _json(self, name: str) -> JsonObject:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{self.key}={self.path}: {name} cannot be read ({type(error).__name__}); expected "
                "a complete model folder"
            ) from error

    @contextmanager
    def _named(self, file: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(
                f"{self.key}={self.path}: {file} is missing or broken ({error}); download the "
                "folder again"
            ) from error

    def _header(self, file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        with self._named(file), safe_open(self.path / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Rows (and of a matrix columns) of a tensor, in the file's own type; nothing else of it
        is read.
        """
        file = self.files[name]
        with self._named(file):
            if file not in self._opened:
                self._opened = {
                    file: safe_open(self.path / file, framework="pt")
                }  # one file at a time
            whole = self._opened[file].get_slice(name)
            place = (rows, columns)[: len(self.shapes[name])]
            value: Tensor = whole[place] if place else self._opened[file].get_tensor(name)
        self.bytes_read += value.nbytes
        self.largest_read = max(self.largest_read, value.nbytes)
        return value
