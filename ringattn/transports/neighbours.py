"""Neighbours: the ranks of a group, where all share a machine and may read each other's memory, connected by sockets.

The sockets are Linux's abstract ones, which have no name in a file system: nothing is left, however a process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

PATIENCE = 20.0  # seconds for neighbours that have just said that they are there
GREETING = struct.Struct("=QQ16s")  # rank, where a word of it lies, and that word
CREDENTIALS = struct.Struct("=3i")  # of the process at the other end: its id, user and group
TRACERS, ANY = 0x59616D61, -1  # prctl's PR_SET_PTRACER: where Yama lets only parents read, all of the same user may


class Place(NamedTuple):
    """Where a rank is called: the machine since it was started, the network that it sees, and a name in that."""

    boot: str
    network: int
    name: bytes


class Neighbour(NamedTuple):
    """A connected socket of whole packets, and the process at its other end."""

    line: socket.socket
    process: int


class _Piece(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


def read(process: int, address: int, into: int, size: int) -> None:
    """Copies memory of another process to an address of this one.

    Raises:
        OSError: it has ended, has no such memory, or may not be read.
    """
    done = 0
    while done < size:
        here, there = _Piece(into + done, size - done), _Piece(address + done, size - done)
        got = _libc().process_vm_readv(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if got <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        done += got


def neighbours(group: dist.ProcessGroup) -> Mapping[int, Neighbour]:
    """The other ranks of a group, all of which call it together.

    Nobody has any, unless all share a machine and each may read all others.
    """
    word = ctypes.create_string_buffer(os.urandom(16), 16)  # read by the others until all have said so
    met: dict[int, Neighbour] = {}
    with contextlib.ExitStack() as lines:
        listener = _listener(group.size())
        place = None if listener is None else _place(listener)
        places = _gathered(group, place)
        try:
            for peer, name in enumerate(_names(places)):
                if peer == group.rank():
                    continue
                line = _called(name) if peer < group.rank() or listener is None else listener.accept()[0]
                lines.callback(line.close)
                greeted, process = _greeted(line, group.rank(), word)
                met[greeted] = Neighbour(line, process)
        except (OSError, struct.error):
            met.clear()
        finally:
            if listener is not None:
                listener.close()
        if not all(_gathered(group, len(met) == group.size() - 1)):
            return {}
        lines.pop_all()
    return met


def _listener(size: int) -> socket.socket | None:
    """At which the others call; None where this system cannot do what is needed."""
    if sys.platform != "linux" or not hasattr(_libc(), "process_vm_readv"):
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.settimeout(PATIENCE)
    listener.bind(f"\0ringattn-{os.urandom(16).hex()}")
    listener.listen(size)
    return listener


def _place(listener: socket.socket) -> Place:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return Place(boot, Path("/proc/self/ns/net").stat().st_ino, listener.getsockname())


def _names(places: Sequence[Place | None]) -> list[bytes]:
    """At which the ranks of one machine are called; none where these are of several."""
    known = [place for place in places if place is not None]
    together = len(known) == len(places) and len({place[:2] for place in known}) == 1
    return [place.name for place in known] if together else []


def _called(name: bytes) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(name)
    return line


def _greeted(line: socket.socket, rank: int, word: Any) -> tuple[int, int]:
    """The rank and the process at the other end, whose word has been read.

    Raises:
        OSError, struct.error: it has ended, is another user's, or may not be read.
    """
    line.settimeout(PATIENCE)
    line.send(GREETING.pack(rank, ctypes.addressof(word), word.raw))
    greeted, address, said = GREETING.unpack(line.recv(GREETING.size))
    process, user, _ = CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    found = ctypes.create_string_buffer(len(said))
    read(process, address, ctypes.addressof(found), len(said))
    if user != os.getuid() or found.raw != said:
        raise PermissionError("the process at the other end is not who it says")
    return greeted, process


def _gathered(group: dist.ProcessGroup, x: Any) -> list[Any]:
    """What all ranks of the group have."""
    found = [None] * group.size()
    dist.all_gather_object(found, x, group=group)
    return found


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(TRACERS, ctypes.c_ulong(ANY), 0, 0, 0)  # refused where there is no Yama, and not needed then
    if hasattr(libc, "process_vm_readv"):
        pieces = ctypes.POINTER(_Piece), ctypes.c_ulong
        libc.process_vm_readv.argtypes = (ctypes.c_int, *pieces, *pieces, ctypes.c_ulong)
        libc.process_vm_readv.restype = ctypes.c_ssize_t
    return libc
