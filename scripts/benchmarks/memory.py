"""Peak memory and bytes moved of forward+backward on Gloo ranks, against plan.memory() and plan.traffic().

The peak is the resident set of a fresh process at --length tokens minus that of the same process at 1,024 tokens, so
that what Python, torch and Gloo need anyway cancels out. Ranks make their own shards: no rank holds a whole tensor.
glibc is told to give freed blocks of 64 KiB and more back at once, so that the peak is what is in use and not what its
heap has kept in fragments (up to a sixth more); --default-malloc measures that too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import sys

import torch
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn import masks
from ringattn.advice.comparison import schedules_for
from ringattn.mechanisms import Mechanism
from ringattn.naming import by_name
from ringattn.readable import dtype_name
from ringattn.schedules import MEMBERS
from scripts.benchmarks.teams import Team, Worker

BASELINE = 1024  # tokens
ALLOWED = 1.1  # peak over plan.memory()


@dataclasses.dataclass(frozen=True)
class Call:
    """One forward and backward of [1, heads, length, dim]."""

    length: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    mask: str
    schedule: str
    mechanism: str
    ulysses: int = 1


@dataclasses.dataclass(frozen=True)
class Usage:
    """One rank's: bytes, and messages."""

    peak: int
    planned_memory: dict[str, int]
    moved: tuple[int, int, int]  # sent bytes, received bytes, messages
    planned: tuple[int, int, int]


def measure(_: Worker, call: Call) -> Usage:
    """Runs the call once and reads the counters."""
    mesh = ringattn.init(ulysses=call.ulysses)
    mask = masks.parse(call.mask)
    sharding = ringattn.Sharding(call.length, mesh, mask=mask)
    shape = {"heads": (call.heads, call.kv_heads), "head_dims": (call.dim, call.dim), "dtype": call.dtype}
    mechanism = ringattn.Linear() if call.mechanism == "linear" else ringattn.Softmax()
    plan = ringattn.plan(mask, sharding, schedule=call.schedule, mechanism=mechanism, **shape)  # type: ignore[arg-type]

    # as projections give them: [B, S, H, D], of which attention sees a transposed view. Gradients then come back in
    # the layout of the leaves, and torch keeps them as they are instead of copying them.
    def random(heads: int) -> torch.Tensor:
        return torch.randn(1, sharding.count, heads, call.dim, dtype=call.dtype)

    leaves = [random(heads).requires_grad_() for heads in (call.heads, call.kv_heads, call.kv_heads)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = ringattn.attention(q, k, v, mask, sharding=sharding, schedule=call.schedule, mechanism=mechanism)
    out.backward(random(call.heads).transpose(1, 2))
    counters, traffic = mesh.connected().counters, plan.traffic()
    return Usage(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        plan.memory().buffers,
        (counters.sent_bytes, counters.received_bytes, counters.messages),
        (
            (traffic.sent_bytes or 0) + (traffic.backward_sent_bytes or 0),
            (traffic.received_bytes or 0) + (traffic.backward_received_bytes or 0),
            traffic.messages + traffic.backward_messages,
        ),
    )


def run(call: Call, ranks: int) -> list[Usage]:
    with Team(ranks) as team:  # fresh processes: a peak never falls
        return team.call(measure, call)


def report(call: Call, ranks: int, console: Console) -> bool:
    long, short = run(call, ranks), run(dataclasses.replace(call, length=BASELINE), ranks)
    dtype = dtype_name(call.dtype)
    table = Table(
        title=f"{call.mechanism} by {call.schedule}: {call.mask}, {call.length} tokens on {ranks // call.ulysses} x "
        f"{call.ulysses} Gloo ranks, {call.heads} query and {call.kv_heads} key heads of {call.dim}, {dtype}"
    )
    table.add_column("rank")
    for title in (
        "peak − peak at 1,024",
        "plan.memory()",
        "ratio",
        "sent bytes",
        "received bytes",
        "messages",
        "planned",
    ):
        table.add_column(title, justify="right")
    good = True
    for rank, (usage, baseline) in enumerate(zip(long, short, strict=True)):
        grown = usage.peak - baseline.peak
        planned = sum(usage.planned_memory.values()) - sum(baseline.planned_memory.values())
        ratio, exact = grown / planned, usage.moved == usage.planned
        good = good and exact and ratio <= ALLOWED
        moved = [f"{count:,}" for count in usage.moved]
        verdict = "equal" if exact else f"differs: {usage.planned}"
        table.add_row(str(rank), f"{grown / 1e6:.1f} MB", f"{planned / 1e6:.1f} MB", f"{ratio:.3f}", *moved, verdict)
    console.print(table)
    buffers = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in long[0].planned_memory.items())
    console.print(f"rank 0's buffers in MB: {buffers}", highlight=False)
    return good


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__)
    parser.add_argument("--length", type=int, default=65_536, help="tokens (default 65536)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--mask", default="causal")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's heap as it is")
    parser.add_argument("--mechanism", choices=["softmax", "linear"], default="softmax")
    parser.add_argument("--schedule", help="as route(stages=2) is written; all that serve the mechanism unless given")
    parser.add_argument("--ulysses", type=int, help="ranks of it for --schedule ulysses (default all)")
    return parser.parse_args()


def schedules(mechanism: Mechanism, ranks: int) -> list[tuple[str, int]]:
    """Those that are measured, each with the number of ulysses ranks."""
    flat = [(name, 1) for name in schedules_for(mechanism)]
    return [*flat, ("ulysses", ranks)] if "ulysses" in by_name(MEMBERS) else flat


def main() -> int:
    options = arguments()
    if not options.default_malloc:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by the workers when they start
    console = Console(width=None if sys.stdout.isatty() else 160)
    good = True
    chosen = schedules(ringattn.Linear() if options.mechanism == "linear" else ringattn.Softmax(), options.ranks)
    if options.schedule:
        composite = options.schedule.startswith("ulysses")
        chosen = [(options.schedule, (options.ulysses or options.ranks) if composite else 1)]
    for schedule, ulysses in chosen:
        dtype = getattr(torch, options.dtype)
        shape = (options.length, options.heads, options.kv_heads, options.dim, dtype)
        call = Call(*shape, options.mask, schedule, options.mechanism, ulysses)
        good = report(call, options.ranks, console) and good
    console.print(f"peaks within {ALLOWED}× of plan.memory() and traffic exact: {'yes' if good else 'NO'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
