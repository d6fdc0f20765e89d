"""Token ids of recent texts: a text is tokenised once in a batch, and not again in the next epoch.

What a text's tokens are depends on the tokenizer alone, so each tokenizer keeps its own, per
process. They are kept as numbers of four bytes, and those of a set larger than the room are kept in
part: what is there stays as long as it is asked for (`data.cache`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

from sailplan.data.cache import EPOCHS, ByteCache

KNOWN_BYTES = 32 << 20


class TokenCache:
    """Token ids by text, of at most `limit` bytes; a pickled copy starts empty."""

    def __init__(self, limit: int = KNOWN_BYTES) -> None:
        self._known: ByteCache[array[int]] = ByteCache(limit, patience=EPOCHS)

    def of(
        self,
        texts: Sequence[str],
        encode: Callable[[list[str]], Iterable[Sequence[int]]],
        prompt: str = "",
    ) -> list[list[int]]:
        """Return the token ids of each text.

        encode: called at most once, with the different texts that are not known. prompt: what the
        ids depend on beside the text.
        """
        found = {text: self._known.get((prompt, text)) for text in texts}
        unknown = [text for text, ids in found.items() if ids is None]
        if unknown:
            for text, ids in zip(unknown, encode(unknown), strict=True):
                found[text] = kept = array("i", ids)
                self._known.put((prompt, text), kept, 200 + 2 * len(text) + 4 * len(kept))
        return [ids.tolist() for ids in map(found.__getitem__, texts) if ids is not None]
