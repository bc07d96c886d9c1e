"""Routes in stages: what arrives in one exchange is bounded, ranks do not wait in chains, and time is as modelled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn import Causal, Documents, Full, Route
from ringattn.advice.figures import timelines
from ringattn.conformance.drawing import LAYOUTS
from ringattn.errors import InputError
from ringattn.plans.clock import Link, Rates, Times, timed
from ringattn.plans.demand import Demand
from ringattn.plans.plan import Plan
from ringattn.plans.shape import Shape
from tests.conformance import masks as any_mask

SHARD = 1024
SHAPE: dict[str, Any] = {"heads": (64, 8), "head_dims": (128, 128), "dtype": "bfloat16"}
RATES = Rates(forward=4.0, backward=10.0, node=2, inside=Link(1e9, 0.0), across=Link(1.0, 3.0))
"""A pair a second, a row of one byte a second between nodes."""


def lengths(tokens: int, seed: int = 0) -> list[int]:
    """Lognormal documents, most of them shorter than a shard."""
    rng, out = np.random.default_rng(seed), [0]
    while sum(out) < tokens:
        out.append(min(int(np.clip(rng.lognormal(np.log(SHARD / 4), 1.6), 1, 16 * SHARD)), tokens - sum(out)))
    return out[1:]


def plans(schedule: Route, ranks: int = 64) -> list[Plan]:
    length = SHARD * ranks
    mask = Documents(lengths(length)) & Causal()
    return ringattn.plan_all(mask, length, "balanced", schedule, ranks, node=8, **SHAPE)


def times(made: list[Plan], rates: Rates, *, backward: bool = False) -> Times:
    assert made[0].shape is not None
    return timed(made, made[0].shape, rates, backward=backward)


@given(data=st.data(), length=st.integers(0, 90), ranks=st.integers(1, 9), layout=st.sampled_from(LAYOUTS))
def test_what_all_ranks_need_is_seen_without_a_cut(
    data: st.DataObject, length: int, ranks: int, layout: ringattn.Layout
) -> None:
    mask = data.draw(any_mask(length))
    spans = ringattn.Sharding(length, ringattn.Mesh.virtual(ranks), layout).spans
    demand = Demand(mask, *mask.classify(length, length), spans, spans, ranks)
    needed = demand.needed_by_all(1 << 20)
    if needed is None:
        assert (spans[:, 4] > 1).any()
        return
    alone = [demand.keys_needed_by(rank) for rank in range(ranks)]
    np.testing.assert_array_equal(needed, np.concatenate(alone))
    assert demand.needed_by_all(len(needed) - 1) is None or not len(needed)


@pytest.mark.parametrize("buffer", [SHARD, 3 * SHARD])
@pytest.mark.parametrize("mask", ["documents", "causal"])
def test_what_arrives_in_an_exchange_is_bounded(mask: str, buffer: int) -> None:
    made = (
        plans(Route(buffer=buffer), 24)
        if mask == "documents"
        else ringattn.plan_all(Causal(), 24 * SHARD, "zigzag", Route(buffer=buffer), 24)
    )
    ringattn.verify(made)
    exchanges = [step.exchange for plan in made for step in plan.steps if step.exchange]
    for exchange in exchanges:
        for side in (exchange.receives, exchange.sends):
            assert len(side) == 1 or sum(item.rows for item in side) <= buffer
    assert max(len(exchange.receives) for exchange in exchanges) > (buffer > SHARD)


def test_fewer_stages_are_fewer_exchanges() -> None:
    def most(route: Route) -> int:
        return max(sum(bool(step.exchange) for step in plan.steps) for plan in plans(route))

    assert most(Route(stages=1, buffer=64 * SHARD)) == 1
    assert most(Route(stages=4, buffer=64 * SHARD)) < most(Route(buffer=1))
    assert str(Route(stages=2, buffer=9)) == "route(stages=2, buffer=9)"


def test_ranks_do_not_wait_in_chains() -> None:
    """An exchange of many messages, or some of about the same length, end near what the busiest link takes."""
    alone, some = (plans(route) for route in (Route(buffer=1), Route(stages=4, buffer=8 * SHARD)))
    quick = Rates(forward=690e12 / 8)  # shards of an eighth of the tokens
    slow, fast = times(alone, quick), times(some, quick)
    assert fast.bound == pytest.approx(slow.bound)
    assert fast.makespan < 1.6 * fast.bound and fast.makespan < slow.makespan / 1.2
    assert fast.bare == 0


def test_every_exchange_travels_behind_tiles() -> None:
    for backward in (False, True):
        time = times(plans(Route(stages=4)), Rates(), backward=backward)
        assert time.exchanges > 200 and time.bare < time.exchanges / 20


def test_the_picture_of_the_readme_idles_nowhere() -> None:
    """Four ranks, three documents: the last rank is done when the busiest one has computed."""
    mask = Documents([1500, 1, 1498]) & Causal()
    made = ringattn.plan_all(mask, 2999, ring=4)
    pairs, rows = (sum(x) for x in zip(*((plan.area, plan.traffic().received_tokens) for plan in made), strict=True))
    drawn = timelines(made, pairs / rows / 2)  # receiving takes half as long as computing
    assert max(segment.stop for segment in drawn) <= 1.1 * max(plan.area for plan in made)


def test_time_by_hand() -> None:
    """Two nodes of two ranks of one key each, everybody sees everything."""
    made = ringattn.plan_all(Full(), 4, "contiguous", Route(buffer=1), 4)
    found = timed(made, Shape(1, 1, 1, 1, 1, "float16", 2), RATES)
    # Exchange d: from d places back. All but two of them cross nodes in each of 1 and 3: 3 s and 4 bytes, thrice,
    # with a pair computed meanwhile; a pair after the last.
    assert found.makespan == pytest.approx(3 * 7 + 1) and found.computing.tolist() == [4.0] * 4
    assert found.bound == pytest.approx(8) and found.exchanges == 12 and found.bare == 0
    # keys and float32 gradients: the first exchange of keys alone, the second too, the third and fourth of both
    back = timed(made, Shape(1, 1, 1, 1, 1, "float16", 2), RATES, backward=True)
    assert back.makespan > found.makespan and back.bound == pytest.approx(2 * 4 + 2 * 8)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 3])
def test_slices_of_heads_take_as_long_as_all_of_them(kv_heads: int, backward: bool) -> None:
    shape = {**SHAPE, "heads": (2 * kv_heads, kv_heads)}
    whole, sliced = (
        ringattn.plan_all(Causal(), 96, "zigzag", ringattn.AllGather(slices=slices), 3, **shape) for slices in (1, 2)
    )
    slow, quick = Link(1.0, 0.0), Link(np.inf, 0.0)
    moved, other = (times(made, Rates(inside=slow), backward=backward) for made in (sliced, whole))
    np.testing.assert_allclose(moved.computing, other.computing)
    np.testing.assert_allclose(moved.links, other.links)
    hidden = times(sliced, Rates(inside=quick), backward=backward)
    assert hidden.makespan == pytest.approx(hidden.computing.max())


@pytest.mark.parametrize("name", ["stages", "buffer"])
@pytest.mark.parametrize("value", [0, True, 1.5, "2"])
def test_limits_are_numbers(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"Route's {name}"):
        Route(**{name: value})  # type: ignore[arg-type]
