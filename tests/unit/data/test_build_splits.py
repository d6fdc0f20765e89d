"""What is held out must be decided by the strings alone, and nothing may be on both sides."""

from quickstart_data.splits import (
    HELD_OUT,
    TRAIN,
    drop_aliases_of_the_other_side,
    hold_out_keywords,
    separate,
    split_by_name,
    training_texts,
)
from sailplan.data.writer import Record


def item(name: str, split: str, title: dict, **fields) -> Record:
    return Record({"id": f"icons/{name}", "split": split, "fields": {"title": title, **fields}})


def test_side_depends_on_the_name_alone():
    names = [f"thing {n}" for n in range(2000)]
    sides = split_by_name(names)
    assert dict(zip(names, sides, strict=True)) == dict(
        zip(names[::-1], split_by_name(names[::-1]), strict=True)
    )
    assert 0.08 < sides.count(HELD_OUT) / len(sides) < 0.12


def test_skin_tones_case_and_equal_pictures_share_a_side():
    for n in range(60):
        sides = split_by_name(
            [f"hand {n}", f"Hand {n}: dark skin tone", f"other {n}"], [f"a{n}", f"b{n}", f"a{n}"]
        )
        assert len(set(sides)) == 1


def test_translations_on_both_sides_are_removed_from_one():
    train = item("a", TRAIN, {"en": "rabbit", "de": "Hase"})
    held = item("b", HELD_OUT, {"en": "hare", "de": "hase", "fr": "lièvre"})
    also = item("c", TRAIN, {"en": "bunny", "nl": "HARE"})
    assert separate([train, held, also]) == 2
    assert held.body["fields"]["title"] == {"en": "hare", "fr": "lièvre"}
    assert also.body["fields"]["title"] == {"en": "bunny"}


def test_no_training_alias_is_a_held_out_name():
    train = item("a", TRAIN, {"en": "bell"}, aliases={"en": ["Alarm", "ring"]})
    held = item("b", HELD_OUT, {"en": "alarm"}, aliases={"en": ["bell", "siren"]})
    assert drop_aliases_of_the_other_side([train, held]) == 2
    assert train.body["fields"]["aliases"] == {"en": ["ring"]}
    assert held.body["fields"]["aliases"] == {"en": ["siren"]}


def test_held_out_keywords_are_unseen_everywhere():
    words = [f"word{n}" for n in range(600)]
    records = [
        item("a", TRAIN, {"en": "word7"}, tags={"en": words}),
        item("b", TRAIN, {"en": "x"}, tags={"de": [w.upper() for w in words]}),
    ]
    known = training_texts(records)
    distinct = hold_out_keywords(records, known)
    held = {
        word.lower()
        for record in records
        for one in record.body["held_out_tags"].values()
        for word in one
    }
    kept = {
        word.lower()
        for record in records
        for one in record.body["fields"]["tags"].values()
        for word in one
    }
    assert len(held) == distinct and not held & kept and held | kept == set(words)
    assert 70 < distinct < 130
    assert "word7" in kept, "a keyword that is a training title is not unseen"
