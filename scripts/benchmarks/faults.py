"""A fault in one of three ranks: what each of them says, how long until the last has ended, and what is left.

A cell is a fault, a transport and a place. It is well when every other rank ends within the timeout and five seconds
of the fault, when nothing is left running, and when the checkpoint of the step before can still be loaded; the exit
code of the command is 1 where one is not. A frozen rank cannot end: whoever started it ends it then, here as under a
launcher. Under MPI mpiexec ends all ranks when one of them is lost: its words count, and the others need say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from torch._C._distributed_c10d import TCPStore

from ringattn.errors import CheckpointError
from ringattn.training.storage import Manifest, complete
from scripts.benchmarks import faulty
from scripts.benchmarks.faulty import FAULT, ODD, RANKS, Place

SAID = ("BAD TERMINATION", "EXIT CODE", "Abort(", "Timeout (")  # what counts of mpiexec's words
TIMEOUT, MARGIN, STARTING = 4.0, 5.0, 90.0  # seconds
PLACES: tuple[Place, ...] = get_args(Place)
MEANINGLESS = {
    **dict.fromkeys(
        [(fault, "start") for fault in ("closed socket", "wrong shape", "wrong dtype", "wrong mask", "skips")],
        "nothing is connected or called yet",
    ),
    **dict.fromkeys(
        [(fault, "backward") for fault in ("wrong shape", "wrong dtype", "wrong mask")],
        "autograd checks gradients against what went forward",
    ),
    ("wrong mask", "save"): "a checkpoint has no mask",
    **dict.fromkeys([("missing", place) for place in ("forward", "backward", "save")], "missing at the start"),
}
FAULTS = (
    *("SIGKILL", "SIGSTOP", "exception", "out of memory", "closed socket"),
    *("wrong shape", "wrong dtype", "wrong mask", "skips", "twice", "missing"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        said: the line of each rank, and of mpiexec.
        seconds: from the fault until the last rank that could end had ended; None where one had to be ended.
        codes: exit codes by rank, or that of mpiexec.
        files: the checkpoints, and what else lies beside them.
        wrong: what is not as it should be, in words.
    """

    said: tuple[str, ...]
    seconds: float | None
    codes: tuple[int | None, ...]
    files: str
    wrong: tuple[str, ...]


def cell(transport: str, fault: str, place: Place, timeout: float = TIMEOUT) -> Outcome:
    """Runs one."""
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        start = _gloo if transport == "gloo" else _mpi
        seconds, codes, words = start([transport, fault, place, str(timeout), str(folder)], folder)
        time.sleep(0.2)
        said = [f"rank {rank}: {_read(folder / f'rank {rank}') or 'nothing'}" for rank in range(RANKS)]
        wrong = [f"{len(left)} processes left"] if (left := _processes(folder)) else []
        if seconds is None or seconds > timeout + MARGIN:
            wrong.append("not all ended in time")
        if transport == "gloo" and (fault, place) != ("twice", "save"):  # where the others are done before
            silent = [rank for rank in range(RANKS) if rank != ODD and _read(folder / f"rank {rank}") in ("", "done")]
            wrong += [f"rank {rank} said nothing" for rank in silent]
        if not any(codes) and fault != "closed socket":  # MPI's messages on one host need no sockets
            wrong.append("nobody noticed")
        there = complete(folder / "checkpoints")
        if place != "start" and 1 not in there:
            wrong.append("the checkpoint is lost")
        for path in there.values():
            with contextlib.suppress(CheckpointError):
                Manifest.read(path)
                continue
            wrong.append(f"{path.name} cannot be read")
        beside = [path.name for path in (folder / "checkpoints").glob("*") if path not in there.values()]
        files = ", ".join([*(path.name for path in there.values()), *beside]) or "none"
        return Outcome((*said, *words), seconds, tuple(codes), files, tuple(wrong))


def _gloo(arguments: Sequence[str], folder: Path) -> tuple[float | None, list[int | None], list[str]]:
    """Ranks that are forked, for they have imported everything then; the store is kept here, as torchrun does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, store.port, arguments)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    frozen = ranks[ODD] if arguments[1] == "SIGSTOP" else None
    others = [rank for rank in ranks if rank is not frozen]
    seconds = _until(lambda: not any(rank.is_alive() for rank in others), folder)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()
    return seconds, [rank.exitcode for rank in ranks], []


def _rank(rank: int, port: int, arguments: Sequence[str]) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    transport, fault, place, timeout, folder = arguments
    sys.exit(faulty.main(transport, fault, place, float(timeout), Path(folder)))


def _mpi(arguments: Sequence[str], folder: Path) -> tuple[float | None, list[int | None], list[str]]:
    launcher = Path(sys.executable).with_name("mpirun")
    command = [str(launcher), "-n", str(RANKS), sys.executable, "-m", "scripts.benchmarks.faulty", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as job:
        seconds = _until(lambda: job.poll() is not None, folder)
        if seconds is None:
            job.kill()
            for process in _processes(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        text = (job.stdout.read() if job.stdout else "").splitlines()
    words = [line.strip(" =|") for line in text if any(each in line for each in SAID)]
    return seconds, [job.returncode], [f"mpiexec: {'; '.join(words)}"] if words else []


def _until(ended: Any, folder: Path) -> float | None:
    """Seconds from the fault until it holds; None where it does not for long after it should."""
    began = time.time()
    while not ended():
        mark = _read(folder / FAULT)
        if time.time() > (float(mark) + TIMEOUT + 4 * MARGIN if mark else began + STARTING):
            return None
        time.sleep(0.02)
    return time.time() - float(_read(folder / FAULT) or began)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _processes(folder: Path) -> list[int]:
    """Those that have this folder among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--transport", choices=("gloo", "mpi"), action="append", help="only this one")
    parser.add_argument("--place", choices=PLACES, action="append", help="only this one; may be repeated")
    given = parser.parse_args()
    console, wrong = Console(soft_wrap=True, highlight=False), 0
    console.print("| fault | place | transport | seconds | exit codes | files | what each rank said |")
    console.print("|---|---|---|---|---|---|---|")
    for fault in given.fault or FAULTS:
        for place in given.place or PLACES:
            if (fault, place) in MEANINGLESS:
                console.print(f"| {fault} | {place} | | | | | — {MEANINGLESS[fault, place]} |", markup=False)
                continue
            for transport in given.transport or ("gloo", "mpi"):
                found = cell(transport, fault, place)
                wrong += bool(found.wrong)
                seconds = "never" if found.seconds is None else f"{found.seconds:.1f}"
                codes = ", ".join(map(str, found.codes))
                said = "<br>".join(found.said) + "".join(f"<br>**{each}**" for each in found.wrong)
                row = (fault, place, transport, seconds, codes, found.files, said)
                console.print(f"| {' | '.join(row)} |", markup=False)
    console.print(f"{wrong} cells are not as they should be." if wrong else "Every cell is as it should be.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
