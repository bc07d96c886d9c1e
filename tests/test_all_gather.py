"""AllGather: all keys at once, in slices of heads. What its plans move and hold, and what the verifier catches."""

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
from ringattn.conformance import Case, attend, examine, joined, simulated
from ringattn.errors import InputError, PlanError, UnsupportedError
from ringattn.plans.plan import Plan
from ringattn.plans.steps import GRAD_PHASE, RECV_PHASE, SEND_PHASE
from tests.conformance import layouts, masks
from tests.workers import Workers

SHAPE: dict[str, Any] = {"heads": (10, 5), "head_dims": (8, 6), "dtype": "bfloat16"}
Fault = Callable[[Plan], Plan]


@settings(max_examples=20, deadline=None)
@given(data=st.data(), length=st.integers(0, 120), ranks=st.integers(1, 8), slices=st.integers(1, 7))
def test_every_plan_is_right(data: st.DataObject, length: int, ranks: int, slices: int) -> None:
    mask, layout = data.draw(masks(length)), data.draw(layouts(length, ranks))
    plans = ringattn.plan_all(mask, length, layout, ringattn.AllGather(slices=slices), ring=ranks, **SHAPE)
    ringattn.verify(plans)
    where = np.arange(length)
    assert sum(plan.area for plan in plans) == int(mask.dense(where, where).sum())
    routed = ringattn.plan_all(mask, length, layout, "route", ring=ranks, **SHAPE)
    for plan, other in zip(plans, routed, strict=True):
        names = ("received_tokens", "received_bytes", "backward_received_bytes", "sent_bytes", "backward_sent_bytes")
        assert all(getattr(plan.traffic(), name) == getattr(other.traffic(), name) for name in names)
        assert plan.traffic().messages == other.traffic().messages * min(slices, 5)
        sharding = ringattn.Sharding(length, ringattn.Mesh.virtual(ranks, rank=plan.rank), layout, mask)
        assert ringattn.plan(mask, sharding, ringattn.AllGather(slices=slices), **SHAPE).hash == plan.hash


def _plans(slices: int, **more: Any) -> list[Plan]:
    return ringattn.plan_all(ringattn.Full(), 64, "contiguous", ringattn.AllGather(slices=slices), ring=4, **SHAPE)


def test_the_exchange_of_each_slice_travels_behind_the_one_before() -> None:
    plan = _plans(3)[1]
    assert [(bool(step.exchange), step.phase) for step in plan.steps] == [(True, 0), (True, 1), (True, 2), (False, 3)]
    assert all(step.tiles for step in plan.steps)
    assert "key heads in 3 slices of 2, 2, 1, one after the other" in plan.explain()


def test_memory_is_that_of_two_slices() -> None:
    """48 rows of 14 numbers in bfloat16, for all 5 heads at once, or for 2 and 2 of them."""
    whole, sliced = (_plans(slices)[0].memory().buffers for slices in (1, 3))
    rows = 48 * 14 * 2
    assert [x for name, x in whole.items() if name.startswith("keys")] == [rows * 5]
    assert [x for name, x in sliced.items() if name.startswith("keys")] == [rows * 2, rows * 2]


def test_there_are_no_more_slices_than_key_heads() -> None:
    plan = _plans(9)[0]
    assert plan.slices == 5 and plan.hash == _plans(5)[0].hash
    assert "in 5 slices of 1, 1, 1, 1, 1" in plan.explain()
    with pytest.raises(InputError, match="slices"):
        ringattn.AllGather(slices=0)


def _lost(name: str, column: int, phase: int) -> Fault:
    """Without what travels in a phase."""

    def plant(plan: Plan) -> Plan:
        table = getattr(plan, name)
        return dataclasses.replace(plan, **{name: table[table[:, column] != phase]})

    return plant


def _swapped(plan: Plan) -> Plan:
    """Sends of two slices, each in the phase of the other."""
    sends = plan.sends.copy()
    sends[:, SEND_PHASE] = np.array([0, 2, 1, 3])[sends[:, SEND_PHASE]]
    return dataclasses.replace(plan, sends=sends[np.argsort(sends[:, SEND_PHASE], kind="stable")], slices=1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_lost("receives", RECV_PHASE, 2), "a phase whose keys it never held"),
        (_lost("sends", SEND_PHASE, 2), "messages to rank|that are not the"),
        (_lost("grad_sends", GRAD_PHASE, 4), "does not send home"),
        (_lost("grad_receives", GRAD_PHASE, 4), "does not reach its owner"),
        (_swapped, "another mask, sharding, payload, gradient dtype or slices"),
        (
            lambda plan: dataclasses.replace(
                plan,
                tile_rows=plan.tile_rows[plan.tile_phases != 2],
                tile_phases=plan.tile_phases[plan.tile_phases != 2],
            ),
            "wrong pairs",
        ),
        (lambda plan: dataclasses.replace(plan, slices=2), "slices|none of its 2 slices|wrong pairs"),
    ],
)
def test_a_slice_that_is_lost_is_missed(fault: Fault, words: str) -> None:
    plans = _plans(3)
    ringattn.verify(plans)
    plans[2] = fault(plans[2])
    with pytest.raises(PlanError, match=words):
        ringattn.verify(plans)


EVERY = frozenset({"bias", "sinks", "alibi", "dropout", "centres", "relative"})
CASES = [
    Case(70, ringattn.Causal(), batch=2, kv_heads=5, groups=2, features=EVERY, use_lse=True),
    Case(
        64, ringattn.Window(9) | ringattn.SinkTokens(3), kv_heads=3, mechanism="entmax", features=frozenset({"alpha"})
    ),
    Case(33, ringattn.Full(), kv_heads=3, groups=2, kv_length=50, mechanism=ringattn.Hard(top=3), dtype=torch.float64),
    Case(60, ringattn.Causal(), kv_heads=4, groups=2, mechanism="sampled", layout="striped"),
    Case(60, ringattn.Documents([20, 40]) & ringattn.Causal(), kv_heads=2, groups=3, mechanism="linear"),
    Case(60, ringattn.Causal(), mechanism="gated", kv_heads=3, groups=1, layout="zigzag"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.mechanism))
def test_heads_are_counted_globally(case: Case) -> None:
    finding = examine(dataclasses.replace(case, ranks=3, schedule=ringattn.AllGather(slices=2)))
    assert finding.refusal is None and not finding.faults, finding


def test_gloo_gives_the_bits_of_the_simulator(gloo: Workers) -> None:
    case = dataclasses.replace(CASES[0], ranks=3, schedule=ringattn.AllGather(slices=2), dtype=torch.bfloat16)
    found, virtual = joined(case, gloo.run(3, attend, case)), simulated(case)
    assert all(torch.equal(found[name], virtual[name]) for name in found)


def test_deterministic_takes_all_heads_at_once() -> None:
    def call(mesh: ringattn.Mesh, slices: int) -> torch.Tensor:
        sharding = ringattn.Sharding(8, mesh)
        x = sharding.split(torch.arange(64.0).sin().view(1, 2, 8, 4), 2)
        schedule = ringattn.AllGather(slices=slices)
        return ringattn.attention(x, x, x, ringattn.Full(), sharding=sharding, schedule=schedule, deterministic=True)

    one, two = (ringattn.simulate(call, 1, ring=ranks).results for ranks in (1, 2))
    assert torch.equal(one[0], torch.cat(two, dim=2))
    with pytest.raises(UnsupportedError, match=r"Use AllGather\(slices=1\)"):
        ringattn.simulate(call, 2, ring=2)
