"""Memory and time of the loss, with all logits and without, and of an MLP, whole and in tiles.

Each row is one forward and backward pass in a fresh process: the peak is its resident set at the end minus that before
the pass, when inputs and weights were there. Gradients are part of it. Times are of that pass, after a short one.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ringattn
from ringattn.readable import readable_bytes
from ringattn.training import Batch, linear_cross_entropy, tiled, token_loss


@dataclasses.dataclass(frozen=True)
class Size:
    """What is computed."""

    tokens: int
    words: int
    hidden: int
    dtype: torch.dtype


class Gated(nn.Module):
    """The MLP of Llama: four times as wide inside."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def with_logits(size: Size) -> Callable[[int], Tensor]:
    return _loss(size, lambda hidden, weight, batch: token_loss(hidden @ weight.T, batch))


def without_logits(size: Size) -> Callable[[int], Tensor]:
    return _loss(size, linear_cross_entropy)


def whole_mlp(size: Size) -> Callable[[int], Tensor]:
    return _mlp(size, Gated(size.hidden, size.dtype))


def tiled_mlp(size: Size) -> Callable[[int], Tensor]:
    return _mlp(size, tiled(Gated(size.hidden, size.dtype)))


def _loss(size: Size, loss: Callable[[Tensor, Tensor, Batch], Tensor]) -> Callable[[int], Tensor]:
    hidden = torch.randn(1, size.tokens, size.hidden, dtype=size.dtype, requires_grad=True)
    weight = (torch.randn(size.words, size.hidden, dtype=size.dtype) / size.hidden**0.5).requires_grad_()
    tokens, mesh = torch.randint(0, size.words, (1, size.tokens)), ringattn.init()
    return lambda n: loss(hidden[:, :n], weight, Batch(tokens[:, :n], mesh))


def _mlp(size: Size, mlp: nn.Module) -> Callable[[int], Tensor]:
    x = torch.randn(1, size.tokens, size.hidden, dtype=size.dtype, requires_grad=True)
    return lambda n: mlp(x[:, :n]).float().sum()


KINDS = {
    "loss of all logits": with_logits,
    "linear_cross_entropy": without_logits,
    "MLP, whole": whole_mlp,
    "MLP, tiled": tiled_mlp,
}


def measure(kind: str, size: Size) -> tuple[float, int, float]:
    """Seconds, bytes and the value, in this process."""
    torch.manual_seed(0)
    run = KINDS[kind](size)
    run(64).backward()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident()
    started = time.perf_counter()
    value = run(size.tokens)
    value.backward()
    taken = time.perf_counter() - started
    return taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, value.item()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a shard")
    parser.add_argument("--words", type=int, default=128256, help="of the vocabulary")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and hidden states")
    parser.add_argument("--most", type=int, default=8192, help="tokens up to which all logits are computed")
    given = parser.parse_args()

    console = Console()
    table = Table(
        "", "tokens", "memory", "seconds", "value", title=f"{given.words:,} words, hidden size {given.hidden:,}"
    )
    for kind in KINDS:
        for tokens in given.tokens:
            if kind == "loss of all logits" and tokens > given.most:
                continue
            size = Size(tokens, given.words, given.hidden, getattr(torch, given.dtype))
            with console.status(f"{kind}, {tokens:,} tokens"):
                with multiprocessing.get_context("spawn").Pool(1) as fresh:
                    seconds, peak, value = fresh.apply(measure, (kind, size))
            table.add_row(kind, f"{tokens:,}", readable_bytes(peak), f"{seconds:.1f}", f"{value:.6g}")
    console.print(table)


if __name__ == "__main__":
    main()
