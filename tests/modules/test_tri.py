"""Tri-attention, against one softmax over all pairs of keys and contexts."""

from __future__ import annotations

import math

import pytest
import torch

import ringattn
from ringattn import modules
from tests.modules.dense import Axes, Inputs, compare, drawn

AXES: Axes = {"q": ("tokens", 2), "k": ("tokens", 2), "v": ("tokens", 2), "c": None}


def _equation(module: modules.TriAttention, x: Inputs, mask: ringattn.Mask) -> torch.Tensor:
    """F of every triple, and one softmax of all keys and contexts."""
    q, k, v, c = (x[name] for name in "qkvc")
    if module.scores == "additive":
        one, two, three = ((y @ w) for y, w in ((q, module.query), (k, module.key), (c, module.context)))
        inner = torch.tanh(one[:, :, :, None, None] + two[:, :, None, :, None] + three[:, :, None, None])
        scores = torch.einsum("bhsijd,hd->bhsij", inner, module.direction)
        values = v[:, :, :, None] + c[:, :, None]
    elif module.scores == "trilinear":
        scores = torch.einsum("bhsd,bhie,bhjf,hdef->bhsij", q, k, c, module.tensor)
        values = v[:, :, :, None] * (c @ module.value)[:, :, None]
    else:
        scores = torch.einsum("bhsd,bhid,bhjd->bhsij", q, k, c)
        scores = scores / math.sqrt(module.dim) if module.scores == "scaled" else scores
        values = v[:, :, :, None] * c[:, :, None]
    n = q.shape[2]
    scores = scores.masked_fill(~mask.dense(range(n), range(n))[..., None], -math.inf)
    return scores.flatten(-2).softmax(-1).nan_to_num(0) @ values.flatten(2, 3)


@pytest.mark.parametrize("chunk", [2, 64], ids="chunks of {}".format)
@pytest.mark.parametrize("scores", ["additive", "dot", "scaled", "trilinear"])
def test_tri_attention(scores: str, chunk: int) -> None:
    mask = ringattn.Causal() if chunk == 2 else ringattn.Full()
    compare(
        modules.TriAttention(2, 4, scores, chunk),
        lambda module, x, own: module(x["q"], x["k"], x["v"], x["c"], mask, sharding=own["tokens"]),
        lambda module, x: _equation(module, x, mask),
        drawn(q=(2, 2, 15, 4), k=(2, 2, 15, 4), v=(2, 2, 15, 4), c=(2, 2, 5, 4)),
        AXES,
        {"tokens": 15},
    )


def test_a_context_that_is_sharded_is_joined() -> None:
    compare(
        modules.TriAttention(1, 4, "scaled", chunk=3),
        lambda module, x, own: module(
            x["q"], x["k"], x["v"], own["context"].join(x["c"], 2), ringattn.Full(), sharding=own["tokens"]
        ),
        lambda module, x: _equation(module, x, ringattn.Full()),
        drawn(q=(1, 1, 15, 4), k=(1, 1, 15, 4), v=(1, 1, 15, 4), c=(1, 1, 11, 4)),
        {**AXES, "c": ("context", 2)},
        {"tokens": 15, "context": 11},
    )


@pytest.mark.parametrize("scores", ["additive", "scaled"])
def test_a_query_that_sees_no_key_gets_nothing(scores: str) -> None:
    mask = ringattn.Causal() & ~ringattn.Prefix(3)  # the first three queries see nobody
    inputs = drawn(q=(1, 1, 8, 4), k=(1, 1, 8, 4), v=(1, 1, 8, 4), c=(1, 1, 3, 4))
    module = modules.TriAttention(1, 4, scores, chunk=2).double()
    sharding = ringattn.Sharding(8, ringattn.init())
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = module(*leaves, mask, sharding=sharding)
    with torch.no_grad():
        exact = _equation(module, inputs, mask)
        silent = (~mask.dense(range(8), range(8))).all(1)
    assert silent.any() and bool((out[:, :, silent] == 0).all())
    assert (out - exact)[:, :, ~silent].norm() < 1e-12
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), leaves))
