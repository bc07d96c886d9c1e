"""The transport contract: one move, the exchange, and one sum.

A transport takes a whole *exchange* at once: what this rank sends to and receives from each peer. It returns a
handle at once; until the handle's ``wait`` returns, no buffer of the exchange may be written. Exchanges of a rank
complete in the order they were started, and messages between two ranks arrive in the order they were sent. A send
completes when its receive is posted: a plan that relies on more buffering than that is refused by the verifier.

A *sum* adds up what all ranks have, as a trainer does with gradients: each member uses the collective of its own
library, and those without one are given it in exchanges.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ringattn.declared import WORDS, Collective
from ringattn.errors import TransportError

T = TypeVar("T")
V = TypeVar("V")

Message = tuple[int, torch.Tensor]
"""A peer's rank within the transport, and a contiguous buffer."""

SUMMED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)


@dataclasses.dataclass
class Counters:
    """What one rank has moved so far, payload and control apart. Bytes and seconds are cumulative."""

    messages: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    waited_seconds: float = 0.0
    control_messages: int = 0
    control_bytes: int = 0


class Buffers:
    """Named buffers, kept from call to call and grown when a call needs more."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._views: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor of this shape over the buffer of this name. Its content is whatever was there."""
        count = 1
        for side in shape:
            count *= side
        size = count * dtype.itemsize
        held = self._bytes.get((name, device))
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8, device=device)
            self._bytes[name, device] = held
            self._views.clear()
        return held[:size].view(dtype).view(*shape)

    def views(self, owner: T, make: Callable[[T], V]) -> V:
        """What ``make`` takes of these buffers for an owner, worked out once; again where one has grown since."""
        found: V | None = self._views.get(owner)
        if found is None:
            found = make(owner)
            self._views[owner] = found
        return found

    @property
    def held_bytes(self) -> int:
        """Bytes held at present."""
        return sum(buffer.numel() for buffer in self._bytes.values())


class Handle:
    """An exchange under way."""

    def __init__(self, complete: Callable[[], object] | None, counters: Counters) -> None:
        self._complete = complete
        self._counters = counters

    def wait(self) -> None:
        """Returns when every buffer of the exchange may be read and written again."""
        if self._complete is None:
            return
        complete, self._complete = self._complete, None
        started = time.perf_counter()
        try:
            complete()
        finally:
            self._counters.waited_seconds += time.perf_counter() - started


