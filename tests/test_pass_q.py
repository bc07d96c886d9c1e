"""PassQ: queries travel in place of keys. What its plans move, what the verifier catches, what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn
from ringattn.conformance import Case, attend, errors, examine, joined, oracle, simulated
from ringattn.errors import PlanError, UnsupportedError
from ringattn.kernels.reference import Reference
from ringattn.mechanisms.base import OutputGrad
from ringattn.payloads.columns import Columns
from ringattn.plans import tiles
from ringattn.plans.plan import Plan
from ringattn.plans.steps import RECV_START, SEND_STOP
from tests.conformance import layouts, masks
from tests.workers import Workers

SHAPE: dict[str, Any] = {"heads": (4, 2), "head_dims": (8, 6), "dtype": "bfloat16"}
Fault = Callable[[Plan], Plan]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(0, 120), ranks=st.integers(1, 8))
def test_every_plan_is_right(data: st.DataObject, length: int, ranks: int) -> None:
    mask, layout = data.draw(masks(length)), data.draw(layouts(length, ranks))
    plans = ringattn.plan_all(mask, length, layout, "passq", ring=ranks, **SHAPE)
    ringattn.verify(plans)
    where = np.arange(length)
    assert sum(plan.area for plan in plans) == int(mask.dense(where, where).sum())
    traffic = [plan.traffic() for plan in plans]
    assert all(t.received_tokens == t.sent_tokens == 0 for t in traffic)
    for name in ("queries", "bytes"):
        assert sum(getattr(t, f"sent_{name}") for t in traffic) == sum(getattr(t, f"received_{name}") for t in traffic)
    for rank, plan in enumerate(plans):
        sharding = ringattn.Sharding(length, ringattn.Mesh.virtual(ranks, rank=rank), layout, mask)
        assert (plan.tokens, plan.key_tokens) == (sharding.count, sharding.count)
        assert ringattn.plan(mask, sharding, "passq", **SHAPE).hash == plan.hash
        assert plan.explain().startswith(f"rank {rank} of {ranks}, passq")


def test_what_travels_is_counted_as_what_it_is() -> None:
    """Each rank's 4 queries go to 3 others, and as many states come back: what it receives is others' and its own."""
    plans = ringattn.plan_all(ringattn.Full(), 16, "contiguous", "passq", ring=4, kv_length=4000, **SHAPE)
    there, state, gradient = 8 * 2, (6 + 1) * 4, 8 * 4
    output = 2 * 6 * 2 + 4 + 4  # gradient of out, out, log-sum-exp and its gradient
    for moved in (plan.traffic() for plan in plans):
        assert (moved.received_queries, moved.sent_queries, moved.messages) == (12, 12, 6)
        assert moved.received_bytes == moved.sent_bytes == 12 * 4 * (there + state)
        assert moved.backward_received_bytes == 12 * 4 * (there + output + gradient)
    routed = ringattn.plan_all(ringattn.Full(), 16, "contiguous", "route", ring=4, kv_length=4000, **SHAPE)
    assert 50 * (plans[0].traffic().received_bytes or 0) < (routed[0].traffic().received_bytes or 0)


def _table(name: str, column: int, by: int) -> Fault:
    def plant(plan: Plan) -> Plan:
        table = getattr(plan, name).copy()
        table[-1, column] += by
        return dataclasses.replace(plan, **{name: table})

    return plant


def _cut(name: str) -> Fault:
    return lambda plan: dataclasses.replace(plan, **{name: getattr(plan, name)[:-1]})


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_table("tile_rows", tiles.Q, -1), "does not hold at that place"),
        (_table("tile_rows", tiles.LOW, 1), "wrong pairs"),
        (
            lambda plan: dataclasses.replace(plan, tile_rows=plan.tile_rows[:-1], tile_phases=plan.tile_phases[:-1]),
            "wrong pairs",
        ),
        (_table("receives", RECV_START, 1), "does not hold at that place"),
        (_table("sends", SEND_STOP, -1), "that are not the"),
        (_cut("sends"), "messages to rank|that are not"),
        (_cut("grad_sends"), "does not send home"),
        (_cut("grad_receives"), "does not reach its owner"),
    ],
)
def test_faults_are_caught(fault: Fault, words: str) -> None:
    plans = ringattn.plan_all(ringattn.Causal(), 64, "zigzag", "passq", ring=4, **SHAPE)
    ringattn.verify(plans)
    plans[2] = fault(plans[2])
    with pytest.raises(PlanError, match=words):
        ringattn.verify(plans)


CASES = [
    Case(70, ringattn.Causal(), batch=2, kv_heads=2, groups=2, features=frozenset({"bias", "sinks", "alibi"})),
    Case(33, ringattn.Full(), batch=2, kv_heads=3, groups=2, kv_length=80, features=frozenset({"centres", "dropout"})),
    Case(64, ringattn.Window(9) | ringattn.SinkTokens(3), mechanism="entmax", features=frozenset({"alpha", "bias"})),
    Case(50, ringattn.Documents([20, 30]), kv_heads=2, mechanism=ringattn.Hard(top=3), dtype=torch.float64),
    Case(60, ringattn.Causal(), mechanism="sampled", layout="striped"),
    Case(60, ringattn.Causal(), mechanism="gated", kv_heads=2, groups=3, layout="contiguous"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.mechanism))
def test_what_belongs_to_a_query_travels_with_it(case: Case) -> None:
    finding = examine(dataclasses.replace(case, ranks=3, schedule="passq"))
    assert finding.refusal is None and not finding.faults, finding


def test_extras_that_only_some_use_travel_as_zeros_do() -> None:
    case = Case(60, ringattn.Causal(), ranks=3, mechanism=ringattn.Sampled(straight_through=0.7, seed=3))
    passed, routed = (simulated(dataclasses.replace(case, schedule=x)) for x in ("passq", "route"))
    assert all(torch.allclose(passed[name], routed[name], rtol=1e-5, atol=1e-6) for name in routed)


@pytest.mark.parametrize("extras", [(), ("lse",)])
def test_an_extra_that_nobody_asked_for_has_no_gradient(
    extras: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels compute a pass of its own for it, whatever it is."""
    met, backward = [], Reference.backward

    def watched(self: Reference, problem: Any, q: Any, k: Any, v: Any, output_grad: OutputGrad, *others: Any) -> None:
        met.append(output_grad.grad_extras[0] is not None)
        backward(self, problem, q, k, v, output_grad, *others)

    def call(mesh: ringattn.Mesh) -> None:
        sharding = ringattn.Sharding(24, mesh)
        q, k, v = (torch.randn(1, 2, sharding.count, 4, requires_grad=True) for _ in range(3))
        options: dict[str, Any] = {"schedule": "passq", "kernel": "reference", "extras": extras}
        out = ringattn.attention(q, k, v, ringattn.Full(), sharding=sharding, **options)
        sum(x.sum() for x in (out if extras else (out,))).backward()

    monkeypatch.setattr(Reference, "backward", watched)
    ringattn.simulate(call, ring=2)
    assert {*met} == {bool(extras)}  # of own queries and the other rank's


