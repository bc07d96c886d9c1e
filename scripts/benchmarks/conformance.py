"""Many more conformance cases than the test suite has time for: any call, against the float64 oracle.

Says how many were computed, what was refused in which words, and the largest errors. Ends with 1 where any was wrong. A
member of your own is put through it by its name, as in --schedule my.module:Name.

On virtual ranks; under a launcher on its ranks, as in ``torchrun -m scripts.benchmarks.conformance``; and with
--everywhere on all of them, 1 to 4 ranks each: the simulator's, Gloo's and MPI's, the same cases with the same limits.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from rich.progress import track

import ringattn
from ringattn import conformance
from ringattn.conformance import Case
from ringattn.rendezvous import Launch
from scripts.benchmarks.teams import mpirun

MEMBERS = ("mask", "layout", "schedule", "mechanism", "kernel")
PROGRAM = ["-m", "scripts.benchmarks.conformance"]
SIZES = (1, 2, 3, 4)


def _shown(cases: Sequence[Case]) -> Iterator[Case]:
    yield from track(cases, "cases", transient=True)


def _everywhere(arguments: Sequence[str]) -> int:
    """Runs this program on every transport. Virtual ranks are as many as the others are, in a mesh of their own."""
    failed = 0
    starts = {"local": [sys.executable, *PROGRAM, "--local"]}
    for size in SIZES:
        starts[f"simulator, {size} ranks"] = [sys.executable, *PROGRAM, "--ranks", str(size)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        starts[f"gloo, {size} ranks"] = [*torchrun, *PROGRAM]
        starts[f"mpi, {size} ranks"] = [*mpirun(size), sys.executable, *PROGRAM]
    for name, command in starts.items():
        began = time.monotonic()
        run = subprocess.run([*command, *arguments, "--brief"], stdout=subprocess.PIPE, text=True, check=False)
        print(f"{name} ({time.monotonic() - began:.0f} s):\n  " + run.stdout.strip().replace("\n", "\n  "), flush=True)
        failed += run.returncode != 0
    print(f"{len(starts)} runs, {failed} of them failed")
    return int(failed > 0)


def _check(options: argparse.Namespace, mesh: ringattn.Mesh | None, *, shown: bool) -> conformance.Report:
    members = {name: getattr(options, name) for name in MEMBERS}
    walk = _shown if shown else iter
    return conformance.check(**members, count=options.cases, seed=options.seed, track=walk, mesh=mesh)


def _on_ranks(options: argparse.Namespace) -> conformance.Report | None:
    """The report, on the first rank: all of them have the same."""
    mesh = ringattn.init(transport="local" if options.local else "auto")
    report = _check(options, mesh, shown=mesh.rank == 0)
    return None if mesh.rank else report


def main() -> int:
    """Runs the cases."""
    parser = argparse.ArgumentParser(prog="scripts/bench conformance", description=__doc__)
    parser.add_argument("--cases", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, help="virtual ranks of every case; any number unless given")
    parser.add_argument("--local", action="store_true", help="this process, without a simulator")
    parser.add_argument("--brief", action="store_true", help="how many, how wrong, and no more")
    parser.add_argument("--everywhere", action="store_true", help="on every transport, with 1 to 4 ranks")
    for name in MEMBERS:
        parser.add_argument(f"--{name}", help="by name, or module:Name; any unless given")
    options = parser.parse_args()
    if options.everywhere:
        return _everywhere([x for x in sys.argv[1:] if x != "--everywhere"])
    torch.set_num_threads(1)
    if options.ranks is not None:
        report = ringattn.simulate(lambda mesh: _check(options, mesh, shown=False), ring=options.ranks).results[0]
    elif options.local or Launch.found(os.environ).started:
        report = _on_ranks(options)
    else:
        report = _check(options, None, shown=True)
    if report is not None:
        lines = str(report).splitlines()
        print("\n".join([lines[0], lines[-1]] if options.brief and report.passed else lines))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if report is None or report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
