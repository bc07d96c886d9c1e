"""Stages: into which exchanges the messages between pairs of ranks are put.

A rank takes part in one exchange after another, and waits in each for everybody that it meets there, who may be waiting
for others. So messages are put into few exchanges of about the same length, by all ranks alike: the longest messages
first, each into the first exchange in which neither of its ends has more to carry than its share: of what the busiest
link carries in all, and of what a buffer holds.

Where most ranks meet, they may do so by distance, if that is shorter: in phase d a rank sends to the rank d places on
and receives from the rank d places back, so that every link is used once in each direction, and neighbouring distances
may share an exchange.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ringattn.bands import Array

SHORTER = 5 / 6  # of the exchanges' length, before ranks that might meet by distance do not
FASTER = 16  # links within a node, than those between nodes


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an exchange may hold.

    Attributes:
        stages: exchanges in which the busiest link is used; None for as few as the buffer allows.
        buffer: rows that arrive at a rank, or leave it, in one exchange; a message of more is alone.
        node: neighbouring ranks that share a node; None where all do, or it is not known.
    """

    stages: int | None
    buffer: int
    node: int | None


def pairs_of(rows: Array, size: int) -> tuple[Array, Array, Array, Array]:
    """The pairs of ranks among ``(receiver, origin, start, stop)``: which each row is of; receivers, origins, rows."""
    pairs, which = np.unique(rows[:, 0] * size + rows[:, 1], return_inverse=True)
    count = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(count, which, rows[:, 3] - rows[:, 2])
    return which, *np.divmod(pairs, size), count


@dataclasses.dataclass(frozen=True, eq=False)
class Messages:
    """Messages to be put into exchanges.

    Attributes:
        size: ranks.
        receiver, sender, rows: of each, ``[n]``.
        after: the message by which the sender gets what it passes on, which has that from its origin; -1 for its own.
            None where nobody passes anything on.
    """

    size: int
    receiver: Array
    sender: Array
    rows: Array
    limits: Limits
    after: Array | None = None

    def stages(self) -> Array:
        """The exchange of each, from 1 on."""
        stage = self.by_length()
        if self.after is not None or 2 * len(self.rows) <= self.size * (self.size - 1):
            return stage
        distance = self.by_distance()  # by which all ranks compute about the same in each exchange
        return stage if self.length(stage) < SHORTER * self.length(distance) else distance

    def length(self, stage: Array) -> int:
        """How long all exchanges take together, if each takes as long as its busiest link."""
        total = np.zeros(int(stage.max(initial=0)) + 1, dtype=np.int64)
        for rank in (self.receiver, self.sender):
            loads = np.zeros((len(total), self.size), dtype=np.int64)
            np.add.at(loads, (stage, rank), self.cost)
            total = np.maximum(total, loads.max(axis=1))
        return int(total.sum())

    @functools.cached_property
    def cost(self) -> Array:
        """How long each takes, in rows over a slow link times `FASTER`."""
        node = self.limits.node
        if node is None:
            return self.rows * FASTER
        cost: Array = self.rows * np.where(self.receiver // node == self.sender // node, 1, FASTER)
        return cost

    @property
    def share(self) -> int:
        """What a link carries in one exchange at most: what a buffer holds, or an even share of the busiest link's."""
        cost, share = self.cost, self.limits.buffer * FASTER
        if self.limits.stages is not None:
            loads = [np.bincount(rank, cost, self.size).max(initial=0) for rank in (self.receiver, self.sender)]
            share = min(share, -int(-max(loads) // self.limits.stages))
        return max(share, int(cost.max(initial=0)))

    def by_distance(self) -> Array:
        """Neighbouring distances together, as many as the limits allow."""
        distance, cost, share, stage = (self.receiver - self.sender) % self.size, self.cost, self.share, 1
        stages = np.zeros(self.size, dtype=np.int64)
        order = np.argsort(distance, kind="stable")
        edges = np.searchsorted(distance[order], np.arange(self.size + 1))
        full, moved = np.zeros((2, 2, self.size), dtype=np.int64)
        for d in np.unique(distance).tolist():
            now = order[edges[d] : edges[d + 1]]
            ends, takes, rows = (self.receiver[now], self.sender[now]), cost[now], self.rows[now]
            if moved.any() and any(
                (full[side, end] + takes).max() > share or (moved[side, end] + rows).max() > self.limits.buffer
                for side, end in enumerate(ends)
            ):
                stage += 1
                full[:], moved[:] = 0, 0
            for side, end in enumerate(ends):
                full[side, end] += takes
                moved[side, end] += rows
            stages[d] = stage
        found: Array = stages[distance]
        return found

    def by_length(self) -> Array:
        """The longest first, each into the first exchange that has room at both ends; behind it what is passed on."""
        cost, share, buffer = self.cost, self.share, self.limits.buffer
        after = np.full(len(cost), -1) if self.after is None else self.after
        first = np.where(after < 0, np.arange(len(cost)), after)
        distance = (self.receiver - self.sender) % self.size
        order = np.lexsort((self.receiver, distance, after >= 0, first, distance[first], -cost[first]))
        stage = np.zeros(len(order) + 1, dtype=np.int64)  # the last is that of what nobody has passed on
        ins, outs = _Ends(self.size), _Ends(self.size)
        columns = (order, self.receiver[order], self.sender[order], cost[order], self.rows[order], after[order])
        for nth, receiver, sender, takes, rows, behind in zip(*(x.tolist() for x in columns), strict=True):
            at, room, place = int(stage[behind]), share - takes, buffer - rows
            costs, counts, costs_out, counts_out = *ins[receiver], *outs[sender]
            while (
                costs[at] > room
                or costs_out[at] > room
                or (counts[at] > place and counts[at])
                or (counts_out[at] > place and counts_out[at])
            ):
                at += 1
            costs[at] += takes
            costs_out[at] += takes
            counts[at] += rows
            counts_out[at] += rows
            stage[nth] = at + 1
            if at + 1 == len(ins):  # there is always an empty one behind all others, which has room
                ins.grow()
                outs.grow()
        return stage[:-1]


class _Ends:
    """What the messages at one end of every rank's links carry, by rank and exchange: costs, and rows."""

    def __init__(self, size: int) -> None:
        self._ends = [([0], [0]) for _ in range(size)]

    def __len__(self) -> int:
        """So many exchanges."""
        return len(self._ends[0][0])

    def __getitem__(self, rank: int) -> tuple[list[int], list[int]]:
        return self._ends[rank]

    def grow(self) -> None:
        """One exchange more, of none of which there is anything yet."""
        for costs, rows in self._ends:
            costs.append(0)
            rows.append(0)
