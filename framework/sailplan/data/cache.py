"""A bounded store of recently used values, counted in bytes, safe for the prefetch thread and
the evaluation together.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")
EPOCHS = 16  # the patience where sets are read epoch by epoch


@dataclass(slots=True)
class _Kept(Generic[Value]):
    value: Value
    size: int  # bytes
    used: int  # the look-up that asked for it last


class ByteCache(Generic[Value]):
    """Values whose sizes, as given to `put`, add up to at most `limit` bytes.

    patience: 0 drops the least recently used value for a new one. That keeps nothing of a set that
    is read epoch by epoch and is larger than the limit: each value goes before its turn comes. With
    a patience of n, a full store takes no new value until the oldest was not asked for during n
    times as many look-ups as there are values: it keeps its share of a set up to n times its size.
    A pickled copy starts empty: workers fill their own.
    """

    def __init__(self, limit: int, patience: int = 0) -> None:
        self.limit, self.patience, self.used = limit, patience, 0
        self._asked = 0
        self._values: OrderedDict[Hashable, _Kept[Value]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "patience": self.patience}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            self._asked += 1
            kept = self._values.get(key)
            if kept is None:
                return None
            kept.used = self._asked
            self._values.move_to_end(key)
            return kept.value

    def put(self, key: Hashable, value: Value, size: int) -> None:
        with self._lock:
            known = self._values.pop(key, None)
            self.used -= 0 if known is None else known.size
            while self._values and self.used + size > self.limit:
                oldest = next(iter(self._values.values()))
                if self._asked - oldest.used < self.patience * len(self._values):
                    return
                self._values.popitem(last=False)
                self.used -= oldest.size
            if size <= self.limit:
                self._values[key] = _Kept(value, size, self._asked)
                self.used += size
