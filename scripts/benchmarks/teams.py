"""Long-lived teams of ranks for benchmarks: started once, driven through pipes, alternated without restarts."""

from __future__ import annotations

import datetime
import multiprocessing
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
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

    def __init__(self, rank: int, size: int, barrier: Callable[[], object] | None = None) -> None:
        self.rank, self.size = rank, size
        self._barrier = barrier
        self.prepared: Callable[[], Any] = lambda: None
        self.kept: dict[str, Any] = {}  # what calls make once and use again

    def timed(self, cpu: bool) -> float:
        """Seconds that one call of what was prepared takes, all ranks starting together.

        With `cpu`, those of the processor, shared by the threads: what a busy machine distorts least.
        """
        if self._barrier is not None:
            self._barrier()
        clock = time.process_time if cpu else time.perf_counter
        start = clock()
        self.prepared()
        return (clock() - start) / (torch.get_num_threads() if cpu else 1)


def timed(worker: Worker, cpu: bool) -> float:
    return worker.timed(cpu)


class Team:
    """`size` processes of `threads` threads each, joined by Gloo when there are more than one, or by MPI.

    The processes meet through a file in a temporary folder, so no port is picked by anyone; those of mpirun call the
    parent at a socket there.
    """

    def __init__(self, size: int, threads: int = 1, timeout: float = 600.0, transport: str = "gloo") -> None:
        self.size = size
        self._timeout = timeout  # seconds a call may take
        self._folder = tempfile.TemporaryDirectory(prefix="ringattn-team-")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._job: subprocess.Popen[bytes] | None = None
        meeting = str(Path(self._folder.name) / "meeting")
        if transport == "mpi":
            self._start_job(threads, meeting)
        else:
            self._start_processes(threads, meeting)

    def _start_processes(self, threads: int, meeting: str) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_gloo, args=(theirs, rank, self.size, threads, meeting), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _start_job(self, threads: int, meeting: str) -> None:
        program = [sys.executable, "-m", "scripts.benchmarks.teams", str(threads), meeting]
        self._job, self._pipes = start_job(self.size, program, meeting)

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
        if self._job is not None:
            self._job.wait(60)
        self._folder.cleanup()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def mpirun(ranks: int) -> list[str]:
    """The launcher beside this Python, which the mpich wheel brings."""
    return [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)]


def start_job(size: int, program: Sequence[str], meeting: str) -> tuple[subprocess.Popen[bytes], list[Connection]]:
    """Starts a program on MPI ranks, which call at a socket and say their rank; the job, and the pipes by rank."""
    with Listener(meeting, "AF_UNIX") as listener:
        job = subprocess.Popen([*mpirun(size), *program], cwd=Path(__file__).parents[2])
        pipes = [listener.accept() for _ in range(size)]
    by_rank = {pipe.recv(): pipe for pipe in pipes}
    return job, [by_rank[rank] for rank in range(size)]


def _serve_gloo(pipe: Connection, rank: int, size: int, threads: int, meeting: str) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        limit = datetime.timedelta(seconds=600)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit)
    _serve(pipe, Worker(rank, size, dist.barrier if size > 1 else None))


def _serve_mpi(threads: int, meeting: str) -> None:
    from mpi4py import MPI

    torch.set_num_threads(threads)
    world = MPI.COMM_WORLD
    with Client(meeting, "AF_UNIX") as pipe:
        pipe.send(world.rank)
        _serve(pipe, Worker(world.rank, world.size, world.Barrier))


def _serve(pipe: Connection, worker: Worker) -> None:
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((function(worker, *args, **kwargs), None))
        except Exception:  # whatever a benchmark raises is the parent's to report, with its rank
            pipe.send((None, traceback.format_exc()))


if __name__ == "__main__":
    _serve_mpi(int(sys.argv[1]), sys.argv[2])
