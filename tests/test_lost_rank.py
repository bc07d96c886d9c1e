"""A rank that is lost in the middle of a ring: the others end too, and all say whom they lost, in which call, and why.

Every fault happens in the second call, when the rank has relayed nothing yet of what it has received.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

import ringattn

SIZE, LOST, SLOW = 4, 2, 3.0


def _close_sockets(port: int) -> None:
    """Those to the other ranks; that to the store stays."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "socket" in str(link.readlink()):
                with socket.socket(fileno=os.dup(int(link.name))) as end:
                    if end.family != socket.AF_UNIX and end.getpeername()[1] != port:
                        end.shutdown(socket.SHUT_RDWR)


def _fail(what: str, port: int, timeout: float) -> None:
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "slow":
        time.sleep(timeout + 1)
    elif what == "closed":
        _close_sockets(port)
    elif what == "raises":
        raise ZeroDivisionError("on purpose")


def _serve(rank: int, port: int, hosted: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{SIZE}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(not hosted)
    while True:
        what, timeout, lost = pipe.recv()
        mesh = ringattn.init(timeout=timeout)
        _call(mesh)
        if rank == lost:
            _plant(mesh.connected(), what, port, timeout)
        said, started = [], time.monotonic()
        for _ in range(2):
            try:
                if what == "skips" and rank != lost:
                    mesh.everyone.sum(torch.ones(3), label="the gradients")
                else:
                    _call(mesh) if what != "skips" else time.sleep(timeout + 1)
                said.append("no error")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        pipe.send((said, time.monotonic() - started))


def _call(mesh: ringattn.Mesh) -> None:
    sharding = ringattn.Sharding(60, mesh)
    q = torch.randn(1, 2, sharding.count, 8)
    ringattn.attention(q, q, q, ringattn.Full(), sharding=sharding, schedule="ring")


def _plant(transport: Any, what: str, port: int, timeout: float) -> None:
    exchange, exchanges = transport.exchange, 0

    def counted(*arguments: Any, control: bool = False, **options: Any) -> Any:
        nonlocal exchanges
        exchanges += not control
        if exchanges == 2 and not control:
            _fail(what, port, timeout)
        return exchange(*arguments, control=control, **options)

    transport.exchange = counted


class Ranks:
    """Processes that go through one fault after another, each on a mesh of its own."""

    def __init__(self, hosted: bool = False) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        if hosted:  # by rank 0, where there is none yet
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, hosted, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, what: str, timeout: float, lost: int = LOST) -> dict[int, tuple[list[str], float]]:
        """What the ranks said in two calls, and the seconds that it took; nothing of one that has ended."""
        found = {}
        for pipe in self._pipes:
            pipe.send((what, timeout, lost))
        for rank in [rank for rank in range(SIZE) if rank != lost]:
            assert self._pipes[rank].poll(60), f"rank {rank} waits still"
            found[rank] = self._pipes[rank].recv()
        if what == "frozen":
            os.kill(self._processes[lost].pid or 0, signal.SIGCONT)
        if what != "killed":
            found[lost] = self._pipes[lost].recv()
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks()
    yield processes
    processes.close()


LATE = "Rank 2 did not come within 3 s"
ALIVE = "lives, but the connection to it was closed"
RAISED = "Rank 2 raised ZeroDivisionError: on purpose (in attention forward 2)"
ENDED = "Rank 2 has ended: its own output says why"


def _check(found: dict[int, tuple[list[str], float]], lost: int, where: str, why: str, seconds: float) -> None:
    for rank, (said, took) in found.items():
        if rank != lost:
            assert all(each.startswith(f"TransportError: Rank {rank} of {SIZE} lost rank {lost} in ") for each in said)
            assert f"lost rank {lost} in {where}" in said[0] and why in said[0] and "\n" not in said[0], said[0]
            assert took < seconds + 5


@pytest.mark.parametrize(
    ("what", "timeout", "where", "why", "own"),
    [
        ("raises", 60, "attention forward 2, phase", RAISED, "ZeroDivisionError: on purpose"),
        ("slow", SLOW, "attention forward 2, phase", LATE, "TransportError: Rank 2 of 4 cannot go on in attention"),
        ("frozen", SLOW, "attention forward 2, phase", LATE, "TransportError: Rank 2 of 4 "),
        ("skips", SLOW, "the gradients", LATE, "no error"),
        ("closed", 60, "attention forward 2, phase", ALIVE, "TransportError: Rank 2 of 4 "),
        ("killed", 60, "attention forward 2, phase", ENDED, ""),
    ],
)
def test_all_others_end_in_time_and_say_whom_they_lost(
    ranks: Ranks, what: str, timeout: float, where: str, why: str, own: str
) -> None:
    found = ranks.run(what, timeout)
    lost = int(found[0][0][0].split("lost rank ")[1][0]) if what == "closed" else LOST  # both ends of a connection live
    _check(found, lost, where, why, timeout if timeout == SLOW else 0)
    if own:
        assert found[LOST][0][0].startswith(own), found[LOST][0]
    if what == "slow":
        assert "Rank 2 was last in attention forward 2, phase 1." in found[1][0][0], found[1][0]
    if what == "killed":  # on a ring of four rank 0 waits for rank 3, which lives and waits for rank 2
        assert "phase 3, where it waited for rank 3" in found[0][0][0] or "phase 2, where it" in found[0][0][0]


def test_the_rank_that_hosts_the_store_is_killed() -> None:
    processes = Ranks(hosted=True)
    try:
        _check(processes.run("killed", 60, lost=0), 0, "attention forward 2, phase", "Rank 0 has ended", 0)
    finally:
        processes.close()
