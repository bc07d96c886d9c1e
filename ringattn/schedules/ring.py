"""Ring: every rank relays the keys it has just used to its right neighbour (Ring Attention, arXiv 2310.01889).

Only neighbours talk, which suits a ring of links. A shard travels no further than the last rank that needs any of
it, and from hop to hop shrinks to the rows that somebody further on still needs.

The double ring is one ring within each node and one between nodes: a shard goes round the ranks of a node, from right
neighbour to right neighbour, and then to the next node, where it goes round again. On N nodes of m ranks it crosses
between nodes N - 1 times in place of (N - 1) m, each time on m links at once, and always comes out of the buffer of the
hop before: hop a m + b brings rank (node, place) the shard of rank (node - a, place - b).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn import layouts
from ringattn.bands import Array
from ringattn.checking import flag
from ringattn.errors import UnsupportedError
from ringattn.plans import tiles
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.schedules.base import Schedule

MAX_WASTEFUL = 8192  # ranks: they take tables of all ranks by all ranks, of half a gigabyte each


@dataclasses.dataclass(frozen=True)
class Ring(Schedule):
    """Relay to the neighbour.

    Attributes:
        double: one ring within nodes and one between them; see `Mesh.node`. The ranks of a node are a divisor of all.
    """

    double: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "double", flag(self.double, "Ring's double"))

    @property
    def asks_for_nodes(self) -> bool:
        return self.double

    def refusal(self, demand: Demand) -> str | None:
        if not self.double or demand.size % _node(demand) == 0:
            return None
        return (
            f"a double ring has as many ranks in each node, and {demand.size} ranks are no multiple of "
            f"{demand.node}. Use ring or route"
        )

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        return self._circle(demand).hop(q_ranks, k_ranks)

    def _circle(self, demand: Demand) -> _Circle:
        return _Circle(demand.size, _node(demand) if self.double else demand.size)

    def moves(self, demand: Demand, rank: int) -> Moves:
        if not self.double and self.exact_tokens(demand) is not None:
            return _exact_moves(demand, rank)
        circle = self._circle(demand)
        needed = demand.memo(_still_needed, circle)
        hops = np.arange(1, demand.size)
        received, passed = circle.origin(rank, hops), circle.origin(rank, hops - 1)

        start, stop = needed[received, hops].T
        receives = np.stack([hops, circle.before(rank, hops), received, start, stop], axis=1)[start < stop]
        start, stop = needed[passed, hops].T
        sends = np.stack([hops, circle.behind(rank, hops), hops - 1, passed, start, stop], axis=1)[start < stop]
        return Moves(receives, sends)

    def exact_tokens(self, demand: Demand) -> int | None:
        """Key positions received by all ranks together where nobody receives any that it does not use; else None.

        None also where that is not seen at once.
        """
        return demand.memo(_exact_tokens)

    def received_tokens(self, requested: Array, size: int) -> int:
        owners, owner = np.unique(requested[:, K_RANK], return_inverse=True)
        needed = _needed_from_hop(requested, owner, len(owners), _Circle(size, size))[:, 1:]
        return int(np.maximum(needed[..., 1] - needed[..., 0], 0).sum())

    def __str__(self) -> str:
        return "ring(double)" if self.double else "ring"


@dataclasses.dataclass(frozen=True)
class _Circle:
    """The way of every shard: round the ranks of a node, then on to the next node. A flat ring is one node of all."""

    size: int
    node: int

    def hop(self, ranks: Array, origins: Array) -> Array:
        """After how many hops a rank has an origin's shard."""
        nodes = (ranks // self.node - origins // self.node) % (self.size // self.node)
        return nodes * self.node + (ranks - origins) % self.node

    def origin(self, rank: int, hops: Array) -> Array:
        """Whose shard a rank has after so many hops."""
        return self._moved(rank, -(hops // self.node), -(hops % self.node))

    def before(self, rank: int, hops: Array) -> Array:
        """From whom a rank gets it."""
        return self._moved(rank, -((hops % self.node == 0).astype(np.int64)), -1)

    def behind(self, rank: int, hops: Array) -> Array:
        """To whom a rank hands what it had one hop before."""
        return self._moved(rank, (hops % self.node == 0).astype(np.int64), 1)

    def _moved(self, rank: int, nodes: Array, places: Array | int) -> Array:
        node, place = divmod(rank, self.node)
        moved: Array = (node + nodes) % (self.size // self.node) * self.node + (place + places) % self.node
        return moved


def _node(demand: Demand) -> int:
    """Ranks of a node: all, where nobody says how many."""
    return demand.size if demand.node is None else min(demand.node, demand.size)


def _still_needed(demand: Demand, circle: _Circle) -> Array:
    """``[origin, hop, 2]``: the range of the origin's rows that ranks at this hop or further on use."""
    if demand.size > MAX_WASTEFUL:
        raise UnsupportedError(
            f"Under this mask and layout ranks pass on keys that they do not use, which ring plans for up to "
            f"{MAX_WASTEFUL} ranks; got {demand.size}. Use route or auto."
        )
    requested = np.concatenate(list(demand.keys_requested_from_all()))
    return _needed_from_hop(requested, requested[:, K_RANK], demand.size, circle)


def _needed_from_hop(requested: Array, owner: Array, owners: int, circle: _Circle) -> Array:
    """``[owner, hop, 2]``: the range of the rows requested of each owner by ranks at this hop or further on."""
    hop, size = circle.hop(requested[:, Q_RANK], requested[:, K_RANK]), circle.size
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
