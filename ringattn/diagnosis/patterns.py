"""The two ways in which schedules use all links at once: round the ring, and everybody to everybody."""

from __future__ import annotations

import torch

from ringattn.diagnosis.instruments import Instruments
from ringattn.diagnosis.links import BULKS, settle
from ringattn.runtime.agreement import exchanged
from ringattn.transports.base import Message, Transport


def ring(transport: Transport, instruments: Instruments, size: int) -> float:
    """Bytes a second that each rank passes to its right neighbour while all do so, as the slowest rank sees it."""
    ours, theirs = _buffer(transport, 1, size), _buffer(transport, 1, size)
    right, left = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    return _rate(transport, instruments, [(right, ours[0])], [(left, theirs[0])], "the measurement of the ring")


def all_to_all(transport: Transport, instruments: Instruments, size: int) -> float:
    """Bytes a second that each rank sends while all send to all others, as the slowest rank sees it."""
    peers = [rank for rank in range(transport.size) if rank != transport.rank]
    ours, theirs = (_buffer(transport, len(peers), size) for _ in range(2))
    sends, receives = list(zip(peers, ours, strict=True)), list(zip(peers, theirs, strict=True))
    return _rate(transport, instruments, sends, receives, "the measurement of all to all")


def _buffer(transport: Transport, count: int, size: int) -> torch.Tensor:
    return torch.zeros(count, max(1, size // count), dtype=torch.uint8, device=transport.device)


def _rate(
    transport: Transport, instruments: Instruments, sends: list[Message], receives: list[Message], label: str
) -> float:
    def once() -> float:
        transport.sum_numbers(0.0)  # all are ready
        began = instruments.clock()
        transport.exchange(sends, receives, label=label).wait()
        settle(transport)
        return max(instruments.clock() - began, 1e-9)

    sent = sum(x.nbytes for _, x in sends)
    return sent / slowest(transport, min(once() for _ in range(BULKS)))


def slowest(transport: Transport, seconds: float) -> float:
    """The most that any rank took."""
    return max(gathered(transport, [seconds]))[0]


def gathered(transport: Transport, own: list[float]) -> list[list[float]]:
    """Every rank's numbers, by rank."""
    data = torch.tensor(own, dtype=torch.float64).numpy().tobytes()
    return [torch.frombuffer(bytearray(x), dtype=torch.float64).tolist() for x in exchanged(transport, data, "doctor")]
