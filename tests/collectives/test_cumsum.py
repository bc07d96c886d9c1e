"""Collectives over a sharded sequence, against what PyTorch gives for the whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ringattn
from ringattn.errors import AgreementError, InputError
from tests.workers import Workers

LAYOUTS: tuple[Any, ...] = ("contiguous", "zigzag", "striped", "balanced")
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _whole(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(length)
    x, dout = (torch.randn(2, length, 3, generator=g, dtype=torch.float64).to(dtype) for _ in "xd")
    return x, dout


def _sums(mesh: ringattn.Mesh, length: int, layout: Any, dtype: torch.dtype, dim: int = 1) -> Found:
    """The positions, the sums and x's gradient on a rank."""
    sharding = ringattn.Sharding(length, mesh, layout, ringattn.Causal())
    x, dout = (sharding.split(whole, 1).clone().movedim(1, dim) for whole in _whole(length, dtype))
    x.requires_grad_()
    out = ringattn.cumsum(x, sharding, dim)
    assert out.shape == x.shape and out.dtype == x.dtype
    (dx,) = torch.autograd.grad((out * dout).sum(), x)
    return sharding.positions, out.detach().movedim(dim, 1), dx.movedim(dim, 1)


def _check(found: list[Found], length: int, dtype: torch.dtype, limit: float) -> None:
    x, dout = _whole(length, dtype)
    expected = x.double().cumsum(1), dout.double().flip(1).cumsum(1).flip(1)
    size = x.double().abs().sum() + dout.double().abs().sum()
    for positions, *parts in found:
        for part, whole in zip(parts, expected, strict=True):
            assert (part.double() - whole[:, positions]).norm() <= limit * size.clamp(min=1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cumsum(ranks: int, layout: Any) -> None:
    for length, dim in ((0, 1), (1, 1), (5, -1), (61, 0), (300, 2)):
        found = ringattn.simulate(_sums, length, layout, torch.float64, dim, ring=ranks).results
        _check(found, length, torch.float64, 1e-14)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-7), (torch.bfloat16, 3e-3), (torch.float16, 3e-4)])
def test_cumsum_in_other_dtypes(dtype: torch.dtype, limit: float) -> None:
    _check(ringattn.simulate(_sums, 300, "zigzag", dtype, ring=3).results, 300, dtype, limit)


@pytest.mark.parametrize("ranks", [2, 3])
def test_cumsum_over_gloo(gloo: Workers, ranks: int) -> None:
    for layout in LAYOUTS:
        found = gloo.run(ranks, _sums, 61, layout, torch.float64)
        virtual = ringattn.simulate(_sums, 61, layout, torch.float64, ring=ranks).results
        assert all(
            torch.equal(a, b) for one, two in zip(found, virtual, strict=True) for a, b in zip(one, two, strict=True)
        )


@pytest.mark.parametrize("shape", [(7,), (0, 7), (7, 0, 2)])
def test_cumsum_of_other_shapes(shape: tuple[int, ...]) -> None:
    x, dim = torch.randn(shape), shape.index(7)

    def sums(mesh: ringattn.Mesh) -> torch.Tensor:
        sharding = ringattn.Sharding(7, mesh)
        return ringattn.cumsum(sharding.split(x, dim), sharding, dim)

    assert torch.allclose(torch.cat(ringattn.simulate(sums, ring=2).results, dim), x.cumsum(dim))


def test_cumsum_moves_one_sum_a_run() -> None:
    def sums(mesh: ringattn.Mesh, length: int) -> None:
        sharding = ringattn.Sharding(length, mesh, "zigzag")
        ringattn.cumsum(sharding.split(torch.randn(2, length, 3), 1), sharding, 1)

    traffic = [ringattn.simulate(sums, length, ring=4).traffic for length in (512, 4096)]
    # rank 0 gets five runs of the others' positions (rank 3's two touch), of 2 x 3 sums in float32
    assert traffic[0][0].received_bytes == 5 * 6 * 4
    assert [x.received_bytes for x in traffic[0]] == [x.received_bytes for x in traffic[1]]


def test_cumsum_compiles_to_one_graph() -> None:
    sharding = ringattn.Sharding(30, ringattn.init())
    x, y = (torch.arange(60.0).reshape(2, 30).requires_grad_() for _ in "xy")

    def sums(x: torch.Tensor) -> torch.Tensor:
        return ringattn.cumsum(x * 2, sharding, 1) + 1

    out, expected = torch.compile(sums, fullgraph=True, backend="aot_eager")(x), sums(y)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(out, expected) and x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


Arguments = Callable[[ringattn.Sharding, torch.Tensor], tuple[Any, Any, Any]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda sharding, x: (x.tolist(), sharding, 1), "cumsum sums a dense tensor"),
        (lambda sharding, x: (x.long(), sharding, 1), "got torch.int64"),
        (lambda sharding, x: (x, sharding, 3), r"a dimension of x, whose shape is \[2, 4, 3\]; got 3"),
        (lambda sharding, x: (x, sharding, 0), r"holds 4 of the 8 positions; got x \[2, 4, 3\] with dim=0"),
    ],
)
def test_what_cumsum_refuses(arguments: Arguments, words: str) -> None:
    def sums(mesh: ringattn.Mesh) -> None:
        sharding = ringattn.Sharding(8, mesh)
        x = torch.zeros(2, 4, 3)
        with pytest.raises(InputError if mesh.sequence_rank else AgreementError, match=words):
            ringattn.cumsum(*(arguments(sharding, x) if mesh.sequence_rank else (x, sharding, 1)))

    ringattn.simulate(sums, ring=2)
    with pytest.raises(InputError, match=r"cumsum needs a ringattn.Sharding"):
        ringattn.cumsum(torch.zeros(3), "sharding", 0)  # type: ignore[arg-type]
