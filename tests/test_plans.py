"""Laws of plans, and faults planted in them that verification must catch."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn.conformance.drawing import FORMS, LAYOUTS, SCHEDULES
from ringattn.errors import InputError, PlanError
from ringattn.plans import tiles
from ringattn.plans.plan import Plan
from ringattn.plans.steps import RECV_PHASE, SEND_PHASE
from ringattn.schedules.base import Schedule
from tests.conformance import masks as any_mask

SHAPE: dict[str, Any] = {"heads": (4, 2), "head_dims": (8, 8), "dtype": "float32"}


def _plans(schedule: Schedule | str = "route", mask: ringattn.Mask | None = None, **more: object) -> list[Plan]:
    mask = mask or ringattn.Documents([9, 1, 40]) & ringattn.Causal()
    return ringattn.plan_all(mask, 50, more.get("layout", "zigzag"), schedule, ring=4)  # type: ignore[arg-type]


@given(
    data=st.data(),
    length=st.integers(0, 90),
    ranks=st.integers(1, 9),
    layout=st.sampled_from(("auto", *LAYOUTS)),
    schedule=st.sampled_from(("auto", *SCHEDULES, *FORMS)),
)
def test_every_plan_is_right(
    data: st.DataObject, length: int, ranks: int, layout: str, schedule: Schedule | str
) -> None:
    mask = data.draw(any_mask(length))
    plans = ringattn.plan_all(mask, length, layout, schedule, ring=ranks, **SHAPE)
    ringattn.verify(plans)
    where = np.arange(length)
    assert sum(plan.area for plan in plans) == int(mask.dense(where, where).sum())
    assert sum(plan.tokens for plan in plans) == length
    traffic = [plan.traffic() for plan in plans]
    assert sum(t.received_tokens for t in traffic) == sum(t.sent_tokens for t in traffic)
    assert sum(t.backward_received_bytes or 0 for t in traffic) == sum(t.backward_sent_bytes or 0 for t in traffic)
    for rank, whole in enumerate(plans):
        # one rank plans for itself what the plan of all ranks gives it, and explains it
        sharding = ringattn.Sharding(length, ringattn.Mesh.virtual(ranks, rank=rank), layout, mask)
        alone = ringattn.plan(mask, sharding, schedule, **SHAPE)
        assert alone.hash == whole.hash
        assert pickle.loads(pickle.dumps(alone)).hash == alone.hash
        assert alone.explain().startswith(f"rank {rank} of {ranks}")


@given(data=st.data(), length=st.integers(0, 60), ranks=st.integers(1, 7), layout=st.sampled_from(LAYOUTS))
def test_route_receives_exactly_the_keys_its_mask_touches(
    data: st.DataObject, length: int, ranks: int, layout: ringattn.Layout
) -> None:
    mask = data.draw(any_mask(length, predicates=False))
    for plan in ringattn.plan_all(mask, length, layout, "route", ring=ranks):
        sharding = ringattn.Sharding(length, ringattn.Mesh.virtual(ranks, rank=plan.rank), layout)
        touched = mask.dense(sharding.positions, np.arange(length)).any(dim=0)
        touched[sharding.positions] = False
        assert plan.traffic().received_tokens == int(touched.sum())


@given(data=st.data(), length=st.integers(1, 200), ranks=st.integers(1, 8), layout=st.sampled_from(LAYOUTS))
def test_nothing_beats_the_lower_bound(data: st.DataObject, length: int, ranks: int, layout: ringattn.Layout) -> None:
    mask = data.draw(any_mask(length))
    plans = ringattn.plan_all(mask, length, layout, "route", ring=ranks)
    balance = ringattn.balance(plans)
    imbalance = max(balance.area, balance.tokens) + 1e-9
    received = sum(plan.traffic().received_tokens for plan in plans)
    assert ringattn.lower_bound(mask, length, ranks, imbalance) <= received + 1e-6


def test_the_lower_bound_of_one_causal_sequence_is_the_formula() -> None:
    length, ranks = 4096, 8
    pairs, tokens = 1.02 * length * (length + 1) / 2 / ranks, 1.02 * length / ranks
    terms = [max((length**2 - 2 * j * pairs), 0) ** 0.5 for j in range(ranks)]
    formula = sum(max(term, length - j * tokens, 0) for j, term in enumerate(terms)) - length
    assert ringattn.lower_bound(ringattn.Causal(), length, ranks) == pytest.approx(formula, abs=ranks)


def test_ring_relays_no_further_than_anybody_needs() -> None:
    for plan in _plans("ring", ringattn.Window(5), layout="contiguous"):
        assert plan.receives[:, RECV_PHASE].tolist() == ([1] if plan.rank else [])
    causal = _plans("ring", ringattn.Causal(), layout="contiguous")
    assert [len(plan.receives) for plan in causal] == [0, 1, 2, 3]


def test_auto_takes_what_receives_less_and_says_so() -> None:
    assert "auto took route: all ranks together receive" in _plans("auto", ringattn.Causal())[0].explain()
    assert "auto took ring" in _plans("auto", ringattn.Full())[0].explain()


@given(data=st.data(), length=st.integers(0, 60), ranks=st.integers(1, 7), layout=st.sampled_from(LAYOUTS))
def test_ring_that_wastes_nothing_is_known_without_a_cut_by_all_keys(
    data: st.DataObject, length: int, ranks: int, layout: ringattn.Layout
) -> None:
    mask = data.draw(st.one_of(any_mask(length), st.sampled_from((ringattn.Full(), ringattn.Causal()))))
    received = [
        sum(plan.traffic().received_tokens for plan in ringattn.plan_all(mask, length, layout, schedule, ring=ranks))
        for schedule in ("ring", "route")
    ]
    reason = ringattn.plan_all(mask, length, layout, ring=ranks)[0].reason
    if received[0] == received[1]:
        assert reason.startswith(f"auto took ring: all ranks together receive {received[0]} key positions either way")
    else:
        assert reason.startswith("auto took route: all ranks together receive")


def test_the_next_exchange_is_under_way_while_a_step_computes() -> None:
    for plan in _plans("ring", ringattn.Full()):
        assert [bool(step.exchange and step.tiles) for step in plan.steps] == [True, True, True, False]
    for plan in _plans(ringattn.Ring(lookahead=0), ringattn.Full()):
        assert not any(step.exchange and step.tiles for step in plan.steps)


# -- planted faults -------------------------------------------------------------------------------------------------

Fault = Callable[[Plan], Plan]


def _without_tile(plan: Plan) -> Plan:
    return dataclasses.replace(plan, tile_rows=plan.tile_rows[1:], tile_phases=plan.tile_phases[1:])


def _without_phase(plan: Plan) -> Plan:
    kept = plan.tile_phases != plan.tile_phases[-1]
    return dataclasses.replace(plan, tile_rows=plan.tile_rows[kept], tile_phases=plan.tile_phases[kept])


def _doubled_tile(plan: Plan) -> Plan:
    rows, phases = plan.tile_rows, plan.tile_phases
    return dataclasses.replace(
        plan, tile_rows=np.concatenate([rows[:1], rows]), tile_phases=np.concatenate([phases[:1], phases])
    )


def _changed(column: int, by: int) -> Fault:
    def plant(plan: Plan) -> Plan:
        rows = plan.tile_rows.copy()
        rows[0, column] += by
        return dataclasses.replace(plan, tile_rows=rows)

    return plant


def _keys_of_another_phase(plan: Plan) -> Plan:
    """The field's classic: every step reuses the keys of step 0."""
    rows, phases = plan.tile_rows.copy(), plan.tile_phases.copy()
    phases[:] = 0
    return dataclasses.replace(plan, tile_rows=rows, tile_phases=phases)