class Transport(ABC):
    """Moves buffers between ranks, those that share a sequence or others, numbered 0 to ``size - 1``.

    Attributes:
        name: what it is called in reports: local, simulator, gloo, nccl or mpi.
        agreement: whether the ranks compare each call.
        counters: what this rank has moved.
        buffers: this rank's reusable buffers.
        decisions: what its ranks have decided on together, by subject.
        doing: the call that is being made, shown in errors.
        observer: is told of every call, and the tensors that go into it and come out, by name.
    """

    def __init__(self, name: str, rank: int, size: int, agreement: bool) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.agreement = agreement
        self.counters = Counters()
        self.buffers = Buffers()
        self.decisions: dict[str, int] = {}
        self.doing = "no call"
        self.observer: Callable[[str, Mapping[str, torch.Tensor]], None] | None = None
        self._calls = 0

    def next_call(self) -> int:
        """A number for a call. Ranks make the same calls in the same order, so the same call has the same number.

        0 where no rank compares it with another's.
        """
        self._calls += self.agrees
        return self._calls

    def forget_calls(self) -> None:
        """Starts numbering again, after a disagreement that every rank has seen: their numbers may differ by now."""
        self._calls = 0

    @property
    def agrees(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.agreement and self.size > 1

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors lie, unless the caller has others."""
        return torch.device("cpu")

    @property
    def control(self) -> Transport:
        """Moves the small CPU messages by which the same ranks agree: itself, where it moves CPU tensors.

        All ranks ask for it the first time together.
        """
        return self

    def among(self, ranks: Sequence[int], limit: datetime.timedelta | None = None) -> Transport:
        """A transport of the same kind between other ranks, this one included, which all of them ask for together.

        Args:
            ranks: as the world numbers them.
            limit: within which a wait for another rank ends; None for this transport's own.
        """
        raise TransportError(f"The {self.name} transport joins its own {self.size} ranks and no others; got {ranks}.")

    def along(self, ranks: Sequence[int]) -> Transport:
        """A view of this transport for some of its ranks, this one included, numbered in their order.

        It needs no connections of its own, and its ranks do not compare their calls: they are parts of a call that all
        ranks have compared.
        """
        return Along(self, ranks)

    def abandon(self, error: BaseException) -> None:  # noqa: B027 (some have their own way to tell)
        """Tells the ranks that wait for this one that it has raised an exception in the middle of a call."""

    @abstractmethod
    def refusal(self, device: torch.device) -> str | None:
        """Why tensors on this device cannot be exchanged, in words; None when they can."""

    @abstractmethod
    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        """Starts the exchange and returns what waits for it. Messages are checked and not empty."""

    def _start_collective(
        self, collective: Collective, sends: Sequence[Message], receives: Sequence[Message], label: str
    ) -> Callable[[], None]:
        """The same of what is declared: in messages, unless its library's own is faster.

        On one machine they are, of Gloo and of MPI between 2 and 4 ranks: all-gathers by 2 to 20 times, from 64 KiB to
        16 MiB; all-to-alls by 1.1 to 3 times from 1 MiB on, and about as fast below.
        """
        return self._start(sends, receives, label)

    def exchange(
        self,
        sends: Sequence[Message],
        receives: Sequence[Message],
        *,
        label: str = "",
        control: bool = False,
        collective: Collective | None = None,
    ) -> Handle:
        """Starts one exchange.

        Args:
            sends: buffers to send; unchanged until the handle's wait returns. Empty ones are not sent.
            receives: buffers to fill; the sender's message must have the same bytes and dtype.
            label: what the exchange is for, shown in errors.
            control: whether this is bookkeeping, counted apart from the payload.
            collective: what the exchange is of all ranks of this transport, each of which says the same of it. It is
                counted as the messages it stands for.

        Raises:
            TransportError: a message to oneself, to nobody, or from a buffer that is not contiguous; or not one, which
                is not empty, to and from each other rank where a collective is declared.
        """
        sends, sent = self._checked(sends)
        receives, received = self._checked(receives)
        if control:
            self.counters.control_messages += len(sends)
            self.counters.control_bytes += sent
        else:
            self.counters.messages += len(sends)
            self.counters.sent_bytes += sent
            self.counters.received_bytes += received
        if not sends and not receives:
            return Handle(None, self.counters)
        if collective is None:
            return Handle(self._start(sends, receives, label), self.counters)
        self._check_complete(collective, sends, receives, label)
        return Handle(self._start_collective(collective, sends, receives, label), self.counters)

    def sum(self, x: torch.Tensor, *, label: str = "a sum") -> None:
        """Replaces ``x`` by the sum over all ranks, the same bits on each. Every rank calls it, with equal shapes.

        Half precisions are added up in float32 and rounded once.

        Args:
            x: contiguous; float32, float64, bfloat16, float16, int64 or int32.

        Raises:
            TransportError: it is not contiguous or of another dtype, or a rank is lost.
        """
        if x.dtype not in SUMMED or not x.is_contiguous():
            raise TransportError(
                f"Tensors that are added up are contiguous, of {', '.join(map(str, SUMMED))}; got strides {x.stride()} "
                f"and {x.dtype}."
            )
        if self.size == 1 or not x.numel():
            return
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        self._sum(wide.view(-1), label)
        if wide is not x:
            x.copy_(wide)

    def sum_numbers(self, *numbers: float) -> list[float]:
        """The sums over all ranks of a few numbers, in float64: counts are exact below 2^53."""
        added = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self.control.sum(added)
        return added.tolist()

    def _sum(self, x: torch.Tensor, label: str) -> None:
        """Reduce-scatter, then all-gather: each rank adds up its part of x, in rank order, and hands it to the others.

        2 (P - 1) / P of x is sent by each of P ranks, the least there is.
        """
        me, parts = self.rank, x.tensor_split(self.size)
        peers = [rank for rank in range(self.size) if rank != me]
        received = {peer: torch.empty_like(parts[me]) for peer in peers}
        theirs = [(peer, parts[peer]) for peer in peers]
        self.exchange(theirs, list(received.items()), label=f"{label}, reduce-scatter").wait()
        received[me] = parts[me].clone()
        parts[me].zero_()
        for rank in range(self.size):
            parts[me].add_(received[rank])
        mine = [(peer, parts[me]) for peer in peers]
        self.exchange(mine, theirs, label=f"{label}, all-gather").wait()

    def _collective(self, x: torch.Tensor, complete: Callable[[], object]) -> None:
        """Waits for a library's own sum, and counts what such a one moves at least, which nobody sees."""
        Handle(complete, self.counters).wait()
        moved = 2 * (self.size - 1) * x.nbytes // self.size
        self.counters.messages += 2 * (self.size - 1)
        self.counters.sent_bytes += moved
        self.counters.received_bytes += moved

    def _check_complete(
        self, collective: Collective, sends: Sequence[Message], receives: Sequence[Message], label: str
    ) -> None:
        """Raises TransportError where the others would wait for this rank's part, or it for theirs."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        to, come = ([peer for peer, _ in messages] for messages in (sends, receives))
        if sorted(to) != others or sorted(come) != others:
            raise TransportError(
                f"{label or 'An exchange'} of rank {self.rank} of {self.size} is declared {WORDS[collective]}, which "
                f"has one message to and from each other rank; got some to {to} and from {come}. Declare it where all "
                f"ranks have all of them."
            )

    def _checked(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """Those that are not empty, and their bytes."""
        kept, size = [], 0
        for peer, buffer in messages:
            if not 0 <= peer < self.size or peer == self.rank:
                raise TransportError(f"Rank {self.rank} of {self.size} exchanges with the others; got peer {peer}.")
            if not buffer.is_contiguous():
                raise TransportError(f"Exchanged buffers must be contiguous; got strides {buffer.stride()}.")
            if buffer.numel():
                kept.append((peer, buffer))
                size += buffer.nbytes
        return kept, size


class Along(Transport):
    """Some ranks of a transport, renumbered: see `Transport.along`. Buffers and counters are the transport's."""

    def __init__(self, whole: Transport, ranks: Sequence[int]) -> None:
        if whole.rank not in ranks:
            raise TransportError(f"Rank {whole.rank} is not among those it asks a view for; got {list(ranks)}.")
        super().__init__(whole.name, list(ranks).index(whole.rank), len(ranks), agreement=False)
        self._whole, self._ranks = whole, tuple(ranks)
        self.counters, self.buffers = whole.counters, whole.buffers

    @property
    def device(self) -> torch.device:
        return self._whole.device

    @functools.cached_property
    def control(self) -> Transport:
        control = self._whole.control
        return self if control is self._whole else control.along(self._ranks)

    def abandon(self, error: BaseException) -> None:
        self._whole.abandon(error)

    def refusal(self, device: torch.device) -> str | None:
        return self._whole.refusal(device)

    def _start_collective(
        self, collective: Collective, sends: Sequence[Message], receives: Sequence[Message], label: str
    ) -> Callable[[], None]:
        """The transport's own in a view of all its ranks, and in one of some messages.

        These have no process group of their own, and a call that only some ranks of a group make never ends. NCCL's
        all-to-all is the same messages, started together, so nothing is lost by it.
        """
        if self._ranks != tuple(range(self._whole.size)):
            return self._start(sends, receives, label)
        return self._whole._start_collective(collective, sends, receives, label)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        there, back = ([(self._ranks[peer], x) for peer, x in messages] for messages in (sends, receives))
        return self._whole._start(there, back, label)
