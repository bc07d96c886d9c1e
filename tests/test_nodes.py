"""Meshes that know their nodes: what crosses between them, once, and faults on the way that verification must catch."""

from __future__ import annotations

import dataclasses
import datetime
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore

import ringattn
from ringattn import Causal, Documents, Full, Ring, Route, Window, conformance
from ringattn.errors import PlanError, UnsupportedError
from ringattn.meeting import Meeting
from ringattn.plans.plan import Plan
from ringattn.plans.steps import (
    GRAD_BUFFER,
    GRAD_PEER,
    GRAD_PHASE,
    RECV_ORIGIN,
    RECV_SENDER,
    SEND_PEER,
    SEND_PHASE,
    SEND_SOURCE,
)
from ringattn.schedules.base import Schedule

PACKED = Documents([300, 1, 40, 683]) & Causal()
MASKS = {"full": Full(), "causal": Causal(), "documents": PACKED, "window": Window(200)}
SHAPE = {"heads": (4, 2), "head_dims": (8, 8), "dtype": "float32"}


def plans(schedule: Schedule, mask: str = "full", ranks: int = 12, node: int = 4, layout: str = "zigzag") -> list[Plan]:
    return ringattn.plan_all(MASKS[mask], 1024, layout, schedule, ranks, node=node, **SHAPE)  # type: ignore[arg-type]


def crossing(made: list[Plan]) -> int:
    return sum(plan.traffic().between_nodes_tokens for plan in made)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", MASKS)
def test_what_a_node_needs_crosses_once(mask: str, layout: str) -> None:
    """Every key position that ranks of a node need of another one comes in once, and no other does."""
    for ranks, node in ((12, 4), (7, 3)):
        made = plans(Route(node_aware=True), mask, ranks, node, layout)
        ringattn.verify(made)
        sharding = ringattn.Sharding(1024, ringattn.Mesh.virtual(ranks), layout)
        owner = np.concatenate([np.full(n, rank) for rank, n in enumerate(sharding.counts)])
        place = np.concatenate([sharding.positions_of(rank).numpy() for rank in range(ranks)])
        least = 0
        for first in range(0, ranks, node):
            inside = owner // node == first // node
            needed = MASKS[mask].dense(place[inside], place).any(dim=0).numpy()
            least += int((needed & ~inside).sum())
        assert crossing(made) == least <= crossing(plans(Route(), mask, ranks, node, layout))


@pytest.mark.parametrize(
    ("schedule", "mask"),
    [(Route(node_aware=True), "full"), (Route(node_aware=True), "causal"), (Ring(double=True), "full")],
)
def test_eight_nodes_of_eight_move_an_eighth(schedule: Schedule, mask: str) -> None:
    made, flat = (plans(each, mask, 64, 8) for each in (schedule, Route()))
    ringattn.verify(made)
    assert 7 * crossing(made) <= crossing(flat)
    assert 7 * sum(x.traffic().between_nodes_messages for x in made) <= sum(
        x.traffic().between_nodes_messages for x in flat
    )


def test_without_nodes_nothing_crosses() -> None:
    for schedule in (Route(node_aware=True), Ring(double=True)):
        alone, flat = (ringattn.plan_all(Causal(), 1024, "zigzag", each, 6) for each in (schedule, type(schedule)()))
        assert crossing(alone) == 0
        assert [plan.traffic() for plan in alone] == [plan.traffic() for plan in flat]


def test_a_double_ring_wants_whole_nodes() -> None:
    with pytest.raises(UnsupportedError, match="12 ranks are no multiple of 5"):
        plans(Ring(double=True), node=5)


def test_one_rank_plans_what_all_do() -> None:
    for schedule in (Route(node_aware=True), Ring(double=True)):
        for plan in plans(schedule, "documents", layout="balanced"):
            mesh = ringattn.Mesh.virtual(12, rank=plan.rank, node=4)
            sharding = ringattn.Sharding(1024, mesh, "balanced", PACKED)
            assert ringattn.plan(PACKED, sharding, schedule, **SHAPE).hash == plan.hash  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [Route(node_aware=True, buffer=40), Ring(double=True, lookahead=0)], ids=str)
def test_results_and_bytes(schedule: Schedule) -> None:
    """As on one rank; and the transport counts what the plan says."""
    full = [torch.randn(1, heads, 1024, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2)]

    def run(mesh: ringattn.Mesh) -> list[torch.Tensor]:
        sharding = ringattn.Sharding(1024, mesh, "balanced", PACKED)
        q, k = (sharding.split(x, 2).requires_grad_() for x in full)
        taken = schedule if mesh.size > 1 else "auto"
        out = ringattn.attention(q, k, k.detach() * 2, PACKED, sharding=sharding, schedule=taken)
        out.square().sum().backward()
        found = [x.detach() for x in (out, q.grad, k.grad) if x is not None]
        return [x.index_select(2, sharding.positions.argsort()) for x in found] + [sharding.positions]

    (alone,) = ringattn.simulate(run, ring=1).results
    simulation = ringattn.simulate(run, ring=6, node=3)
    order = torch.cat([found[3] for found in simulation.results]).argsort()
    for n in range(3):
        whole = torch.cat([found[n] for found in simulation.results], dim=2)[:, :, order]
        torch.testing.assert_close(whole, alone[n], rtol=2e-5, atol=2e-5)
    made = ringattn.plan_all(PACKED, 1024, "balanced", schedule, 6, node=3, **SHAPE)  # type: ignore[arg-type]
    for counted, plan in zip(simulation.traffic, made, strict=True):
        moved = plan.traffic()
        assert counted.received_bytes == (moved.received_bytes or 0) + (moved.backward_received_bytes or 0)


