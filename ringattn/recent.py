"""What was used last: a mapping that forgets what was not asked for the longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class Recent:
    """At most ``limit`` values by key. Forgetting one ends nothing: whoever uses it holds it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Any:
        """The value of this key, None where there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def keep(self, key: Hashable, value: Any) -> None:
        """Keeps a value, and forgets the one that was not asked for the longest."""
        self._values[key] = value
        if len(self._values) > self._limit:
            self._values.popitem(last=False)
