"""Risks: a tar as people make it (links, joined archives, directories, long names) of which half
the records are lost unseen.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from sailplan.data.tar import scan
from sailplan.data.testing import png, tar_bytes
from sailplan.errors import BadDataError


def shard(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    return path


def part(first: int, count: int = 3) -> bytes:
    return tar_bytes(
        [
            member
            for n in range(first, first + count)
            for member in ((f"{n:03d}.png", png(n)), (f"{n:03d}.txt", b"red"))
        ]
    )


def test_joined_archives_are_read_to_their_end(tmp_path: Path) -> None:
    content = part(0) + part(3) + b"\0" * 20480 + part(6)
    found = scan(shard(tmp_path, content))
    assert [record.key for record in found.records] == [
        f"{n:03d}" for n in range(9)
    ] and not found.passed
    for n, record in enumerate(found.records):
        extension, offset, size = record.members[0]
        assert extension == "png" and content[offset : offset + size] == png(n)


def test_bytes_that_are_no_archive_after_the_end_are_counted_and_empty_ones_are_not(
    tmp_path: Path,
) -> None:
    assert not scan(shard(tmp_path, part(0) + b"\0" * 40960)).passed
    found = scan(shard(tmp_path, part(0) + b"a signature".ljust(512, b"\1")))
    assert len(found.records) == 3 and found.passed["bytes after an end mark"][0] == 512


def test_a_joined_archive_that_is_cut_is_no_whole_tar(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="end mark"):
        scan(shard(tmp_path, part(0) + part(3)[: 512 * 5]))


def test_links_stand_for_what_they_point_at(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:

        def add(
            name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
        ) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, link
            archive.addfile(info, io.BytesIO(content))

        add("d", kind=tarfile.DIRTYPE)
        add("d/a.png", png(1))
        add("d/a.txt", b"one")
        add("d/b.png", kind=tarfile.LNKTYPE, link="d/a.png")
        add("d/b.txt", kind=tarfile.SYMTYPE, link="./c.txt")  # points ahead, from its own folder
        add("d/c.png", kind=tarfile.SYMTYPE, link="../d/b.png")  # a link to a link
        add("d/c.txt", b"three")
        add("d/e.png", kind=tarfile.SYMTYPE, link="/elsewhere/x.png")
        add("d/e.txt", kind=tarfile.SYMTYPE, link="e.txt")  # in a circle
        add("d/f.txt", b"six")
        add("d/pipe.txt", kind=tarfile.FIFOTYPE)
        add("README", b"no ending")
    found = scan(shard(tmp_path, file.getvalue()))
    content = file.getvalue()
    read = {
        record.key: [content[offset : offset + size] for _, offset, size in record.members]
        for record in found.records
    }
    assert read == {
        "d/a": [png(1), b"one"],
        "d/b": [png(1), b"three"],
        "d/c": [png(1), b"three"],
        "d/f": [b"six"],
    }
    assert {what: count for what, (count, _) in found.passed.items()} == {
        "links to what the archive does not hold": 2,
        "members that are no plain files": 1,
        "members without an ending": 1,
    }


def test_tars_of_the_usual_programs_are_read(tmp_path: Path) -> None:
    """GNU tar from a folder: directories, hard links of equal files, names of 200 bytes, members
    added later with -r.
    """
    folder = tmp_path / "set"
    (folder / ("long" * 40)).mkdir(parents=True)
    for n in range(3):
        (folder / ("long" * 40) / f"{n}.png").write_bytes(png(n))
        (folder / ("long" * 40) / f"{n}.txt").write_bytes(b"red")
    (folder / "9.png").write_bytes(png(9))
    os.link(folder / "9.png", folder / "9b.png")
    (folder / "9b.txt").write_bytes(b"nine")
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
        first = [name for name in names if not name.startswith("9")]
        subprocess.run(
            ["tar", f"--format={form}", "--no-recursion", "-cf", path, "-C", folder, *first],
            check=True,
            timeout=20,
        )
        subprocess.run(
            ["tar", f"--format={form}", "-rf", path, "-C", folder, "9.png", "9b.png", "9b.txt"],
            check=True,
            timeout=20,
        )
        found, content = scan(path), path.read_bytes()
        assert [record.key.rpartition("/")[2] for record in found.records] == [
            "0",
            "1",
            "2",
            "9",
            "9b",
        ] and not found.passed, form
        _, offset, size = found.records[4].members[0]
        assert content[offset : offset + size] == png(9), (
            "a hard link has the content of the file that it is"
        )
