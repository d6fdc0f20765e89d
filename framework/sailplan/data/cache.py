"""A bounded store of recently used values, counted in bytes, safe for the prefetch thread and
the evaluation together.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
DECODED_BYTES = 128 << 20  # pictures and spectrograms kept between epochs, per process


class ByteCache(Generic[Value]):
    """Least recently used values are dropped once the sizes given to `put` add up to more than
    `limit` bytes.

    A pickled copy starts empty: workers fill their own.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        with self._lock:
            self.used += size - self._values.pop(key, (value, 0))[1]
            self._values[key] = (value, size)
            while self.used > self.limit:
                self.used -= self._values.popitem(last=False)[1][1]
