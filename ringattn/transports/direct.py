"""Direct: messages between ranks of one machine, whose receiver reads the memory of their sender.

Through a socket a message is copied twice, and Gloo wakes a thread at either end. Here short ones travel in a packet of
a Unix socket; of a long one the packet says where it lies, and the receiver copies it into its own buffer from there,
once. Of either it says that it has it. Nothing is allocated, and nothing is left when a process ends, which the others
are told by its sockets. Who waits sleeps. The order in which memory is written and read is the socket's: what was
written before a packet was sent is there for who has received it, on any processor.

A message is copied when its receiver next waits for anything here, or starts an exchange.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import math
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch

from ringattn.transports.base import Message
from ringattn.transports.neighbours import Neighbour, read

SHORT = 1 << 13  # bytes, up to which a second copy costs less than reading another process's memory
LONGEST = 1e6  # seconds, of which a poll can count the milliseconds
NAME, NOTHING = 16, b"\0"
HEADER = struct.Struct(f"=QQ{NAME}s")  # bytes, address, dtype
READ = b"r"  # a packet: the oldest message of those not yet read has been read


class MismatchError(RuntimeError):
    """A message is not what its receiver needs.

    Attributes:
        peer: its sender.
    """

    def __init__(self, peer: int, words: str) -> None:
        super().__init__(words)
        self.peer = peer


@dataclasses.dataclass(eq=False)
class Transfer:
    """A message under way, and its buffer, which is kept until it is done."""

    peer: int
    buffer: torch.Tensor
    done: bool = False


class _Line:
    """A neighbour, and what is under way to and from it."""

    def __init__(self, neighbour: Neighbour) -> None:
        self.socket, self.process = neighbour
        self.socket.setblocking(False)
        self.open = True
        self.packets: collections.deque[bytes] = collections.deque()  # that the socket has had no room for yet
        self.unread: collections.deque[Transfer] = collections.deque()  # what was sent
        self.posted: collections.deque[Transfer] = collections.deque()  # those to be received
        self.arrived: collections.deque[bytes] = collections.deque()  # their packets, where these come first


class Direct:
    """Messages between this rank and its neighbours, each pair's in the order they are sent. One thread uses it.

    Args:
        neighbours: by their rank.
        limit: within which a wait for one of them ends.
    """

    def __init__(self, neighbours: Mapping[int, Neighbour], limit: datetime.timedelta) -> None:
        self._seconds = limit.total_seconds()
        self._lines = {peer: _Line(neighbour) for peer, neighbour in neighbours.items()}
        self._peers = {line.socket.fileno(): peer for peer, line in self._lines.items()}
        self._poll = select.poll()
        for file in self._peers:
            self._poll.register(file, select.POLLIN)
        weakref.finalize(self, _close, [line.socket for line in self._lines.values()])

    def start(self, sends: Iterable[Message], receives: Iterable[Message]) -> list[Callable[[], None]]:
        """Starts an exchange. Its messages, those to be received first, are waited for by what it returns.

        They raise RuntimeError where the other rank has ended or does not come in time, and MismatchError where what
        has come meanwhile, from any rank, is not what this one needs.
        """
        incoming = [Transfer(peer, x) for peer, x in receives]
        for transfer in incoming:
            self._lines[transfer.peer].posted.append(transfer)
        outgoing = [self._send(peer, x) for peer, x in sends]
        for peer in {transfer.peer for transfer in incoming}:
            self._receive(peer)
        self._go_on(0)
        return [functools.partial(self._wait, transfer) for transfer in incoming + outgoing]

    def _wait(self, transfer: Transfer) -> None:
        """Returns when its buffer may be read and written again."""
        end = time.monotonic() + self._seconds
        while not transfer.done:
            left = end - time.monotonic()
            if not self._lines[transfer.peer].open:
                raise RuntimeError("Connection closed by peer")
            if left <= 0:
                raise RuntimeError("Timed out")
            self._go_on(math.ceil(min(left, LONGEST) * 1000))

    def end(self) -> None:
        """Ends every wait here, and those of the neighbours for this rank. Any thread may call it."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # it has ended by itself
                line.socket.shutdown(socket.SHUT_RDWR)

    def _send(self, peer: int, x: torch.Tensor) -> Transfer:
        line, transfer = self._lines[peer], Transfer(peer, x)
        packet = HEADER.pack(x.nbytes, x.data_ptr(), _name(x.dtype))
        if x.nbytes <= SHORT:
            packet += ctypes.string_at(x.data_ptr(), x.nbytes)
        line.unread.append(transfer)
        self._say(line, packet)
        return transfer

    def _say(self, line: _Line, packet: bytes) -> None:
        line.packets.append(packet)
        if len(line.packets) == 1:
            self._flush(line)
            if line.packets:
                self._poll.modify(line.socket, select.POLLIN | select.POLLOUT)

    def _flush(self, line: _Line) -> None:
        """Sends as many packets as the socket has room for."""
        try:
            while line.packets:
                line.socket.send(line.packets[0])
                line.packets.popleft()
        except BlockingIOError:
            return
        except OSError:  # who has ended is noticed by who waits for it, after what it has sent before
            line.packets.clear()

    def _go_on(self, milliseconds: int) -> None:
        """Goes on with what can go on within this time, of any exchange."""
        for file, events in self._poll.poll(milliseconds):
            peer = self._peers[file]
            line = self._lines[peer]
            if events & select.POLLOUT:
                self._flush(line)
                if not line.packets:
                    self._poll.modify(file, select.POLLIN)
            if events & ~select.POLLOUT:
                self._hear(peer, line)

    def _hear(self, peer: int, line: _Line) -> None:
        """Takes the next packet."""
        try:
            packet = line.socket.recv(HEADER.size + SHORT)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            line.open = False
            self._poll.unregister(line.socket)
        elif packet == READ:
            line.unread.popleft().done = True
        else:
            line.arrived.append(packet)
            self._receive(peer)

    def _receive(self, peer: int) -> None:
        """Fills the buffers of the messages that have come from this neighbour and are wanted."""
        line = self._lines[peer]
        while line.posted and line.arrived:
            transfer, packet = line.posted.popleft(), line.arrived.popleft()
            x = transfer.buffer
            size, address, name = HEADER.unpack_from(packet)
            if (size, name) != (x.nbytes, _name(x.dtype)):
                sent, needed = (kind.rstrip(NOTHING).decode() for kind in (name, _name(x.dtype)))
                raise MismatchError(peer, f"sent {size} bytes of {sent}; needed are {x.nbytes} of {needed}")
            try:
                if size <= SHORT:
                    ctypes.memmove(x.data_ptr(), packet[HEADER.size :], size)
                else:
                    read(line.process, address, x.data_ptr(), size)
            except OSError:  # it has just ended
                return
            self._say(line, READ)
            transfer.done = True


@functools.cache
def _name(dtype: torch.dtype) -> bytes:
    """Its name, padded to what a header has room for."""
    return str(dtype).removeprefix("torch.").encode().ljust(NAME, NOTHING)[:NAME]


def _close(sockets: Iterable[socket.socket]) -> None:
    for line in sockets:
        line.close()
