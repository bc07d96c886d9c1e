"""The examination: all ranks measure together, and each comes to know everything."""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn.diagnosis import facts, links, patterns
from ringattn.diagnosis.computing import Trial
from ringattn.diagnosis.facts import Facts
from ringattn.diagnosis.instruments import Instruments
from ringattn.diagnosis.links import Link, Wire
from ringattn.mesh import Mesh
from ringattn.profile import Profile
from ringattn.transports.base import Transport


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
    known = facts.of_all(transport, Facts.here(transport))
    used.advance()
    trial = used.trial(transport.device)
    speeds = tuple(numbers[0] for numbers in patterns.gathered(transport, [trial.gigaflops]))
    used.advance()
    table = _table(transport, used)
    latency, bandwidth = ([[getattr(x, name) for x in row] for row in table] for name in ("latency", "bandwidth"))
    ring = around = None
    if transport.size > 1:
        slow = min(x for row in bandwidth for x in row if x) < patterns.LEAST
        size = patterns.SLOW if slow else patterns.BYTES
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
