"""Where the time of an attention call goes: a rank's mean over ranks and calls, on Gloo ranks of one thread each.

Operators are grouped: matrix products; passes over scores and sums; copying, zeroing and packing buffers; waiting for
other ranks; the rest, which is Python, dispatch and Gloo's own copying.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import ringattn
from scripts.benchmarks.attention import mask_names
from scripts.benchmarks.cases import Case
from scripts.benchmarks.contestants import measured
from scripts.benchmarks.teams import Team, Worker

GROUPS = {
    "products": ("mkldnn::_linear", "aten::bmm", "aten::_scaled_dot_product_flash"),
    "passes": (
        "aten::exp",
        "aten::sub",
        "aten::mul",
        "aten::add",
        "aten::div",
        "aten::amax",
        "aten::sum",
        "aten::maximum",
        "aten::masked_fill",
        "aten::clamp",
        "aten::log",
    ),
    "copies": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::clone", "aten::cat", "aten::flip"),
}


def profiled(_: Worker, case: Case, rounds: int) -> dict[str, float]:
    """Seconds a call by group."""
    mesh = ringattn.init()
    assert mesh.transport is not None
    sharding = ringattn.Sharding(case.length, mesh, mask=case.mask)
    inputs = [sharding.split(x, 2).contiguous() for x in case.inputs()]
    call = measured(lambda q, k, v: ringattn.attention(q, k, v, case.mask, sharding=sharding), inputs, case)
    call()
    waited, began = mesh.transport.counters.waited_seconds, time.perf_counter()
    for _round in range(rounds):
        call()
    whole, waited = time.perf_counter() - began, mesh.transport.counters.waited_seconds - waited
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _round in range(rounds):
            call()
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in found.key_averages():
        for group, names in GROUPS.items():
            if event.key.startswith(names):
                seconds[group] += event.self_cpu_time_total * 1e-6
    seconds["waiting"] = waited
    seconds["rest"] = whole - sum(seconds.values())
    return {name: value / rounds for name, value in {"whole": whole, **seconds}.items()}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="scripts/bench profile", description=__doc__)
    parser.add_argument("tables", nargs="*", help="which of causal, documents, window; all of them unless given")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table(title=f"ms a call and rank, {options.ranks} ranks")
    for title in ("case", "whole", *GROUPS, "waiting", "rest"):
        table.add_column(title, justify="left" if title == "case" else "right")
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler tells every start and stop
    with Team(options.ranks) as team:
        for name in options.tables or ("causal", "documents", "window"):
            length = 8192 if name == "causal" else 16384
            for dtype in (torch.float32, torch.bfloat16):
                for backward in (False, True):
                    case = Case(mask_names(length)[name], length, dtype, backward)
                    parts = team.call(profiled, case, options.rounds)
                    mean = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
                    table.add_row(f"{name}, {case.label}", *(f"{mean[key] * 1e3:.1f}" for key in mean))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
