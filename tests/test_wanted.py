"""Gradients that nobody asked for: nothing is computed for them alone, and the others are the same to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ringattn
from ringattn.kernels.base import Kernel
from ringattn.kernels.chunked import Chunked
from ringattn.kernels.onednn import OneDNN
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.mechanisms.base import Mechanism, OutputGrad, Problem
from ringattn.mechanisms.softmax import Softmax
from ringattn.plans import tiles as t
from ringattn.plans.tiles import Tiles

ROWS = 256  # queries and keys of the one tile
PRODUCTS = ("mm", "bmm", "_linear_pointwise", "_scaled_dot_product_flash_attention_for_cpu_backward")
G = torch.Generator().manual_seed(0)
SINKS = torch.randn(4, generator=G)
EVERY_TERM = Softmax(
    softcap=3.0,
    dropout=0.2,
    sinks=SINKS,
    alibi=torch.rand(4, generator=G),
    relative=torch.randn(4, 5, generator=G),
    bias=torch.randn(4, ROWS, ROWS, generator=G),
)


class _Products(TorchDispatchMode):
    """Counts the products that are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def _softmax(wanted: set[str]) -> int:
    """Products of a block: the scores, the gradient of the weights, and one for each of q, k and v."""
    return bool(wanted - {"sinks"}) + bool(wanted - {"v", "sinks"}) + len(wanted & {"q", "k", "v"})


def _linear(wanted: set[str]) -> int:
    """The gradient of v takes the weights too."""
    return 2 * ("v" in wanted) + bool(wanted & {"q", "k"}) + len(wanted & {"q", "k"})


def _summaries(wanted: set[str]) -> int:
    """The summary, its gradient, and one for each of q, k and v."""
    return 1 + bool(wanted & {"k", "v"}) + len(wanted) if wanted else 0


def _hard(wanted: set[str]) -> int:
    """That of v, and of the score for queries and keys together."""
    return ("v" in wanted) + 2 * bool(wanted & {"q", "k"})


def _flash(wanted: set[str]) -> int:
    """One launch computes all three. The gradient of the log-sum-exp takes another one, and reaches no value."""
    return bool(wanted & {"q", "k", "v"}) + bool(wanted & {"q", "k"})


CASES: dict[str, tuple[Kernel, Mechanism, Callable[[set[str]], int], int]] = {
    "reference, softmax": (Reference(), EVERY_TERM, _softmax, 1),
    "reference, linear": (Reference(), ringattn.Linear(), _linear, 1),
    "reference, hard": (Reference(), ringattn.Hard(), _hard, 1),
    "onednn": (OneDNN(), Softmax(softcap=3.0, sinks=SINKS), _softmax, 4),  # two key heads by two blocks of rows
    "onednn, small blocks": (OneDNN(rows=2048, columns=1024, min_block=2048), Softmax(sinks=SINKS), _softmax, 1),
    "chunked": (Chunked(), ringattn.Linear(), _summaries, 1),
    "sdpa": (Sdpa(), Softmax(sinks=SINKS), _flash, 1),
}
"""The kernel, the mechanism, the products of a block by what is wanted, and how many blocks there are."""


def _backward(kernel: Kernel, mechanism: Mechanism, wanted: set[str]) -> tuple[dict[str, torch.Tensor], int]:
    """The accumulators, all of which begin as ones, after the one tile, and the products that were computed."""
    g = torch.Generator().manual_seed(1)
    names = ("q", "k", "v", *mechanism.params)
    cpu = torch.device("cpu")
    problem = Problem(
        mechanism.without_tensors, 1, 4, 2, 16, 16, torch.float32, cpu, mechanism.params, 5, None,
        frozenset(names) - wanted,
    )  # fmt: skip
    row = np.zeros((1, t.WIDTH), dtype=np.int64)
    row[:, [t.M, t.N]], row[:, [t.Q_STEP, t.K_STEP, t.Q_STRIDE, t.K_STRIDE]] = ROWS, 1
    row[:, t.LOW], row[:, t.HIGH] = 1 - ROWS, ROWS - 1
    tiles = Tiles(row)
    q, k, v, dout = (torch.randn(1, heads, ROWS, 16, generator=g) for heads in (4, 2, 2, 4))
    out, extras = mechanism.finish(problem, kernel.forward(problem, q, k, v, tiles, None))
    grad_extras = tuple(torch.randn(x.shape, generator=g) if x.is_floating_point() else None for x in extras)
    output_grad = OutputGrad((out, *extras), dout, grad_extras)
    totals = {name: torch.ones_like(x) for name, x in zip(names, (q, k, v, *mechanism.params.values()), strict=True)}
    dparams = {name: totals[name] for name in mechanism.params}
    with _Products() as products:
        kernel.backward(problem, q, k, v, output_grad, tiles, (totals["q"], totals["k"], totals["v"]), dparams)
        mechanism.finish_grad(problem, output_grad, dparams)
    return totals, products.count


@pytest.mark.parametrize("case", CASES)
def test_what_nobody_wants_is_not_computed(case: str) -> None:
    kernel, mechanism, expected, blocks = CASES[case]
    names = ("q", "k", "v", *mechanism.params)
    everything, _ = _backward(kernel, mechanism, set(names))
    for some in itertools.product((False, True), repeat=len(names)):
        wanted = set(itertools.compress(names, some))
        totals, products = _backward(kernel, mechanism, wanted)
        assert products == expected(wanted) * blocks, wanted
        for name, total in totals.items():
            assert torch.equal(total, everything[name] if name in wanted else torch.ones_like(total)), (name, wanted)


@pytest.mark.parametrize(
    ("mechanism", "schedule"), [(Softmax(), "ring"), (ringattn.Linear(), "scan"), (ringattn.Linear(), "route")]
)
def test_over_ranks_the_wanted_gradients_are_the_same_to_the_bit(mechanism: Mechanism, schedule: str) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v, dout = (torch.randn(1, heads, 50, 8, generator=g) for heads in (4, 2, 2, 4))

    def gradients(mesh: ringattn.Mesh, wanted: str) -> dict[str, torch.Tensor | None]:
        sharding = ringattn.Sharding(50, mesh)
        parts = {name: sharding.split(x, 2).clone() for name, x in zip("qkv", (q, k, v), strict=True)}
        for name in wanted:
            parts[name].requires_grad_()
        out = ringattn.attention(
            parts["q"],
            parts["k"],
            parts["v"],
            ringattn.Causal(),
            sharding=sharding,
            mechanism=mechanism,
            schedule=schedule,
        )
        out.backward(sharding.split(dout, 2))
        return {name: x.grad for name, x in parts.items()}

    everything = ringattn.simulate(gradients, "qkv", ring=3).results
    for wanted in ("q", "k", "v", "qv", "kv"):
        for rank, found in enumerate(ringattn.simulate(gradients, wanted, ring=3).results):
            for name, x in found.items():
                assert _alike(x, everything[rank][name] if name in wanted else None), (wanted, name)


def _alike(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    return x is y is None or (x is not None and y is not None and torch.equal(x, y))
