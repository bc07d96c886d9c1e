"""What large plans cost: CPU seconds and memory, each case in a process of its own, from the mask to the plan."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich import box
from rich.table import Table

import ringattn
from ringattn.cli import options as shared
from ringattn.masks import Causal, Documents, Mask, SinkTokens, Window
from scripts.benchmarks.cases import packed


@dataclasses.dataclass(frozen=True)
class Large:
    """A case: what is planned, and the most it may take.

    Attributes:
        seconds, megabytes: CPU time, and memory beyond what the process took before; None where no limit is set.
    """

    name: str
    run: Callable[[], object]
    seconds: float
    megabytes: float | None = None


def one_rank(mask: Callable[[], Mask], length: int, ranks: int, layout: str = "auto", verify: bool = False) -> None:
    """One rank's plan, the schedule chosen by auto."""
    made = mask()
    mesh = ringattn.Mesh.virtual(ring=ranks, rank=ranks // 2)
    plan = ringattn.plan(made, ringattn.Sharding(length, mesh, layout, made))
    if verify:
        plan.verify()


def all_ranks(mask: Callable[[], Mask], length: int, ranks: int, layout: str = "auto") -> None:
    """Every rank's plan, the schedule chosen by auto."""
    ringattn.plan_all(mask(), length, layout, ring=ranks)


def windowed_documents(count: int) -> Mask:
    """Documents of 100 tokens seen through a window, and the first four tokens by all."""
    return (Documents([100] * count) & Window(8)) | SinkTokens(4)


def packed_documents(length: int) -> Mask:
    """Causal documents of median 2,000 tokens."""
    return Documents(packed("lognormal", length, 0)) & Causal()


CASES = (
    Large(
        "one plan: 20 documents of 1,000, striped, 1,024 ranks",
        partial(one_rank, partial(Documents, [1000] * 20), 20_000, 1024, "striped"),
        0.5,
        300,
    ),
    *(
        Large(
            f"one plan, verified: ({count:,} documents & window) | sinks, 8 ranks",
            partial(one_rank, partial(windowed_documents, count), 100 * count, 8, verify=True),
            seconds,
        )
        for count, seconds in ((10_000, 0.5), (100_000, 6.0))
    ),
    Large("one plan: causal, zigzag, 512 ranks, 4M tokens", partial(one_rank, Causal, 2**22, 512), 0.5),
    Large("all plans: causal, zigzag, 512 ranks, 4M tokens", partial(all_ranks, Causal, 2**22, 512), 3.0),
    Large(
        "one plan: packed documents, 1,024 ranks, 8M tokens",
        partial(one_rank, partial(packed_documents, 2**23), 2**23, 1024),
        0.5,
    ),
    Large(
        "all plans: packed documents, 1,024 ranks, 8M tokens",
        partial(all_ranks, partial(packed_documents, 2**23), 2**23, 1024),
        1.0,
    ),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a case took. Memory is the peak of the process, and what of it came after the imports."""

    name: str
    seconds: float
    peak_megabytes: float
    more_megabytes: float


def measured(case: Large) -> Cost:
    """In this process, which should be a fresh one: a peak never falls."""
    before, start = resident("VmRSS"), time.process_time()
    case.run()
    seconds, peak = time.process_time() - start, resident("VmHWM")
    return Cost(case.name, seconds, peak, peak - before)


def resident(line: str) -> float:
    """Megabytes of this process, by their name in Linux' list. (What getrusage says begins with the parent's peak.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{line}:")[2].split()[0]) * 1024 / 1e6


def in_a_fresh_process(nth: int) -> Cost:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.scale", str(nth)], check=True, capture_output=True, text=True
    )
    return Cost(**json.loads(done.stdout))


def report(path: Path | None) -> int:
    """Prints a row for every case; 1 where one took more than it may."""
    costs = [in_a_fresh_process(nth) for nth in shared.track("planning", range(len(CASES)))]
    table = Table(box=box.SIMPLE_HEAD, title="from the mask to the plan, schedule auto", title_justify="left")
    table.add_column("case")
    for title in ("CPU s", "limit", "peak MB", "beyond imports", "limit"):
        table.add_column(title, justify="right")
    good = True
    for case, cost in zip(CASES, costs, strict=True):
        fits = cost.seconds <= case.seconds and cost.more_megabytes <= (case.megabytes or cost.more_megabytes)
        good = good and fits
        most = "" if case.megabytes is None else f"{case.megabytes:.0f}"
        figures = f"{cost.seconds:.2f}", f"{case.seconds:.1f}", f"{cost.peak_megabytes:.0f}"
        table.add_row(case.name, *figures, f"{cost.more_megabytes:.0f}", most, style=None if fits else "bold")
    shared.console().print(table)
    if path is not None:
        path.write_text(json.dumps([dataclasses.asdict(cost) for cost in costs], indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measured(CASES[int(sys.argv[1])]))))
