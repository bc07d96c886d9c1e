"""`halo` against positions written out by hand: any layout, neighbours several ranks away, gradients, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn
from ringattn.schedules.route import Route
from tests.workers import GlooWorkers


def _extended(positions: list[int], left: int, right: int) -> list[int]:
    """The positions of the result, run by run."""
    runs: list[list[int]] = []
    for p in positions:
        if runs and runs[-1][-1] == p - 1:
            runs[-1].append(p)
        else:
            runs.append([p])
    return [p for run in runs for p in range(run[0] - left, run[-1] + right + 1)]


def _check(mesh: ringattn.Mesh, length: int, layout: str, left: int, right: int) -> None:
    """The result, and the gradient of a weighted sum of all ranks' results."""
    whole = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sharding = ringattn.Sharding(length, mesh, layout=layout)
    x = sharding.split(whole, 1).clone().requires_grad_()
    y = ringattn.halo(x, sharding, 1, left, right)
    wanted = _extended(sharding.positions.tolist(), left, right)
    inside = [0 <= p < length for p in wanted]
    expected = whole.new_zeros(2, len(wanted), 3)
    expected[:, inside] = whole[:, [p for p in wanted if 0 <= p < length]]
    assert torch.equal(y, expected)

    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(mesh.rank), dtype=torch.float64)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    total = torch.zeros_like(whole)
    for i, p in enumerate(wanted):
        if inside[i]:
            total[:, p] += weights[:, i]
    gradient = sharding.split(ringattn.reduce(total, mesh, "sum"), 1)
    assert (found - gradient).norm() <= 1e-14 * gradient.norm()


@settings(max_examples=80, deadline=None)
@given(
    ranks=st.sampled_from((1, 2, 3, 5, 8)),
    length=st.integers(0, 40),
    layout=st.sampled_from(("contiguous", "zigzag", "striped")),
    left=st.integers(0, 45),
    right=st.integers(0, 9),
)
def test_halo(ranks: int, length: int, layout: str, left: int, right: int) -> None:
    ringattn.simulate(_check, length, layout, left, right, ring=ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_halo_over_gloo(gloo: GlooWorkers, ranks: int) -> None:
    for layout in ("contiguous", "zigzag", "striped"):
        gloo.run(ranks, _check, 23, layout, 9, 2)


def test_rows_of_an_image_are_convolved() -> None:
    """3 x 3 over an image of 12 rows of 5 pixels, sharded row by row, is torch's convolution of the whole."""
    height, width = 12, 5
    g = torch.Generator().manual_seed(0)
    image, kernel = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((1, 2, 60), (3, 2, 3, 3)))

    def convolved(mesh: ringattn.Mesh) -> torch.Tensor:
        sharding = ringattn.Sharding(height * width, mesh, layout="contiguous")
        rows = ringattn.halo(sharding.split(image, 2), sharding, 2, width, width).unflatten(2, (-1, width))
        out = torch.nn.functional.conv2d(rows, kernel, padding=(0, 1)).flatten(2)
        return sharding.join(out, 2)

    expected = torch.nn.functional.conv2d(image.unflatten(2, (height, width)), kernel, padding=1).flatten(2)
    for found in ringattn.simulate(convolved, ring=4).results:
        assert (found - expected).norm() <= 1e-14 * expected.norm()


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_only_missing_rows_travel_and_only_their_gradients_return(layout: str) -> None:
    def moved(mesh: ringattn.Mesh) -> tuple[int, int, int | None]:
        counters, sharding = mesh.connected().counters, ringattn.Sharding(40, mesh, layout=layout)
        x = torch.ones(sharding.count, 3, requires_grad=True)
        y = ringattn.halo(x, sharding, 0, 4, 1)
        forward = counters.received_bytes
        y.sum().backward()
        plan = ringattn.plan(ringattn.Window(4, 1), sharding, Route(), heads=(1, 1), head_dims=(2, 1), dtype=x.dtype)
        return forward, counters.sent_bytes - plan_bytes(plan, "sent_bytes"), plan.traffic().received_bytes

    def plan_bytes(plan: ringattn.Plan, name: str) -> int:
        return int(getattr(plan.traffic(), name))

    for forward, returned, planned in ringattn.simulate(moved, ring=4).results:
        assert forward == planned
        assert returned == planned  # float32 both ways


def test_numbers_of_half_precision_and_no_numbers() -> None:
    def run(mesh: ringattn.Mesh) -> tuple[torch.dtype, list[int]]:
        sharding = ringattn.Sharding(7, mesh, layout="contiguous")
        x = torch.ones(sharding.count, dtype=torch.bfloat16, requires_grad=True)
        y = ringattn.halo(x, sharding, 0, 2, 2)
        y.sum().backward()
        assert x.grad is not None
        return y.dtype, list(ringattn.halo(torch.ones(sharding.count, 0), sharding, -2, 1, 0).shape)

    assert ringattn.simulate(run, ring=2).results == [(torch.bfloat16, [5, 0]), (torch.bfloat16, [4, 0])]


@pytest.mark.parametrize(
    "arguments",
    [{"left": -1}, {"right": 1.5}, {"dim": 3}, {"x": torch.ones(8)}, {"x": None}, {"x": torch.ones(7).long()}],
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    given_ = {"x": torch.ones(7), "dim": 0, "left": 1, "right": 1, **arguments}
    with pytest.raises(ringattn.InputError):
        ringattn.halo(sharding=ringattn.Sharding(7, ringattn.init()), **given_)


def test_ranks_that_differ_in_needing_a_gradient_are_told_before_some_wait_for_it() -> None:
    def differ(mesh: ringattn.Mesh) -> str:
        sharding = ringattn.Sharding(4, mesh)
        with pytest.raises(ringattn.AgreementError) as caught:
            ringattn.halo(torch.ones(2, requires_grad=mesh.rank == 0), sharding, 0, 1, 0)
        return str(caught.value)

    for said in ringattn.simulate(differ, ring=2).results:
        assert "gradients (rank 0: x; rank 1: none)" in said
