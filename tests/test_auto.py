"""What ``auto`` takes where there is more to choose than by which keys travel, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringattn
from ringattn.plans.candidates import Received
from ringattn.plans.passing import PassPlan
from ringattn.plans.planning import _demand
from ringattn.plans.ulysses import UlyssesPlan

SHAPE: dict[str, Any] = {"heads": (64, 8), "head_dims": (128, 128), "dtype": "bfloat16"}
LONG = 1 << 17
MASKS = (ringattn.Causal(), ringattn.Documents([1000, 31, LONG // 2, LONG // 2 - 1031]) & ringattn.Causal())


def _plan(length: int = LONG, **options: Any) -> ringattn.Plan:
    return ringattn.plan_all(ringattn.Causal(), length, **{**SHAPE, **options})[0]


def test_fewer_bytes_between_nodes_decide_where_all_take_as_long() -> None:
    flat, aware, groups = _plan(ring=64), _plan(ring=64, node=8), _plan(8 * LONG, ring=8, ulysses=8, node=8)
    assert flat.description.startswith("route:")
    assert aware.description.startswith("route(node_aware):")
    assert isinstance(groups, UlyssesPlan)
    assert "route(node_aware)" in groups.reason and "between nodes" in groups.reason


def test_sequences_that_begin_within_nodes_are_of_several() -> None:
    """Three replicas of 64 ranks on two nodes of 96: the second's first half is on the first."""
    mesh = ringattn.Mesh(ring=64, data=3, rank=0, node=96)
    sharding = ringattn.Sharding(LONG, mesh, "contiguous", ringattn.Causal())
    plan = ringattn.plan(ringattn.Causal(), sharding, **SHAPE)
    assert mesh.sequence_node == 32 and "route(node_aware)" in plan.reason
    alone = ringattn.Sharding(LONG, ringattn.Mesh(ring=32, data=6, rank=0, node=64), "contiguous", ringattn.Causal())
    assert "route(node_aware)" not in ringattn.plan(ringattn.Causal(), alone, **SHAPE).reason


def test_heads_that_would_make_a_rank_wait_for_others_are_not_dealt() -> None:
    uneven = _plan(ring=2, ulysses=3, heads=(4, 4))
    assert not isinstance(uneven, UlyssesPlan) and "ulysses(auto)" in uneven.reason
    few = _plan(ring=2, ulysses=6, heads=(4, 4))
    assert not isinstance(few, UlyssesPlan) and "ulysses" not in few.reason


def test_few_queries_travel_to_many_keys() -> None:
    few = ringattn.plan_all(ringattn.Full(), 64, kv_length=LONG, ring=8, **SHAPE)[0]
    assert isinstance(few, PassPlan) and "passq" in few.reason
    many = ringattn.plan_all(ringattn.Full(), LONG, kv_length=LONG // 4, ring=8, **SHAPE)[0]
    assert not isinstance(many, PassPlan)


def test_sums_over_keys_are_exchanged_whatever_the_mesh() -> None:
    plan = _plan(ring=4, ulysses=2, mechanism=ringattn.Linear())
    assert plan.description.startswith("scan:")


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_is_estimated_is_what_the_plans_receive(mask: ringattn.Mask) -> None:
    for node, schedule in ((None, ringattn.Route()), (4, ringattn.Route()), (4, ringattn.Route(node_aware=True))):
        sharding = ringattn.Sharding(LONG, ringattn.Mesh.virtual(16, node=node), "auto", mask)
        moved = Received.of(_demand(mask, sharding, sharding), schedule.node_aware)
        assert moved is not None
        plans = ringattn.plan_all(mask, LONG, sharding.layout, schedule, ring=16, node=node)
        between = [plan.traffic().between_nodes_tokens for plan in plans]
        if not schedule.node_aware:
            assert moved.between.tolist() == between
            assert (moved.inside + moved.between).tolist() == [plan.traffic().received_tokens for plan in plans]
        else:  # which of a node's ranks gets what for the others is not estimated
            assert int(moved.between.sum()) == pytest.approx(sum(between), rel=0.01)


def test_every_rank_and_a_call_take_the_same() -> None:
    mask, length, heads = ringattn.Documents([300, 1, 723]) & ringattn.Causal(), 1024, (6, 3)
    shape: dict[str, Any] = {"heads": heads, "head_dims": (8, 8), "dtype": "float32"}
    plans = ringattn.plan_all(mask, length, ring=2, ulysses=2, **shape)
    ringattn.verify(plans)

    def moved(mesh: ringattn.Mesh) -> tuple[int, str]:
        sharding = ringattn.Sharding(length, mesh, mask=mask)
        x = [torch.zeros(1, h, sharding.count, 8) for h in (6, 3, 3)]
        ringattn.attention(x[0], x[1], x[2], mask, sharding=sharding)
        planned = ringattn.plan(mask, sharding, **shape)
        return mesh.connected().counters.received_bytes, planned.hash

    for plan, (received, planned) in zip(plans, ringattn.simulate(moved, ring=2, ulysses=2).results, strict=True):
        assert (plan.traffic().received_bytes, plan.hash) == (received, planned)


def test_bits_that_must_not_depend_on_ranks_have_all_heads_at_once() -> None:
    def attend(mesh: ringattn.Mesh) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        q, k = torch.randn(1, 4, 40, 8, generator=g), torch.randn(1, 4, 90, 8, generator=g)
        sharding, kv = ringattn.Sharding(40, mesh), ringattn.Sharding(90, mesh)
        out = ringattn.attention(
            sharding.split(q, 2),
            kv.split(k, 2),
            kv.split(k, 2),
            ringattn.Full(),
            sharding=sharding,
            kv_sharding=kv,
            deterministic=True,
        )
        return sharding.join(out, 2)

    one, both = (ringattn.simulate(attend, ring=r, ulysses=u).results[0] for r, u in ((1, 1), (2, 2)))
    assert torch.equal(one, both)
