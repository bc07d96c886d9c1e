"""Route: every rank gets from each owner exactly the key positions that its queries' mask touches.

In phase d a rank sends to the rank d places on and receives from the rank d places back, so that every link is used
once in each direction; phases in which a rank has nothing to do are skipped. Nothing is received that is not used,
which no schedule that moves keys and values can better.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn.bands import Array
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.schedules.base import Schedule


@dataclasses.dataclass(frozen=True)
class Route(Schedule):
    """Ask the owner for what the mask needs."""

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        return (q_ranks - k_ranks) % demand.size

    def moves(self, demand: Demand, rank: int) -> Moves:
        _, owner, start, stop = demand.keys_needed_by(rank).T
        phase = (rank - owner) % demand.size
        receives = np.stack([phase, owner, owner, start, stop], axis=1)[owner != rank]

        user, _, start, stop = demand.keys_requested_from(rank).T
        phase = (user - rank) % demand.size
        own = np.full_like(user, rank)
        sends = np.stack([phase, user, np.zeros_like(user), own, start, stop], axis=1)[user != rank]
        return Moves(receives, sends)

    def received_tokens(self, requested: Array, size: int) -> int:
        foreign = requested[requested[:, Q_RANK] != requested[:, K_RANK]]
        return int((foreign[:, 3] - foreign[:, 2]).sum())

    def __str__(self) -> str:
        return "route"