def test_gloo_gives_the_bits_of_the_simulator(gloo: Workers) -> None:
    for case in CASES[:2]:
        case = dataclasses.replace(case, ranks=3, schedule="passq", dtype=torch.bfloat16, kernel="auto")
        found, virtual = joined(case, gloo.run(3, attend, case)), simulated(case)
        assert all(torch.equal(found[name], virtual[name]) for name in found)


@pytest.mark.parametrize("wire", ["float32", "input"])
def test_gradients_of_queries_travel_in_the_dtype_that_was_asked_for(wire: str) -> None:
    schedule = ringattn.PassQ(gradient_wire=wire)  # type: ignore[arg-type]
    case = Case(150, ringattn.Causal(), ranks=4, dtype=torch.bfloat16, schedule=schedule)
    assert not examine(case).faults
    found, once = (errors(simulated(x), oracle(x)) for x in (case, dataclasses.replace(case, ranks=1)))
    assert found["dq"] - 2 * once["dq"] <= (0 if wire == "float32" else 2**-8)


@pytest.mark.parametrize("wanted", ["q", "v", "k"])
def test_what_nobody_asked_for_does_not_come_home(wanted: str) -> None:
    def gradient(mesh: ringattn.Mesh, schedule: str) -> tuple[torch.Tensor, int]:
        sharding = ringattn.Sharding(40, mesh)
        g = torch.Generator().manual_seed(1)
        x = {name: sharding.split(torch.randn(1, 2, 40, 4, generator=g), 2).clone() for name in "qkv"}
        x[wanted].requires_grad_()
        out = ringattn.attention(x["q"], x["k"], x["v"], ringattn.Full(), sharding=sharding, schedule=schedule)
        before = mesh.connected().counters.received_bytes
        (grad,) = torch.autograd.grad(out.square().sum(), x[wanted])
        return grad, mesh.connected().counters.received_bytes - before

    passed, routed = (ringattn.simulate(gradient, schedule, ring=2).results for schedule in ("passq", "route"))
    there, back = 4 * 4 + 4 * 4 * 2 + 4 * 2, 4 * 4  # q, the gradient of out and out, log-sum-exp and its gradient; dq
    assert passed[0][1] == 20 * 2 * (there + back * (wanted == "q"))
    assert all(torch.allclose(a[0], b[0], rtol=1e-5, atol=1e-6) for a, b in zip(passed, routed, strict=True))


def test_nodes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="states go straight home"):
        ringattn.PassQ(node_aware=True)


def test_deterministic_is_refused() -> None:
    def call(mesh: ringattn.Mesh) -> None:
        sharding = ringattn.Sharding(8, mesh)
        x = torch.zeros(1, 1, 4, 4)
        with pytest.raises(UnsupportedError, match="passq merges the states of queries, cut by rank"):
            ringattn.attention(x, x, x, ringattn.Full(), sharding=sharding, schedule="passq", deterministic=True)

    ringattn.simulate(call, ring=2)


def test_columns_keep_every_bit_where_it_may_be_read() -> None:
    g = torch.Generator().manual_seed(1)
    tensors = (
        torch.randn(2, 3, 5, 7, generator=g).bfloat16(),
        torch.randint(1 << 62, (2, 3, 5), generator=g),
        torch.randn(2, 3, 5, 2, 2, generator=g),
        torch.randn(2, 3, 5, 0, generator=g),
    )
    columns = Columns.of(tensors, lead=3)
    assert columns.size == 8 + 4 * 4 + 7 * 2 + 2  # wide ones first, and a row ends where the next may begin
    found = columns.views(columns.packed(tensors, (2, 3, 5)))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True))
