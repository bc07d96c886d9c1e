"""`reduce` and the tree it travels along: every op against torch over stacked ranks, gradients, traffic."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn
from ringattn.plans.tree import Tree, verify_trees
from tests.workers import GlooWorkers

OPS = ("sum", "mean", "max", "min")


def _parts(ranks: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Every rank's numbers, with ties."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ranks, *shape, generator=g, dtype=torch.float64).round(decimals=1)


def _reduced(mesh: ringattn.Mesh, parts: torch.Tensor, weights: torch.Tensor, op: str) -> tuple[torch.Tensor, ...]:
    x = parts[mesh.rank].clone().requires_grad_()
    y = ringattn.reduce(x, mesh, op)
    (gradient,) = torch.autograd.grad((y * weights[mesh.rank]).sum(), x)
    return y.detach(), gradient


def _expected(parts: torch.Tensor, weights: torch.Tensor, op: str) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch, of the sum of all ranks' losses."""
    x = parts.clone().requires_grad_()
    y: torch.Tensor = getattr(x, op if op in ("sum", "mean") else f"a{op}")(dim=0)
    (gradient,) = torch.autograd.grad((y * weights.sum(dim=0)).sum(), x)
    return y.detach(), gradient


@settings(max_examples=60, deadline=None)
@given(
    op=st.sampled_from(OPS),
    ranks=st.sampled_from((1, 2, 3, 5, 8)),
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    seed=st.integers(0, 99),
)
def test_reduce_is_that_of_torch(op: str, ranks: int, shape: tuple[int, ...], seed: int) -> None:
    parts, weights = _parts(ranks, shape, seed), _parts(ranks, shape, seed + 1)
    value, gradients = _expected(parts, weights, op)
    for rank, (found, gradient) in enumerate(ringattn.simulate(_reduced, parts, weights, op, ring=ranks).results):
        torch.testing.assert_close(found, value, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(gradient, gradients[rank], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("ranks", [2, 3])
def test_reduce_over_gloo(gloo: GlooWorkers, ranks: int) -> None:
    parts, weights = _parts(ranks, (3,), 0), _parts(ranks, (3,), 1)
    value, gradients = _expected(parts, weights, "max")
    for rank, (found, gradient) in enumerate(gloo.run(ranks, _reduced, parts, weights, "max")):
        torch.testing.assert_close(found, value, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(gradient, gradients[rank], rtol=1e-13, atol=1e-13)


def test_half_precision_is_added_up_in_float32() -> None:
    """Eight times 1 + 2^-8 in bfloat16: each partial sum would be rounded."""

    def total(mesh: ringattn.Mesh) -> torch.Tensor:
        return ringattn.reduce(torch.tensor(1 + 2**-7, dtype=torch.bfloat16), mesh, "sum")

    assert {float(x) for x in ringattn.simulate(total, ring=8).results} == {8 * (1 + 2**-7)}


def test_whole_numbers_and_what_is_no_number() -> None:
    def both(mesh: ringattn.Mesh) -> tuple[int, bool]:
        nan = torch.tensor(float("nan") if mesh.rank == 1 else 5.0)
        return int(ringattn.reduce(torch.tensor(mesh.rank), mesh, "max")), bool(
            ringattn.reduce(nan, mesh, "max").isnan()
        )

    assert ringattn.simulate(both, ring=3).results == [(2, True)] * 3


@pytest.mark.parametrize("ranks", [*range(1, 18), 64, 1000])
def test_a_tree_folds_every_rank_once_and_in_order(ranks: int) -> None:
    trees = [Tree.of(rank, ranks) for rank in range(ranks)]
    verify_trees(trees)
    assert max(len(tree.children) for tree in trees) <= (ranks - 1).bit_length()
    assert sum(tree.traffic(1, 1).messages for tree in trees) == 2 * (ranks - 1)


@pytest.mark.parametrize(
    ("rank", "changes"),
    [
        (0, {"children": (1, 2)}),
        (0, {"children": (2, 1, 4)}),
        (4, {"parent": None}),
        (2, {"children": (5,)}),
        (1, {"rank": 2}),
    ],
)
def test_a_wrong_tree_is_caught(rank: int, changes: dict[str, Any]) -> None:
    trees = [Tree.of(rank, 6) for rank in range(6)]
    trees[rank] = dataclasses.replace(trees[rank], **changes)
    with pytest.raises(ringattn.PlanError):
        verify_trees(trees)


def test_what_travels_is_what_the_tree_says() -> None:
    def sent(mesh: ringattn.Mesh) -> tuple[int, int, int]:
        counters = mesh.connected().counters
        x = torch.zeros(10, requires_grad=True)
        y = ringattn.reduce(x, mesh, "sum")
        forward = counters.messages, counters.sent_bytes
        y.sum().backward()
        return *forward, counters.sent_bytes - forward[1]

    for rank, (messages, forward, backward) in enumerate(ringattn.simulate(sent, ring=6).results):
        planned = Tree.of(rank, 6).traffic(40, 40, 40)
        assert (messages, forward, backward) == (planned.messages, planned.sent_bytes, planned.backward_sent_bytes)


@pytest.mark.parametrize("wrong", [("median",), (None,), (["sum"],)])
def test_an_unknown_op_is_refused(wrong: tuple[object]) -> None:
    with pytest.raises(ringattn.InputError, match="op must be one of"):
        ringattn.reduce(torch.ones(2), ringattn.init(), *wrong)  # type: ignore[arg-type]


def test_ranks_that_differ_are_told() -> None:
    def differ(mesh: ringattn.Mesh) -> str:
        with pytest.raises(ringattn.AgreementError) as caught:
            ringattn.reduce(torch.ones(2 + mesh.rank), mesh, "sum")
        with pytest.raises((ringattn.AgreementError, ringattn.InputError)):
            ringattn.reduce(torch.ones(2), mesh, "sum" if mesh.rank else "median")
        return str(caught.value)

    assert all("shapes" in said for said in ringattn.simulate(differ, ring=2).results)


def test_ranks_that_differ_in_needing_a_gradient_are_told_before_some_wait_for_it() -> None:
    def differ(mesh: ringattn.Mesh) -> list[str]:
        said = []
        for grads in (mesh.rank == 0, True):
            x = torch.ones(2, requires_grad=grads)
            with pytest.raises(ringattn.AgreementError) as caught, torch.set_grad_enabled(grads and mesh.rank == 0):
                ringattn.reduce(x, mesh, "max")
            said.append(str(caught.value))
        return said

    for said in ringattn.simulate(differ, ring=2).results:
        assert all("gradients (rank 0: x; rank 1: none)" in text for text in said)