@pytest.mark.parametrize("schedule", ["ring", "route"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_without_tile, "forward, computes the wrong pairs"),
        (_without_phase, "forward, computes the wrong pairs"),
        (_doubled_tile, "forward, computes the wrong pairs"),
        (_changed(tiles.LOW, 1), "forward, computes the wrong pairs"),
        (_changed(tiles.HIGH, -1), "forward, computes the wrong pairs"),
        (_changed(tiles.HIGH, -99), "forward, computes the wrong pairs"),
        (_changed(tiles.M, -1), "forward, computes the wrong pairs"),
        (_changed(tiles.PARTIAL, 1), "forward, computes the wrong pairs"),
        (_changed(tiles.K, 1), "does not hold at that place"),
        (_changed(tiles.Q_POSITION, 1), "does not hold at that place"),
        (_keys_of_another_phase, "does not hold at that place"),
    ],
)
def test_faults_of_one_rank(schedule: str, fault: Fault, words: str) -> None:
    plan = _plans(schedule)[3]
    plan.verify()
    with pytest.raises(PlanError, match=words):
        fault(plan).verify()


def _cut_rows(name: str) -> Fault:
    return lambda plan: dataclasses.replace(plan, **{name: getattr(plan, name)[1:]})


def _longer(name: str, column: int) -> Fault:
    """The last row of a table ends seven rows later."""

    def plant(plan: Plan) -> Plan:
        table = getattr(plan, name).copy()
        table[-1, column] += 7
        return dataclasses.replace(plan, **{name: table})

    return plant


