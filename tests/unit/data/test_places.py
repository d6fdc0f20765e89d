"""Risks: shards in folders that cannot be written end in a traceback, or in an index that is
old.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sailplan.config.schema import Config
from sailplan.data import places
from sailplan.data.datasets import open_datasets
from sailplan.data.index import ShardIndex
from sailplan.data.shards import resolve
from sailplan.data.testing import item_record, json_member, write_set
from sailplan.errors import BadDataError, ConfigurationError

Make = Callable[..., Config]


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder refuse to be written, as it does to anybody but root."""
    closed: list[Path] = []
    allowed, write = os.access, Path.mkdir

    def access(path: Path, mode: int) -> bool:
        return allowed(path, mode) and not (
            mode == os.W_OK
            and any(folder == Path(path) or folder in Path(path).parents for folder in closed)
        )

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        if any(folder in self.parents for folder in closed):
            raise PermissionError(13, "Permission denied", str(self))
        write(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    return closed.append


def shards_of(config: Config, folder: Path) -> Path:
    made = write_set(folder, [item_record(number) for number in range(20)])
    config.data.sets["things"].shards = str(made)
    return made


def test_index_and_lengths_go_to_the_cache_where_the_shards_cannot_be_written(
    make_config: Make, tmp_path: Path, read_only: Callable[[Path], None]
) -> None:
    config = make_config(cache=str(tmp_path / "cache"))
    folder = shards_of(config, tmp_path / "set")
    read_only(folder)
    assert (
        len(open_datasets(config, names=["things"])["things"]) == 20
        and not (folder / ".index").exists()
    )
    kept = sorted(
        path.suffix for path in (tmp_path / "cache" / "index").rglob("*") if path.is_file()
    )
    assert kept.count(".manifest") == 2 and kept.count(".tables") == 2


def test_an_old_index_in_a_folder_that_cannot_be_written_is_replaced_in_the_cache(
    tmp_path: Path, read_only: Callable[[Path], None]
) -> None:
    folder = write_set(tmp_path / "set", [[json_member("a", {"id": "one"})]])
    assert ShardIndex(sorted(folder.glob("*.tar"))).ids([0]) == ["one"]
    write_set(folder, [[json_member("a", {"id": "two"})]])
    read_only(folder)
    assert ShardIndex(sorted(folder.glob("*.tar")), tmp_path / "cache").ids([0]) == ["two"]


@pytest.mark.parametrize("cache", ["a file", "below a file", "closed"])
def test_a_cache_that_cannot_be_written_is_named(
    make_config: Make, tmp_path: Path, read_only: Callable[[Path], None], cache: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir()
    place = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
        "closed": tmp_path / "closed" / "x",
    }[cache]
    config = make_config(cache=str(place))
    read_only(shards_of(config, tmp_path / "set"))
    read_only(tmp_path / "closed")
    with pytest.raises(
        ConfigurationError,
        match=r"data\.cache=.* cannot be written \(.*\); set data\.cache to a folder",
    ) as caught:
        open_datasets(config, names=["things"])
    assert "\n" not in str(caught.value)


def test_a_user_without_a_home_needs_a_cache_only_where_shards_cannot_be_written(
    make_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_only: Callable[[Path], None],
) -> None:
    def nowhere(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(places.Path, "expanduser", nowhere)
    config = make_config()
    folder = shards_of(config, tmp_path / "set")
    assert len(open_datasets(config, names=["things"])["things"]) == 20
    other = shards_of(config, tmp_path / "other")
    read_only(other)
    with pytest.raises(
        ConfigurationError, match=r"data\.cache is not set, and this user has no home"
    ):
        open_datasets(config, names=["things"])
    assert (folder / ".index").is_dir()


def test_shards_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path / "set", [[json_member("a", {"id": "one"})]])
    (folder / "._part-000.tar").write_bytes(b"a sidecar")
    assert [path.name for path in resolve("mine", str(folder))] == ["part-000.tar"]

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refused)
        with pytest.raises(
            ConfigurationError,
            match=r"data\.sets\.mine\.shards=.*: the folder cannot be read \(Permission denied\)",
        ):
            resolve("mine", str(folder))
    monkeypatch.setattr("sailplan.data.shard_table.scan", refused)
    with pytest.raises(BadDataError, match=r"part-000\.tar: cannot be read \(Permission denied\)"):
        ShardIndex(sorted(folder.glob("part*.tar")))
