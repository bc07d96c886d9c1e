"""What entmax moves: passes over keys, and forward bytes over softmax's, as counted by the transport.

Queries and keys are normal numbers, so that scores are about normal with the deviation said. The sum of a query's
weights, by which the threshold is judged, is the output where all values are 1.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn.mechanisms import Mechanism

ALPHAS = (1.25, 1.5, 2.0)
DEVIATIONS = (0.01, 0.1, 0.5, 1.0, 3.0)
DIM = 64


def attended(mesh: ringattn.Mesh, length: int, heads: int, mechanism: Mechanism) -> torch.Tensor:
    """The output where all values are 1."""
    sharding = ringattn.Sharding(length, mesh)
    g = torch.Generator().manual_seed(0)
    q, k = (sharding.split(torch.randn(1, heads, length, DIM, generator=g), 2) for _ in range(2))
    v = torch.ones_like(k)
    return ringattn.attention(q, k, v, ringattn.Full(), sharding=sharding, mechanism=mechanism, kernel="reference")


def measured(arguments: argparse.Namespace, mechanism: Mechanism) -> tuple[int, float, float]:
    """Bytes received by all ranks, seconds, and how far from 1 the weights of a query sum at most."""
    started = time.perf_counter()
    run = ringattn.simulate(attended, arguments.length, arguments.heads, mechanism, ring=arguments.ring)
    seconds = time.perf_counter() - started
    off = max(float((out - 1).abs().max()) for out in run.results)
    return sum(counters.received_bytes for counters in run.traffic), seconds, off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--ring", type=int, default=4, help="virtual ranks")
    arguments = parser.parse_args()
    title = f"{arguments.length:,} tokens, {arguments.heads} heads of {DIM}, {arguments.ring} virtual ranks, float32"
    table = Table(
        "alpha", "deviation of scores", "passes over keys", "bytes / softmax's", "time / softmax's", title=title
    )
    table.add_column("largest |sum of weights - 1|")
    for alpha in ALPHAS:
        for deviation in DEVIATIONS:
            scale = deviation / DIM**0.5
            bytes_, seconds, _ = measured(arguments, ringattn.Softmax(scale=scale))
            found, took, off = measured(arguments, ringattn.Entmax(alpha, scale=scale))
            passes = round(2 * (found / bytes_ - 1))  # keys are half of what softmax moves
            cells = (alpha, deviation, passes, f"{found / bytes_:.2f}", f"{took / seconds:.1f}", f"{off:.1e}")
            table.add_row(*map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
