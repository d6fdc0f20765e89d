"""The committed quick-start pack: whole, decodable, and with nothing of the held-out side in
training.
"""

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import soundfile
import webdataset
from PIL import Image
from tokenizers import Tokenizer

from quickstart_data.splits import normal

PACK = Path(__file__).parents[3] / "data" / "quickstart"
ITEMS = ("emoji", "icons", "prompts")


def read(name: str) -> list[dict]:
    """The records of a set: JSON bodies, with the encoded image and sound under "webp" and
    "ogg".
    """
    records = []
    for path in sorted((PACK / name).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                extension = member.name.rsplit(".", 1)[1]
                if extension == "json":
                    records.append(json.loads(content))
                else:
                    records[-1][extension] = content
    return records


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((PACK / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sets(manifest) -> dict[str, list[dict]]:
    return {name: read(name) for name in manifest["sets"]}


def strings(records: list[dict], split: str, *fields: str) -> set[str]:
    found = set()
    for record in records:
        if record["split"] == split:
            for field in fields:
                for value in (
                    (record if field == "text" else record["fields"]).get(field, {}).values()
                ):
                    found.update(map(normal, [value] if isinstance(value, str) else value))
    return found


def test_shards_are_those_of_the_manifest(manifest):
    listed = {
        name: digest for one in manifest["sets"].values() for name, digest in one["shards"].items()
    }
    assert set(listed) == {str(path.relative_to(PACK)) for path in PACK.rglob("*.tar")}
    listed["tokenizer.json"] = manifest["tokenizer"]["sha256"]
    for name, digest in listed.items():
        assert hashlib.sha256((PACK / name).read_bytes()).hexdigest() == digest, name


def test_counts_are_those_of_the_manifest_and_of_the_readme(manifest, sets):
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    for name, records in sets.items():
        splits = [record["split"] for record in records]
        train, held = splits.count("train"), splits.count("held_out")
        assert manifest["sets"][name]["splits"] == {"train": train, "held_out": held}
        assert (
            len({record["id"] for record in records})
            == len(records)
            == manifest["sets"][name]["records"]
            == train + held
        )
        assert f"| `{name}` | {train + held:,} | {train:,} | {held:,} |" in readme


def test_no_name_is_on_both_sides(sets):
    named = sets["emoji"] + sets["icons"] + sets["icon_choices"]
    held = strings([one for one in named if "fields" in one], "held_out", "title") | strings(
        sets["icon_choices"], "held_out", "text"
    )
    items = sets["emoji"] + sets["icons"]
    assert not held & strings(items, "train", "title")
    assert not held & strings(sets["icon_choices"], "train", "text")
    assert not strings(items, "held_out", "title") & strings(items, "train", "aliases")
    assert not strings(sets["prompts"], "held_out", "asr") & strings(
        sets["prompts"], "train", "asr"
    )


def test_no_picture_is_on_both_sides(sets):
    for name in ("emoji", "icons"):
        train = {record["webp"] for record in sets[name] if record["split"] == "train"}
        assert not train & {
            record["webp"] for record in sets[name] if record["split"] == "held_out"
        }


def test_held_out_keywords_occur_in_no_training_text(sets):
    held, seen = set(), set()
    for record in sets["emoji"] + sets["icons"]:
        held.update(normal(word) for words in record["held_out_tags"].values() for word in words)
        seen.update(normal(word) for words in record["fields"]["tags"].values() for word in words)
    for name in ITEMS:
        seen |= strings(sets[name], "train", "title", "aliases", "asr")
    assert len(held) > 5000
    assert not held & (seen | strings(sets["icon_choices"], "train", "text"))


def test_every_item_that_is_referred_to_exists(sets):
    split = {record["id"]: record["split"] for name in ITEMS for record in sets[name]}
    assert all(split[choice["item"]] == choice["item_split"] for choice in sets["icon_choices"])
    for history in sets["icon_histories"]:
        assert len(set(history["items"])) == len(history["items"]) >= 3
        assert set(history["items"]) <= set(history["source_items"]) <= set(split)
        assert history["split"] == "train" or len(history["items"]) >= 5
    for pair in sets["emoji_pairs"]:
        assert split[pair["query"]] == split[pair["item"]] == pair["split"]
        assert 0 <= pair["score"] <= 1


def test_images_are_64_pixels_rgb(sets):
    for record in random.Random(0).sample(sets["emoji"] + sets["icons"], 200):
        image = Image.open(io.BytesIO(record["webp"]))
        image.load()
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "WEBP"), record["id"]


def test_audio_is_mono_and_as_long_as_it_says(sets):
    for record in random.Random(0).sample(sets["prompts"], 40):
        samples, rate = soundfile.read(io.BytesIO(record["ogg"]))
        assert samples.ndim == 1 and rate == 8000
        assert abs(len(samples) / rate - record["seconds"]) < 0.01, record["id"]


def test_webdataset_reads_a_shard():
    shard = str(PACK / "prompts" / "prompts-000000.tar")
    samples = list(
        webdataset.WebDataset(shard, shardshuffle=False, nodesplitter=None, workersplitter=None)
    )
    assert len(samples) == 300 and {"json", "ogg", "__key__"} <= set(samples[0])


@pytest.mark.parametrize(
    "text",
    [
        "Grinning Face",
        "Привет, мир",
        "日本語の絵文字",
        "ภาษาไทย",
        "हिन्दी",
        "한국어",
        "naïve ﬁlm № 5 😀",
    ],
)
def test_tokenizer_round_trips(text):
    tokenizer = Tokenizer.from_file(str(PACK / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == normal(text)


def test_tokenizer_has_the_size_and_specials_that_models_rely_on(sets):
    tokenizer = Tokenizer.from_file(str(PACK / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 8192
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>", "<unk>")] == [
        0,
        1,
        2,
        3,
    ]
    titles = [record["fields"]["title"]["en"] for record in sets["emoji"] + sets["icons"]]
    tokens = sum(len(one.ids) for one in tokenizer.encode_batch(titles))
    assert 1 <= tokens / sum(len(title.split()) for title in titles) < 2
