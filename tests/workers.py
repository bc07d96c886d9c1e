"""Long-lived ranks for the tests: four processes, of Gloo or of MPI, that run one function after another.

Nothing picks a port: the parent's store takes a free one and the workers are told, and MPI's ranks call a socket in a
folder. Every call has a deadline, and a failure shows every rank's traceback.
"""

from __future__ import annotations

import datetime
import multiprocessing
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import ringattn
from ringattn.transports.mpi import Mpi
from ringattn.transports.torch_distributed import TorchDistributed
from scripts.benchmarks.teams import start_job

SIZE = 4
LIMIT = datetime.timedelta(seconds=60)


class Workers(ABC):
    """``run(n, fn, *args)`` gives ``fn(mesh, *args)`` of ranks 0 to n - 1."""

    def __init__(self, pipes: list[Connection], deadline: float = 120.0) -> None:
        self._pipes, self._deadline = pipes, deadline

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """The results by rank. ``fn`` and ``args`` must pickle."""
        for pipe in self._pipes[:size]:
            pipe.send((size, fn, args))
        end = time.monotonic() + self._deadline
        answers = []
        for pipe in self._pipes[:size]:
            if not pipe.poll(max(0.0, end - time.monotonic())):
                answers.append((False, f"no answer within {self._deadline} s"))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, "process ended"))
        failed = [f"--- rank {rank} ---\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if failed:
            raise AssertionError(f"{len(failed)} of {size} ranks failed:\n" + "\n".join(failed))
        return [result for _, result in answers]

    def close(self) -> None:
        """Ends the processes: a poison pill, then force."""
        for pipe in self._pipes:
            if not pipe.closed:
                try:
                    pipe.send(None)
                except OSError:
                    continue  # it has ended already
        self._end()

    @abstractmethod
    def _end(self) -> None: ...


class GlooWorkers(Workers):
    """Four Gloo ranks."""

    def __init__(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        pipes: list[Connection] = []
        self._processes = []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_gloo, args=(rank, self._store.port, theirs), daemon=True)
            process.start()
            pipes.append(ours)
            self._processes.append(process)
        super().__init__(pipes)

    def _end(self) -> None:
        for process in self._processes:
            process.join(10)
            process.kill()


class MpiWorkers(Workers):
    """Four MPI ranks, one job of mpirun."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = str(Path(self._folder.name) / "socket")
        self._job, pipes = start_job(SIZE, [sys.executable, "-m", "tests.workers", address], address)
        super().__init__(pipes)

    def _end(self) -> None:
        try:
            self._job.wait(10)
        except subprocess.TimeoutExpired:
            self._job.kill()
        self._folder.cleanup()


def _serve_gloo(rank: int, port: int, pipe: Connection) -> None:
    store = TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=LIMIT)
    groups = {size: dist.new_group(list(range(size)), timeout=LIMIT) for size in range(2, SIZE + 1)}
    meshes = {
        size: ringattn.Mesh(ring=size, rank=rank, transport=TorchDistributed(group))
        for size, group in groups.items()
        if rank < size
    }
    _serve(meshes, pipe)
    dist.destroy_process_group()


def _serve_mpi(address: str) -> None:
    world = Mpi.start(LIMIT)
    pipe = Client(address, "AF_UNIX")
    pipe.send(world.rank)
    sizes = range(max(2, world.rank + 1), SIZE + 1)
    _serve({n: ringattn.Mesh(ring=n, rank=world.rank, transport=world.among(range(n))) for n in sizes}, pipe)


def _serve(meshes: Mapping[int, ringattn.Mesh], pipe: Connection) -> None:
    torch.set_num_threads(1)
    linear = torch.nn.functional.linear
    while (task := pipe.recv()) is not None:
        size, fn, args = task
        try:
            pipe.send((True, fn(meshes[size], *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        torch.nn.functional.linear = linear  # for which ZeRO-3 of DeepSpeed leaves one that rounds otherwise


if __name__ == "__main__":
    _serve_mpi(sys.argv[1])
