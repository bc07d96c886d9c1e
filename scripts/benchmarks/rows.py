"""The exact weights of a few queries over a long sharded sequence: their error against float64, and what travels.

The weights of chosen rows of `ringattn.attention_rows`, for every mechanism that has weights, on virtual ranks, beside
those of one rank in float64; and softmax's beside a matrix product of the chosen rows alone. Mechanisms that walk the
keys in order need all rows before the chosen ones, and take a shorter sequence.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ringattn
from ringattn.advice.repertoire import Sizes, Specimen, mask_for, sharded, specimens
from ringattn.mechanisms.ordered import Ordered
from ringattn.readable import readable_bytes

PLACES = (0.0, 0.1, 0.31, 0.62, 1.0)
"""Of the rows, from the first to the last."""
IN_ORDER = 4096  # tokens


def inputs(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the whole sequence, in float64."""
    g = torch.Generator().manual_seed(0)
    shape = 1, sizes.heads, sizes.length, sizes.dim
    return torch.randn(shape, generator=g).double(), torch.randn(shape, generator=g).double()


def weights(mesh: ringattn.Mesh, specimen: Specimen, sizes: Sizes, rows: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The whole rows."""
    mechanism = specimen.made(sizes)
    layout = "contiguous" if isinstance(mechanism, Ordered) else "zigzag"
    sharding = ringattn.Sharding(sizes.length, mesh, layout)
    q, k = (sharding.split(x, 2).to(dtype) for x in inputs(sizes))
    own, mask = sharded(mechanism, sharding), mask_for(mechanism)
    torch.manual_seed(0)  # for mechanisms that draw
    part = ringattn.attention_rows(q, k, mask, rows, sharding=sharding, mechanism=own)
    moved = mesh.connected().counters.received_bytes
    whole = sharding.join(part, 3)
    mesh.connected().counters.received_bytes = moved
    return whole


def softmax_in_float64(sizes: Sizes, rows: list[int]) -> torch.Tensor:
    """By a product of the chosen rows with all keys."""
    q, k = inputs(sizes)
    scores: torch.Tensor = q[:, :, rows] @ k.transpose(-1, -2) / sizes.dim**0.5
    later = torch.arange(sizes.length) > torch.tensor(rows)[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=65536, help="tokens")
    parser.add_argument("--ring", type=int, default=8, help="virtual ranks")
    parser.add_argument("--heads", type=int, default=2)
    arguments = parser.parse_args()
    sizes = Sizes(arguments.length, arguments.heads, arguments.heads, 64, 64, arguments.ring)
    title = (
        f"{len(PLACES)} rows of {sizes.length:,} tokens, {sizes.heads} heads of {sizes.dim}, {sizes.ring} virtual ranks"
    )
    table = Table("mechanism", "received at most", "error, float32", "error, float64", "seconds", title=title)
    for specimen in track(list(specimens()), "mechanisms", transient=True):
        own = sizes
        if isinstance(specimen.made(Sizes(8)), Ordered):
            own = dataclasses.replace(sizes, length=min(sizes.length, IN_ORDER))
        rows = [int(place * (own.length - 1)) for place in PLACES]
        (one,) = ringattn.simulate(weights, specimen, own, rows, torch.float64, ring=1).results
        exact = softmax_in_float64(own, rows) if specimen.title == "Softmax()" else one
        cells = []
        for dtype in (torch.float32, torch.float64):
            started = time.perf_counter()
            run = ringattn.simulate(weights, specimen, own, rows, dtype, ring=sizes.ring)
            seconds = time.perf_counter() - started
            cells.append(f"{float((run.results[0].double() - exact).norm() / exact.norm()):.1e}")
        received = max(counters.received_bytes for counters in run.traffic) // 2  # float64 is twice float32
        shown = specimen.title if own is sizes else f"{specimen.title}, {own.length:,} tokens"
        table.add_row(shown, readable_bytes(received), *cells, f"{seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
