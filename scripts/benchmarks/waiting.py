"""How long ranks wait for each other, by a small model of time (`ringattn.plans.clock`), which nothing measures."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

import ringattn
from ringattn.cli import options as shared
from ringattn.masks import Causal, Documents, Mask
from ringattn.plans.clock import Link, Rates, timed
from ringattn.plans.demand import Demand
from ringattn.plans.plan import Plan
from scripts.benchmarks.cases import packed

CASES = (("documents", 16), ("documents", 64), ("documents", 256), ("documents", 1024), ("causal", 64))
BUFFERS = {1024: 20}  # shards, where ranks are so many
BUFFER = 8
STAGES = 4
GIGA, TERA, MICRO = 1e9, 1e12, 1e-6


@dataclasses.dataclass(frozen=True)
class Distance(ringattn.Route):
    """As `Route` was: in phase d from the rank d places back, whoever needs anything of it."""

    def _transfers(self, demand: Demand) -> None:
        """None are looked at."""

    def _distances(self, demand: Demand) -> int:
        return 1

    def __str__(self) -> str:
        return "distances"


@dataclasses.dataclass(frozen=True)
class Waiting:
    """Milliseconds of one pass; ``busy`` is the mean rank's computing, ``bound`` the busiest rank's or link's."""

    mask: str
    ranks: int
    seed: int | None
    route: str
    backward: bool
    busy: float
    bound: float
    makespan: float
    waits: float  # the mean rank's, over its computing
    exchanges: float  # a rank
    bare: float  # share of them that start in a step without tiles
    buffer: float  # the largest receive buffer, in shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("waiting, of a nominal machine")
    group.add_argument("--forward", type=float, default=690, help="TF/s of a rank forward (default 690)")
    group.add_argument("--backward", type=float, default=590, help="TF/s backward (default 590)")
    group.add_argument("--node", type=int, default=8, help="neighbouring ranks that share a node (default 8)")
    group.add_argument("--inside", type=float, nargs=2, default=(380, 10), metavar=("GB/S", "US"), help="their links")
    group.add_argument("--across", type=float, nargs=2, default=(26, 40), metavar=("GB/S", "US"), help="all others")
    group.add_argument("--tokens", type=int, default=8192, help="a rank's (default 8192)")
    group.add_argument("--heads", type=int, nargs=2, default=(64, 8), metavar=("Q", "K"), help="default 64 and 8")
    group.add_argument("--dim", type=int, default=128, help="of a head (default 128)")
    group.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    group.add_argument("--draws", type=int, default=1, help="of the documents, lognormal of median 2,000 (default 1)")


def rates(options: argparse.Namespace) -> Rates:
    (inside, soon), (across, late) = options.inside, options.across
    links = Link(inside * GIGA, soon * MICRO), Link(across * GIGA, late * MICRO)
    return Rates(options.forward * TERA, options.backward * TERA, options.node, *links)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, int | None, Mask]]:
    for name, ranks in CASES:
        if options.ranks and ranks not in options.ranks:
            continue
        if name == "causal":
            yield name, ranks, None, Causal()
            continue
        for seed in range(options.draws):
            yield name, ranks, seed, Documents(packed("lognormal", ranks * options.tokens, seed)) & Causal()


def report(options: argparse.Namespace, path: Path | None) -> int:
    rows = []
    shape: dict[str, Any] = {"heads": tuple(options.heads), "head_dims": (options.dim,) * 2, "dtype": options.dtype}
    for name, ranks, seed, mask in cases(options):
        buffer = BUFFERS.get(ranks, BUFFER)
        routes = Distance(), ringattn.Route(), ringattn.Route(stages=STAGES, buffer=buffer * options.tokens)
        for route in routes:
            plans = ringattn.plan_all(mask, ranks * options.tokens, "auto", route, ranks, node=options.node, **shape)
            largest = max(max(plan.buffer_rows.received, default=0) for plan in plans) / options.tokens
            for backward in (False, True):
                seconds = spent(plans, rates(options), backward)
                rows.append(Waiting(name, ranks, seed, str(route), backward, **seconds, buffer=largest))
        shared.console().print(table(rows[-2 * len(routes) :]))
    if path is not None:
        path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    return 0


def spent(plans: list[Plan], rates: Rates, backward: bool) -> dict[str, Any]:
    assert plans[0].shape is not None
    time = timed(plans, plans[0].shape, rates, backward=backward)
    busy = float(np.mean(time.computing))
    return {
        "busy": busy * 1e3,
        "bound": time.bound * 1e3,
        "makespan": time.makespan * 1e3,
        "waits": float(np.mean(time.finished)) / busy - 1,
        "exchanges": time.exchanges / len(plans),
        "bare": time.bare / max(time.exchanges, 1),
    }


def table(rows: list[Waiting]) -> Table:
    first = rows[0]
    drawn = "" if first.seed is None else f", draw {first.seed}"
    title = f"{first.mask}{drawn}, {first.ranks} ranks"
    out = Table("route", box=box.SIMPLE_HEAD, title_justify="left", title=title)
    times = "", "computes\nmean ms", "bound\nms", "done\nms", "done /\nmean", "done /\nbound", "waits /\ncomputes"
    for title in times:
        out.add_column(title, justify="right")
    for title in ("exchanges\na rank", "without\ntiles", "buffer\nshards"):
        out.add_column(title, justify="right")
    for row in rows:
        out.add_row(
            "" if row.backward else row.route,
            "backward" if row.backward else "forward",
            *(f"{value:.1f}" for value in (row.busy, row.bound, row.makespan)),
            *(f"{value:.2f}" for value in (row.makespan / row.busy, row.makespan / row.bound, row.waits)),
            *(f"{row.exchanges:.1f}", f"{row.bare:.0%}", f"{row.buffer:.1f}"),
        )
    return out
