"""Stages: into which exchanges the messages between pairs of ranks are put.

A rank takes part in one exchange after another, and waits in each for everybody that it meets there, who may be waiting
for others. So messages are put into few exchanges of about the same length, by all ranks alike: the longest messages
first, each into the first exchange in which neither of its ends has more to carry than its share: of what the busiest
link carries in all, and of what a buffer holds.

Where nearly all ranks meet, nobody needs to look: in phase d a rank sends to the rank d places on and receives from the
rank d places back, so that every link is used once in each direction, and neighbouring distances may share an exchange.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ringattn.bands import Array

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


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """The exchange, from 1 on, in which each pair of ranks meets.

    Attributes:
        size: ranks.
        pairs: ``receiver * size + sender``, ascending.
        stage: of each pair.
    """

    size: int
    pairs: Array
    stage: Array

    def of(self, receivers: Array, senders: Array) -> Array:
        """The exchanges of these pairs; 0 for a rank with itself."""
        if not len(self.pairs):
            return np.zeros_like(receivers)
        at = np.searchsorted(self.pairs, receivers * self.size + senders)
        found: Array = np.where(receivers == senders, 0, self.stage[np.minimum(at, len(self.pairs) - 1)])
        return found


def staged(needed: Array, size: int, limits: Limits) -> Stages:
    """The stages of what ranks need of others: ``(receiver, sender, start, stop)``, rows of the sender."""
    foreign = needed[needed[:, 0] != needed[:, 1]]
    pairs, which = np.unique(foreign[:, 0] * size + foreign[:, 1], return_inverse=True)
    rows = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(rows, which, foreign[:, 3] - foreign[:, 2])
    messages = Messages(size, *np.divmod(pairs, size), rows, limits)
    most_meet = 2 * len(pairs) > size * (size - 1)
    return Stages(size, pairs, messages.by_distance() if most_meet else messages.by_length())


@dataclasses.dataclass(frozen=True, eq=False)
class Messages:
    """Messages to be put into exchanges: ``[n]`` receivers, senders and rows."""

    size: int
    receiver: Array
    sender: Array
    rows: Array
    limits: Limits

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
        """The longest first, each into the first exchange that has room at both ends."""
        cost, share, buffer = self.cost, self.share, self.limits.buffer
        order = np.lexsort((self.sender, self.receiver, -cost))
        ins, outs = ([[[0, 0]] for _ in range(self.size)] for _ in range(2))  # by rank and exchange: cost and rows
        stage = np.zeros(len(order), dtype=np.int64)
        columns = (order, self.receiver[order], self.sender[order], cost[order], self.rows[order])
        for nth, receiver, sender, takes, rows in zip(*(x.tolist() for x in columns), strict=True):
            ends, at = (ins[receiver], outs[sender]), 0
            while True:
                for end in ends:
                    if len(end) == at:
                        end.append([0, 0])
                if all(end[at][0] + takes <= share and (not end[at][1] or end[at][1] + rows <= buffer) for end in ends):
                    break
                at += 1
            for end in ends:
                end[at][0] += takes
                end[at][1] += rows
            stage[nth] = at + 1
        return stage
