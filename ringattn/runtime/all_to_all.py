"""All-to-alls of heads and tokens among the ranks of a group, as a swap says.

Outward, what goes to a member is this rank's tokens of that one's heads; homeward, that one's tokens of this rank's
heads. Everything that goes to a member in one all-to-all is one message of bytes, in which wider numbers come first, so
that all of them lie where numbers of their width may. While one slice of heads is computed, the next one arrives and
the one before goes home.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ringattn.plans.deal import Part
from ringattn.plans.swap import Message, Swap
from ringattn.transports.base import Handle, Transport

Tensors = list[torch.Tensor]
Messages = list[tuple[int, torch.Tensor]]
"""Of all-to-alls, each with the member's rank of the sequence."""


class Kind(NamedTuple):
    """Which dims of a tensor count heads and tokens, and whether they are those of the keys."""

    heads: int
    tokens: int
    of_keys: bool = False


QUERIES, KEYS = Kind(1, 2), Kind(1, 2, of_keys=True)


@dataclasses.dataclass(frozen=True)
class Travelling:
    """A tensor of which every part of the heads travels.

    Attributes:
        shape: of all heads, and of any number of tokens.
        dtype: as which a part travels.
    """

    shape: tuple[int, ...]
    kind: Kind
    dtype: Callable[[Part], torch.dtype]

    @staticmethod
    def of(x: torch.Tensor, kind: Kind) -> Travelling:
        """A tensor that travels as it is."""
        return Travelling(tuple(x.shape), kind, lambda _: x.dtype)

    def shape_of(self, part: Part, message: Message) -> tuple[int, ...]:
        """A part of it in a message."""
        shape, of_keys = list(self.shape), self.kind.of_keys
        shape[self.kind.heads] = part.kv_heads if of_keys else part.heads
        shape[self.kind.tokens] = message.key_tokens if of_keys else message.tokens
        return tuple(shape)


def heads_of(x: torch.Tensor, kind: Kind, part: Part) -> torch.Tensor:
    """A part's heads of a tensor of all heads."""
    first, count = (part.kv_first, part.kv_heads) if kind.of_keys else (part.first, part.heads)
    return x.narrow(kind.heads, first, count)


