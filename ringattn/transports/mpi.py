"""Mpi: exchanges over MPI, by mpi4py; neither torch.distributed nor a store is needed.

Buffers are handed to MPI by their address and as bytes: nothing is copied, and every dtype travels. CUDA tensors do so
where the MPI library is GPU-aware.

MPI has no timeouts and no lost ranks of its own, so a wait polls, and ends in an error after ``limit``; a process that
ends without MPI's knowing is the launcher's to notice, which then ends all others. An exception in one rank would leave
the others waiting in MPI's own shutdown, so `start` has exceptions end the whole job.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from ringattn.errors import MissingDependencyError, TransportError
from ringattn.transports.base import Message, Transport

TAG = 7  # every message has it: they arrive in the order they were sent, and a communicator is a transport's own
EAGER_POLLS = 100  # before a waiting rank gives its core to others between polls: ranks may share cores
PATIENT_AFTER = 0.01  # seconds, after which it also sleeps
NAP = 1e-4  # seconds
FAREWELL = 0.5  # seconds for the launcher to show what a rank has said, before the job is ended


class Mpi(Transport):
    """Nonblocking messages over a communicator.

    Args:
        communicator: of mpi4py; this transport's own, for no messages of others may meet its.
        limit: within which a wait for another rank ends.
    """

    def __init__(self, communicator: Any, limit: datetime.timedelta, agreement: bool = True) -> None:
        self._communicator = communicator
        self._limit = limit
        self._under_way: dict[int, object] = {}  # MPI writes to buffers whether or not anybody still waits for them
        super().__init__("mpi", communicator.Get_rank(), communicator.Get_size(), agreement)

    @classmethod
    def start(cls, limit: datetime.timedelta) -> Mpi:
        """Between all ranks of the job, whose errors from now on end all of it.

        Raises:
            MissingDependencyError: mpi4py is not installed, or finds no MPI library.
        """
        import faulthandler

        # MPI's own start waits for ever for a rank that is missing, and lets no thread of Python's run meanwhile.
        faulthandler.dump_traceback_later(limit.total_seconds(), exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # the latter where there is no library
            raise MissingDependencyError(
                f"transport='mpi' needs mpi4py and an MPI library ({str(error).splitlines()[0]}). Install both with "
                f"pip install 'ringattn[mpi]', and start with its mpirun."
            ) from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        if getattr(sys.excepthook, "func", None) is not _end_job:
            sys.excepthook = functools.partial(_end_job, sys.excepthook)
        return cls(_communicator(MPI.COMM_WORLD.Dup), limit)

    @staticmethod
    def library() -> str:
        """Name and version of the MPI library."""
        from mpi4py import MPI

        return " ".join(MPI.Get_library_version().split()[:3]).rstrip(",")

    def among(self, ranks: Sequence[int], limit: datetime.timedelta | None = None) -> Transport:
        from mpi4py import MPI

        members = MPI.COMM_WORLD.Get_group().Incl(list(ranks))
        own = _communicator(lambda: MPI.COMM_WORLD.Create_group(members, TAG))
        return Mpi(own, limit or self._limit, self.agreement)

    def close(self) -> None:
        """Gives the communicator back, of which MPI has some thousands. All ranks do so together."""
        self._communicator.Free()

    def refusal(self, device: torch.device) -> str | None:
        if device.type == "cpu" or (device.type == "cuda" and gpu_aware()):
            return None
        return (
            f"This MPI library is not GPU-aware: it exchanges CPU tensors; got tensors on {device}. Use an MPI "
            f"that was built for these GPUs, transport='nccl', or move them to the CPU."
        )

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        messages = [*receives, *sends]
        _settle(messages)
        start = [self._communicator.Irecv] * len(receives) + [self._communicator.Isend] * len(sends)
        requests = [post(_bytes(x), peer, TAG) for post, (peer, x) in zip(start, messages, strict=True)]
        self._under_way[id(requests)] = requests, messages

        def complete() -> None:
            statuses = self._wait(requests, [peer for peer, _ in messages], label)
            for status, (peer, x) in zip(statuses, receives, strict=False):
                if status.Get_count() != x.nbytes:  # else a short message would pass in silence
                    raise TransportError(
                        f"Rank {self.rank} of {self.size} got {status.Get_count()} bytes from rank {peer} in "
                        f"{label or 'an exchange'}, and needs {x.nbytes}."
                    )

        return complete

    def _sum(self, x: torch.Tensor, label: str) -> None:
        from mpi4py import MPI

        refusal = self.refusal(x.device)
        if refusal is not None:
            raise TransportError(refusal)
        kinds = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}
        kinds |= {torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T}
        _settle([(self.rank, x)])
        requests = [self._communicator.Iallreduce(MPI.IN_PLACE, [_address(x), kinds[x.dtype]], MPI.SUM)]
        self._under_way[id(requests)] = requests, x
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._collective(x, functools.partial(self._wait, requests, others, label))

    def _wait(self, requests: list[Any], peers: list[int], label: str) -> list[Any]:
        """Returns when all are complete, and how they ended. Until then, after an error too, their buffers are kept."""
        from mpi4py import MPI

        statuses, began, polls = [MPI.Status() for _ in requests], time.monotonic(), 0
        try:
            while not MPI.Request.Testall(requests, statuses):
                polls += 1
                if polls > EAGER_POLLS:
                    self._be_patient(time.monotonic() - began, requests, peers, label)
        except MPI.Exception as error:
            raise TransportError(
                f"Rank {self.rank} of {self.size} failed in {label or 'an exchange'} with rank {_listed(peers)}. MPI "
                f"says: {error}."
            ) from error
        del self._under_way[id(requests)]
        return statuses

    def _be_patient(self, waited: float, requests: list[Any], peers: list[int], label: str) -> None:
        if waited > self._limit.total_seconds():
            late = [peer for request, peer in zip(requests, peers, strict=False) if not request.Get_status()]
            raise TransportError(
                f"Rank {self.rank} of {self.size} lost rank {_listed(late or peers)} during {label or 'an exchange'}. "
                f"It did not make the same call within the timeout: look at what it was doing, or raise the timeout."
            )
        time.sleep(NAP) if waited > PATIENT_AFTER else os.sched_yield()


@functools.cache
def gpu_aware() -> bool:
    """Whether the MPI library says that it takes CUDA addresses: MPIX_Query_cuda_support of MPICH and Open MPI."""
    from mpi4py import MPI

    try:
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support
    except (AttributeError, OSError):
        return False
    return bool(query())


def end_job(code: int) -> None:
    """Has this process, where it is a rank of MPI, end all others too when it exits with an error."""
    if code and "mpi4py.MPI" in sys.modules:
        from mpi4py.run import set_abort_status

        set_abort_status(code)


def _end_job(
    before: Callable[..., object], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What Python does with an exception that nobody has caught; then the end of the job."""
    from mpi4py import MPI

    try:
        before(kind, error, trace)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(FAREWELL)
    MPI.COMM_WORLD.Abort(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _communicator(make: Callable[[], Any]) -> Any:
    from mpi4py import MPI

    try:
        return make()
    except MPI.Exception as error:
        raise TransportError(
            f"MPI has no communicator left for this mesh: {error}. Each mesh keeps one; make it once, and use it again."
        ) from error


def _settle(messages: Sequence[Message]) -> None:
    """MPI knows nothing of CUDA's streams: what is to be sent must have been computed."""
    if any(x.device.type == "cuda" for _, x in messages):
        torch.cuda.current_stream().synchronize()


def _address(x: torch.Tensor) -> Any:
    from mpi4py import MPI

    return MPI.memory.fromaddress(x.data_ptr(), x.nbytes)


def _bytes(x: torch.Tensor) -> list[Any]:
    from mpi4py import MPI

    return [_address(x), MPI.BYTE]


def _listed(peers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(peers))))
