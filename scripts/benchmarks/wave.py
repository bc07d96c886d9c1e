"""The wave of monotonic attention and MoChA: steps, share of waiting, bytes and time, and the error beside them.

On Gloo ranks of one thread, forward and backward. Of waiting there are three figures: the plan's, (ranks - 1) / steps;
what it comes to by the processor seconds that each block took, one after another as they need each other; and the
seconds in which a rank waited for an exchange over those of the call, which mean something where every rank has an idle
processor. The latter two are of the rank that waits least and of the one that waits most. Bytes are
counted by the transport and must be the plan's. Times are shown as multiples of softmax's, on the same ranks by auto.
The error is that of a shorter call, against the equations in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn.conformance import Case, errors, oracle, simulated
from ringattn.kernels.machine import processor
from ringattn.mechanisms.ordered import Ordered
from scripts.benchmarks.teams import Team, Worker

SHORT = 160  # tokens of the call whose error is shown


@dataclasses.dataclass(frozen=True)
class Call:
    mechanism: ringattn.Monotonic | ringattn.MoChA | ringattn.Softmax
    block: int
    length: int
    heads: int

    @property
    def schedule(self) -> ringattn.Wave | str:
        return ringattn.Wave(self.block) if isinstance(self.mechanism, Ordered) else "auto"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one rank has measured of one forward and backward pass."""

    seconds: float
    waited: float
    received: int
    blocks: dict[str, list[float]]
    """Processor seconds of each block, in order, of either pass."""


def timing(name: str, spent: list[float]) -> Callable[..., Any]:
    """The method of `Ordered`, which also says how long it took."""
    method = getattr(Ordered, name)

    def timed(*args: Any) -> Any:
        started = time.process_time()
        result = method(*args)
        spent.append(time.process_time() - started)
        return result

    return timed


def waiting(found: Sequence[Measured]) -> list[float]:
    """The share of waiting of each rank, were nothing else to wait for than the blocks before."""
    worked, total = [0.0] * len(found), 0.0
    for name, ranks in (("block", [*range(len(found))]), ("block_grad", [*reversed(range(len(found)))])):
        ends = [0.0] * len(found[0].blocks[name])
        for rank in ranks:
            at = 0.0
            for block, seconds in enumerate(found[rank].blocks[name]):
                ends[block] = at = max(at, ends[block]) + seconds
            worked[rank] += sum(found[rank].blocks[name])
        total += ends[-1]
    return [1 - each / total for each in worked]


def run(worker: Worker, call: Call) -> Measured:
    if "mesh of the wave" not in worker.kept:
        worker.kept["mesh of the wave"] = ringattn.init()
    mesh: ringattn.Mesh = worker.kept["mesh of the wave"]
    sharding = ringattn.Sharding(call.length, mesh)
    g = torch.Generator().manual_seed(worker.rank)
    q, k, v, dout = (torch.randn(1, call.heads, sharding.count, 64, generator=g) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    transport = mesh.connected()
    counters = transport.counters
    transport.sum(torch.zeros(1))  # all begin together
    received, waited, started = counters.received_bytes, counters.waited_seconds, time.perf_counter()
    blocks: dict[str, list[float]] = {"block": [], "block_grad": []}
    methods: dict[str, Any] = {name: timing(name, spent) for name, spent in blocks.items()}
    with patch.multiple(Ordered, **methods):
        out = ringattn.attention(
            q, k, v, ringattn.Full(), sharding=sharding, mechanism=call.mechanism, schedule=call.schedule
        )
        torch.autograd.grad(out, leaves, dout)
    seconds = time.perf_counter() - started
    return Measured(seconds, counters.waited_seconds - waited, counters.received_bytes - received, blocks)


def error(mechanism: ringattn.Monotonic | ringattn.MoChA, ranks: int) -> float:
    """The largest of the output's and the gradients', in float32, by the magnitudes of `ringattn.reference`."""
    case = Case(SHORT, ringattn.Full(), ranks=ranks, kv_heads=2, groups=2, dim=64, value_dim=64, mechanism=mechanism)
    return max(errors(simulated(case), oracle(case)).values())


def row(team: Team, call: Call, rounds: int) -> list[str]:
    found = [team.call(run, call) for _ in range(rounds + 1)][1:]  # the first plans
    softmax = dataclasses.replace(call, mechanism=ringattn.Softmax())
    others = [team.call(run, softmax) for _ in range(rounds + 1)][1:]
    seconds, beside = (statistics.median(max(x.seconds for x in each) for each in runs) for runs in (found, others))
    shares = [statistics.median(each[rank].waited / each[rank].seconds for each in found) for rank in range(team.size)]
    by_blocks = [statistics.median(each) for each in zip(*map(waiting, found), strict=True)]
    plans = []
    assert isinstance(call.mechanism, Ordered)
    for rank in range(team.size):
        sharding = ringattn.Sharding(call.length, ringattn.Mesh.virtual(team.size, rank=rank))
        shape = {"heads": (call.heads, call.heads), "head_dims": (64, 64), "dtype": "float32"}
        plans.append(
            ringattn.plan_wave(sharding, mechanism=call.mechanism, schedule=ringattn.Wave(call.block), **shape)  # type: ignore[arg-type]
        )
    moved = [plan.traffic() for plan in plans]
    planned = [(x.received_bytes or 0) + (x.backward_received_bytes or 0) for x in moved]
    received = [x.received for x in found[-1]]
    kept = max(sum(size for name, size in x.memory().buffers.items() if name.startswith("kept")) for x in plans)
    assert isinstance(call.mechanism, (ringattn.Monotonic, ringattn.MoChA))
    return [
        str(call.mechanism),
        str(team.size),
        str(call.block),
        str(plans[0].steps),
        f"{plans[0].waiting:.0%}",
        f"{min(by_blocks):.0%} to {max(by_blocks):.0%}",
        f"{min(shares):.0%} to {max(shares):.0%}",
        f"{max(received):,}" if received == planned else f"{received}, planned {planned}",
        f"{kept / 2**20:.1f} MiB",
        f"{seconds * 1e3:.0f} ms",
        f"{seconds / beside:.0f}",
        f"{error(call.mechanism, team.size):.1e}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench wave", description=__doc__)
    parser.add_argument("--length", type=int, default=2048, help="queries and keys (default 2048)")
    parser.add_argument("--heads", type=int, default=4, help="heads of size 64 (default 4)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="Gloo ranks (default 2 4)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 256], help="queries in a block (default 64 256)")
    parser.add_argument("--width", type=int, default=8, help="of MoChA's windows (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are shown (default 3)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 190)
    table = Table(
        title=f"{options.length} queries and keys, {options.heads} heads of 64, float32, forward and backward; "
        f"{processor()}, load {os.getloadavg()[0]:.1f}"
    )
    for title in (
        "mechanism",
        "ranks",
        "block",
        "steps",
        "waits by the plan",
        "by its blocks",
        "measured",
        "bytes received at most",
    ):
        table.add_column(title)
    for title in ("kept", "time", "× softmax", f"error at {SHORT} tokens"):
        table.add_column(title, justify="right")
    for ranks in options.ranks:
        with Team(ranks) as team:
            for mechanism in (ringattn.Monotonic(), ringattn.MoChA(options.width)):
                for block in options.blocks:
                    table.add_row(*row(team, Call(mechanism, block, options.length, options.heads), options.rounds))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