def _late(plan: Plan) -> Plan:
    """The first exchange moved behind all others, its tiles left where they were."""
    receives = plan.receives.copy()
    receives[receives[:, RECV_PHASE] == receives[0, RECV_PHASE], RECV_PHASE] = 9
    order = np.argsort(receives[:, RECV_PHASE], kind="stable")
    return dataclasses.replace(plan, receives=receives[order])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_cut_rows("sends"), "forward: rank 1 sends 1 messages to rank 2, which receives 2 from it"),
        (_cut_rows("grad_sends"), "does not send home the gradient"),
        (_cut_rows("grad_receives"), "A gradient does not reach its owner"),
        (_late, "a phase whose keys it never held"),
        (_longer("receives", 4), r"message with rank 0 takes rows \[\[0, 19\]\] of a buffer of 12 rows"),
        (_longer("sends", 4), r"message with rank 2 takes rows \[\[0, 19\]\] of a buffer of 12 rows"),
        (lambda plan: dataclasses.replace(plan, gradient_wire="input"), "planned for another"),
        (lambda plan: dataclasses.replace(plan, grad_sends=plan.grad_sends + np.array([0, 0, 9, 0, 0])), "never held"),
    ],
)
def test_faults_between_ranks(fault: Fault, words: str) -> None:
    plans = _plans("ring")
    ringattn.verify(plans)
    plans[1] = fault(plans[1])
    with pytest.raises(PlanError, match=words):
        ringattn.verify(plans)


def test_a_cycle_is_a_deadlock() -> None:
    """Two ranks that each first wait for the message the other sends second."""
    plans = ringattn.plan_all(ringattn.Full(), 8, "contiguous", "route", ring=3)
    ringattn.verify(plans)
    plans = [dataclasses.replace(p, sends=_swapped(p.sends)) for p in plans]
    with pytest.raises(PlanError, match="deadlock; in a circle wait rank 0 in the exchange of phase 1 for rank"):
        ringattn.verify(plans)


def _swapped(sends: np.ndarray) -> np.ndarray:
    out = sends.copy()
    out[:, SEND_PHASE] = 3 - out[:, SEND_PHASE]
    return out[np.argsort(out[:, SEND_PHASE], kind="stable")]


def test_the_last_gradients_hide_behind_own_tiles() -> None:
    for schedule in ("ring", "route"):
        for plan in _plans(schedule, ringattn.Full()):
            assert all(step.tiles for step in plan.backward_steps[:-2]) and plan.backward_steps[-1].tiles
            assert plan.backward_steps[-1].exchange and plan.backward_steps[-1].phase == 0


def test_a_fault_in_the_backward_steps_is_a_fault() -> None:
    plan = _plans("ring", ringattn.Full())[1]
    broken = dataclasses.replace(plan)
    last = plan.backward_steps[-1]
    broken.__dict__["backward_steps"] = (*plan.backward_steps[:-1], dataclasses.replace(last, tiles=tiles.NO_TILES))
    with pytest.raises(PlanError, match="backward, computes the wrong pairs"):
        broken.verify()


