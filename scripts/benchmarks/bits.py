"""What ``deterministic=True`` promises and costs: sha256 of out, dq, dk, dv over ranks, layouts, schedules, transports.

Every mask and dtype is computed on 1, 2, 4 and 8 virtual ranks in every layout and by every schedule that moves keys;
with --launch, also by that many processes under torchrun (Gloo) and mpirun (MPI). A line gives the one hash, or how
many there are. Then the cost: the same call with and without, taken in turns, in processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ringattn
from ringattn.conformance import Case, Results, attend, simulated
from ringattn.conformance.running import shardings
from ringattn.masks import Mask

RANKS = (1, 2, 4, 8)
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
SCHEDULES = ("ring", "route")
DTYPES = (torch.float32, torch.bfloat16)
STARTS = (("torchrun", "--nproc-per-node", "{}"), ("mpirun", "-n", "{}", sys.executable))
NAMES = ("out", "dq", "dk", "dv")


def masks(length: int) -> dict[str, Mask]:
    """Three masks of so many tokens."""
    packed = ringattn.Documents([length // 7, 1, length // 3, length - length // 7 - length // 3 - 1])
    return {
        "causal": ringattn.Causal(),
        "documents": packed & ringattn.Causal(),
        "window": ringattn.Window(length // 10),
    }


def cases(length: int) -> Iterator[tuple[str, Case]]:
    """Every mask and dtype."""
    for (name, mask), dtype in itertools.product(masks(length).items(), DTYPES):
        case = Case(length, mask, kv_heads=2, groups=2, dim=16, value_dim=24, dtype=dtype, deterministic=True)
        yield f"{name}, {str(dtype).removeprefix('torch.')}", case


def placed(case: Case, ranks: int) -> Iterator[Case]:
    """The case in every layout, by every schedule."""
    for layout, schedule in itertools.product(LAYOUTS, SCHEDULES):
        yield dataclasses.replace(case, ranks=ranks, layout=layout, schedule=schedule)


def digest(results: Results) -> str:
    """sha256 of the bytes of out, dq, dk and dv."""
    found = hashlib.sha256()
    for name in NAMES:
        found.update(results[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def launched(launcher: list[str], length: int) -> dict[str, list[str]]:
    """The hashes of processes that a launcher starts, by case."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hashes"
        here = ["-m", "scripts.benchmarks.bits", "--length", str(length), "--write", str(file)]
        subprocess.run([*launcher, *here], check=True, timeout=600)
        found: dict[str, list[str]] = json.loads(file.read_text())
        return found


def write(file: Path, length: int) -> None:
    """One of the processes: all cases in every layout, and the hashes of the whole results into a file."""
    torch.set_num_threads(1)
    mesh, found = ringattn.init(), dict[str, list[str]]()
    for name, case in cases(length):
        found[name] = []
        for each in placed(case, mesh.size):
            part, (own, kv) = attend(mesh, each), shardings(each, mesh)
            joined = {x: (kv if x in ("dk", "dv") else own).join(part.results[x], 2) for x in NAMES}
            found[name].append(digest(joined))
    if mesh.rank == 0:
        file.write_text(json.dumps(found))


def costs(length: int, rounds: int) -> Table:
    """Seconds of both calls, one rank and four virtual ones, forward and backward."""
    table = Table("ranks", "dtype", "deterministic (s)", "ordinary (s)", "ratio", title=f"{length} causal tokens")
    for ranks, dtype in itertools.product((1, 4), DTYPES):
        case = Case(length, ringattn.Causal(), ranks, kv_heads=4, groups=2, dim=64, value_dim=64, dtype=dtype)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds + 1):
            for which, taken in times.items():
                run = dataclasses.replace(case, deterministic=which, layout="zigzag")
                began = time.process_time()
                simulated(run)
                taken.append(time.process_time() - began)
        ours, ordinary = (statistics.median(times[which][1:]) for which in (True, False))
        name = str(dtype).removeprefix("torch.")
        table.add_row(str(ranks), name, f"{ours:.3f}", f"{ordinary:.3f}", f"{ours / ordinary:.1f}")
    return table


def main() -> int:
    """Prints the tables; 1 where there is more than one hash of a case."""
    parser = argparse.ArgumentParser(prog="scripts/bench bits", description=__doc__)
    parser.add_argument("--length", type=int, default=700, help="tokens (default 700)")
    parser.add_argument("--launch", action="store_true", help="processes too, under torchrun and mpirun")
    parser.add_argument("--rounds", type=int, default=5, help="of the cost (default 5; 0 leaves it out)")
    parser.add_argument("--cost-length", type=int, default=2048, help="tokens of the cost (default 2048)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write(options.write, options.length)
        return 0
    torch.set_num_threads(1)
    found: dict[str, list[str]] = {name: [] for name, _ in cases(options.length)}
    for (name, case), ranks in track([*itertools.product(cases(options.length), RANKS)], "virtual ranks"):
        found[name] += [digest(simulated(each)) for each in placed(case, ranks)]
    starts = STARTS if options.launch else ()
    for start, ranks in itertools.product(starts, (2, 4)):
        command = [str(Path(sys.executable).with_name(start[0])), *(word.format(ranks) for word in start[1:])]
        for name, hashes in launched(command, options.length).items():
            found[name] += hashes
    table = Table("case", "calls", "sha256 of out, dq, dk, dv", title=f"{options.length} tokens")
    for name, hashes in found.items():
        table.add_row(name, str(len(hashes)), hashes[0] if len({*hashes}) == 1 else f"{len({*hashes})} DIFFERENT")
    Console(width=110).print(table)
    if options.rounds:
        Console().print(costs(options.cost_length, options.rounds))
    same = all(len({*hashes}) == 1 for hashes in found.values())
    print("One hash each:", "yes" if same else "NO")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
