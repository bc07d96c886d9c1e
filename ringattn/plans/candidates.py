"""Candidates: what the schedules that could serve a call would move, and how long that would take.

An estimate by the demand of all ranks, the same on each of them: of the busiest rank the bytes that it receives within
its node and from others, and its messages. Pairs are computed at one rate, shared evenly, as layouts share them; heads
that do not divide make the busiest rank compute more. What travels behind tiles costs what it takes longer than they
do; of an all-to-all of heads the first slice travels behind nothing, and costs what it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ringattn import bands, layouts
from ringattn.bands import Array
from ringattn.mechanisms.base import Mechanism
from ringattn.payloads.base import Wire
from ringattn.payloads.queries import Queries
from ringattn.plans import tiles
from ringattn.plans.clock import Link, Rates
from ringattn.plans.deal import Deal
from ringattn.plans.demand import Demand
from ringattn.plans.links import MOST
from ringattn.plans.shape import Shape
from ringattn.plans.shaping import of_payload
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.readable import readable_bytes, readable_seconds
from ringattn.schedules import Route, Schedule, Scheme

MANY = 1 << 19  # ranges of keys of all ranks together, beyond which nothing is estimated
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One schedule.

    Attributes:
        inside, between: bytes that the busiest rank receives from its node and from others, forward and backward.
        messages: that it receives, forward.
        seconds: forward and backward.
    """

    schedule: Scheme
    inside: int
    between: int
    messages: int
    seconds: float

    def __str__(self) -> str:
        crossing = f", {readable_bytes(self.between)} between nodes" if self.between else ""
        return (
            f"{self.schedule} {readable_seconds(self.seconds)} ({readable_bytes(self.inside)} within nodes{crossing}, "
            f"{self.messages} messages)"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Received:
    """Rows that each rank receives from its node and from others, and from how many ranks, ``[ranks]`` each."""

    inside: Array
    between: Array
    peers: Array

    @staticmethod
    def of(demand: Demand, node_aware: bool = False) -> Received | None:
        """By a route; None where that is not seen at once."""
        needed = demand.needed_by_all(MANY)
        if needed is None and demand.size <= MOST:
            needed = np.concatenate(list(demand.keys_requested_from_all()))
        if needed is None:
            return None
        size, node = demand.size, demand.node or demand.size
        rows = needed[needed[:, Q_RANK] != needed[:, K_RANK]]
        across = rows[:, Q_RANK] // node != rows[:, K_RANK] // node
        count = rows[:, 3] - rows[:, 2]
        inside, between = (_summed(rows[x, Q_RANK], count[x], size) for x in (~across, across))
        pairs = np.unique(rows[:, Q_RANK] * size + rows[:, K_RANK])
        peers = np.bincount(pairs // size, minlength=size)
        if node_aware:  # what a node needs of another crosses once, its ranks in turn, and is passed on
            shared = rows[across].copy()
            shared[:, Q_RANK] //= node
            once = tiles.merged(shared)
            by_node = _summed(once[:, Q_RANK], once[:, 3] - once[:, 2], -(-size // node))
            inside, between = inside + between, np.repeat(-(-by_node // node), node)[:size]
        return Received(inside, between, peers)


def _summed(ranks: Array, count: Array, size: int) -> Array:
    return np.bincount(ranks, weights=count, minlength=size).astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Estimates:
    """What candidates are estimated by.

    Attributes:
        shape: the heads of the call.
        rates: how fast ranks compute and talk.
    """

    demand: Demand
    shape: Shape
    mechanism: Mechanism | None
    rates: Rates

    def along_one_axis(self, schedules: list[Schedule]) -> Iterator[Candidate]:
        """Of these, those whose demand is seen at once."""
        for schedule in schedules:
            passed = isinstance(schedule.payload, Queries)
            demand = self.demand.transposed if passed else self.demand
            moved = Received.of(demand, isinstance(schedule, Route) and schedule.node_aware)
            if moved is not None:
                shape = of_payload(schedule.payload, schedule.gradient_wire, self.shape, self.mechanism)
                yield self._candidate(schedule, moved, shape.wire(schedule.payload, schedule.gradient_wire))

    def _candidate(self, schedule: Scheme, moved: Received, wire: Wire) -> Candidate:
        passes = (wire.there + wire.back, wire.backward_there + wire.backward_back)
        seconds = sum(
            max(computing, self._moving(moved, row))
            for computing, row in zip(self._computing(1.0), passes, strict=True)
        )
        return self._busiest(schedule, moved, sum(passes), seconds)

    def _busiest(self, schedule: Scheme, moved: Received, row: float, seconds: float) -> Candidate:
        inside, between, peers = (int(x.max(initial=0)) for x in (moved.inside, moved.between, moved.peers))
        return Candidate(schedule, int(inside * row), int(between * row), peers, seconds)

    def _computing(self, padding: float) -> tuple[float, float]:
        """Seconds of the busiest rank's tiles, forward and backward."""
        pairs = (bands.area(self.demand.regions) + bands.area(self.demand.partial)) / self.demand.size * padding
        flops = pairs * self.shape.batch * self.shape.heads * (self.shape.dim + self.shape.value_dim) / 2
        return 4 * flops / self.rates.forward, 10 * flops / self.rates.backward

    def _moving(self, moved: Received, row: float) -> float:
        """Seconds in which the busiest rank receives so many bytes for each of its rows."""
        inside, across = self.rates.inside, self.rates.across
        waits = np.maximum(moved.inside * row / inside.bandwidth, moved.between * row / across.bandwidth)
        waits += moved.peers * np.where(moved.between > 0, across.latency, inside.latency)
        return float(waits.max(initial=0))

    def in_groups(self, schedule: Scheme, grouped: Demand, dealt: Deal, wire: Wire) -> Candidate | None:
        """With heads exchanged for sequence, and a route along the ring.

        Args:
            grouped: what the groups need of each other.
            wire: the bytes of a row of all key heads along the ring.
        """
        moved, shape, size = Received.of(grouped), self.shape, len(dealt)
        if moved is None:
            return None
        heads, kv_heads = (
            max(sum(getattr(p, name) for ps in own for p in ps) for own in dealt) for name in ("heads", "kv_heads")
        )
        share, slices = kv_heads / shape.kv_heads, len(dealt[0])
        queries = int(layouts.counts(self.demand.q_spans, self.demand.size).max(initial=0))
        keys = int(layouts.counts(self.demand.k_spans, self.demand.size).max(initial=0))
        there = queries * heads * shape.dim + keys * kv_heads * (shape.dim + shape.value_dim)
        swapped = (size - 1) * shape.batch * shape.itemsize * (there + queries * heads * shape.value_dim)
        node = self.demand.node or self.demand.size
        link = self.rates.inside if size <= node else self.rates.across
        exchange = swapped / link.bandwidth + 2 * (size - 1) * link.latency
        padding = heads * size / shape.heads
        passes = (wire.there * share, (wire.backward_there + wire.backward_back) * share)
        seconds = sum(
            max(computing, self._moving(moved, row) + exchange * (slices - 1) / slices) + exchange / slices
            for computing, row in zip(self._computing(padding), passes, strict=True)
        )
        found = self._busiest(schedule, moved, sum(passes), seconds)
        inside, between = (2 * swapped, 0) if size <= node else (0, 2 * swapped)
        return dataclasses.replace(
            found,
            inside=found.inside + inside,
            between=found.between + between,
            messages=found.messages + 2 * (size - 1) * slices,
        )


def rates_of(latency: Array | Floats, bandwidth: Array | Floats) -> Rates:
    """The defaults, with links that were measured: between all ranks, medians."""
    off = ~np.eye(len(latency), dtype=bool)
    link = Link(float(np.median(bandwidth[off])), float(np.median(latency[off])))
    return dataclasses.replace(Rates(), inside=link, across=link)
