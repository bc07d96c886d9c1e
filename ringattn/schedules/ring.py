"""Ring: every rank relays the keys it has just used to its right neighbour (Ring Attention, arXiv 2310.01889).

Only neighbours talk, which suits a ring of links. A shard travels no further than the last rank that needs any of
it, and from hop to hop shrinks to the rows that somebody further on still needs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn import layouts
from ringattn.bands import Array
from ringattn.errors import UnsupportedError
from ringattn.plans import tiles
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.schedules.base import Schedule

MAX_WASTEFUL = 8192  # ranks: they take tables of all ranks by all ranks, of half a gigabyte each


@dataclasses.dataclass(frozen=True)
class Ring(Schedule):
    """Relay to the neighbour."""

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        return (q_ranks - k_ranks) % demand.size

    def moves(self, demand: Demand, rank: int) -> Moves:
        if self.exact_tokens(demand) is not None:
            return _exact_moves(demand, rank)
        needed = demand.memo(_still_needed)
        hops = np.arange(1, demand.size)
        received, passed = (rank - hops) % demand.size, (rank + 1 - hops) % demand.size
        left, right = (rank - 1) % demand.size, (rank + 1) % demand.size

        start, stop = needed[received, hops].T
        receives = np.stack([hops, np.full_like(hops, left), received, start, stop], axis=1)[start < stop]
        start, stop = needed[passed, hops].T
        sends = np.stack([hops, np.full_like(hops, right), hops - 1, passed, start, stop], axis=1)[start < stop]
        return Moves(receives, sends)

    def exact_tokens(self, demand: Demand) -> int | None:
        """Key positions received by all ranks together where nobody receives any that it does not use; else None.

        None also where that is not seen at once.
        """
        return demand.memo(_exact_tokens)

    def received_tokens(self, requested: Array, size: int) -> int:
        owners, owner = np.unique(requested[:, K_RANK], return_inverse=True)
        needed = _needed_from_hop(requested, owner, len(owners), size)[:, 1:]
        return int(np.maximum(needed[..., 1] - needed[..., 0], 0).sum())

    def __str__(self) -> str:
        return "ring"


def _still_needed(demand: Demand) -> Array:
    """``[origin, hop, 2]``: the range of the origin's rows that ranks at this hop or further on use."""
    if demand.size > MAX_WASTEFUL:
        raise UnsupportedError(
            f"Under this mask and layout ranks pass on keys that they do not use, which ring plans for up to "
            f"{MAX_WASTEFUL} ranks; got {demand.size}. Use route or auto."
        )
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


def _exact_tokens(demand: Demand) -> int | None:
    """See `Ring.exact_tokens`: every rank's keys are one run of positions, within its left neighbour's.

    The two ranks' own keys apart, which do not come that way. So it takes no cut by the keys of all ranks.
    """
    ranges = tiles.key_ranges(np.concatenate([demand.regions, demand.partial]), demand.q_spans)
    if ranges is None or (np.diff(ranges[:, 0]) == 0).any():
        return None
    start, stop = np.zeros((2, demand.size), dtype=np.int64)
    start[ranges[:, 0]], stop[ranges[:, 0]] = ranges[:, 1], ranges[:, 2]
    own = _keys_within(demand.k_spans, start, stop, 0)
    if demand.size > 1:
        # what a rank needs and its left neighbour does not: before the neighbour's run and behind it
        before = start, np.minimum(stop, np.roll(start, 1))
        behind = np.maximum(start, np.roll(stop, 1)), stop
        for first, last in (before, behind):
            others = sum(_keys_within(demand.k_spans, first, last, distance) for distance in (0, 1))
            if (np.maximum(last - first, 0) > others).any():
                return None
    return int((stop - start - own).sum())


def _keys_within(k_spans: Array, start: Array, stop: Array, distance: int) -> Array:
    """How many of the positions from ``start[r]`` to ``stop[r]`` the rank so many places left of rank r holds."""
    rank = (k_spans[:, layouts.RANK] + distance) % len(start)
    first, count, stride = k_spans[:, layouts.START], k_spans[:, layouts.COUNT], k_spans[:, layouts.STRIDE]
    low, high = (np.clip(-((first - edge[rank]) // stride), 0, count) for edge in (start, stop))
    within = np.zeros(len(start), dtype=np.int64)
    np.add.at(within, rank, np.maximum(high - low, 0))
    return within


def _exact_moves(demand: Demand, rank: int) -> Moves:
    """Every rank receives what it uses, and its right neighbour what that uses."""
    left, right = (rank - 1) % demand.size, (rank + 1) % demand.size
    moved = []
    for user in (rank, right):
        _, origin, start, stop = demand.keys_needed_by(user).T
        hop = (user - origin) % demand.size
        moved.append([column[hop > 0] for column in (hop, origin, start, stop)])
    (hop, origin, start, stop), (sent, passed, first, last) = moved
    return Moves(
        np.stack([hop, np.full_like(hop, left), origin, start, stop], axis=1),
        np.stack([sent, np.full_like(sent, right), sent - 1, passed, first, last], axis=1),
    )
