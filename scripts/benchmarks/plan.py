"""How long `Route` plans of a million packed tokens take to make: all ranks' at once, and one rank's alone."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import ringattn
from scripts.benchmarks.cases import documents


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    once()  # the first call imports and allocates
    return statistics.median(once() for _ in range(rounds))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench plan", description=__doc__)
    parser.add_argument("--length", type=int, default=1_048_576, help="tokens (default 1048576)")
    parser.add_argument("--documents", type=int, default=10_000, help="packed causal documents (default 10000)")
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--layout", default="contiguous")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions, of which the median is printed")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    mask = ringattn.Documents(documents(options.documents, options.length)) & ringattn.Causal()
    ranks = options.ranks

    def every_rank() -> list[ringattn.Plan]:
        return ringattn.plan_all(mask, options.length, layout=options.layout, schedule="route", ring=ranks)

    def one_rank(rank: int) -> ringattn.Plan:
        mesh = ringattn.Mesh.virtual(ring=ranks, rank=rank)
        sharding = ringattn.Sharding(options.length, mesh, layout=options.layout)
        return ringattn.plan(mask, sharding, schedule="route")

    plans = every_rank()
    print(f"route, {options.length} tokens, {options.documents} causal documents, {options.layout}, {ranks} ranks")
    print(f"  all ranks' plans          {median_seconds(every_rank, options.rounds) * 1e3:8.1f} ms")
    some = {0, ranks // 2, ranks - 1}
    slowest = max(median_seconds(partial(one_rank, rank), options.rounds) for rank in some)
    print(f"  one rank's plan           {slowest * 1e3:8.1f} ms, the slowest of three ranks")
    print(f"  verify one plan           {median_seconds(plans[ranks // 2].verify, options.rounds) * 1e3:8.1f} ms")
    print(f"  verify all together       {median_seconds(lambda: ringattn.verify(plans), options.rounds) * 1e3:8.1f} ms")
    repeats = [plan.hash for plan in plans] == [plan.hash for plan in every_rank()]
    same = plans[0].hash == one_rank(0).hash and repeats
    print(f"  one rank's equals its own of all: {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
