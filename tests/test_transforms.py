"""What PyTorch can do to a function and this package cannot follow is refused in words; nothing is silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

import ringattn
from ringattn.errors import UnsupportedError

SHARDING = ringattn.Sharding(12, ringattn.init())


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, generator=g).requires_grad_() for _ in range(3))
    return q, k, v


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ringattn.attention(q, k, v, ringattn.Causal(), sharding=SHARDING)


def _join(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return SHARDING.join(q * k * v, 2)


FUNCTIONS = pytest.mark.parametrize("fn", [_attention, _join])


@FUNCTIONS
def test_a_second_derivative_is_refused(fn: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(UnsupportedError, match=r"has no second derivative\. Differentiate once"):
        _twice(fn, *_inputs())


def test_a_second_derivative_of_compiled_code_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"support double backward|requires create_graph=False"
    ):  # PyTorch's own words
        _twice(torch.compile(_attention, backend="aot_eager"), *_inputs())


def _twice(fn: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    (dq,) = torch.autograd.grad(fn(q, k, v).square().sum(), q, create_graph=True)
    dq.square().sum().backward()


@FUNCTIONS
def test_gradients_with_a_graph_are_those_without(fn: Callable[..., torch.Tensor]) -> None:
    inputs = _inputs()
    once, twice = (
        torch.autograd.grad(fn(*inputs).square().sum(), inputs, create_graph=create) for create in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@FUNCTIONS
def test_forward_mode_is_refused(fn: Callable[..., torch.Tensor]) -> None:
    q, k, v = _inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q.detach(), torch.ones_like(q))
        with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
            fn(dual, k, v)
        fn(q, k, v)  # a level without tangents changes nothing


@FUNCTIONS
@pytest.mark.parametrize(
    "transform",
    [
        lambda fn, q, k, v: torch.func.grad(lambda x: fn(x, k, v).sum())(q),
        lambda fn, q, k, v: torch.func.jvp(lambda x: fn(x, k, v), (q,), (q,)),
        lambda fn, q, k, v: torch.func.vjp(lambda x: fn(x, k, v), q),
        lambda fn, q, k, v: torch.func.vmap(lambda x: fn(x, k, v))(q[None]),
    ],
    ids=["grad", "jvp", "vjp", "vmap"],
)
def test_functional_transforms_are_refused(fn: Callable[..., torch.Tensor], transform: Callable[..., object]) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be called inside torch\.func"):
        transform(fn, *(x.detach() for x in _inputs()))


@FUNCTIONS
def test_the_output_may_be_written_in_place(fn: Callable[..., torch.Tensor]) -> None:
    inputs = _inputs()
    expected = fn(*inputs)
    wanted = torch.autograd.grad((expected * 2).sum(), inputs)
    out = fn(*inputs)
    out.mul_(2)
    assert torch.equal(out, expected * 2)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), inputs), wanted, strict=True))


def test_what_the_backward_pass_needs_may_not_be_written() -> None:
    q, k, v = (x.detach().clone().requires_grad_() for x in _inputs())
    scaled = q * 1
    out = _attention(scaled, k, v)
    with torch.no_grad():
        scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
