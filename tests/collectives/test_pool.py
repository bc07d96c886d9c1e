"""`pool` and `attention_rows` against dense attention: mechanisms, layouts, gradients, and what travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn
from ringattn.mechanisms.softmax import Softmax
from ringattn.plans.tree import Tree
from tests.test_passes import TwoPass
from tests.workers import GlooWorkers

F64 = torch.float64


def _numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _pooled(mesh: ringattn.Mesh, length: int, queries: int, layout: str, make: Any) -> list[torch.Tensor]:
    """Output, log-sum-exp, and gradients, added up over the ranks where the tensor is replicated."""
    q, k, v = _numbers(2, 4, queries, 8, seed=0), _numbers(2, 2, length, 8, seed=1), _numbers(2, 2, length, 6, seed=2)
    sinks = _numbers(4, seed=3)
    sharding = ringattn.Sharding(length, mesh, layout=layout)
    leaves = [x.clone().requires_grad_() for x in (q, sharding.split(k, 2), sharding.split(v, 2), sinks)]
    mechanism = make(sinks=leaves[3]) if make is Softmax else make()
    leaves = leaves[: 3 + len(mechanism.params)]
    out, lse = ringattn.pool(*leaves[:3], sharding=sharding, mechanism=mechanism, extras=("lse",))
    share = 1 + mesh.rank  # every rank has a loss of its own
    dq, dk, dv, *dparams = torch.autograd.grad(share * (out.sin().sum() + lse.cos().sum()), leaves)
    return [
        out.detach(),
        lse.detach(),
        ringattn.reduce(dq, mesh, "sum"),
        sharding.join(dk, 2),
        sharding.join(dv, 2),
        *(ringattn.reduce(x, mesh, "sum") for x in dparams),
    ]


def _dense(length: int, queries: int, ranks: int, with_sinks: bool) -> list[torch.Tensor]:
    q, k, v = _numbers(2, 4, queries, 8, seed=0), _numbers(2, 2, length, 8, seed=1), _numbers(2, 2, length, 6, seed=2)
    sinks = _numbers(4, seed=3) if with_sinks else torch.full((4,), -torch.inf, dtype=F64)
    leaves = [x.requires_grad_() for x in (q, k, v, *([sinks] if with_sinks else []))]
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5
    lse = torch.cat([scores, sinks[:, None, None].expand(2, 4, queries, 1)], dim=-1).logsumexp(dim=-1)
    out = torch.exp(scores - lse.unsqueeze(-1)) @ v.repeat_interleave(2, dim=1)
    losses = sum(1 + rank for rank in range(ranks))
    return [out, lse, *torch.autograd.grad(losses * (out.sin().sum() + lse.cos().sum()), leaves)]


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from((1, 2, 3, 5, 8)),
    length=st.integers(1, 30),
    queries=st.integers(1, 5),
    layout=st.sampled_from(("contiguous", "zigzag", "striped")),
    make=st.sampled_from((Softmax, TwoPass)),
)
def test_pool_is_dense_attention(ranks: int, length: int, queries: int, layout: str, make: Any) -> None:
    expected = _dense(length, queries, ranks, make is Softmax)
    for found in ringattn.simulate(_pooled, length, queries, layout, make, ring=ranks).results:
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() <= 1e-12 * (1 + y.norm())


@pytest.mark.parametrize("ranks", [2, 3])
def test_pool_over_gloo(gloo: GlooWorkers, ranks: int) -> None:
    expected = _dense(21, 3, ranks, True)
    for found in gloo.run(ranks, _pooled, 21, 3, "zigzag", Softmax):
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() <= 1e-12 * (1 + y.norm())


@pytest.mark.parametrize("length", [64, 1024])
def test_states_travel_and_not_keys(length: int) -> None:
    """Of 2 heads and 3 queries an output of 8 numbers and a log-sum-exp, whatever the length."""

    def moved(mesh: ringattn.Mesh) -> tuple[int, int]:
        sharding, counters = ringattn.Sharding(length, mesh), mesh.connected().counters
        q = torch.ones(1, 2, 3, 8, requires_grad=True)
        k = v = torch.ones(1, 2, sharding.count, 8)
        out = ringattn.pool(q, k, v, sharding=sharding)
        forward = counters.sent_bytes
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
        return forward, counters.sent_bytes - forward

    state = 2 * 3 * (8 + 1) * 4
    for rank, found in enumerate(ringattn.simulate(moved, ring=5).results):
        planned = Tree.of(rank, 5).traffic(state, state, state)
        assert found == (planned.sent_bytes, planned.backward_sent_bytes)


def _rows(mesh: ringattn.Mesh, mask: ringattn.Mask, layout: str, rows: list[int], bias: bool) -> torch.Tensor:
    length = 40
    q, k, table = (
        _numbers(1, 4, length, 8, seed=0),
        _numbers(1, 2, length, 8, seed=1),
        _numbers(4, length, length, seed=2),
    )
    sharding = ringattn.Sharding(length, mesh, layout=layout, mask=mask)
    mechanism = Softmax(bias=sharding.split(table, 1)) if bias else Softmax(softcap=3.0)
    q, k = sharding.split(q, 2), sharding.split(k, 2)
    return sharding.join(ringattn.attention_rows(q, k, mask, rows, sharding=sharding, mechanism=mechanism), 3)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from((1, 2, 3, 5, 8)),
    layout=st.sampled_from(("contiguous", "zigzag", "striped", "balanced")),
    mask=st.sampled_from(
        (
            ringattn.Full(),
            ringattn.Documents([11, 1, 28]) & ringattn.Causal(),
            ringattn.Window(5, 2),
            ringattn.Predicate(lambda q, k: (q + k) % 3 != 0),
        )
    ),
    rows=st.lists(st.integers(0, 39), max_size=6),
    bias=st.booleans(),
)
def test_rows_are_those_of_the_dense_matrix(
    ranks: int, layout: str, mask: ringattn.Mask, rows: list[int], bias: bool
) -> None:
    q, k, table = _numbers(1, 4, 40, 8, seed=0), _numbers(1, 2, 40, 8, seed=1), _numbers(4, 40, 40, seed=2)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5
    scores = scores + table if bias else 3 * torch.tanh(scores / 3)
    scores = scores.masked_fill(~mask.dense(range(40), range(40)), float("-inf"))
    expected = scores.softmax(dim=-1).nan_to_num(0)[:, :, rows]
    for found in ringattn.simulate(_rows, mask, layout, rows, bias, ring=ranks).results:
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-13 * (1 + expected.norm())


def test_rows_move_no_keys() -> None:
    """What travels is the chosen queries and their states, the same for any length."""

    def moved(mesh: ringattn.Mesh, length: int) -> int:
        sharding, counters = ringattn.Sharding(length, mesh), mesh.connected().counters
        q = torch.ones(1, 2, sharding.count, 8)
        ringattn.attention_rows(q, q, ringattn.Causal(), [3, 0, 9], sharding=sharding)
        return counters.sent_bytes

    short, long = (ringattn.simulate(moved, length, ring=4).results for length in (64, 2048))
    assert short == long
    assert sum(short) == 2 * 3 * (2 * 3 * 8 * 4 + 2 * 3 * 4)  # three ranks up and down: queries, log-sum-exps


@pytest.mark.parametrize("rows", [[40], [-1], [0.5], "all", None])
def test_rows_that_are_none(rows: object) -> None:
    q = torch.ones(1, 1, 40, 4)
    with pytest.raises(ringattn.InputError):
        ringattn.attention_rows(q, q, ringattn.Full(), rows, sharding=ringattn.Sharding(40, ringattn.init()))


def test_keys_behind_their_query_are_refused_as_attention_refuses_them() -> None:
    sharding, q = ringattn.Sharding(7, ringattn.init()), torch.ones(1, 2, 7, 4)
    with pytest.raises(ringattn.UnsupportedError, match="no key that comes after its query"):
        ringattn.pool(q[:, :, :3], q, q, sharding=sharding, mechanism=ringattn.Gated())
    with pytest.raises(ringattn.UnsupportedError, match="no key that comes after its query"):
        ringattn.attention_rows(q, q, ringattn.Window(1, 1), [2], sharding=sharding, mechanism=ringattn.Gated())


def test_bad_pools() -> None:
    sharding = ringattn.Sharding(7, ringattn.init())
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 7, 4)
    for wrong in ({"k": q}, {"q": None}, {"mechanism": "softmax"}, {"extras": ("score",)}, {"sharding": 7}):
        with pytest.raises((ringattn.InputError, ringattn.UnsupportedError)):
            ringattn.pool(**{"q": q, "k": k, "v": k, "sharding": sharding, **wrong})  # type: ignore[arg-type]
