"""What a cached call costs beside its kernel: against PyTorch's own attention, by parts, and a step of a ring.

Small calls on one thread, where everything but the kernel shows, in processor time, which a busy machine distorts
least. The contestants take turns, and the median of the rounds counts. The parts are timed by themselves: what is left
of the whole is autograd and the calls between them.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn.kernels.machine import processor
from ringattn.mechanisms.base import OutputGrad
from ringattn.runtime import agreement, engine, op
from ringattn.runtime.call import TileCall
from ringattn.runtime.request import Request

LIMITS = {"forward": 3.0, "forward and backward": 2.2}
STEP_LIMIT = 300.0
Parts = dict[str, float]

_sdpa = torch.nn.functional.scaled_dot_product_attention
_mask = ringattn.Causal()


def microseconds(contestants: dict[str, Callable[[], object]], rounds: int, repeats: int = 40) -> Parts:
    """The median time of a call of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            call()
            began = time.process_time()
            for _repeat in range(repeats):
                call()
            times[name].append((time.process_time() - began) / repeats * 1e6)
    return {name: statistics.median(taken) for name, taken in times.items()}


def inputs(length: int, heads: int, dim: int, gradients: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values."""
    q, k, v = (torch.randn(1, heads, length, dim).requires_grad_(gradients) for _ in range(3))
    return q, k, v


def one_rank(length: int, rounds: int) -> tuple[dict[str, Parts], Parts, Parts]:
    """Whole calls of both passes, ours and PyTorch's, and the parts of ours in each pass."""
    sharding = ringattn.Sharding(length, ringattn.init())
    plain, learned = inputs(length, 4, 64, False), inputs(length, 4, 64, True)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ringattn.attention(q, k, v, _mask, sharding=sharding, kernel="sdpa")

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _sdpa(q, k, v, is_causal=True)

    def both(fn: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(fn(*learned).sum(), learned)

    request = Request(_mask, sharding, None, ringattn.Softmax(), "auto", "sdpa")
    call, ticket, params = op.prepared(request, *learned)
    assert isinstance(call, TileCall)
    (step,) = call.plan.steps
    with torch.no_grad():
        out, aux = torch.ops.ringattn.attention.default(*learned, params, ticket, *call.spelling, call.wanted)
        saved, problem, dout = [out, *aux], call.problem, torch.ones_like(out)
        q, k, v = plain
        totals = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    none = [None] * len(aux)
    whole = microseconds(
        {
            "ours forward": lambda: ours(*plain),
            "theirs forward": lambda: theirs(*plain),
            "ours forward and backward": both(ours),
            "theirs forward and backward": both(theirs),
        },
        rounds,
    )
    with torch.no_grad():
        parts = microseconds(
            {
                "prepared": lambda: op.prepared(request, *plain),
                "op": lambda: torch.ops.ringattn.attention.default(*plain, params, ticket, *call.spelling, call.wanted),
                "engine": lambda: engine.forward(call, *plain, params, 0, 0),
                "kernel": lambda: call.kernel.forward(problem, *plain, step.tiles, None),
                "op, backward": lambda: torch.ops.ringattn.attention_backward.default(
                    *plain, params, saved, dout, none, ticket, call.wanted
                ),
                "engine, backward": lambda: engine.backward(
                    call, *plain, params, 0, 0, tuple(saved), dout, tuple(none)
                ),
                "kernel, backward": lambda: call.kernel.backward(
                    problem, *plain, OutputGrad(tuple(saved), dout, tuple(none)), step.tiles, totals, {}
                ),
            },
            rounds,
        )
    compared = {name: {"ours": whole[f"ours {name}"], "theirs": whole[f"theirs {name}"]} for name in LIMITS}
    forward = {
        "checks, plan and ticket": parts["prepared"],
        "custom op": parts["op"] - parts["engine"],
        "engine and result": parts["engine"] - parts["kernel"],
        "kernel": parts["kernel"],
        "rest": whole["ours forward"] - parts["prepared"] - parts["op"],
    }
    backward = {
        "custom op": parts["op, backward"] - parts["engine, backward"],
        "engine, accumulators and results": parts["engine, backward"] - parts["kernel, backward"],
        "kernel": parts["kernel, backward"],
        "autograd and rest": whole["ours forward and backward"] - whole["ours forward"] - parts["op, backward"],
    }
    return compared, forward, backward


def ring(ranks: int, rounds: int) -> Parts:
    """Microseconds of one step of a ring on virtual ranks: whole, its kernel, agreement, and what is left."""

    def measured(mesh: ringattn.Mesh) -> Parts:
        sharding = ringattn.Sharding(ranks * 16, mesh, "zigzag")
        q, k, v = inputs(sharding.count, 2, 16, False)
        request = Request(_mask, sharding, None, ringattn.Softmax(), "ring", "sdpa")
        call, *_ = op.prepared(request, q, k, v)
        assert isinstance(call, TileCall)
        steps = len(call.plan.steps)
        agreed = {**call.fields, "call": "overhead"}
        times = microseconds(
            {
                "whole": lambda: ringattn.attention(q, k, v, _mask, sharding=sharding, schedule="ring", kernel="sdpa"),
                "agreement": lambda: agreement.check(mesh.connected(), agreed),
            },
            rounds,
            repeats=5,
        )
        # ranks take turns: a rank's time is that of all; the kernel's is its own, and nobody interrupts it
        kernel = microseconds({"kernel": lambda: _kernel(call, q, k, v)}, rounds, repeats=5)["kernel"]
        return {
            "whole": times["whole"] / ranks / steps,
            "agreement": times["agreement"] / ranks / steps,
            "kernel": kernel / steps,
        }

    found = ringattn.simulate(measured, ring=ranks).results
    mean = {name: statistics.mean(rank[name] for rank in found) for name in found[0]}
    return {**mean, "buffers, messages and the simulator": mean["whole"] - mean["agreement"] - mean["kernel"]}


def _kernel(call: TileCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    state = None
    for step, move in call.passes.forward:
        if step.phase == 0 and step.tiles:
            state = call.kernel.forward(call.problem, q, k, v, step.tiles, state)
        elif step.tiles:
            state = call.plan.attended.attend(call.problem, call.kernel, q, move.rows, step.tiles, state)


def walked(ranks: int, backward: bool) -> tuple[int, int, int]:
    """The functions of this package that a cached call enters, their calls, and their files; the simulator's apart."""
    package = str(Path(ringattn.__file__).parent)

    def counted(mesh: ringattn.Mesh) -> collections.Counter[tuple[str, str]]:
        sharding = ringattn.Sharding(ranks * 16, mesh, "zigzag")
        q, k, v = inputs(sharding.count, 2, 16, backward)
        seen: collections.Counter[tuple[str, str]] = collections.Counter()

        def profile(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(package):
                seen[frame.f_code.co_filename, f"{frame.f_code.co_name} {frame.f_code.co_firstlineno}"] += 1

        def call() -> None:
            out = ringattn.attention(q, k, v, _mask, sharding=sharding, schedule="ring", kernel="sdpa")
            if backward:
                out.sum().backward()

        call()
        sys.setprofile(profile)
        call()
        sys.setprofile(None)
        return seen

    seen = ringattn.simulate(counted, ring=ranks).results[0]
    own = {key: count for key, count in seen.items() if "simulator" not in key[0]}
    return len(own), sum(own.values()), len({name for name, _ in own})


def main() -> int:
    """Prints the tables; 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(prog="scripts/bench overhead", description=__doc__)
    parser.add_argument("--length", type=int, default=64, help="tokens of the calls on one rank (default 64)")
    parser.add_argument("--ranks", type=int, default=8, help="virtual ranks of the ring (default 8)")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compared, forward, backward = one_rank(options.length, options.rounds)
    step = ring(options.ranks, options.rounds)
    console = Console(width=None if sys.stdout.isatty() else 120)

    table = Table("µs a call", "ringattn", "PyTorch", "ratio", "limit", title=f"{options.length} tokens, {processor()}")
    for name, parts in compared.items():
        cells = f"{parts['ours']:.0f}", f"{parts['theirs']:.0f}", f"{parts['ours'] / parts['theirs']:.2f}"
        table.add_row(name, *cells, f"{LIMITS[name]}")
    console.print(table)
    for title, parts in (
        ("forward, µs", forward),
        ("backward, µs", backward),
        (f"a step of a ring on {options.ranks} virtual ranks, µs", step),
    ):
        table = Table("part", "µs", title=title)
        for name, value in parts.items():
            table.add_row(name, f"{value:.0f}")
        console.print(table)
    table = Table("a cached call", "functions", "calls", "files", title="of this package, entered")
    for ranks in (1, 4):
        for both in (False, True):
            name = f"{ranks} ranks, forward{' and backward' if both else ''}"
            table.add_row(name, *map(str, walked(ranks, both)))
    console.print(table)
    kept = all(parts["ours"] <= LIMITS[name] * parts["theirs"] for name, parts in compared.items())
    kept &= step["whole"] - step["kernel"] <= STEP_LIMIT
    print(
        f"within 3 and 2.2 times PyTorch's, and {STEP_LIMIT:.0f} µs a step beside its kernel:", "yes" if kept else "NO"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
