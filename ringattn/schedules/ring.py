"""Ring: every rank relays the keys it has just used to its right neighbour (Ring Attention, arXiv 2310.01889).

Only neighbours talk, which suits a ring of links. A shard travels no further than the last rank that needs any of
it, and from hop to hop shrinks to the rows that somebody further on still needs.
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
class Ring(Schedule):
    """Relay to the neighbour."""

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        return (q_ranks - k_ranks) % demand.size

    def moves(self, demand: Demand, rank: int) -> Moves:
        needed = demand.memo(_still_needed)
        hops = np.arange(1, demand.size)
        held, passed = (rank - hops) % demand.size, (rank + 1 - hops) % demand.size
        left, right = (rank - 1) % demand.size, (rank + 1) % demand.size

        start, stop = needed[held, hops].T
        receives = np.stack([hops, np.full_like(hops, left), held, start, stop], axis=1)[start < stop]
        start, stop = needed[passed, hops].T
        sends = np.stack([hops, np.full_like(hops, right), hops - 1, passed, start, stop], axis=1)[start < stop]
        return Moves(receives, sends)

    def received_tokens(self, requested: Array, size: int) -> int:
        owners, owner = np.unique(requested[:, K_RANK], return_inverse=True)
        needed = _needed_from_hop(requested, owner, len(owners), size)[:, 1:]
        return int(np.maximum(needed[..., 1] - needed[..., 0], 0).sum())

    def __str__(self) -> str:
        return "ring"


def _still_needed(demand: Demand) -> Array:
    """``[origin, hop, 2]``: the range of the origin's rows that ranks at this hop or further on use."""
    requested = np.concatenate(list(demand.keys_requested_from_all()))
    return _needed_from_hop(requested, requested[:, K_RANK], demand.size, demand.size)


def _needed_from_hop(requested: Array, owner: Array, owners: int, size: int) -> Array:
    """``[owner, hop, 2]``: the range of the rows requested of each owner by ranks at this hop or further on."""
    hop = (requested[:, Q_RANK] - requested[:, K_RANK]) % size
    owner, hop, first, last = (x[hop > 0] for x in (owner, hop, requested[:, 2], requested[:, 3]))
    start = np.full((owners, size), np.iinfo(np.int64).max)
    stop = np.zeros((owners, size), dtype=np.int64)
    np.minimum.at(start, (owner, hop), first)
    np.maximum.at(stop, (owner, hop), last)
    start = np.minimum.accumulate(start[:, ::-1], axis=1)[:, ::-1]
    stop = np.maximum.accumulate(stop[:, ::-1], axis=1)[:, ::-1]
    return np.stack([start, stop], axis=2)
