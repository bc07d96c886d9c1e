"""What a schedule's messages cost on links that were measured: how long the busiest rank waits for what it receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ringattn.bands import Array
from ringattn.plans.assembly import Moves

Floats = npt.NDArray[np.float64]

ROW_BYTES = 4096  # of a position: keys and values of 8 heads of 128 in two bytes; schedules are compared, not timed
MOST = 256  # ranks, between which all pairs can be looked at


@dataclasses.dataclass(frozen=True, eq=False)
class Links:
    """The links between the ranks that share a sequence.

    Attributes:
        latency: seconds, ``[ranks, ranks]``.
        bandwidth: bytes a second, ``[ranks, ranks]``.
    """

    latency: Floats
    bandwidth: Floats

    @property
    def size(self) -> int:
        return len(self.latency)

    def longest(self, moves: Iterable[Moves]) -> float:
        """Seconds in which the busiest rank receives what each of these receives, forward, by rank."""
        waits = [self._seconds(rank, each.receives) for rank, each in enumerate(moves)]
        return max(waits, default=0.0)

    def _seconds(self, rank: int, receives: Array) -> float:
        phase, peer, _, start, stop = receives.T
        messages = np.unique(np.stack([phase, peer]), axis=1)[1]
        moved = (stop - start) * ROW_BYTES / self.bandwidth[peer, rank]
        return float(self.latency[messages, rank].sum() + moved.sum())
