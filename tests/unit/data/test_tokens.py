"""Texts are tokenised once in a batch, and not again in the next epoch, as far as there is room."""

from __future__ import annotations

import pickle

from sailplan.data.cache import ByteCache
from sailplan.data.tokens import TokenCache


class Counting:
    """A tokenizer of one id a letter that counts its calls and texts."""

    def __init__(self) -> None:
        self.calls, self.texts = 0, 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.calls += 1
        self.texts += len(texts)
        return [[ord(letter) for letter in text] for text in texts]


def epochs(tokens: TokenCache, texts: list[str], batch: int, count: int) -> list[int]:
    """Texts that the tokenizer is asked for in each epoch."""
    asked = []
    for _ in range(count):
        encode = Counting()
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            assert tokens.of(part, encode) == Counting()(part)
        asked.append(encode.texts)
    return asked


def test_a_batch_is_one_call_and_a_known_text_none() -> None:
    tokens, encode = TokenCache(), Counting()
    assert tokens.of(["moon", "", "moon", "fish"], encode) == Counting()(
        ["moon", "", "moon", "fish"]
    )
    assert (encode.calls, encode.texts) == (1, 3)
    tokens.of(["fish", "moon"], encode)
    assert (encode.calls, encode.texts) == (1, 3)
    tokens.of(["moon"], encode, prompt="Find:")  # its ids are others
    assert (encode.calls, encode.texts) == (2, 4)
    assert pickle.loads(pickle.dumps(tokens)).of(["moon"], encode) == [[109, 111, 111, 110]]
    assert encode.texts == 5, "a worker fills its own"


def test_an_epoch_tokenises_what_there_was_no_room_for_and_no_more() -> None:
    texts = [f"text number {number:06}" for number in range(1000)]
    assert epochs(TokenCache(), texts, 50, 3) == [1000, 0, 0]
    entry = 200 + 2 * len(texts[0]) + 4 * len(texts[0])
    assert epochs(TokenCache(limit=250 * entry), texts, 50, 4) == [1000, 750, 750, 750]


def test_room_goes_to_new_texts_where_the_old_ones_are_not_asked_for() -> None:
    entry = 200 + 6 * len("text number 000000")
    tokens = TokenCache(limit=100 * entry)
    epochs(tokens, [f"text number {number:06}" for number in range(100)], 50, 1)
    others = [f"text number {number:06}" for number in range(500, 600)]
    asked = epochs(tokens, others, 50, 40)
    assert asked[:10] == [100] * 10 and asked[-1] == 0, asked


def test_without_patience_the_least_recently_used_goes() -> None:
    cache = ByteCache[str](30)
    for name in "abc":
        cache.put(name, name, 10)
    assert cache.get("a") == "a"
    cache.put("d", "d", 10)
    assert [cache.get(name) for name in "abcd"] == ["a", None, "c", "d"]
    assert cache.used == 30
    cache.put("e", "e", 31)
    assert cache.get("e") is None and cache.used <= 30