@pytest.mark.parametrize("schedule", [Route(node_aware=True), Ring(double=True)], ids=str)
def test_conformance(schedule: Schedule) -> None:
    report = conformance.check(schedule=schedule, count=12)
    assert report.passed, report
    assert len(report.computed) > 9


def test_sequences_that_begin_within_nodes_share_what_all_of_them_do() -> None:
    meshes = (ringattn.Mesh(ring=ring, data=data, node=8) for ring, data in ((12, 1), (12, 2), (4, 4), (16, 2)))
    assert [mesh.sequence_node for mesh in meshes] == [8, 4, 4, 8]


def test_ranks_find_out_who_shares_a_host() -> None:
    """At the meeting in which they compare their arguments."""
    limit = datetime.timedelta(seconds=20)
    for hosts, node in (("aabb", 2), ("abab", None), ("aabc", None), ("aaaa", None), ("abcd", 1)):
        store = HashStore()

        def agree(rank: int, store: HashStore = store, hosts: str = hosts) -> int | None:
            return Meeting(store, rank, 4, limit).agree({"ring": 4}, None, hosts[rank]).node

        with ThreadPoolExecutor(4) as ranks:
            assert list(ranks.map(agree, range(4))) == [node] * 4


# -- planted faults -------------------------------------------------------------------------------------------------


def relayed() -> tuple[list[Plan], int, int]:
    """Plans, a rank that sends gradients to one of its node which passes them on, and that rank."""
    made = plans(Route(node_aware=True))
    for plan in made:
        for peer, buffer in plan.grad_sends[:, [GRAD_PEER, GRAD_BUFFER]].tolist():
            held = plan.receives[plan.receives[:, 0] == buffer]
            if peer not in held[held[:, RECV_SENDER] == peer, RECV_ORIGIN].tolist():
                return made, plan.rank, peer
    raise AssertionError("no gradient is passed on")


def test_a_gradient_summed_twice_inside_a_node() -> None:
    made, user, gate = relayed()
    ringattn.verify(made)
    came = made[gate].grad_receives
    row = came[(came[:, GRAD_PEER] == user) & (came[:, GRAD_BUFFER] != 0)][0]
    order = np.flatnonzero((came == row).all(axis=1))[0]
    nth = int((came[:order, [GRAD_PHASE, GRAD_PEER]] == row[[GRAD_PHASE, GRAD_PEER]]).all(axis=1).sum())
    sent = made[user].grad_sends
    same = np.flatnonzero((sent[:, [GRAD_PHASE, GRAD_PEER]] == [row[GRAD_PHASE], gate]).all(axis=1))[nth]
    made[gate] = dataclasses.replace(made[gate], grad_receives=np.insert(came, order, row, axis=0))
    made[user] = dataclasses.replace(made[user], grad_sends=np.insert(sent, same, sent[same], axis=0))
    with pytest.raises(PlanError, match="reaches twice"):
        ringattn.verify(made)


def test_a_sum_that_crosses_before_it_is_complete() -> None:
    made, _, gate = relayed()
    early, origins = made[gate].grad_sends.copy(), made[gate].receives
    crossing = early[:, GRAD_PEER] // 4 != gate // 4
    assert crossing.any() and len(origins)
    last = early[crossing][-1, [GRAD_PHASE, GRAD_PEER]]
    moved = (early[:, [GRAD_PHASE, GRAD_PEER]] == last).all(axis=1)
    early[moved, GRAD_PHASE] -= 1
    home = made[last[1]].grad_receives.copy()
    home[(home[:, [GRAD_PHASE, GRAD_PEER]] == [last[0], gate]).all(axis=1), GRAD_PHASE] -= 1
    early, home = (x[np.lexsort((x[:, 3], x[:, GRAD_PEER], x[:, GRAD_PHASE]))] for x in (early, home))
    made[gate] = dataclasses.replace(made[gate], grad_sends=early)
    made[last[1]] = dataclasses.replace(made[last[1]], grad_receives=home)
    with pytest.raises(PlanError, match="does not reach its owner"):
        ringattn.verify(made)


def test_a_stage_out_of_order() -> None:
    """What is passed on leaves in the exchange in which it arrives."""
    made, _, gate = relayed()
    sends = made[gate].sends.copy()
    passed = np.flatnonzero(sends[:, SEND_SOURCE] != 0)
    sends[passed, SEND_PHASE] = sends[passed, SEND_SOURCE]
    sends = sends[np.lexsort((sends[:, SEND_PEER], sends[:, SEND_PHASE]))]
    with pytest.raises(PlanError, match="before they arrive"):
        dataclasses.replace(made[gate], sends=sends).verify()


def test_a_span_that_is_lost_on_the_way() -> None:
    made, _, gate = relayed()
    sends = made[gate].sends
    first = int(np.flatnonzero(sends[:, SEND_SOURCE] != 0)[0])
    made[gate] = dataclasses.replace(made[gate], sends=np.delete(sends, first, axis=0))
    with pytest.raises(PlanError, match="sends"):
        ringattn.verify(made)