class AllToAlls:
    """Those of one pass."""

    def __init__(self, transport: Transport, swap: Swap, device: torch.device) -> None:
        self._transport, self._swap, self._device = transport, swap, device
        self._members = transport.along(swap.members)

    def around(
        self,
        inputs: Sequence[tuple[torch.Tensor, Kind]],
        compute: Callable[[int, list[Tensors]], list[Tensors]],
        results: Sequence[Travelling],
        arrive: Callable[[Part, Tensors], None],
    ) -> None:
        """Every slice outward, computed, and homeward.

        Args:
            inputs: of this rank's tokens and all heads.
            compute: from a slice's number, and the inputs of all tokens of the group for each of this rank's parts,
                makes the results of each part.
            results: what is sent home of them.
            arrive: is told of the results of this rank's tokens, part after part of every slice, in the order of the
                members who computed them.
        """
        slices = range(self._swap.slices)
        going = self._outward(0, inputs)
        coming: Callable[[], None] | None = None
        for nth in slices:
            gathered = going()
            if nth + 1 in slices:
                going = self._outward(nth + 1, inputs)
            made = compute(nth, gathered)
            if coming is not None:
                coming()
            coming = self._homeward(nth, made, results, arrive)
        if coming is not None:
            coming()

    def _outward(self, nth: int, inputs: Sequence[tuple[torch.Tensor, Kind]]) -> Callable[[], list[Tensors]]:
        """Starts the all-to-all of a slice; what it returns waits for it, and gives what is gathered, part by part."""
        travelling = [Travelling.of(*each) for each in inputs]
        given, got = self._swap.outward(nth)
        sends, views = self._messages("swap out, sent", given, travelling)
        for message in given:
            parts = iter(views[message.peer])
            for part in message.parts:
                for x, kind in inputs:
                    next(parts).copy_(heads_of(x, kind, part))
        receives, arrived = self._messages("swap out, received", got, travelling)
        handle = self._start(sends, receives, nth, "outward")

        def finish() -> list[Tensors]:
            handle.wait()
            parts = self._swap.parts[nth]
            own = [heads_of(x, kind, part) for part in parts for x, kind in inputs]
            arrived[self._swap.rank] = own
            whole = [
                torch.empty(each.shape_of(part, self._group), dtype=each.dtype(part), device=self._device)
                for part in parts
                for each in travelling
            ]
            for peer, pieces in arrived.items():
                for at, (total, piece) in enumerate(zip(whole, pieces, strict=True)):
                    kind = travelling[at % len(travelling)].kind
                    for start, there, count in self._swap.runs(peer, kind.of_keys):
                        total.narrow(kind.tokens, there, count).copy_(piece.narrow(kind.tokens, start, count))
            return [whole[at : at + len(travelling)] for at in range(0, len(whole), len(travelling))]

        return finish

    def _homeward(
        self,
        nth: int,
        made: list[Tensors],
        results: Sequence[Travelling],
        arrive: Callable[[Part, Tensors], None],
    ) -> Callable[[], None]:
        """Starts the all-to-all of a slice's results; what it returns waits for it and hands them over."""
        given, got = self._swap.homeward(nth)
        own = Message(self._swap.rank, *self._swap.counts(self._swap.place), self._swap.parts[nth])
        sends, views = self._messages("swap home, sent", [*given, own], results)
        for message in (*given, own):
            pieces = iter(views[message.peer])
            for tensors in made:
                for x, each in zip(tensors, results, strict=True):
                    piece, tokens = next(pieces), each.kind.tokens
                    for start, there, count in self._swap.runs(message.peer, each.kind.of_keys):
                        piece.narrow(tokens, start, count).copy_(x.narrow(tokens, there, count))
        receives, arrived = self._messages("swap home, received", got, results)
        handle = self._start(sends[:-1], receives, nth, "homeward")
        arrived[own.peer] = views[own.peer]

        def finish() -> None:
            handle.wait()
            for message in sorted((*got, own)):
                pieces = iter(arrived[message.peer])
                for part in message.parts:
                    arrive(part, [next(pieces) for _ in results])

        return finish

    def _start(self, sends: Messages, receives: Messages, nth: int, way: str) -> Handle:
        """Starts an all-to-all of the members, whom the view numbers by their places in the group."""
        first = self._swap.members.start
        there, back = ([(peer - first, x) for peer, x in messages] for messages in (sends, receives))
        label, collective = f"{self._transport.doing}, {way}, slice {nth}", self._swap.collective(nth)
        return self._members.exchange(there, back, label=label, collective=collective)

    @property
    def _group(self) -> Message:
        """All tokens of the group, as if they were one message."""
        return Message(-1, *self._swap.all_tokens, ())

    def _messages(
        self, name: str, messages: Sequence[Message], travelling: Sequence[Travelling]
    ) -> tuple[Messages, dict[int, Tensors]]:
        """A buffer for each message, behind one another, and the tensors in it: of each part, what is travelling."""
        layouts = [list(_pieces(message, travelling)) for message in messages]
        sizes = [sum(map(_bytes, pieces)) for pieces in layouts]
        # every message begins where the widest number may
        starts = [-(-size // 8) * 8 for size in sizes]
        buffer = self._transport.buffers.take(name, (sum(starts),), torch.uint8, self._device)
        out, views, at = [], {}, 0
        for message, pieces, size, step in zip(messages, layouts, sizes, starts, strict=True):
            raw = buffer[at : at + size]
            out.append((message.peer, raw))
            views[message.peer] = _views(raw, pieces)
            at += step
        return out, views


def _pieces(message: Message, travelling: Sequence[Travelling]) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    for part in message.parts:
        for each in travelling:
            yield each.shape_of(part, message), each.dtype(part)


def _bytes(piece: tuple[tuple[int, ...], torch.dtype]) -> int:
    return math.prod(piece[0]) * piece[1].itemsize


def _views(raw: torch.Tensor, pieces: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Tensors:
    """The pieces of a message, in their order; wider numbers lie first."""
    found: dict[int, torch.Tensor] = {}
    at = 0
    for nth in sorted(range(len(pieces)), key=lambda nth: -pieces[nth][1].itemsize):
        (shape, dtype), size = pieces[nth], _bytes(pieces[nth])
        found[nth] = raw[at : at + size].view(dtype).view(shape)
        at += size
    return [found[nth] for nth in range(len(pieces))]
