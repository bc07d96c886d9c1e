"""PassQ: queries travel to the ranks that hold the keys their mask touches, and their partial states come home.

For few queries against many keys, as in cross-attention: keys and values stay where they are, and what travels depends
on the queries (pass-Q of arXiv 2411.01783, there in a ring). A query goes to each rank that has keys for it, by `Route`
of the transposed mask; there it becomes a state, which comes home and is merged in the order of the phases. Backward,
the query goes there again with the gradient of its output and what the mechanism has kept; the gradients of keys and
values stay with them, and that of the query comes home.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ringattn.bands import Array
from ringattn.errors import UnsupportedError
from ringattn.payloads.base import Payload
from ringattn.payloads.queries import Queries
from ringattn.schedules.route import Route


@dataclasses.dataclass(frozen=True)
class PassQ(Route):
    """Ask the owners of queries for them, in place of the owners of keys. Its demand is that of the transposed mask."""

    payload: ClassVar[Payload] = Queries()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.node_aware:
            raise UnsupportedError("PassQ's states go straight home, and are not merged on their way. Use Route.")

    def received_tokens(self, requested: Array, size: int) -> int:
        return 0

    def __str__(self) -> str:
        return "passq"
