"""Wave: keys stay where they are, and blocks of queries are handed from rank to rank in the order of the keys.

For mechanisms that walk the keys in order (`mechanisms.ordered.Ordered`), such as monotonic attention: what a block of
queries needs of the keys before a rank's own is a number a query and head, and of the queries before it the weights of
one row, which the rank has kept. So rank r works on block t - r at step t, a wavefront of blocks + ranks - 1 steps;
backward it runs from the last rank and the last block. A rank waits in ranks - 1 of the steps: the smaller the blocks,
the smaller their share, and the more steps there are to begin.
"""

from __future__ import annotations

import dataclasses

from ringattn.checking import integer
from ringattn.schedules.base import Scheme


@dataclasses.dataclass(frozen=True)
class Wave(Scheme):
    """An immutable value.

    Attributes:
        block: queries at most in a block. A block's planes of probabilities take its queries times its rank's keys, a
            few times over, and what is kept for the backward pass the keys once for every block.
    """

    block: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", integer(self.block, "Wave's block", least=1, needed="a number of queries"))

    def __str__(self) -> str:
        return "wave"
