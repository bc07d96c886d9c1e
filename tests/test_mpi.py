"""MPI: what ends a job, and what is refused by name. That it computes and agrees is in the suites of all transports."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ringattn
from ringattn.errors import TransportError
from scripts.benchmarks.teams import mpirun
from tests.workers import Workers

START = """
import os, signal, sys, time, torch, ringattn
mesh = ringattn.init(timeout=8)
assert mesh.transport.name == "mpi" and not torch.distributed.is_initialized()
sharding = ringattn.Sharding(30, mesh)
q = torch.randn(1, 1, sharding.count, 4, requires_grad=True)
def attend(): return ringattn.attention(q, q, q, ringattn.Causal(), sharding=sharding)
attend()
"""


def _job(tmp_path: Path, program: str, ranks: int = 2) -> tuple[int, str, float]:
    """The exit code, everything that was said, and the seconds that it took."""
    script = tmp_path / "job.py"
    script.write_text(START + program)
    began = time.monotonic()
    done = subprocess.run(
        [*mpirun(ranks), sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_an_exception_in_one_rank_ends_all_of_them_and_is_shown(tmp_path: Path) -> None:
    program = "if mesh.rank: raise ValueError('planted')\ntime.sleep(600)"
    code, said, seconds = _job(tmp_path, program)
    assert code != 0 and "ValueError: planted" in said and "Traceback" in said and seconds < 60


def test_a_killed_rank_ends_all_of_them(tmp_path: Path) -> None:
    program = "if mesh.rank: os.kill(os.getpid(), signal.SIGKILL)\nattend()"
    code, _, seconds = _job(tmp_path, program)
    assert code == 9 and seconds < 60


def test_a_rank_that_does_not_come_is_named_after_the_timeout(tmp_path: Path) -> None:
    program = "if mesh.rank == 0: attend()\ntime.sleep(600)"
    code, said, _ = _job(tmp_path, program)
    assert code != 0 and "Rank 0 of 2 lost rank 1 during the agreement before fwd 2" in said


def test_what_comes_too_late_is_written_to_no_memory_of_others(tmp_path: Path) -> None:
    program = """
link, size = ringattn.init(timeout=1).transport, 1 << 12
if mesh.rank:
    time.sleep(2)
    link.exchange([(0, torch.ones(size))], []).wait()
else:
    try: link.exchange([], [(1, torch.zeros(size))]).wait()
    except ringattn.TransportError: others = [torch.zeros(size) for _ in range(64)]
    end = time.monotonic() + 3
    while time.monotonic() < end: link._communicator.Iprobe()
    print("untouched", not any(map(torch.any, others)))
"""
    code, said, _ = _job(tmp_path, program)
    assert code == 0 and "untouched True" in said


def test_a_bad_command_ends_all_of_them_with_one_line_a_rank(tmp_path: Path) -> None:
    command = [*mpirun(2), sys.executable, "-m", "ringattn.cli", "verify", "--layout", "unheard-of"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0 and "ringattn verify: " in done.stderr and "Traceback" not in done.stderr


def test_ranks_that_start_differently_learn_in_what(tmp_path: Path) -> None:
    code, said, _ = _job(tmp_path, "ringattn.init(ring=1 + mesh.rank)")
    assert code != 0 and "they differ in ring (rank 0: 1; rank 1: 2)" in said


def test_meshes_beyond_what_mpi_has_are_a_typed_error(tmp_path: Path) -> None:
    program = """
count = 0
try:
    while count < 5000:
        ringattn.init()
        count += 1
except ringattn.TransportError as error:
    print("after more than 1,500:", count > 1500, str(error)[:36], flush=True)
else:
    print("never", flush=True)
"""
    code, said, _ = _job(tmp_path, program, ranks=1)
    assert code == 0 and ("after more than 1,500: True MPI has no communicator left" in said or "never" in said)


def _refused(mesh: ringattn.Mesh) -> str | None:
    return mesh.connected().refusal(torch.device("cuda"))


def _too_short(mesh: ringattn.Mesh) -> str:
    """What MPI lets pass: fewer bytes than the receive has room for."""
    peer, transport = 1 - mesh.rank, mesh.connected()
    with pytest.raises(TransportError) as caught:
        transport.exchange([(peer, torch.zeros(3))], [(peer, torch.zeros(5))], label="the test").wait()
    return str(caught.value)


def test_a_gpu_that_mpi_cannot_reach_is_refused(mpi: Workers) -> None:
    assert all("This MPI library is not GPU-aware" in str(said) for said in mpi.run(2, _refused))


def test_a_message_that_is_too_short_is_seen(mpi: Workers) -> None:
    first, second = mpi.run(2, _too_short)
    assert first == "Rank 0 of 2 got 12 bytes from rank 1 in the test, and needs 20." and "from rank 0" in second


def _replicas(mesh: ringattn.Mesh) -> list[float]:
    """Sums over a mesh of two sequences of two ranks."""
    parts = [mesh.connected().among(pair) for pair in ((0, 1), (2, 3)) if mesh.rank in pair]
    grid = ringattn.Mesh(ring=2, data=2, rank=mesh.rank, transport=parts[0])
    return [t.sum_numbers(10.0**mesh.rank)[0] for t in (grid.connected(), grid.replicas, grid.everyone)]


@pytest.mark.parametrize("kind", ["gloo", "mpi"])
def test_sums_over_sequences_replicas_and_everyone(request: pytest.FixtureRequest, kind: str) -> None:
    workers: Workers = request.getfixturevalue(kind)
    assert workers.run(4, _replicas) == [[11, 101, 1111], [11, 1010, 1111], [1100, 101, 1111], [1100, 1010, 1111]]
