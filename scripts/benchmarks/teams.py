"""Long-lived teams of ranks for benchmarks: started once, driven through pipes, alternated without restarts."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """What a function sent to a team gets first: who it is, and what earlier calls have prepared."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.prepared: Callable[[], Any] = lambda: None
        self.kept: dict[str, Any] = {}  # what calls make once and use again

    def timed(self, cpu: bool) -> float:
        """Seconds that one call of what was prepared takes, all ranks starting together.

        With `cpu`, those of the processor, shared by the threads: what a busy machine distorts least.
        """
        if self.size > 1:
            dist.barrier()
        clock = time.process_time if cpu else time.perf_counter
        start = clock()
        self.prepared()
        return (clock() - start) / (torch.get_num_threads() if cpu else 1)


def timed(worker: Worker, cpu: bool) -> float:
    return worker.timed(cpu)


class Team:
    """`size` processes of `threads` threads each, joined by Gloo when there are more than one.

    The processes meet through a file in a temporary folder, so no port is picked by anyone.
    """

    def __init__(self, size: int, threads: int = 1, timeout: float = 600.0) -> None:
        self.size = size
        self._timeout = timeout  # seconds a call may take
        self._folder = tempfile.TemporaryDirectory(prefix="ringattn-team-")
        context = multiprocessing.get_context("spawn")
        meeting = f"file://{Path(self._folder.name) / 'meeting'}"
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, threads, meeting), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """`function(worker, ...)` on every rank; the results by rank, or an error with every rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        deadline = time.monotonic() + self._timeout
        answers: list[Any] = []
        problems: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    problems.append(f"rank {rank}: no answer within {self._timeout:.0f} s")
                    continue
                answer, problem = pipe.recv()
            except (EOFError, ConnectionError):
                problems.append(f"rank {rank}: its process ended")
                continue
            answers.append(answer)
            if problem:
                problems.append(f"rank {rank}: {problem}")
        if problems:
            raise RuntimeError("\n".join(problems))
        return answers

    def time(self, *, cpu: bool = False) -> float:
        """Seconds of one call of what the ranks have prepared: those of the slowest rank."""
        return max(self.call(timed, cpu))

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # the poison pill: a rank whose pipe ends, ends
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _serve(pipe: Connection, rank: int, size: int, threads: int, meeting: str) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=meeting,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=600),
        )
    worker = Worker(rank, size)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((function(worker, *args, **kwargs), None))
        except Exception:  # whatever a benchmark raises is the parent's to report, with its rank
            pipe.send((None, traceback.format_exc()))
