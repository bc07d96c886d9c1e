"""Calls, commands, files and environments that make no sense: how many are refused, and by what.

Functions with arguments of wrong kinds, sizes, dtypes and ranges; calls of three virtual ranks of which one is wrong;
commands; files that are cut off, empty, changed, foreign or no files at all; places that cannot be written;
environments of launchers. Each ends in an error of ringattn.errors, on every rank and before anything is sent, or as
if nothing had been wrong. Exit code 1 where one hangs, ends in another error, or is taken without a word.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from tests.fuzzing import calls, commands, environments, files, integrations, ranks
from tests.fuzzing.judging import Report
from tests.trainer.conftest import load_trainer

SHARES = {
    "functions": 50,
    "integrations": 10,
    "one rank of three": 10,
    "commands": 10,
    "damaged files": 5,
    "environments": 15,
}
"""Of a hundred calls."""


def main() -> int:
    """Prints the table, and what is at fault."""
    parser = argparse.ArgumentParser(prog="scripts/bench fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="of all kinds together (default 10,000)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (default 1)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trainer = load_trainer()
    kinds: dict[str, Callable[[int, int], Report]] = {
        "functions": calls.fuzzed,
        "integrations": partial(calls.fuzzed, every=integrations.calls()),
        "one rank of three": ranks.fuzzed,
        "commands": commands.fuzzed,
        "damaged files": lambda count, seed: files.fuzzed(count, trainer, seed),
        "environments": environments.fuzzed,
    }
    run = {name: partial(kinds[name], given.calls * share // 100, given.seed) for name, share in SHARES.items()}
    run["unwritable places"] = partial(files.unwritable, trainer)
    console = Console()
    table = Table("what", "calls", "refused", "by", "right", "at fault", "s", title=f"seed {given.seed}")
    reports: list[Report] = []
    for name, fuzz in run.items():
        began = time.perf_counter()
        with console.status(name), contextlib.redirect_stdout(io.StringIO()):
            report = fuzz()
        reports.append(report)
        by = ", ".join(f"{kind} {count:,}" for kind, count in report.refused.most_common())
        numbers = (f"{n:,}" for n in (report.calls, report.refused.total()))
        seconds = f"{time.perf_counter() - began:.0f}"
        table.add_row(name, *numbers, by, f"{report.right:,}", str(len(report.faults)), seconds)
    table.add_row("all", f"{sum(report.calls for report in reports):,}")
    console.print(table)
    for report in reports:
        if report.faults:
            print(report)
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
