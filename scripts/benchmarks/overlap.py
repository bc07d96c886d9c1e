"""The share of communication that is hidden behind compute: each schedule as it is, and without what hides it.

A wrapper around the Gloo transport makes the link slow: an exchange completes no earlier than its received bytes take
at the link's bandwidth, counted from when both ends had started it. The bandwidth is set so that the forward pass's
link time is a given part of its compute time. A rank that waits for the link sleeps: 1 − slept / link time is the share
that was hidden, over all ranks together, beside the times of the whole call with and without the link.
There must not be more ranks than processors, or another rank's compute would fill the gaps.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import ringattn
from ringattn import masks
from ringattn.naming import by_name
from ringattn.plans.exchanges import Step
from ringattn.schedules import MEMBERS
from ringattn.transports.base import Message, Transport
from scripts.benchmarks.teams import Team, Worker


class SlowLink(Transport):
    """A transport whose messages take `bandwidth` bytes a second at least."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(f"slow {inner.name}", inner.rank, inner.size, inner.agreement)
        self.bandwidth = float("inf")
        self.slept = 0.0  # seconds spent waiting for the link, so far
        self._inner, self._free = inner, 0.0  # the link carries one exchange after the other

    def refusal(self, device: torch.device) -> str | None:
        return self._inner.refusal(device)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        peers = sorted({peer for peer, _ in (*sends, *receives)})
        ours = torch.tensor([time.monotonic()], dtype=torch.float64)  # one clock for all processes of a machine
        theirs = [torch.empty(1, dtype=torch.float64) for _ in peers]
        complete = self._inner._start(
            [*sends, *((peer, ours) for peer in peers)], [*receives, *zip(peers, theirs, strict=True)], label
        )
        seconds = sum(buffer.nbytes for _, buffer in receives) / self.bandwidth

        def finish() -> None:
            complete()
            started = max(self._free, *(float(stamp) for stamp in (ours, *theirs)))
            self._free = started + seconds
            left = max(0.0, self._free - time.monotonic())
            self.slept += left
            time.sleep(left)

        return finish


@dataclasses.dataclass(frozen=True)
class Call:
    """Attention by a schedule, as its name is written with arguments, on so many ulysses ranks."""

    schedule: str
    ulysses: int
    backward: bool
    length: int
    heads: int
    mask: str
    bandwidth: float  # bytes a second


def ways(ranks: int, slices: int) -> list[tuple[str, int]]:
    """The schedules that are measured, each before that with which it hides more, and on how many ulysses ranks."""
    known = by_name(MEMBERS)
    found = [
        *(("ring(lookahead=0)", 1), ("ring", 1)),
        *(("route(lookahead=0)", 1), ("route", 1)),
        *(("route(lookahead=0, stages=2)", 1), ("route(stages=2)", 1)),
        *(("allgather(lookahead=0)", 1), ("allgather", 1), (f"allgather(slices={slices})", 1)),
        *(("ulysses", ranks), (f"ulysses(slices={slices})", ranks)),
    ]
    staged = "stages" in inspect.signature(known["route"]).parameters
    there = [way for way in found if way[0].partition("(")[0] in known]
    return [way for way in there if staged or "stages" not in way[0]]


