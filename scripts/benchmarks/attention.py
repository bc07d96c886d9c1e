"""ringattn on ranks of one thread each, against PyTorch in one process and DeepSpeed's Ulysses on as many ranks.

ringattn takes part with what it chooses by itself, over Gloo and over MPI, and over Gloo with each kernel and with each
schedule by its name.

All contestants live at the same time, those of ringattn in the same processes, and are called in turn, round after
round, so that a slow minute of the machine is everybody's. A time is that of the slowest rank from a common barrier;
medians over the rounds are printed, and beside each the error of its results against the float64 oracle, in units of
the arrays A of ringattn.reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ringattn import conformance, reference
from ringattn.kernels.machine import processor
from scripts.benchmarks.cases import Case, documents
from scripts.benchmarks.contestants import Contestant, Results, choose, collect, contestants, keep, prepare_ringattn
from scripts.benchmarks.teams import Team

Teams = dict[Contestant, Team]
SCALING_LENGTHS = (4096, 8192, 16384, 32768)


def mask_names(length: int) -> dict[str, str]:
    lengths = ",".join(str(n) for n in documents(64, length))
    return {
        "causal": "causal",
        "documents": f"documents:{lengths}&causal",
        "window": "window:1023&causal",
    }


def cases(name: str, length: int, dtypes: list[torch.dtype], heads: int) -> Iterator[Case]:
    for dtype in dtypes:
        for backward in (False, True):
            yield Case(mask_names(length)[name], length, dtype, backward, heads)


def oracle(case: Case) -> reference.Evaluation:
    """Of the output and of the gradients, whether the case has any or not: both directions are compared with it."""
    return conformance.oracle(dataclasses.replace(case, backward=True).call)


def joined(parts: list[Results], positions: list[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
    order = np.argsort(np.concatenate(positions))
    return [np.concatenate(tensors, axis=2)[:, :, order] for tensors in zip(*parts, strict=True)]


def errors(results: list[NDArray[np.float32]], expected: reference.Evaluation) -> list[float]:
    """Of out and, where there are gradients, dq, dk, dv."""
    named = {name: torch.from_numpy(x) for name, x in zip(("out", "dq", "dk", "dv"), results, strict=False)}
    return list(conformance.errors(named, expected).values())


def measure(
    case: Case, teams: Teams, options: argparse.Namespace, expected: reference.Evaluation, progress: Progress
) -> dict[Contestant, tuple[list[float], float]]:
    """The times in seconds of each contestant and the largest of its errors."""
    worst = {}
    for contestant, team in teams.items():
        positions = team.call(contestant.prepare, case)
        team.call(keep, contestant.name)
        results = joined(team.call(collect, contestant.token_dim), positions)
        worst[contestant] = max(errors(results, expected))
    times: dict[Contestant, list[float]] = {contestant: [] for contestant in teams}
    bar = progress.add_task(case.label, total=options.rounds)
    for _ in range(options.rounds):
        for contestant, team in teams.items():
            team.call(choose, contestant.name)
            times[contestant].append(team.time(cpu=options.cpu))
        progress.advance(bar)
    progress.remove_task(bar)
    return {contestant: (times[contestant], worst[contestant]) for contestant in teams}


def report(name: str, teams: Teams, options: argparse.Namespace, console: Console) -> None:
    length = options.length or (8192 if name == "causal" else 16384)
    unit = "ms of processor time a thread" if options.cpu else "ms"
    table = Table(title=f"{name}, {length} tokens, {options.heads} heads of 64, median of {options.rounds} in {unit}")
    table.add_column("contestant")
    truths: dict[torch.dtype, reference.Evaluation] = {}
    columns = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in cases(name, length, options.dtypes, options.heads):
            if case.dtype not in truths:
                truths = {case.dtype: oracle(case)}
            columns.append(measure(case, teams, options, truths[case.dtype], progress))
            table.add_column(f"{case.label}\nms (× fastest peer) error", justify="right")
    for contestant in teams:
        cells = []
        for column in columns:
            medians = {other: statistics.median(times) for other, (times, _) in column.items()}
            peers = [median for other, median in medians.items() if other.kernel is None]
            ratio = f"({medians[contestant] / min(peers):.2f}×)" if peers else ""
            cells.append(f"{medians[contestant] * 1e3:.1f} {ratio} {column[contestant][1]:.1e}")
        table.add_row(contestant.name, *cells)
    choices = [_choice(column) for column in columns]
    if all(choices):
        table.add_section()
        table.add_row("auto × fastest kernel by name", *choices)
    console.print(table)


def _choice(column: dict[Contestant, tuple[list[float], float]]) -> str:
    """How the kernel that ringattn chooses compares with the fastest by its name, and which that is; or nothing."""
    ours = {x: times for x, (times, _) in column.items() if x.kernel and (x.transport, x.schedule) == ("gloo", "auto")}
    medians = {x.kernel: statistics.median(times) for x, times in ours.items()}
    if "auto" not in medians or len(medians) == 1:
        return ""
    chosen = medians.pop("auto")
    fastest = min(medians, key=medians.__getitem__)
    return f"{chosen / medians[fastest]:.2f}× {fastest}"


def report_scaling(team: Team, options: argparse.Namespace, console: Console) -> None:
    """Nanoseconds of forward and backward for each allowed pair of a head: flat, whatever the length."""
    table = Table(title="ringattn, float32 forward+backward: ns per allowed pair and head, by length")
    table.add_column("mask")
    for length in SCALING_LENGTHS:
        table.add_column(str(length), justify="right")
    for name in ("documents", "window"):
        cells = []
        for length in SCALING_LENGTHS:
            case = Case(mask_names(length)[name], length, torch.float32, backward=True, heads=options.heads)
            team.call(prepare_ringattn, case)
            team.time()
            seconds = statistics.median(team.time() for _ in range(options.rounds))
            pairs = sum(int(case.rows(a, min(a + 1024, length)).sum()) for a in range(0, length, 1024))
            cells.append(f"{seconds * 1e9 / (pairs * case.heads):.3f}")
        table.add_row(name, *cells)
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench attention", description=__doc__)
    names = ["causal", "documents", "window", "scaling"]
    parser.add_argument("tables", nargs="*", help=f"which of {', '.join(names)}; all of them unless given")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each contestant (default 7)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of ringattn and of Ulysses (default 2)")
    parser.add_argument("--heads", type=int, default=4, help="query and key heads of size 64 (default 4)")
    parser.add_argument("--length", type=int, help="tokens (default 8192 for causal, 16384 else)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="one dtype instead of both")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of time, on a busy machine")
    parser.add_argument("--only", help="contestants whose name contains this")
    options = parser.parse_args()
    unknown = set(options.tables) - set(names)
    if unknown:
        parser.error(f"unknown table {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options.tables = options.tables or names
    options.dtypes = [getattr(torch, options.dtype)] if options.dtype else [torch.float32, torch.bfloat16]
    return options


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    load = f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    console.print(f"{processor()}, PyTorch {torch.__version__}; {load}", highlight=False)
    chosen = [c for c in contestants(options.ranks) if options.only is None or options.only in c.name]
    with ExitStack() as stack:
        homes = {contestant.home: contestant for contestant in chosen}
        started = {home: stack.enter_context(contestant.team()) for home, contestant in homes.items()}
        teams = {contestant: started[contestant.home] for contestant in chosen}
        for name in options.tables:
            if name != "scaling":
                report(name, teams, options, console)
            elif chosen[-1].kernel == "auto":
                report_scaling(teams[chosen[-1]], options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
