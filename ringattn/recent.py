"""What was used last: a mapping that forgets what was not asked for the longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class Recent(OrderedDict[Hashable, Any]):
    """At most ``limit`` values by key; ``move_to_end`` is how one is used. Forgetting ends nothing that is in use."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def keep(self, key: Hashable, value: Any) -> None:
        """Keeps a value, and forgets the one that was used the longest ago."""
        self[key] = value
        if len(self) > self._limit:
            self.popitem(last=False)
