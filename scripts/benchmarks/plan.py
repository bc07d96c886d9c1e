"""How long `Route` plans of packed tokens take to make; with ``--balance``, how even layouts are and what they move.

With ``--scale``, what the largest plans cost in CPU time and memory. With ``--wait``, how long ranks wait for others;
with ``--nodes``, what crosses between nodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import ringattn
from ringattn.advice.comparison import tile_count
from ringattn.cli import options as shared
from ringattn.masks import Causal, Documents, Mask, Window
from scripts.benchmarks import crossing, scale, waiting
from scripts.benchmarks.cases import GENERATORS, documents, packed, prefixed

LENGTH, DOCUMENTS, RANKS = 1_048_576, 10_000, (128, 1024)
TARGETS = {128: (0.150, 0.015), 1024: (2.0, None)}  # seconds for all ranks' plans and for one's, at the default sizes
BALANCE_RANKS = (8, 64, 128)
SEEDS = 3
AT_ONCE = 2_000_000  # tiles; with more, ranks are planned one after the other, in less memory


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench plan", description=__doc__)
    parser.add_argument("--balance", action="store_true", help="print balance and traffic of layouts, not times")
    parser.add_argument("--scale", action="store_true", help="print the CPU time and memory of large plans")
    parser.add_argument("--wait", action="store_true", help="print how long ranks wait, by a model of time")
    parser.add_argument("--nodes", action="store_true", help="print what crosses between 8 nodes")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens (default {LENGTH})")
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="default 128 and 1024 for times, 8, 64 and 128 for balance"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures into this file, too")
    times = parser.add_argument_group("times")
    times.add_argument("--documents", type=int, default=DOCUMENTS, help=f"causal documents (default {DOCUMENTS})")
    times.add_argument("--layout", default="balanced", help="who holds which tokens (default balanced)")
    times.add_argument("--rounds", type=int, default=7, help="repetitions, of which the median is printed")
    balance = parser.add_argument_group("balance")
    balance.add_argument("--seeds", type=int, default=SEEDS, help=f"of each generator of lengths (default {SEEDS})")
    waiting.add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.scale:
        return scale.report(options.json)
    if options.wait:
        return waiting.report(options, options.json)
    if options.nodes:
        return crossing.report(options, options.json)
    if options.balance:
        return balance(options)
    return times(options)


def save(path: Path | None, figures: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


# -- times ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds to make plans, medians; `same` says that making them again, or one alone, gives the same plans."""

    ranks: int
    all_ranks: float  # layout and plans
    layout: float  # of all ranks, once a sharding
    one_rank: float  # the slowest of three, of a sharding whose layout is known
    same: bool


@dataclasses.dataclass(frozen=True)
class Verification:
    """Seconds to verify one rank's plan, the median, and all ranks' together, once."""

    ranks: int
    one: float
    together: float


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    once(call)  # the first call imports and allocates
    return statistics.median(once(call) for _ in range(rounds))


