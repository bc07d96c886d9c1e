"""Transfers: what moves between all ranks by `Route`, and how gradients go back, the same way.

Between ranks of different nodes, a key span that several ranks of a node need crosses once if nodes are looked at: to
one of those ranks, which passes on to the others what they need of it, in a later exchange. Backward, it adds their
gradients to its own, in the order of the exchanges and of the ranks, and the sum crosses back.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ringattn.bands import Array
from ringattn.plans import tiles
from ringattn.plans.stages import Limits, Messages, pairs_of

RECEIVER, ORIGIN, START, STOP = range(4)


@dataclasses.dataclass(frozen=True, eq=False)
class Transfers:
    """All messages, a row a range of keys, sorted by receiver, origin and start.

    Attributes:
        size: ranks.
        rows: ``(receiver, origin, start, stop)``, in rows of the origin's shard. A rank gets an origin's keys at once.
        sender: who sends them: the origin, or who passes them on.
        phase: of the exchange in which they arrive.
        source: the phase in which the sender got them; 0 for its own.
        back: the phase in which their gradients leave the receiver for the sender.
    """

    size: int
    rows: Array
    sender: Array
    phase: Array
    source: Array
    back: Array

    def phases(self, receivers: Array, origins: Array) -> Array:
        """The phase in which these ranks get keys of these origins; 0 for their own."""
        if not len(self.rows):
            return np.zeros_like(receivers)
        at = np.searchsorted(self._pairs, receivers * self.size + origins)
        found: Array = np.where(receivers == origins, 0, self.phase[np.minimum(at, len(self.rows) - 1)])
        return found

    @functools.cached_property
    def _pairs(self) -> Array:
        pairs: Array = self.rows[:, RECEIVER] * self.size + self.rows[:, ORIGIN]
        return pairs

    @functools.cached_property
    def _by_sender(self) -> Array:
        return np.argsort(self.sender, kind="stable")

    def received_by(self, rank: int) -> Array:
        """Which rows a rank receives."""
        return np.arange(*np.searchsorted(self.rows[:, RECEIVER], [rank, rank + 1]))

    def sent_by(self, rank: int) -> Array:
        """Which rows a rank sends."""
        order = self._by_sender
        first, last = np.searchsorted(self.sender[order], [rank, rank + 1])
        return order[first:last]


def transfers(needed: Array, size: int, limits: Limits, lag: int, relayed: bool) -> Transfers:
    """The transfers of what ranks need of others.

    Args:
        needed: ``(rank, origin, start, stop)``, sorted and merged.
        lag: phases after which gradients of keys that have come may leave.
        relayed: whether what several ranks of a node need crosses to it once.
    """
    rows = needed[needed[:, RECEIVER] != needed[:, ORIGIN]]
    node = limits.node
    if relayed and node is not None and node < size:
        return _relayed(rows, size, limits, lag, node)
    pair, receiver, origin, count = pairs_of(rows, size)
    stage = Messages(size, receiver, origin, count, limits).stages()[pair]
    return Transfers(size, rows, rows[:, ORIGIN], stage, np.zeros_like(stage), stage + lag)


def _relayed(needed: Array, size: int, limits: Limits, lag: int, node: int) -> Transfers:
    _, user, origin, count = pairs_of(needed, size)
    across = user // node != origin // node
    visited = np.unique((user // node * size + origin)[across], return_inverse=True)[1]
    group = np.full(len(user), -1)
    group[across] = visited
    gate = _gates(user, origin, count, group, node)
    carries = across & (gate == user)
    rows = _with_all(needed, gate, size)
    pair, receiver, origin, count = pairs_of(rows, size)  # the same pairs, which gates have more rows of
    sender = np.where(across & ~carries, gate, origin)
    after = np.where(across & ~carries, np.searchsorted(receiver * size + origin, gate * size + origin), -1)
    messages = Messages(size, receiver, sender, count, limits, after)
    stage = messages.stages()
    source = np.where(after < 0, 0, stage[after])
    back = stage + lag
    np.maximum.at(back, after[after >= 0], back[after >= 0] + 1)
    return Transfers(size, rows, sender[pair], stage[pair], source[pair], back[pair])


def _gates(user: Array, origin: Array, count: Array, group: Array, node: int) -> Array:
    """By whom each pair's keys come into the user's node: a user, that has been given least so far; else the origin."""
    gate = origin.copy()
    load = np.zeros(int(user.max(initial=0)) + 1, dtype=np.int64)
    order = np.argsort(group, kind="stable")
    order = order[group[order] >= 0]
    for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []:
        users = user[part]
        far = (origin[part[0]] - users) % node  # the one at the same place in its node comes first
        taken = users[np.lexsort((far, load[users]))[0]]
        load[taken] += int(count[part].max())
        gate[part] = taken
    return gate


def _with_all(needed: Array, gate: Array, size: int) -> Array:
    """What ranks need, and what they pass on."""
    pair = pairs_of(needed, size)[0]
    passed = needed.copy()
    passed[:, RECEIVER] = gate[pair]
    passed = passed[passed[:, RECEIVER] != passed[:, ORIGIN]]
    return tiles.merged(np.concatenate([needed, passed]))
