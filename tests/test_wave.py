"""The wave: what its plans hand from rank to rank, what its verification catches, what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn.errors import InputError, PlanError, UnsupportedError
from ringattn.mechanisms.mocha import MoChA
from ringattn.mechanisms.monotonic import Monotonic
from ringattn.mechanisms.ordered import Ordered
from ringattn.plans.wave import WavePlan, plan_wave
from ringattn.plans.wavefront import Parcel, WaveStep, verify_waves
from ringattn.schedules.wave import Wave

SHAPE: dict[str, Any] = {"heads": (4, 2), "head_dims": (8, 6), "dtype": "bfloat16"}
MONOTONIC = Monotonic()


def _plans(
    length: int, ranks: int, block: int, mechanism: Ordered = MONOTONIC, keys: int | None = None
) -> list[WavePlan]:
    plans = []
    for rank in range(ranks):
        mesh = ringattn.Mesh.virtual(ranks, rank=rank)
        kv = None if keys is None else ringattn.Sharding(keys, mesh)
        sharding = ringattn.Sharding(length, mesh)
        plans.append(plan_wave(sharding, kv, mechanism=mechanism, schedule=Wave(block), **SHAPE))
    return plans


@given(
    length=st.integers(0, 40),
    keys=st.integers(0, 40),
    ranks=st.sampled_from((1, 2, 3, 5, 8)),
    block=st.integers(1, 50),
    width=st.integers(1, 50),
)
def test_every_plan_is_right(length: int, keys: int, ranks: int, block: int, width: int) -> None:
    plans = _plans(length, ranks, block, MoChA(width), keys)
    verify_waves(plans)
    assert sum(plan.tokens for plan in plans) == length and sum(plan.key_tokens for plan in plans) == keys
    blocks = len(plans[0].blocks)
    assert plans[0].steps == (blocks + ranks - 1 if blocks else 0)
    working = [step.number for plan in plans for step in plan.forward if step.block is not None]
    assert {*working} == {*range(plans[0].steps)}, "some rank works in each of the steps"
    traffic = [plan.traffic() for plan in plans]
    assert sum(t.sent_bytes or 0 for t in traffic) == sum(t.received_bytes or 0 for t in traffic)
    assert sum(t.backward_sent_bytes or 0 for t in traffic) == sum(t.backward_received_bytes or 0 for t in traffic)
    for plan in plans:
        here = min(width - 1, plan.first_key) if plan.key_tokens else 0
        assert plan.before == here
        assert plan.explain().startswith(f"rank {plan.rank} of {ranks}, wave: full, {length} tokens contiguous")
        assert plan.memory().total >= 0


def test_what_travels() -> None:
    """Queries, a number a query and head, and partial outputs, from each rank to the next, and the outputs home."""
    first, second, last = _plans(30, 3, 10)
    heads, rows = 4, 10
    handed = 3 * rows * heads * (8 * 2 + 8 + 6 * 4)
    assert second.traffic().received_bytes == handed + rows * heads * 6 * 2  # and its own block's outputs
    assert first.traffic().received_bytes == 2 * rows * heads * 8 * 2 + rows * heads * 6 * 2
    assert last.traffic().received_bytes == handed
    assert [plan.traffic().received_tokens for plan in (first, second, last)] == [0, 0, 0]
    assert [plan.traffic().received_tokens for plan in _plans(30, 3, 10, MoChA(15))] == [0, 10, 14]
    assert first.steps == 5 and first.waiting == pytest.approx(2 / 5)


def _step(at: int, **changes: Any) -> Callable[[WavePlan], WavePlan]:
    def plant(plan: WavePlan) -> WavePlan:
        steps = list(plan.forward)
        steps[at] = dataclasses.replace(steps[at], **changes)
        return dataclasses.replace(plan, forward=tuple(steps))

    return plant


def _other(side: str, change: Callable[[Parcel], Parcel], way: str = "forward") -> Callable[[WavePlan], WavePlan]:
    """The last parcel of the first step of a side made another one."""

    def plant(plan: WavePlan) -> WavePlan:
        steps: list[WaveStep] = list(getattr(plan, way))
        at = next(i for i, step in enumerate(steps) if getattr(step, side))
        *others, last = getattr(steps[at], side)
        changed: dict[str, Any] = {side: (*others, change(last))}
        steps[at] = dataclasses.replace(steps[at], **changed)
        passes: dict[str, Any] = {way: tuple(steps)}
        return dataclasses.replace(plan, **passes)

    return plant


def _swapped(plan: WavePlan) -> WavePlan:
    """Two blocks in the other order."""
    steps = list(plan.forward)
    one, two = [i for i, step in enumerate(steps) if step.block is not None][:2]
    steps[one], steps[two] = (dataclasses.replace(steps[i], block=steps[j].block) for i, j in ((one, two), (two, one)))
    return dataclasses.replace(plan, forward=tuple(steps))


def _later(plan: WavePlan) -> WavePlan:
    """Everything received a step later."""
    receives = [(), *(step.receives for step in plan.forward)]
    steps = [dataclasses.replace(step, receives=x) for step, x in zip(plan.forward, receives, strict=False)]
    return dataclasses.replace(plan, forward=tuple(steps))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_step(2, block=None), r"works on the blocks \[0, 1, 3"),
        (_step(2, block=1), r"works on the blocks \[0, 1, 1"),
        (_swapped, r"works on the blocks \[1, 0"),
        (_later, "works without"),
        (_step(2, sends=()), "sends .* parcels, not"),
        (_step(2, receives=()), "works without"),
        (_other("sends", lambda x: dataclasses.replace(x, block=x.block + 1)), "before it is computed"),
        (_other("sends", lambda x: dataclasses.replace(x, peer=0)), "sends .* parcels, not"),
        (_other("receives", lambda x: dataclasses.replace(x, what="outputs")), "works without"),
        (_other("sends", lambda x: dataclasses.replace(x, what="left"), "backward"), "backward: sends"),
        (_other("receives", lambda x: dataclasses.replace(x, peer=0), "backward"), "backward, step .*: works without"),
        (lambda plan: dataclasses.replace(plan, blocks=plan.blocks[:-1]), "planned for other blocks"),
        (lambda plan: dataclasses.replace(plan, key_counts=(1, 2, 3)), "planned for other blocks of queries, or"),
        (lambda plan: dataclasses.replace(plan, rank=0), "every rank's plan, in order"),
        (
            lambda plan: dataclasses.replace(
                plan, forward=tuple(dataclasses.replace(x, number=x.number + 1) for x in plan.forward)
            ),
            "not the wavefront",
        ),
    ],
)
def test_faults_are_caught(fault: Callable[[WavePlan], WavePlan], words: str) -> None:
    plans = _plans(24, 3, 4, MoChA(5))
    verify_waves(plans)
    plans[1] = fault(plans[1])
    with pytest.raises(PlanError, match=words):
        verify_waves(plans)


def test_the_order_of_parcels_counts() -> None:
    """Messages between two ranks are told apart by nothing else."""
    plans = _plans(24, 3, 4)
    plans[1] = _step(1, sends=plans[1].forward[1].sends[::-1])(plans[1])
    plans[1].verify()
    with pytest.raises(PlanError, match=r"forward: rank 1 sends rank 2 \('partial outputs', 0\), which awaits"):
        verify_waves(plans)


def test_a_circle_is_found() -> None:
    """Ranks that wait for one another before they send what the other waits for."""
    plans = _plans(16, 2, 4)
    steps = list(plans[1].forward)
    late = next(i for i, step in enumerate(steps) if any(x.what == "queries" and x.peer == 0 for x in step.sends))
    moved = tuple(x for x in steps[late].sends if x.what == "queries")
    steps[late] = dataclasses.replace(steps[late], sends=tuple(x for x in steps[late].sends if x not in moved))
    steps[-1] = dataclasses.replace(steps[-1], sends=(*moved, *steps[-1].sends))
    plans[1] = dataclasses.replace(plans[1], forward=tuple(steps))
    with pytest.raises(PlanError, match=r"forward: (the plans deadlock|rank 1 sends rank 0)"):
        verify_waves(plans)


def test_windows_are_verified() -> None:
    plans = _plans(24, 3, 4, MoChA(5))
    window = plans[1].window
    assert window is not None
    wrong = window.receives.copy()
    wrong[-1, 3] -= 1
    plans[1] = dataclasses.replace(plans[1], window=dataclasses.replace(window, receives=wrong))
    with pytest.raises(PlanError):
        verify_waves(plans)


@pytest.mark.parametrize(
    ("layout", "mask", "words"),
    [
        ("zigzag", ringattn.Full(), "so both are contiguous; got queries zigzag. Use ringattn.Sharding"),
        ("striped", ringattn.Full(), "got queries striped"),
        ("contiguous", ringattn.Causal(), "searches all keys from the first on; got the mask causal. Use"),
    ],
)
def test_refusals(layout: str, mask: ringattn.Mask, words: str) -> None:
    sharding = ringattn.Sharding(16, ringattn.Mesh.virtual(2), layout)
    with pytest.raises(UnsupportedError, match=words):
        plan_wave(sharding, mechanism=Monotonic(), mask=mask)


def test_what_is_wrong_with_the_arguments_is_said() -> None:
    with pytest.raises(InputError, match="Wave's block"):
        Wave(0)
    plan = plan_wave(ringattn.Sharding(16, ringattn.Mesh.virtual(2)), mechanism=Monotonic())
    assert plan.traffic().received_bytes is None and "bytes" not in plan.explain()
    with pytest.raises(InputError, match="depend on its shape"):
        plan.memory()
    other = ringattn.Sharding(16, ringattn.Mesh.virtual(3))
    with pytest.raises(InputError, match="over the same mesh"):
        plan_wave(ringattn.Sharding(16, ringattn.Mesh.virtual(2)), other, mechanism=Monotonic())
