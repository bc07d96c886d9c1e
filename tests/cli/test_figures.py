"""Pictures show what the plans do: the painted matrix is the mask, and the timelines are consistent."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

import ringattn
from ringattn import masks
from ringattn.advice import figures
from ringattn.schedules import Scheme

CASES = [
    ("causal", "zigzag", "ring", 4),
    ("documents:40,1,59&causal", "contiguous", "route", 3),
    ("window:9,3", "striped", "ring", 5),
    ("full", "striped", "route", 2),
]


@pytest.mark.parametrize(("text", "layout", "schedule", "ranks"), CASES)
def test_every_pair_has_the_colour_of_the_rank_that_computes_it(
    text: str, layout: str, schedule: str, ranks: int
) -> None:
    mask = masks.parse(text)
    plans = ringattn.plan_all(mask, 100, layout=layout, schedule=schedule, ring=ranks)
    colours = figures.rank_colours(ranks)
    image = figures.matrix(plans, 100, colours)

    expected = np.ones((100, 100, 3))
    allowed = mask.dense(np.arange(100), np.arange(100)).numpy()
    sharding = ringattn.Sharding(100, ringattn.Mesh.virtual(ring=ranks), layout=layout)
    for rank in range(ranks):
        rows = sharding.positions_of(rank).numpy()
        expected[rows] = np.where(allowed[rows][..., None], colours[rank], 1.0)
    np.testing.assert_allclose(image, expected)


def test_a_long_sequence_is_drawn_in_a_bounded_picture() -> None:
    plans = ringattn.plan_all(ringattn.Causal(), 100_000, layout="zigzag", schedule="ring", ring=4)
    image = figures.matrix(plans, 100_000, figures.rank_colours(4))
    assert image.shape == (600, 600, 3)
    painted = image.min(axis=2) < 1
    assert painted[np.tril_indices(600, -1)].all()
    assert not painted[np.triu_indices(600, 1)].any()


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(("text", "layout", "schedule", "ranks"), CASES)
def test_timelines_hold_all_work_once_and_nothing_overlaps(
    text: str, layout: str, schedule: str, ranks: int, lookahead: int
) -> None:
    kind = ringattn.Ring if schedule == "ring" else ringattn.Route
    mask = masks.parse(text)
    plans = ringattn.plan_all(mask, 100, layout=layout, schedule=kind(lookahead=lookahead), ring=ranks)
    segments = figures.timelines(plans, pairs_per_position=20.0)
    for plan in plans:
        own = [segment for segment in segments if segment.rank == plan.rank]
        assert sum(s.stop - s.start for s in own if s.kind == "compute") == plan.area
        lane = sorted((s.start, s.stop) for s in own if s.kind in ("compute", "wait"))
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(lane))
        assert len([s for s in own if s.kind == "exchange"]) == len([s for s in plan.steps if s.exchange])


@pytest.mark.parametrize("heads", [(4, 2), (6, 3)])
@pytest.mark.parametrize("schedule", [ringattn.AllGather(slices=2), ringattn.Ulysses(slices=2)], ids=str)
def test_slices_are_drawn_by_their_heads(schedule: Scheme, heads: tuple[int, int]) -> None:
    ring, ulysses = (2, 2) if isinstance(schedule, ringattn.Ulysses) else (4, 1)
    asked = functools.partial(ringattn.plan_all, ringattn.Full(), 96, "contiguous", schedule, ring, ulysses)
    plans = asked(heads=heads, head_dims=(8, 8), dtype="float32")
    segments = figures.timelines(plans, pairs_per_position=1.0)
    for plan in plans:
        own = [x for x in segments if x.rank == plan.rank]
        assert sum(x.stop - x.start for x in own if x.kind == "compute") == pytest.approx(plan.area)
        if ulysses == 1:  # whose ranks wait for each other
            received = sum(x.stop - x.start for x in own if x.kind == "exchange")
            assert received == pytest.approx(plan.traffic().received_tokens)


def test_without_lookahead_a_rank_waits_where_it_would_have_computed() -> None:
    def waited(lookahead: int) -> float:
        schedule = ringattn.Ring(lookahead=lookahead)
        plans = ringattn.plan_all(ringattn.Causal(), 256, layout="zigzag", schedule=schedule, ring=4)
        segments = figures.timelines(plans, pairs_per_position=20.0)
        return sum(s.stop - s.start for s in segments if s.kind == "wait")

    assert waited(1) < waited(0) / 2
