"""Hard attention to a few keys, and the largest score as a result of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringattn
from ringattn.conformance import Case, attend, joined, simulated
from ringattn.errors import InputError
from tests.workers import Workers

Tensors = list[torch.Tensor]


def _inputs(length: int, dtype: torch.dtype, *, ties: bool = False) -> Tensors:
    g = torch.Generator().manual_seed(2)
    sizes = ((4, length, 8), (2, length, 8), (2, length, 6), (4, length, 6), (4, length))
    q, k, v, dout, dscore = (torch.randn(2, *size, generator=g, dtype=dtype) for size in sizes)
    return [q, k.sign() if ties else k, v, dout, dscore]


def _run(mesh: ringattn.Mesh, inputs: Tensors, mask: ringattn.Mask, layout: str, schedule: str, top: int) -> Tensors:
    """Output, score and position, and the gradients, of the whole sequence."""
    sharding = ringattn.Sharding(inputs[0].shape[2], mesh, layout)
    q, k, v, dout, dscore = (sharding.split(x, 2).detach().clone() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, score, position = ringattn.attention(
        q,
        k,
        v,
        mask,
        sharding=sharding,
        schedule=schedule,
        mechanism=ringattn.Hard(0.5, top),
        extras=("score", "position"),
    )
    grads = torch.autograd.grad((out, score), leaves, (dout, dscore))
    return [sharding.join(x.detach(), 2) for x in (out, score, position, *grads)]


def _expected(inputs: Tensors, mask: ringattn.Mask, top: int) -> Tensors:
    q, k, v, dout, dscore = (x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    length = q.shape[2]
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    allowed = mask.dense(range(length), range(length))
    scores = torch.where(allowed, 0.5 * q @ k.mT, -torch.inf)
    order = scores.detach().round(decimals=12).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(length).expand_as(order))
    weights = torch.where((rank < top) & allowed, scores, -1e30).softmax(dim=-1)
    best = order[..., :1]
    score = scores.gather(-1, best).squeeze(-1)
    out = weights @ v
    grads = torch.autograd.grad((out, score), leaves, (dout, dscore))
    return [out.detach(), score.detach(), best.squeeze(-1), *grads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("ranks", "layout", "schedule"), [(1, "contiguous", "auto"), (2, "zigzag", "ring"), (5, "striped", "route")]
)
def test_top_k_and_the_largest_score(ranks: int, layout: str, schedule: str, top: int, dtype: torch.dtype) -> None:
    for mask in (ringattn.Causal(), ringattn.Full()):
        inputs = _inputs(37, dtype)
        expected = _expected(inputs, mask, top)
        (found, *_) = ringattn.simulate(_run, inputs, mask, layout, schedule, top, ring=ranks).results
        assert torch.equal(found[2], expected[2])
        for x, y in zip(found, expected, strict=True):
            assert (x.double() - y).norm() <= (2e-6 if dtype == torch.float32 else 1e-13) * y.double().norm()


@pytest.mark.parametrize("top", [1, 3, 8])
def test_of_equal_scores_the_first_are_chosen(top: int) -> None:
    inputs = _inputs(41, torch.float64, ties=True)
    inputs[0] = inputs[0].sign()  # so that scores are a few numbers, of which many are equal
    expected = _expected(inputs, ringattn.Causal(), top)
    for ranks, layout in ((1, "contiguous"), (3, "zigzag"), (4, "striped")):
        found = ringattn.simulate(_run, inputs, ringattn.Causal(), layout, "auto", top, ring=ranks).results[0]
        assert torch.equal(found[2], expected[2])
        for x, y in zip(found, expected, strict=True):
            assert (x.double() - y).norm() <= 1e-13 * y.double().norm()


def test_of_all_keys_it_is_softmax() -> None:
    q, k, v, dout, _ = _inputs(30, torch.float64)
    sharding = ringattn.Sharding(30, ringattn.init())
    found: Tensors = []
    expected: Tensors = []
    for results, mechanism in ((found, ringattn.Hard(top=30)), (expected, ringattn.Softmax())):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = ringattn.attention(*leaves, ringattn.Causal(), sharding=sharding, mechanism=mechanism)  # type: ignore[call-overload]
        results += [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= 1e-13 * y.norm()


def test_rows_that_nothing_may_reach() -> None:
    sharding = ringattn.Sharding(6, ringattn.init())
    for top in (1, 4):
        q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
        mask = ringattn.Documents([3, 3]) & ~ringattn.Prefix(3)
        out, score, position = ringattn.attention(
            q, k, v, mask, sharding=sharding, mechanism=ringattn.Hard(top=top), extras=("score", "position")
        )
        assert (out[:, :, :3] == 0).all() and (score[:, :, :3] == -torch.inf).all()
        assert (position[:, :, :3] == 2**63 - 1).all() and not position.requires_grad
        (out.sum() + score[:, :, 3:].sum()).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
        weights = ringattn.attention_rows(q, k, mask, range(6), sharding=sharding, mechanism=ringattn.Hard(top=top))
        assert torch.allclose(weights @ v, out, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_gives_the_bits_of_the_simulator(gloo: Workers, ranks: int) -> None:
    case = Case(61, ringattn.Causal(), ranks=ranks, groups=2, mechanism=ringattn.Hard(top=3), layout="zigzag")
    found, virtual = joined(case, gloo.run(ranks, attend, case)), simulated(case)
    assert all(torch.equal(found[name], virtual[name]) for name in found)


@pytest.mark.parametrize("top", [0, -1, 1.5, True, None])
def test_top_must_be_a_number_of_keys(top: Any) -> None:
    with pytest.raises(InputError, match="Hard's top"):
        ringattn.Hard(top=top)