def once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(mask: Mask, length: int, layout: str, ranks: int, rounds: int) -> Times:
    """All ranks' plans from nothing each time; one rank's as in a process of its own, which lays out all ranks too."""

    def every_rank() -> list[ringattn.Plan]:
        return ringattn.plan_all(mask, length, layout=layout, schedule="route", ring=ranks)

    def laid_out(rank: int) -> ringattn.Sharding:
        sharding = ringattn.Sharding(length, ringattn.Mesh.virtual(ring=ranks, rank=rank), layout, mask)
        _ = sharding.spans
        return sharding

    def one_rank(sharding: ringattn.Sharding) -> ringattn.Plan:
        return ringattn.plan(mask, sharding, schedule="route")

    some = [laid_out(rank) for rank in sorted({0, ranks // 2, ranks - 1})]
    every, layouts = median_seconds(every_rank, rounds), median_seconds(partial(laid_out, 0), rounds)
    one = max(median_seconds(partial(one_rank, sharding), rounds) for sharding in some)
    plans = every_rank()
    repeats = [plan.hash for plan in plans] == [plan.hash for plan in every_rank()]
    same = repeats and all(plans[x.mesh.sequence_rank].hash == one_rank(x).hash for x in some)
    return Times(ranks, every, layouts, one, same)


def verified(mask: Mask, length: int, layout: str, ranks: int, rounds: int) -> Verification:
    plans = ringattn.plan_all(mask, length, layout=layout, schedule="route", ring=ranks)
    one = median_seconds(plans[ranks // 2].verify, rounds)
    return Verification(ranks, one, once(lambda: ringattn.verify(plans)))


def times(options: argparse.Namespace) -> int:
    mask = Documents(documents(options.documents, options.length)) & Causal()
    case = mask, options.length, options.layout
    asked = (options.length, options.documents, options.layout) == (LENGTH, DOCUMENTS, "balanced")
    print(f"route, {options.length} tokens, {options.documents} causal documents, {options.layout}")
    made, checked = [], []
    for ranks in options.ranks or RANKS:
        x = timed(*case, ranks, options.rounds)
        most_all, most_one = TARGETS.get(ranks, (None, None)) if asked else (None, None)
        print(f"planning {ranks} ranks")
        print(f"  all ranks' plans          {_time(x.all_ranks, most_all)}")
        print(f"  the layout alone          {_time(x.layout)}, once a sharding")
        print(f"  one rank's plan           {_time(x.one_rank, most_one)}, the slowest of three, its layout known")
        print(f"  one rank's equals its own of all: {'yes' if x.same else 'NO'}", flush=True)
        made.append(x)
    for ranks in options.ranks or RANKS:  # last, as it leaves the allocator in another state
        y = verified(*case, ranks, options.rounds)
        print(f"verifying {ranks} ranks")
        print(f"  one plan                  {_time(y.one)}")
        print(f"  all together              {_time(y.together)}, once", flush=True)
        checked.append(y)
    figures = {"planning": [dataclasses.asdict(x) for x in made], "verifying": [dataclasses.asdict(y) for y in checked]}
    sizes = {"length": options.length, "documents": options.documents, "layout": options.layout}
    save(options.json, {**sizes, **figures})
    return 0 if all(x.same for x in made) else 1


def _time(seconds: float, most: float | None = None) -> str:
    target = "" if most is None else f" (target {most * 1e3:.0f} ms)"
    return f"{seconds * 1e3:10.1f} ms{target}"


# -- balance --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask, and how its documents were drawn."""

    name: str
    seed: int | None
    documents: int | None
    mask: Mask


@dataclasses.dataclass(frozen=True)
class Row:
    """One layout under one mask, by `Route`. Key positions are fractions of a full ring's, N (W - 1) / W a rank."""

    mask: str
    seed: int | None
    documents: int | None
    ranks: int
    layout: str
    area: float  # the busiest rank's allowed pairs over the mean
    tokens: float  # the largest shard over the mean
    mean_received: float
    max_received: float
    max_sent: float
    lower_bound: float  # the least mean_received of any layout within 2 % of the mean share
    distance: float | None  # mean_received over it


def balance_cases(length: int, seeds: int) -> Iterator[Case]:
    for generator in GENERATORS:
        for seed in range(seeds):
            lengths = packed(generator, length, seed)
            yield Case(f"{generator}, causal", seed, len(lengths), Documents(lengths) & Causal())
    yield Case("window 4096, causal", None, None, Window(min(4096, length) - 1))
    lengths = packed("pareto", length, 0)
    yield Case("pareto, bidirectional", 0, len(lengths), Documents(lengths))
    yield Case("pareto, prefix of a quarter", 0, len(lengths), prefixed(lengths))


def planned(mask: Mask, length: int, layout: str, ranks: int) -> Iterator[ringattn.Plan]:
    shardings = [
        ringattn.Sharding(length, ringattn.Mesh.virtual(ring=ranks, rank=rank), layout, mask) for rank in range(ranks)
    ]
    if tile_count(mask.regions(length, length), shardings[0].spans) <= AT_ONCE:
        yield from ringattn.plan_all(mask, length, layout=layout, schedule="route", ring=ranks)
    else:
        yield from (ringattn.plan(mask, sharding, schedule="route") for sharding in shardings)


def measured(case: Case, length: int, layout: str, ranks: int, bound: float) -> Row:
    areas, tokens, received, sent = [], [], [], []
    for plan in planned(case.mask, length, layout, ranks):
        moved = plan.traffic()
        areas.append(plan.area)
        tokens.append(plan.tokens)
        received.append(moved.received_tokens)
        sent.append(moved.sent_tokens)
    everything = length * (ranks - 1)
    return Row(
        *(case.name, case.seed, case.documents, ranks, layout),
        area=max(areas) * ranks / sum(areas),
        tokens=max(tokens) * ranks / sum(tokens),
        mean_received=sum(received) / everything,
        max_received=max(received) * ranks / everything,
        max_sent=max(sent) * ranks / everything,
        lower_bound=bound / everything,
        distance=sum(received) / bound if bound else None,
    )


def balance(options: argparse.Namespace) -> int:
    length, cases = options.length, list(balance_cases(options.length, options.seeds))
    counts = options.ranks or BALANCE_RANKS
    rows = []
    with shared.bar("balance and traffic", len(cases) * len(counts) * len(shared.LAYOUTS)) as advance:
        for ranks in counts:
            for case in cases:
                bound = ringattn.lower_bound(case.mask, length, ranks)
                for layout in shared.LAYOUTS:
                    rows.append(measured(case, length, layout, ranks, bound))
                    advance()
    for ranks in counts:
        shared.console().print(table([row for row in rows if row.ranks == ranks], length, ranks))
    save(options.json, {"length": length, "rows": [dataclasses.asdict(row) for row in rows]})
    return 0


def table(rows: Sequence[Row], length: int, ranks: int) -> Table:
    out = Table(
        *("mask", "seed", "documents", "layout"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title=f"{ranks} ranks, {length} tokens, route; key positions as fractions of a full ring's, which is 1",
    )
    for title in ("pairs\nmax/mean", "tokens\nmax/mean", "received\nmean", "received\nmax", "sent\nmax"):
        out.add_column(title, justify="right")
    for title in ("lower\nbound", "mean/\nbound"):
        out.add_column(title, justify="right")
    for nth, row in enumerate(rows):
        first = nth % len(shared.LAYOUTS) == 0  # of a mask
        out.add_row(
            *(str(value) if first and value is not None else "" for value in (row.mask, row.seed, row.documents)),
            *(row.layout, f"{row.area:.4f}", f"{row.tokens:.4f}"),
            *(f"{value:.4f}" for value in (row.mean_received, row.max_received, row.max_sent, row.lower_bound)),
            "—" if row.distance is None else f"{row.distance:.2f}",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
