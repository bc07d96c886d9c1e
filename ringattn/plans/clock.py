"""The clock: how long plans take by a small model of time, the same on every machine.

A rank computes its tiles at one rate. Its links to the ranks of its node are apart from those to all others, and both
carry as much each way at once. A message starts when both ends have come to its exchange; what a rank sends over one
kind of link in one exchange goes at once, and so does what it receives, so that a message is there when the busier of
its two ends is through. An exchange is over when all its messages are there; the next one starts when the tiles beside
it are computed, too. Exchanges of one phase depend on earlier phases alone: time is a recurrence over the phases,
worked out for all ranks at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringattn.plans.shape import Shape
from ringattn.plans.steps import Program

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Link:
    """One kind of link.

    Attributes:
        bandwidth: bytes a second, each way.
        latency: seconds until a message is under way.
    """

    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast ranks compute and talk; the defaults are a large GPU, eight of them in a node.

    Attributes:
        forward, backward: floating point operations a second; a pair takes 4 of them for every head and dim, and 10.
        node: neighbouring ranks that share a node.
        inside, across: the links within a node, and between nodes.
    """

    forward: float = 690e12
    backward: float = 590e12
    node: int = 8
    inside: Link = Link(380e9, 10e-6)
    across: Link = Link(26e9, 40e-6)


@dataclasses.dataclass(frozen=True, eq=False)
class Times:
    """What one pass takes.

    Attributes:
        computing: seconds of each rank's tiles, ``[ranks]``.
        links: seconds in which each rank's links carry what it sends or receives, the busiest of them, ``[ranks]``.
        finished: when each rank is done, ``[ranks]``.
        exchanges, bare: how many there are, and how many of them start in a step without tiles.
    """

    computing: Floats
    links: Floats
    finished: Floats
    exchanges: int
    bare: int

    @property
    def makespan(self) -> float:
        """When the last rank is done."""
        return float(self.finished.max(initial=0))

    @property
    def bound(self) -> float:
        """Nothing that moves and computes as much is done before the busiest rank, or the busiest link."""
        return float(max(self.computing.max(initial=0), self.links.max(initial=0)))


def timed(plans: Sequence[Program], shape: Shape, rates: Rates, *, backward: bool = False) -> Times:
    """What one pass of all ranks' plans takes, forward or backward."""
    flops = (10 if backward else 4) * shape.batch * shape.heads * (shape.dim + shape.value_dim) / 2
    seconds = flops / (rates.backward if backward else rates.forward)
    return _run(*_tables(plans, shape, backward), seconds, rates, len(plans))


def _tables(plans: Sequence[Program], shape: Shape, backward: bool) -> tuple[Floats, Floats]:
    """The steps of all ranks, ``(rank, phase, pairs before, pairs beside)``, and the messages of all exchanges.

    A step is an exchange, with the pairs that are computed since the last one with nothing under way and those
    computed while it is; what comes after the last has a phase behind all others'. Messages are ``(phase, sender,
    receiver, bytes)``.
    """
    wire = shape.wire(plans[0].payload, plans[0].gradient_wire)
    there, back = (wire.backward_there, wire.backward_back) if backward else (wire.there, wire.back)
    steps: list[tuple[float, ...]] = []
    messages: list[tuple[float, ...]] = []
    for plan in plans:
        before = 0.0
        for step in plan.backward_steps if backward else plan.steps:
            if not step.exchange:
                before += step.area
                continue
            phase = step.exchange.phase
            steps.append((plan.rank, phase, before, step.area))
            for x in step.exchange.sends:
                messages.append((phase, plan.rank, x.peer, x.rows * x.share * (back if x.gradient else there)))
            before = 0.0
        steps.append((plan.rank, LAST, before, 0.0))
    return np.array(steps, dtype=np.float64).reshape(-1, 4), np.array(messages, dtype=np.float64).reshape(-1, 4)


LAST = np.inf


def _run(steps: Floats, messages: Floats, seconds: float, rates: Rates, ranks: int) -> Times:
    clock, busy = np.zeros(ranks), np.zeros((2, 2, ranks))
    for phase in np.unique(steps[:, 1]).tolist():
        now = steps[steps[:, 1] == phase]
        rank, (before, beside) = now[:, 0].astype(np.int64), now[:, 2:].T
        began = clock.copy()
        began[rank] += before * seconds
        sent = messages[messages[:, 0] == phase]
        (sender, receiver), size = sent[:, 1:3].T.astype(np.int64), sent[:, 3]
        across = (sender // rates.node != receiver // rates.node).astype(np.int64)
        loads = np.zeros((2, 2, ranks))  # sending or receiving, by the kind of link
        sizes = size / np.array([rates.inside.bandwidth, rates.across.bandwidth])[across]
        np.add.at(loads[0], (across, sender), sizes)
        np.add.at(loads[1], (across, receiver), sizes)
        latency = np.array([rates.inside.latency, rates.across.latency])[across]
        through = np.maximum(loads[0][across, sender], loads[1][across, receiver]) + latency
        there = np.maximum(began[sender], began[receiver]) + through
        clock[rank] = began[rank] + beside * seconds
        np.maximum.at(clock, sender, there)
        np.maximum.at(clock, receiver, there)
        busy += loads
    computing = np.zeros(ranks)
    np.add.at(computing, steps[:, 0].astype(np.int64), (steps[:, 2] + steps[:, 3]) * seconds)
    exchanges = steps[:, 1] != LAST
    bare = exchanges & (steps[:, 3] == 0)
    return Times(computing, busy.max(axis=(0, 1)), clock, int(exchanges.sum()), int(bare.sum()))
