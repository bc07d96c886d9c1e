"""What torch.compile makes of two layers of attention: graphs, breaks, messages and the difference from eager mode.

Every row is a fresh compilation with fullgraph=True, forward and backward, over eight steps: of one mask, of eight
document masks, or of eight lengths. Messages are those of one rank in all steps, as its transport counts them, beside
those of eager mode without checkpointing. The difference is the largest of the output and the gradients, relative to
its norm.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn.training import save_attention
from scripts.benchmarks.teams import Team, Worker

BACKENDS = ("eager", "aot_eager", "inductor")
STEPS = ("fixed mask", "8 masks", "8 lengths")
CHECKPOINTS = ("plain", "checkpoint", "selective")

Step = tuple[ringattn.Mask, ringattn.Sharding, torch.Tensor]
"""A mask, who has what, and this rank's part of the input."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One compilation.

    Attributes:
        eager_messages: those of the same steps in eager mode, without checkpointing.
        forward_messages: of these, the forward passes'.
    """

    graphs: int
    breaks: int
    messages: int
    eager_messages: int
    forward_messages: int
    difference: float


def steps_of(mesh: ringattn.Mesh, kind: str, length: int = 96) -> list[Step]:
    """Eight steps: one mask, other documents each, or another length each."""
    made = []
    for number in range(8):
        tokens = length + 16 * number if kind == "8 lengths" else length
        first = 10 + 5 * number if kind == "8 masks" else tokens // 3
        mask = ringattn.Documents([first, tokens - first]) & ringattn.Causal()
        sharding = ringattn.Sharding(tokens, mesh, "zigzag")
        x = torch.randn(1, 4, tokens, 16, generator=torch.Generator().manual_seed(number))
        made.append((mask, sharding, sharding.split(x, 2)))
    return made


def layer(x: torch.Tensor, weight: torch.Tensor, mask: ringattn.Mask, sharding: ringattn.Sharding) -> torch.Tensor:
    """Attention with something for the compiler to do on either side."""
    keys = (x @ weight)[:, :2]
    return x + ringattn.attention(x, keys, keys * 0.5, mask, sharding=sharding)


def network(checkpointing: str) -> Callable[..., torch.Tensor]:
    """Two layers, ``f(x, weight, mask, sharding)``."""
    options: dict[str, Any] = {"context_fn": save_attention()} if checkpointing == "selective" else {}
    one = layer if checkpointing == "plain" else functools.partial(checkpoint, layer, use_reentrant=False, **options)
    return lambda x, *rest: one(one(x, *rest), *rest)


def measured(mesh: ringattn.Mesh, backend: str, kind: str, checkpointing: str) -> Row:
    """One row, on every rank of the mesh alike."""
    torch._dynamo.reset()
    counters.clear()
    steps, weight = steps_of(mesh, kind), torch.eye(16) * 1.1
    counting = CompileCounterWithBackend(backend)
    compiled = torch.compile(network(checkpointing), fullgraph=True, backend=counting)
    expected, eager_messages, forward = _run(network("plain"), steps, weight, mesh)
    found, messages, _ = _run(compiled, steps, weight, mesh)
    differences = [float((x - y).norm() / y.norm()) if y.numel() else 0.0 for x, y in zip(found, expected, strict=True)]
    breaks = sum(counters["graph_break"].values())
    return Row(counting.frame_count, breaks, messages, eager_messages, forward, max(differences))


def _run(
    network: Callable[..., torch.Tensor], steps: list[Step], weight: torch.Tensor, mesh: ringattn.Mesh
) -> tuple[list[torch.Tensor], int, int]:
    """Outputs and gradients of all steps, the messages of both passes, and those of the forward passes."""
    assert mesh.transport is not None
    count, results, forward = mesh.transport.counters, [], 0
    before = count.messages
    for mask, sharding, part in steps:
        x, w = part.clone().requires_grad_(), weight.clone().requires_grad_()
        began = count.messages
        out = network(x, w, mask, sharding)
        forward += count.messages - began
        out.square().sum().backward()
        results += [out.detach(), x.grad, w.grad]
    return [x for x in results if x is not None], count.messages - before, forward


def _on_a_team(_: Worker, backend: str, kind: str, checkpointing: str) -> Row:
    return measured(ringattn.init(), backend, kind, checkpointing)


def main() -> int:
    """Prints the table; 1 where a graph or a message is too many."""
    parser = argparse.ArgumentParser(prog="scripts/bench compile", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="Gloo ranks (default 1 2 3)")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    options = parser.parse_args()
    titles = ("ranks", "backend", "steps", "checkpointing", "graphs", "breaks", "messages", "of eager", "difference")
    table = Table(*titles, title=f"torch {torch.__version__}, eight steps of two layers, forward and backward")
    kept = True
    with Progress(transient=True) as progress:
        rows = len(options.ranks) * len(options.backends) * len(STEPS) * len(CHECKPOINTS)
        task = progress.add_task("compiling", total=rows)
        for ranks in options.ranks:
            with Team(ranks) as team:
                for backend in options.backends:
                    for kind in STEPS:
                        for checkpointing in CHECKPOINTS:
                            every = team.call(_on_a_team, backend, kind, checkpointing)
                            kept &= all(fine(row, kind, checkpointing) for row in every)
                            table.add_row(str(ranks), backend, kind, checkpointing, *_cells(every[0]))
                            progress.advance(task)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print("at most one graph (two for lengths), no break, nothing sent twice but by plain checkpointing:", kept)
    return 0 if kept else 1


def fine(row: Row, kind: str, checkpointing: str) -> bool:
    """Whether the row is as it should be."""
    again = row.forward_messages if checkpointing == "checkpoint" else 0
    return (
        row.graphs <= (2 if kind == "8 lengths" else 1)
        and row.breaks == 0
        and row.messages == row.eager_messages + again
        and row.difference <= 1e-6
    )


def _cells(row: Row) -> tuple[str, ...]:
    counts = (row.graphs, row.breaks, row.messages, row.eager_messages)
    return *map(str, counts), f"{row.difference:.1e}"


if __name__ == "__main__":
    sys.exit(main())