def test_verify_wants_every_rank() -> None:
    with pytest.raises(PlanError, match="every rank's plan, in order"):
        ringattn.verify(_plans()[:-1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ringattn.plan_all(ringattn.Causal(), 8, "spiral"),
            "'auto', 'contiguous', 'zigzag', 'striped', 'balanced'",
        ),
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, schedule="rnig"), "'auto', 'ring', 'route'"),
        (lambda: ringattn.plan_all(ringattn.Causal(), -1), "a number of tokens"),
        (lambda: ringattn.plan_all("causal", 8), "mask must be a ringattn mask"),  # type: ignore[arg-type]
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, ring=0), "at least one rank"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, ulysses=0), "at least one rank"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, heads=(4, 2), dtype="float32"), "all given"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, **{**SHAPE, "heads": (4, 3)}), "multiple of key heads"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, **{**SHAPE, "dtype": "float7"}), "torch dtype"),
        (ringattn.plan_all(ringattn.Causal(), 8)[0].memory, "give heads, head_dims and dtype"),
        (lambda: ringattn.Ring(lookahead=2), "lookahead is 0 or 1"),
        (lambda: ringattn.Ring(gradient_wire="bf16"), "'float32' or 'input'"),  # type: ignore[arg-type]
    ],
)
def test_bad_requests_say_what_is_needed(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_a_tile_that_is_not_asked_is_a_fault() -> None:
    mask = ringattn.Predicate(lambda q, k: (q - k) % 3 == 0) & ringattn.Causal()
    plan = ringattn.plan_all(mask, 90, "zigzag", "route", ring=3)[1]
    plan.verify()
    rows = plan.tile_rows.copy()
    rows[0, tiles.PARTIAL] = 0
    with pytest.raises(PlanError, match="computes the wrong pairs"):
        dataclasses.replace(plan, tile_rows=rows).verify()


@pytest.mark.parametrize(
    "fault",
    [
        _changed(tiles.Q_STEP, -1),
        _changed(tiles.K_STRIDE, -9),
        lambda plan: dataclasses.replace(plan, tile_phases=plan.tile_phases[:-1]),
        lambda plan: dataclasses.replace(plan, tile_rows=np.where(plan.tile_rows == 1, -1, plan.tile_rows)),
        lambda plan: dataclasses.replace(plan, grad_sends=plan.grad_sends * np.array([1, 1, 0, 1, 1])),
    ],
)
def test_plans_out_of_form_are_refused_as_plans(fault: Fault) -> None:
    with pytest.raises(PlanError):
        fault(_plans("route")[3]).verify()


def test_a_band_wider_than_its_tile_is_a_fault() -> None:
    """It holds no other pairs, but kernels read bands as canonical and would compute others."""
    plan = ringattn.plan_all(ringattn.Causal(), 16, "striped", "route", ring=2)[1]
    with pytest.raises(PlanError, match="canonical"):
        _changed(tiles.HIGH, 1)(plan).verify()


def _of_9000(layout: str) -> ringattn.Sharding:
    return ringattn.Sharding(10**6, ringattn.Mesh.virtual(ring=9000), layout)


def _scattered(length: int, ranks: int) -> ringattn.Layout:
    owners = np.random.default_rng(0).integers(0, ranks, length)
    return ringattn.Explicit([[(i, i + 1) for i in np.flatnonzero(owners == r).tolist()] for r in range(ranks)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, ring=2**63), "number of ranks, below"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 8, ring=10**6), "up to 131072 ranks; got 1000000"),
        (lambda: ringattn.plan_all(ringattn.Full(), 10**8, ring=10**5), "a table of 10,000,000,000 tiles"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 2**17, _scattered(2**17, 8), ring=8), "a layout in longer runs"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 2**63), "a number of tokens, from 0 to below 2.40"),
        (ringattn.plan_all(ringattn.Causal(), 2**39)[0].verify, "up to 2,147,483,648 are listed"),
        (lambda: ringattn.plan_all(ringattn.Causal(), 2**39, "balanced", ring=4), "up to 2,147,483,647 tokens"),
        (lambda: ringattn.lower_bound(ringattn.Causal(), 2**39, 4), "below 2.28"),
        (
            lambda: ringattn.plan(ringattn.Causal(), _of_9000("zigzag"), "ring"),
            "up to 8192 ranks; got 9000",
        ),
    ],
)
def test_what_is_too_large_is_refused_before_memory_is_taken(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_pairs_beyond_64_bits_are_counted() -> None:
    length = 2**33
    plans = ringattn.plan_all(ringattn.Causal(), length, ring=4)
    assert sum(plan.area for plan in plans) == length * (length + 1) // 2
