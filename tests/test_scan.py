"""Scan: sums over keys travel in place of keys. What its plans move, what the verifier catches, what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import ringattn
from ringattn.conformance import Case, attend, errors, joined, limits, oracle, simulated
from ringattn.errors import InputError, PlanError, UnsupportedError
from ringattn.mechanisms.base import Mechanism, Problem
from ringattn.payloads import summaries
from ringattn.payloads.keys import Keys
from ringattn.plans import tiles
from ringattn.plans.plan import Plan
from ringattn.plans.steps import RECV_START, RECV_STOP, SEND_STOP
from tests.conformance import layouts, masks
from tests.workers import Workers

SHAPE: dict[str, Any] = {
    "heads": (4, 2),
    "head_dims": (8, 6),
    "dtype": "bfloat16",
    "mechanism": ringattn.Linear(),
}
Fault = Callable[[Plan], Plan]


@given(data=st.data(), length=st.integers(0, 120), ranks=st.integers(1, 8))
def test_every_plan_is_right(data: st.DataObject, length: int, ranks: int) -> None:
    mask, layout = data.draw(masks(length)), data.draw(layouts(length, ranks))
    try:
        plans = ringattn.plan_all(mask, length, layout, "scan", ring=ranks, **SHAPE)
    except UnsupportedError:
        assume(False)
    ringattn.verify(plans)
    where = np.arange(length)
    assert sum(plan.area for plan in plans) == int(mask.dense(where, where).sum())
    traffic = [plan.traffic() for plan in plans]
    assert all(t.received_tokens == t.sent_tokens == 0 for t in traffic)
    assert sum(t.received_summaries for t in traffic) == sum(t.sent_summaries for t in traffic)
    assert sum(t.backward_received_bytes or 0 for t in traffic) == sum(t.backward_sent_bytes or 0 for t in traffic)
    for rank, plan in enumerate(plans):
        sharding = ringattn.Sharding(length, ringattn.Mesh.virtual(ranks, rank=rank), layout, mask)
        assert ringattn.plan(mask, sharding, "scan", **SHAPE).hash == plan.hash
        assert plan.explain().startswith(f"rank {rank} of {ranks}, scan")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("mask", [ringattn.Causal(), ringattn.Full()], ids=str)
def test_bytes_do_not_depend_on_the_length(layout: str, mask: ringattn.Mask) -> None:
    def moved(length: int) -> list[tuple[int | None, ...]]:
        plans = ringattn.plan_all(mask, length, layout, ring=4, **SHAPE)
        assert all("auto took scan" in plan.reason for plan in plans)
        return [dataclasses.astuple(plan.traffic()) for plan in plans]

    assert moved(8_192) == moved(65_536)


def test_a_causal_scan_is_exclusive() -> None:
    """Rank r gets one summary from each rank before it, and nothing from those after."""
    plans = ringattn.plan_all(ringattn.Causal(), 64, "contiguous", "scan", ring=4, **SHAPE)
    assert [plan.traffic().received_summaries for plan in plans] == [0, 1, 2, 3]
    assert [plan.traffic().sent_summaries for plan in plans] == [3, 2, 1, 0]
    # a summary is D (Dv + 1) numbers a key head, in the accumulator's dtype
    assert plans[1].traffic().received_bytes == 2 * 8 * (6 + 1) * 4


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
        (_table("tile_rows", tiles.K, -1), "not the sum over exactly its keys"),
        (_table("tile_rows", tiles.K, 9), "not the sum over exactly its keys"),
        (_table("tile_rows", tiles.LOW, 1), "not the sum over exactly its keys"),
        (_table("tile_rows", tiles.N, -1), "not the sum over exactly its keys"),
        (_table("receives", RECV_START, 1), "not the sum over exactly its keys"),
        (_table("receives", RECV_STOP, -1), "not the sum over exactly its keys"),
        (_table("sends", SEND_STOP, -1), "that are not the"),
        (_cut("sends"), "sends 1 messages|sends 0 messages|sends 2 messages|that are not"),
        (_cut("grad_sends"), "does not send home"),
        (_cut("grad_receives"), "does not reach its owner"),
        (lambda plan: dataclasses.replace(plan, payload=Keys()), "another mask, sharding, payload"),
    ],
)
def test_faults_are_caught(fault: Fault, words: str) -> None:
    plans = ringattn.plan_all(ringattn.Causal(), 64, "zigzag", "scan", ring=4, **SHAPE)
    ringattn.verify(plans)
    plans[2] = fault(plans[2])
    with pytest.raises(PlanError, match=words):
        ringattn.verify(plans)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ringattn.plan_all(ringattn.Window(9), 64, "contiguous", "scan", ring=4),
            "scan exchanges sums over keys, so a query must see all .* rank 1 sees rank 0's only in part. Use a layout",
        ),
        (lambda: ringattn.plan_all(ringattn.Causal(), 64, "striped", "scan", ring=4), "only in part"),
        (
            lambda: ringattn.plan_all(ringattn.Causal(), 64, "zigzag", "scan", ring=4, mechanism=ringattn.Hard()),
            r"Hard\(\) needs the keys themselves. Use ring, route or auto",
        ),
    ],
)
def test_refusals(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        call()


def test_auto_says_why_it_is_not_scan() -> None:
    plan = ringattn.plan_all(ringattn.Window(9), 64, "contiguous", ring=4, mechanism=ringattn.Linear())[0]
    assert "auto took ring" in plan.reason and "not scan: scan exchanges sums over keys" in plan.reason


def test_bytes_need_the_mechanism() -> None:
    shape = {name: x for name, x in SHAPE.items() if name != "mechanism"}
    plan = ringattn.plan_all(ringattn.Causal(), 64, "zigzag", "scan", ring=4, **shape)[0]
    with pytest.raises(InputError, match="depend on the mechanism; give it to plan"):
        plan.traffic()


CASES = [
    Case(257, ringattn.Causal(), kv_heads=2, groups=2, value_dim=12, mechanism="linear", schedule=ringattn.Scan()),
    Case(90, ringattn.Documents([40, 50]) & ringattn.Causal(), layout="contiguous", mechanism="linear"),
    Case(64, ringattn.Full(), batch=2, mechanism="linear", schedule=ringattn.Scan(gradient_wire="input")),
    Case(64, ringattn.Causal(), mechanism="linear", schedule=ringattn.Scan(lookahead=0), dtype=torch.bfloat16),
]


@pytest.mark.parametrize("ranks", [3, 4])
def test_gloo_gives_the_bits_of_the_simulator(gloo: Workers, ranks: int) -> None:
    for case in CASES:
        case = dataclasses.replace(case, ranks=ranks)
        found, virtual = joined(case, gloo.run(ranks, attend, case)), simulated(case)
        assert all(torch.equal(found[name], virtual[name]) for name in found)
        answer = oracle(case)
        most = limits(case, answer)
        assert all(error <= most[name] for name, error in errors(found, answer).items())


def _moved(mesh: ringattn.Mesh, length: int) -> tuple[int, int]:
    case = Case(length, ringattn.Causal(), mechanism="linear", kv_heads=2, groups=1)
    assert mesh.transport is not None
    before = mesh.transport.counters.sent_bytes, mesh.transport.counters.received_bytes
    attend(mesh, case)
    return mesh.transport.counters.sent_bytes - before[0], mesh.transport.counters.received_bytes - before[1]


def test_bytes_counted_on_gloo_do_not_depend_on_the_length(gloo: Workers) -> None:
    assert gloo.run(4, _moved, 512) == gloo.run(4, _moved, 4096)


def test_a_summary_is_attended_to_whole() -> None:
    plans = ringattn.plan_all(ringattn.Causal(), 64, "contiguous", "scan", ring=2, **SHAPE)
    partial = _table("tile_rows", tiles.PARTIAL, 1)(plans[1])
    with pytest.raises(PlanError, match=r"not the sum over exactly its keys|wrong pairs"):
        partial.verify()


class _InOrder(ringattn.Linear):
    """Values are positions, and a fold that gets summaries in another order fails. Its gradients are three times as
    large as they should be, to show that they are asked for."""

    def fold(self, problem: Problem, rows: torch.Tensor) -> torch.Tensor:
        sums = rows.unflatten(-1, (problem.dim, problem.value_dim + 1))[..., 0, :]
        means = sums[..., 0] / sums[..., -1]
        assert bool((means[1:] > means[:-1]).all())
        return super().fold(problem, rows)

    def fold_grad(self, problem: Problem, rows: torch.Tensor, dfolded: torch.Tensor) -> torch.Tensor:
        self.fold(problem, rows)
        return 3 * dfolded


@pytest.mark.parametrize(
    "layout", ["contiguous", "zigzag", ringattn.Explicit([[(9, 30)], [(0, 9), (40, 64)], [(30, 40)]])]
)
def test_summaries_are_folded_in_the_order_of_positions(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "AT_ONCE", 4)

    def gradients(mesh: ringattn.Mesh, mechanism: Mechanism) -> tuple[torch.Tensor, torch.Tensor]:
        sharding = ringattn.Sharding(64, mesh, layout)
        g = torch.Generator().manual_seed(1)
        q, k = (sharding.split(torch.randn(1, 1, 64, 3, generator=g, dtype=torch.float64), 2).clone() for _ in "qk")
        v = sharding.split(torch.arange(64.0).double().reshape(1, 1, 64, 1), 2).clone().requires_grad_()
        out = ringattn.attention(
            q, k, v, ringattn.Causal(), sharding=sharding, mechanism=mechanism, schedule="scan", kernel="reference"
        )
        (dv,) = torch.autograd.grad((out * sharding.positions[:, None]).sum(), v)
        return out.detach(), dv

    ordered, sums = (ringattn.simulate(gradients, m, ring=3).results for m in (_InOrder(), ringattn.Linear()))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ordered, sums, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(ordered[:2], sums[:2], strict=True))  # its own fold_grad
