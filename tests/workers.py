"""Long-lived Gloo ranks for the tests: four processes, started once, that run one function after another.

Nothing picks a port: the parent's store takes a free one and the workers are told. Every call has a deadline, and a
failure shows every rank's traceback.
"""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import ringattn
from ringattn.transports.torch_distributed import TorchDistributed

SIZE = 4


class Workers:
    """``run(n, fn, *args)`` gives ``fn(mesh, *args)`` of ranks 0 to n - 1."""

    def __init__(self, deadline: float = 120.0) -> None:
        self._deadline = deadline
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """The results by rank. ``fn`` and ``args`` must pickle."""
        for pipe in self._pipes[:size]:
            pipe.send((size, fn, args))
        end = time.monotonic() + self._deadline
        answers = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                answers.append((False, f"no answer within {self._deadline} s"))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, f"process ended with exit code {self._processes[rank].exitcode}"))
        failed = [f"--- rank {rank} ---\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if failed:
            raise AssertionError(f"{len(failed)} of {size} ranks failed:\n" + "\n".join(failed))
        return [result for _, result in answers]

    def close(self) -> None:
        """Ends the processes: a poison pill, then force."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=limit)
    groups = {size: dist.new_group(list(range(size)), timeout=limit) for size in range(2, SIZE + 1)}
    meshes = {
        size: ringattn.Mesh(ring=size, rank=rank, transport=TorchDistributed(group))
        for size, group in groups.items()
        if rank < size
    }
    while (task := pipe.recv()) is not None:
        size, fn, args = task
        try:
            pipe.send((True, fn(meshes[size], *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
