"""Links: latency, bandwidth and clocks of every pair of ranks, in the rounds of a tournament.

In each round every rank meets one other, all pairs at once: P - 1 rounds for P ranks, and not P^2 / 2 meetings one
after another. What pairs share, a switch or a core, they share while they are measured, as they do in training.
"""

from __future__ import annotations

import dataclasses

import torch

from ringattn.diagnosis.instruments import Instruments
from ringattn.transports.base import Transport

PINGS = 10
PROBE = 1 << 18  # bytes, whose time says how many are worth sending
WORTH = 0.05  # seconds that a message should take
TRIPS = 20  # latencies that it should take at least
MOST = 1 << 26  # bytes
BULKS = 3


@dataclasses.dataclass(frozen=True)
class Link:
    """A pair of ranks.

    Attributes:
        latency: seconds one way, half of the fastest of a few round trips of eight bytes.
        bandwidth: bytes a second each way, both ways at once.
        offset: seconds by which the other's clock is ahead.
    """

    latency: float
    bandwidth: float
    offset: float


def rounds(size: int) -> int:
    """How many until every pair has met."""
    return size - 1 + size % 2 if size > 1 else 0


def opponent(rank: int, turn: int, size: int) -> int | None:
    """Whom a rank meets in a round; None where it sits out, as one does in each round of an odd number.

    >>> [[opponent(rank, turn, 4) for rank in range(4)] for turn in range(3)]
    [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]
    """
    last = rounds(size)  # odd: those below it meet where they add up to the round, and who is left meets it
    if rank == last:
        return turn * (last + 1) // 2 % last
    other = (turn - rank) % last
    other = last if other == rank else other
    return other if other < size else None


class Wire:
    """Measures one link; both of its ranks call the same things."""

    def __init__(self, transport: Transport, peer: int, instruments: Instruments) -> None:
        self._transport, self._peer, self._instruments = transport, peer, instruments
        first, second = sorted((transport.rank, peer))
        self._label = f"the measurement of ranks {first} and {second}"
        self._leads = transport.rank == first

    def measured(self) -> Link:
        """The link, the same on both ranks but for the sign of the offset."""
        if self._leads:
            trip, offset = min(self._called() for _ in range(PINGS + 1))
            self._swapped_numbers([trip, offset])
        else:
            for _ in range(PINGS + 1):
                self._answered()
            trip, offset = self._swapped_numbers([0.0, 0.0])
            offset = -offset
        rate = self._rate(PROBE, trip / 2)
        for _ in range(BULKS):  # a connection gets faster as it is used
            rate = max(rate, self._rate(worth_sending(rate, trip / 2), trip / 2))
        return Link(trip / 2, rate, offset)

    def _called(self) -> tuple[float, float]:
        """Seconds of a round trip, and how far ahead the other's clock was in its middle."""
        ours, theirs = self._numbers([0.0]), self._numbers([0.0])
        began, day = self._instruments.clock(), self._instruments.wall()
        self._exchange([ours], [])
        self._exchange([], [theirs])
        trip = self._instruments.clock() - began
        return trip, theirs.item() - (day + trip / 2)

    def _answered(self) -> None:
        theirs = self._numbers([0.0])
        self._exchange([], [theirs])
        self._exchange([self._numbers([self._instruments.wall()])], [])

    def _seconds(self, size: int) -> float:
        """For so many bytes each way."""
        ours, theirs = (torch.zeros(size, dtype=torch.uint8, device=self._transport.device) for _ in range(2))
        self._swapped_numbers([0.0])  # both are ready
        began = self._instruments.clock()
        self._exchange([ours], [theirs])
        return max(self._instruments.clock() - began, 1e-9)

    def _rate(self, size: int, latency: float) -> float:
        """Bytes a second each way, as the slower of the two saw it, without the latency where that is a part."""
        seconds = self._seconds(size)
        seconds = max(seconds, *self._swapped_numbers([seconds]))
        return size / max(seconds - latency, seconds / 2)

    def _swapped_numbers(self, own: list[float]) -> list[float]:
        """The other's numbers for this rank's."""
        ours, theirs = self._numbers(own), self._numbers(own)
        self._exchange([ours], [theirs])
        return theirs.tolist()

    def _numbers(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._transport.device)

    def _exchange(self, sends: list[torch.Tensor], receives: list[torch.Tensor]) -> None:
        there, here = ([(self._peer, x) for x in each] for each in (sends, receives))
        self._transport.exchange(there, here, label=self._label).wait()
        settle(self._transport)


def worth_sending(rate: float, latency: float) -> int:
    """Bytes of a message that shows what a link carries, at about this rate."""
    return int(min(MOST, max(PROBE, rate * max(WORTH, TRIPS * latency))))


def settle(transport: Transport) -> None:
    """Until what a GPU was told is done."""
    if transport.device.type == "cuda":
        torch.cuda.synchronize(transport.device)