def prepare(worker: Worker, call: Call) -> tuple[int, int | None]:
    """Received bytes of the call on this rank, and those of them that some compute could hide, where that is known."""
    if "link" not in worker.kept:
        worker.kept["link"] = SlowLink(ringattn.init().connected())
    link, name = worker.kept["link"], f"slow mesh {call.ulysses}"
    if name not in worker.kept:
        worker.kept[name] = dataclasses.replace(ringattn.init(ulysses=call.ulysses), transport=link)
    mesh, mask = worker.kept[name], masks.parse(call.mask)
    link.bandwidth = call.bandwidth
    sharding = ringattn.Sharding(call.length, mesh, mask=mask)
    q, k, v, dout = (torch.randn(1, call.heads, sharding.count, 64) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    worker.kept["out"] = ringattn.attention(q, k, v, mask, sharding=sharding, schedule=call.schedule)

    def forward() -> None:
        worker.kept["out"] = ringattn.attention(q, k, v, mask, sharding=sharding, schedule=call.schedule)

    def backward() -> None:
        torch.autograd.grad(worker.kept["out"], (q, k, v), dout, retain_graph=True)

    worker.prepared = backward if call.backward else forward
    plan = ringattn.plan(
        mask, sharding, call.schedule, heads=(call.heads, call.heads), head_dims=(64, 64), dtype="float32"
    )
    moved = plan.traffic()
    size = moved.backward_received_bytes if call.backward else moved.received_bytes
    return size or 0, hideable(plan.backward_steps if call.backward else plan.steps, size or 0, call)


def hideable(steps: Sequence[Step], size: int, call: Call) -> int | None:
    """Received bytes of steps that compute meanwhile; None where heads are exchanged, which steps do not tell."""
    rows = [(sum(item.rows for item in step.exchange.receives), bool(step.tiles)) for step in steps]
    everything = sum(count for count, _ in rows)
    if call.ulysses > 1 or not everything:
        return None
    return size * sum(count for count, hidden in rows if hidden) // everything


def slept(worker: Worker) -> float:
    """Seconds this rank has waited for the link so far."""
    return float(worker.kept["link"].slept)


def report(team: Team, options: argparse.Namespace, console: Console) -> None:
    table = Table(
        title=f"{options.mask}, {options.length} tokens, {options.heads} heads of 64, float32, {options.ranks} Gloo "
        f"ranks of one thread: link time {options.share:.0%} of the forward's compute, medians of {options.rounds}"
    )
    for title in ("schedule", "pass"):
        table.add_column(title)
    for title in ("fast link", "slow link", "link time a rank", "hidden", "could be at most"):
        table.add_column(title, justify="right")
    bandwidths: dict[str, float] = {}
    measured = [way for way in ways(options.ranks, options.slices) if options.only in way[0]]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for schedule, ulysses in measured:
            name = schedule.partition("(")[0]
            for backward in (False, True):
                sizes = options.length, options.heads, options.mask
                fast = Call(schedule, ulysses, backward, *sizes, float("inf"))
                received = team.call(prepare, fast)
                team.time()
                if name not in bandwidths:
                    bandwidths[name] = max(size for size, _ in received) / (options.share * team.time())
                slow = dataclasses.replace(fast, bandwidth=bandwidths[name])
                table.add_row(*measure(team, fast, slow, options.rounds, progress))
    console.print(table)


def measure(team: Team, fast: Call, slow: Call, rounds: int, progress: Progress) -> list[str]:
    direction = "backward" if fast.backward else "forward"
    bar = progress.add_task(f"{fast.schedule} {direction}", total=rounds)
    times: dict[Call, list[float]] = {fast: [], slow: []}
    exposed: list[float] = []  # seconds, all ranks together
    for _ in range(rounds):
        for call in (fast, slow):
            sizes = team.call(prepare, call)
            before = team.call(slept)
            times[call].append(team.time())
            waited = sum(team.call(slept)) - sum(before)
        exposed.append(waited)
        progress.advance(bar)
    progress.remove_task(bar)
    everything = sum(size for size, _ in sizes)
    could = [size for _, size in sizes if size is not None]
    link = everything / slow.bandwidth
    hidden = 1 - statistics.median(exposed) / link if link else 1.0
    share = f"{sum(could) / everything:.0%}" if could and everything else "—"
    without, with_link = (statistics.median(times[call]) for call in (fast, slow))
    seconds = [f"{value * 1e3:.0f} ms" for value in (without, with_link, link / team.size)]
    return [fast.schedule, direction, *seconds, f"{hidden:.0%}", share]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench overlap", description=__doc__)
    parser.add_argument("--length", type=int, default=8192, help="tokens (default 8192)")
    parser.add_argument("--heads", type=int, default=4, help="heads of size 64 (default 4)")
    parser.add_argument("--mask", default="causal")
    parser.add_argument("--ranks", type=int, default=min(4, os.cpu_count() or 1), help="at most one a processor")
    parser.add_argument("--share", type=float, default=0.4, help="link time over the forward's compute (default 0.4)")
    parser.add_argument("--slices", type=int, default=2, help="of heads, where a schedule has slices (default 2)")
    parser.add_argument("--only", default="", help="schedules whose text contains this")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error("one rank communicates with nobody; give --ranks 2 or more")
    return options


def main() -> int:
    options = arguments()
    with Team(options.ranks) as team:
        report(team, options, Console(width=None if sys.stdout.isatty() else 160))
    return 0


if __name__ == "__main__":
    sys.exit(main())
