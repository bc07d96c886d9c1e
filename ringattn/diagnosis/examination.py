"""The examination: all ranks measure together, and each comes to know everything."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from ringattn.diagnosis import facts, links, patterns
from ringattn.diagnosis.computing import Trial
from ringattn.diagnosis.facts import Facts
from ringattn.diagnosis.instruments import Instruments
from ringattn.diagnosis.links import Link, Wire
from ringattn.mesh import Mesh
from ringattn.plans.links import ROW_BYTES
from ringattn.profile import Profile
from ringattn.transports.base import Transport

PAIR_FLOPS = 4 * 8 * 128  # of a query and a key, forward


@dataclasses.dataclass(frozen=True)
class Examination:
    """What was found. Every rank has the same, but for the trial.

    Attributes:
        axes: of the mesh.
        transport: its name.
        facts: of each rank.
        latency, bandwidth: of each pair of ranks, seconds one way and bytes a second each way, 0 on the diagonal.
        offsets: seconds by which each rank's clock is ahead of rank 0's.
        ring, all_to_all: bytes a second that each rank sends; None for one rank.
        speeds: of each rank, as its trial's ``gigaflops``.
        trial: this rank's own.
    """

    axes: dict[str, int]
    transport: str
    facts: tuple[Facts, ...]
    latency: tuple[tuple[float, ...], ...]
    bandwidth: tuple[tuple[float, ...], ...]
    offsets: tuple[float, ...]
    ring: float | None
    all_to_all: float | None
    speeds: tuple[float, ...]
    trial: Trial

    @property
    def profile(self) -> Profile:
        """What ``auto`` can use of it."""
        tables = np.array(self.latency), np.array(self.bandwidth)
        return Profile(self.transport, *tables, self.trial.entries)

    @property
    def hidden_from(self) -> int | None:
        """Tokens of a rank from which on its messages are there before they are needed; None where there are none.

        In a phase of a ring a rank meets n keys with n queries, and receives the next n: of 8 heads of 128, in two
        bytes, on the slowest link and the slowest rank. n^2 pairs take as long as n keys on the wire.
        """
        if self.size < 2 or not min(self.speeds):
            return None
        pair = PAIR_FLOPS / min(self.speeds) / 1e9
        key = ROW_BYTES / min(x for row in self.bandwidth for x in row if x)
        return math.ceil((key + math.sqrt(key * key + 4 * pair * max(map(max, self.latency)))) / (2 * pair))

    @property
    def size(self) -> int:
        return len(self.facts)


def steps(size: int) -> int:
    """How often an examination of so many ranks advances."""
    return 2 + links.rounds(size) + 2 * (size > 1)


def examine(mesh: Mesh, instruments: Instruments | None = None) -> Examination:
    """All ranks of the mesh call it together.

    Raises:
        TransportError: a rank is lost.
    """
    used, transport = instruments or Instruments(), mesh.everyone
    transport.sum(torch.zeros(1, device=transport.device))  # NCCL wants all ranks in a group's first exchange
    known = facts.of_all(transport, Facts.here(transport))
    used.advance()
    trial = used.trial(transport.device)
    speeds = tuple(numbers[0] for numbers in patterns.gathered(transport, [trial.gigaflops]))
    used.advance()
    table = _table(transport, used)
    latency, bandwidth = ([[getattr(x, name) for x in row] for row in table] for name in ("latency", "bandwidth"))
    ring = around = None
    if transport.size > 1:
        size = links.worth_sending(min(x for row in bandwidth for x in row if x), max(map(max, latency)))
        ring = patterns.ring(transport, used, size)
        used.advance()
        around = patterns.all_to_all(transport, used, size)
        used.advance()
    return Examination(
        mesh.axes,
        transport.name,
        tuple(known),
        tuple(map(tuple, latency)),
        tuple(map(tuple, bandwidth)),
        tuple(x.offset for x in table[0]),
        ring,
        around,
        speeds,
        trial,
    )


def _table(transport: Transport, instruments: Instruments) -> list[list[Link]]:
    """The links of all pairs, as every rank knows them when they have met."""
    own = [Link(0.0, 0.0, 0.0)] * transport.size
    for turn in range(links.rounds(transport.size)):
        peer = links.opponent(transport.rank, turn, transport.size)
        if peer is not None:
            own[peer] = Wire(transport, peer, instruments).measured()
        instruments.advance()
    flat = [number for link in own for number in dataclasses.astuple(link)]
    rows = patterns.gathered(transport, flat)
    return [[Link(*row[i : i + 3]) for i in range(0, len(row), 3)] for row in rows]
