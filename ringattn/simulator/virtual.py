"""`simulate`: a function of a mesh, run on every rank of a virtual one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch

from ringattn.checking import integer, shown
from ringattn.errors import DeadlockError, InputError, TransportError
from ringattn.mesh import Mesh
from ringattn.simulator.transport import Abandoned, Hub, Simulator
from ringattn.transports.base import Counters

MAX_RANKS = 4096  # each is a thread of its own


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What a simulation gave.

    Attributes:
        results: what the function returned on each rank.
        traffic: what each rank moved (messages, bytes), as its transport counted.
    """

    results: list[Any]
    traffic: list[Counters]


def simulate(fn: Callable[..., Any], *args: Any, ring: int, ulysses: int = 1, node: int | None = None) -> Simulation:
    """Runs ``fn(mesh, *args)`` on ``ring * ulysses`` virtual ranks in this process.

    One rank runs at a time, with all cores, and the next takes over only where it waits: a run is reproducible to
    the bit. Arguments are shared, not copied; each rank has its own random state, which begins as the caller's.

    Args:
        fn: a function of a mesh and of ``args``.
        ring, ulysses: ranks on the axes of the mesh.
        node: how many neighbouring ranks share a node, for schedules that look at it; None where all do.

    Raises:
        InputError: ``fn`` is not a function, or there are too many ranks: each is a thread.
        DeadlockError: no rank can go on; says who waits for whom, in which exchange.
        InFlightError: a buffer was written while an exchange still needed it.
        TransportError: a message did not fit its receive, or was never received.
        Exception: whatever ``fn`` raised first, with that rank's traceback.

    >>> simulate(lambda mesh, x: x + mesh.rank, 5, ring=2).results
    [5, 6]
    """
    if not callable(fn):
        raise InputError(f"simulate runs a function of a mesh on every rank; got {shown(fn)}.")
    for size, axis in ((ring, "ring"), (ulysses, "ulysses")):
        integer(size, f"simulate's {axis}", least=1, below=MAX_RANKS + 1, needed="a number of ranks")
    hub = Hub(Mesh.virtual(ring, ulysses, node=node).size)
    transports = [Simulator(hub, rank) for rank in range(hub.size)]
    results: list[Any] = [None] * hub.size
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        failure: BaseException | None = None
        try:
            hub.begin(rank)
            torch.get_num_threads()  # before a new thread has asked for the caller's number, its products use all cores
            mesh = Mesh.virtual(ring, ulysses, rank, node, transport=transports[rank])
            # Autograd's device threads would be shared by the ranks, and one waiting rank would stop them all.
            with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(grad_enabled):
                results[rank] = fn(mesh, *args)
        except BaseException as error:
            failure = error
        hub.finish(rank, failure)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(hub.size)]
    for thread in threads:
        thread.start()
    hub.start()
    for thread in threads:
        thread.join()
    hub.end()
    if hub.failure is not None and not isinstance(hub.failure, Abandoned):
        if hasattr(hub.failure, "add_note") and not isinstance(hub.failure, DeadlockError):  # Python 3.11 and later
            hub.failure.add_note(f"raised on virtual rank {hub.failed_rank} of {hub.size}")
        raise hub.failure
    left = hub.unreceived()
    if left:
        raise TransportError(f"Messages were posted that no rank answered:\n{left}")
    return Simulation(results, [transport.counters for transport in transports])
