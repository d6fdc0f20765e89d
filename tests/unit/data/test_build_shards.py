"""The same records must give the same bytes, or a rebuild could never be compared with what is
committed.
"""

import io
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from quickstart_data.__main__ import main
from quickstart_data.audio import opus
from quickstart_data.images import webp
from quickstart_data.pairs import MOST, emoji_pairs
from quickstart_data.sources import SOURCES, archive, unpack_all
from sailplan.data.writer import BuildError, Record, write_shards


def made_up(count: int) -> list[Record]:
    """`count` records with a picture and 0.2 s of sound each, made anew at every call."""
    records = []
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        wave = (8000 * np.sin(np.arange(1600) * (0.05 + 0.01 * n))).astype(np.int16)
        body = {
            "split": "train",
            "id": f"set/one.{n}/of",
            "fields": {"title": {"ru": "имя", "en": f"name {n}"}},
        }
        records.append(
            Record(body, webp=webp(Image.fromarray(pixels), lossless=True), ogg=opus(wave, 8000))
        )
    return records


def test_two_builds_write_equal_bytes(tmp_path):
    first = write_shards(made_up(5), tmp_path / "a", "set", per_shard=2)
    second = write_shards(made_up(5), tmp_path / "b", "set", per_shard=2)
    assert [path.name for path in first] == ["set-000000.tar", "set-000001.tar", "set-000002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_record_is_json_then_image_then_sound_under_one_key(tmp_path):
    (path,) = write_shards(made_up(1), tmp_path, "set", per_shard=10)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        "one_0__of.json",
        "one_0__of.webp",
        "one_0__of.ogg",
    ]
    assert {(member.mtime, member.uid, member.gid) for member in members} == {(0, 0, 0)}


def test_a_smaller_rebuild_leaves_no_old_shard(tmp_path):
    write_shards(made_up(4), tmp_path, "set", per_shard=1)
    write_shards(made_up(2), tmp_path, "set", per_shard=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_records_with_one_key_are_refused(tmp_path):
    with pytest.raises(BuildError, match="share a key: a_b"):
        write_shards([Record({"id": "set/a.b"}), Record({"id": "set/a_b"})], tmp_path, "set", 10)


def test_long_ids_fit_a_tar_header():
    first, second = (
        Record({"id": "set/" + "x" * 200 + "1"}),
        Record({"id": "set/" + "x" * 200 + "2"}),
    )
    assert len(first.key) <= 90 and first.key != second.key


def test_opus_survives_the_rewriting_of_its_pages():
    wave = (8000 * np.sin(np.arange(12000) * 0.1)).astype(np.int16)
    encoded = opus(wave, 8000)
    decoded, rate = soundfile.read(io.BytesIO(encoded))
    assert rate == 8000 and len(decoded) == len(wave)
    assert np.corrcoef(decoded, wave)[0, 1] > 0.95
    assert encoded == opus(wave, 8000)


def test_pairs_stay_within_a_split_and_a_number():
    def emoji(n: int) -> Record:
        tags = {"en": ["face", f"t{n % 7}", f"u{n % 3}"]}
        body = {
            "id": f"emoji/{n:04X}",
            "split": "held_out" if n % 10 == 0 else "train",
            "group": "g",
            "subgroup": f"s{n % 4}",
        }
        return Record(body | {"fields": {"tags": tags}})

    records = [emoji(n) for n in range(80)]
    split = {record.id: record.body["split"] for record in records}
    pairs = [record.body for record in emoji_pairs(records)]
    assert pairs and all(
        split[pair["query"]] == split[pair["item"]] == pair["split"] for pair in pairs
    )
    touching = [one for pair in pairs for one in (pair["query"], pair["item"])]
    assert max(map(touching.count, set(touching))) <= MOST


def test_a_missing_client_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path / "out"), "--sources", str(tmp_path / "sources")]) == 1
    assert (
        capsys.readouterr().err
        == "error: npm is not installed; it is needed to get emojibase-data 17.0.0\n"
    )


def test_an_archive_that_is_there_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "mdi-svg-7.4.47.tgz").write_bytes(b"x")
    source = next(source for source in SOURCES if source.name == "@mdi/svg")
    assert archive(source, tmp_path).name == "mdi-svg-7.4.47.tgz"


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "emojibase-data-17.0.0.tgz").write_bytes(b"half a download")
    with pytest.raises(BuildError, match=r"emojibase-data-17.0.0.tgz is damaged; delete it"):
        unpack_all(tmp_path, tmp_path / "scratch")
