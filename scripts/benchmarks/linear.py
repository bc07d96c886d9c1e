"""What sums over keys cost: bytes and time of linear attention, its features and decay gates, as sequences grow.

Bytes are those of the busiest of 4 ranks, forward and backward, causal and zigzag, from the plans. Time is of one rank,
one thread, forward and backward; a length that is twice as long would take twice the time if all was sums over keys.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn.mechanisms import Mechanism

LENGTHS = (8_192, 16_384, 32_768, 65_536)


def made(name: str, heads: int, length: int) -> Mechanism:
    """The mechanism, with a decay of .9 to 1 a token where there is one."""
    if name != "gated":
        return ringattn.Linear(name)
    return ringattn.Gated(torch.rand(1, heads, length).mul(-0.1))


def bytes_moved(mechanism: Mechanism, length: int, heads: int, dim: int) -> int:
    """What the busiest of 4 ranks receives, forward and backward."""
    shape = {"heads": (heads, heads), "head_dims": (dim, dim), "dtype": "float32"}
    plans = ringattn.plan_all(ringattn.Causal(), length, "zigzag", ring=4, mechanism=mechanism, **shape)  # type: ignore[arg-type]
    traffic = [plan.traffic() for plan in plans]
    return max((x.received_bytes or 0) + (x.backward_received_bytes or 0) for x in traffic)


def seconds(mechanism: Mechanism, length: int, heads: int, dim: int) -> float:
    """One pass forward and backward, the second of two."""
    sharding = ringattn.Sharding(length, ringattn.init())
    q, k, v = (torch.randn(1, heads, length, dim, requires_grad=True) for _ in range(3))
    for _ in range(2):
        started = time.perf_counter()
        ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, mechanism=mechanism).sum().backward()
        took = time.perf_counter() - started
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64, help="of queries, keys and values")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens up to which time is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = arguments.heads, arguments.dim
    table = Table("mechanism", "tokens", "bytes a rank", "seconds", "seconds / tokens, over 8K's")
    for name in ("elu", "taylor", "gated"):
        first = 0.0
        for length in LENGTHS:
            moved = bytes_moved(made(name, arguments.heads, 0), length, *sizes)
            if length > arguments.longest:
                table.add_row(name, f"{length:,}", f"{moved:,}", "", "")
                continue
            took = seconds(made(name, arguments.heads, length), length, *sizes)
            first = first or took / length
            table.add_row(name, f"{length:,}", f"{moved:,}", f"{took:.2f}", f"{took / length / first:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
