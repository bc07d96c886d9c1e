"""Gradients of every mechanism and module against differences of their own outputs, on one rank in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

import ringattn
from ringattn import modules
from ringattn.mechanisms import Mechanism

HEADS, KV_HEADS, TOKENS, DIM = 2, 1, 5, 3
SHARDING = ringattn.Sharding(TOKENS, ringattn.init(), "contiguous")
G = torch.Generator().manual_seed(0)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64, requires_grad=True)


MECHANISMS: dict[str, tuple[Callable[..., Mechanism], list[torch.Tensor], tuple[str, ...]]] = {
    "softmax": (lambda a, s: ringattn.Softmax(alibi=a, sinks=s, softcap=2.0), [_drawn(HEADS), _drawn(HEADS)], ("lse",)),
    "additive": (lambda w: ringattn.Softmax(additive=w), [_drawn(HEADS, DIM)], ("lse",)),
    "local": (lambda c: ringattn.Softmax(centres=2 + c, width=3.3), [_drawn(1, HEADS, TOKENS)], ("lse",)),
    "hard": (ringattn.Hard, [], ("score",)),
    "top": (lambda: ringattn.Hard(top=3), [], ("score",)),
    "sampled": (lambda: ringattn.Sampled(seed=4), [], ("log_prob", "entropy")),
    "entmax": (lambda: ringattn.Entmax(1.4), [], ()),
    "linear": (ringattn.Linear, [], ()),
    "gated": (lambda x: ringattn.Gated(-x.square()), [_drawn(1, KV_HEADS, TOKENS)], ()),
    "monotonic": (lambda b: ringattn.Monotonic(bias=b), [_drawn(HEADS)], ()),
    "mocha": (lambda b: ringattn.MoChA(2, bias=b), [_drawn(HEADS)], ()),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms(name: str) -> None:
    make, learned, extras = MECHANISMS[name]
    mask = ringattn.Full() if name in ("monotonic", "mocha") else ringattn.Causal()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = ringattn.attention(q, k, v, mask, sharding=SHARDING, mechanism=make(*tensors), extras=extras)
        return found if isinstance(found, tuple) else (found,)

    inputs = [_drawn(1, h, TOKENS, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    assert gradcheck(attend, (*inputs, *learned))


def _row(x: torch.Tensor) -> torch.Tensor:
    """Tokens ``[B, S, D]`` of the first head."""
    return x[:, 0]


Q = [_drawn(1, 2, TOKENS, 4) for _ in range(3)]
CONTEXT = _drawn(1, 2, 3, 4)
CAUSAL = {"sharding": SHARDING}
BOTH = {"sharding": SHARDING, "question_sharding": SHARDING}
ROWS = modules.Rows(ringattn.Sharding(6, ringattn.init(), "contiguous"), 3)
IMAGE = [_drawn(1, 4, 6)]
MODULES: dict[str, tuple[torch.nn.Module, list[torch.Tensor], Callable[..., Any]]] = {
    "General": (modules.General(2, 4, 4), Q, lambda f, *x: f(*x, ringattn.Causal(), **CAUSAL)),
    "Cosine": (modules.Cosine(2), Q, lambda f, *x: f(*x, ringattn.Causal(), **CAUSAL)),
    "LocalM": (modules.LocalM(3), Q, lambda f, *x: f(*x, ringattn.Causal(), **CAUSAL)),
    "LocalP": (modules.LocalP(2, 4, 3, 6.3), Q, lambda f, *x: f(*x, ringattn.Causal(), **CAUSAL)),
    "SpatialAttention": (modules.SpatialAttention(2, 4, 3), Q, lambda f, *x: f(*x, ringattn.Causal(), **CAUSAL)),
    "Location": (modules.Location(2, 4, TOKENS), Q[:2], lambda f, *x: f(*x, ringattn.Causal(), **CAUSAL)),
    "TriAttention": (modules.TriAttention(2, 4), [*Q, CONTEXT], lambda f, *x: f(*x, ringattn.Full(), **CAUSAL)),
    "BiDAF": (modules.BiDAF(4), Q[:2], lambda f, *x: f(*map(_row, x), **BOTH)),
    "DCN": (modules.DCN(4), Q[:2], lambda f, *x: f(*map(_row, x), **BOTH)),
    "DCNPlus": (modules.DCNPlus(torch.nn.Linear(4, 4)), Q[:2], lambda f, *x: f(*map(_row, x), **BOTH)),
    "SqueezeExcitation": (modules.SqueezeExcitation(4, 1), IMAGE, lambda f, x: f(x, ROWS.sharding)),
    "ChannelAttention": (modules.ChannelAttention(0.1), IMAGE, lambda f, x: f(x, ROWS.sharding)),
    "Convolution": (modules.Convolution((4, 2), 3), IMAGE, lambda f, x: f(x, ROWS)),
    "DeformableConvolution": (modules.DeformableConvolution((4, 2)), IMAGE, lambda f, x: f(x, ROWS)),
    "HybridAttention": (modules.HybridAttention(4, (1,)), IMAGE, lambda f, x: f(x, ROWS)),
    "AttentionInAttention": (modules.AttentionInAttention(4), IMAGE, lambda f, x: f(x, ROWS)),
}


def test_every_module_is_there() -> None:
    assert MODULES.keys() == {*modules.__all__} - {"Rows"}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    made, inputs, call = MODULES[name]
    module = copy.deepcopy(made).double()
    names = [name for name, _ in module.named_parameters()]
    learned = [_drawn(*x.shape).detach().div(2).requires_grad_() for x in module.parameters()]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        given, parameters = tensors[: len(inputs)], dict(zip(names, tensors[len(inputs) :], strict=True))

        def with_parameters(*args: Any, **options: Any) -> Any:
            return functional_call(module, parameters, args, options)

        out: torch.Tensor = call(with_parameters, *given)
        return out

    assert gradcheck(run, (*inputs, *learned))
