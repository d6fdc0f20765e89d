"""Fetch the six source packages with their ordinary clients and unpack them; nothing is installed.

Versions are pinned. A folder given with --sources keeps the archives, so that a second run needs no
network.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sailplan.data.writer import BuildError


@dataclass(frozen=True)
class Source:
    """One package: `kind` says which client fetches it, `archive` is a glob for the file that
    the client writes.
    """

    name: str
    version: str
    kind: str  # npm | debian | wheel
    archive: str
    licence: str


SOURCES = (
    Source("emojibase-data", "17.0.0", "npm", "emojibase-data-17.0.0.tgz", "MIT; Unicode-3.0"),
    Source("@mdi/svg", "7.4.47", "npm", "mdi-svg-7.4.47.tgz", "Apache-2.0"),
    Source("@mdi/font", "7.4.47", "npm", "mdi-font-7.4.47.tgz", "Apache-2.0"),
    Source(
        "homeassistant",
        "2026.2.3",
        "wheel",
        "homeassistant-2026.2.3-py3-none-any.whl",
        "Apache-2.0",
    ),
    Source(
        "fonts-noto-color-emoji",
        "2.042-0+deb12u1",
        "debian",
        "fonts-noto-color-emoji_2.042-*_all.deb",
        "OFL-1.1",
    ),
    Source(
        "asterisk-core-sounds-en",
        "1.6.1-1",
        "debian",
        "asterisk-core-sounds-en_1.6.1-1_all.deb",
        "CC-BY-SA-3.0",
    ),
    Source(
        "asterisk-core-sounds-en-wav",
        "1.6.1-1",
        "debian",
        "asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
        "CC-BY-SA-3.0",
    ),
)


def _run(command: list[str], folder: Path, what: str) -> None:
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} is not installed; it is needed to get {what}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise BuildError(f"{' '.join(command[:2])} could not get {what}: {last}")


def _fetch(source: Source, folder: Path) -> None:
    what = f"{source.name} {source.version}"
    if source.kind == "npm":
        _run(["npm", "pack", "--silent", f"{source.name}@{source.version}"], folder, what)
    elif source.kind == "debian":
        _run(["apt-get", "download", f"{source.name}={source.version}"], folder, what)
    else:
        pin = f"{source.name}=={source.version}"
        options = ["--no-deps", "--python-version", "3.14", "--only-binary=:all:", "--dest", "."]
        _run(["pip", "download", "--quiet", *options, pin], folder, what)


def archive(source: Source, folder: Path) -> Path:
    """The archive of a source, fetched if it is not in `folder` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(source.archive)):
        _fetch(source, folder)
    found = sorted(folder.glob(source.archive))
    if not found:
        raise BuildError(f"{source.name}: the client wrote no file {source.archive} into {folder}")
    return found[0]


def _unpack(path: Path, source: Source, folder: Path) -> None:
    if source.kind == "npm":
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    elif source.kind == "debian":
        _run(
            ["dpkg-deb", "-x", str(path.resolve()), str(folder.resolve())],
            folder,
            f"the files of {path.name}",
        )


@dataclass(frozen=True)
class Unpacked:
    """Where the readers find their input. `wheel` stays a zip: it is only read, never installed."""

    folders: dict[str, Path]
    wheel: zipfile.ZipFile
    described: list[
        dict[str, str]
    ]  # name, version, archive, sha256, licence of each source, for the manifest

    def file(self, source: str, pattern: str) -> Path:
        """The one file of a source that matches a glob pattern."""
        found = sorted(self.folders[source].glob(pattern))
        if not found:
            raise BuildError(f"{source} has no file {pattern}; is it another version?")
        return found[0]


def unpack_all(folder: Path, scratch: Path) -> Unpacked:
    """Fetch what is missing into `folder`, unpack into `scratch`."""
    folders, described, wheel = {}, [], None
    for source in SOURCES:
        path = archive(source, folder)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        described.append(
            {
                "name": source.name,
                "version": source.version,
                "archive": path.name,
                "sha256": sha256,
                "licence": source.licence,
            }
        )
        try:
            if source.kind == "wheel":
                wheel = zipfile.ZipFile(path)
                continue
            folders[source.name] = scratch / source.name.replace("/", "-")
            folders[source.name].mkdir(parents=True, exist_ok=True)
            _unpack(path, source, folders[source.name])
        except (zipfile.BadZipFile, tarfile.TarError):
            raise BuildError(f"{path} is damaged; delete it and run again") from None
    assert wheel is not None
    return Unpacked(folders, wheel, described)
