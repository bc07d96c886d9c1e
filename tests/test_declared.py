"""Exchanges that are declared to be collectives: what plans say, what the verifier asks, and what a transport makes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.conformance import Case, attend, joined, simulated
from ringattn.declared import Collective
from ringattn.errors import PlanError, TransportError
from ringattn.plans.plan import Plan
from ringattn.plans.steps import SEND_PHASE
from ringattn.plans.swap import Message, Swap
from ringattn.plans.ulysses import UlyssesPlan
from ringattn.transports.torch_distributed import TorchDistributed
from tests.workers import Workers

SHAPE: dict[str, Any] = {"heads": (10, 5), "head_dims": (8, 6), "dtype": "bfloat16"}
BOTH = ["all_gather"] * 2


def _gathered(slices: int, mask: ringattn.Mask | None = None) -> list[Plan]:
    schedule = ringattn.AllGather(slices=slices)
    return ringattn.plan_all(mask or ringattn.Full(), 64, "zigzag", schedule, ring=4, **SHAPE)


def _declared(plan: Plan) -> list[Collective | None]:
    return [step.exchange.collective for step in plan.backward_steps if step.exchange]


def test_keys_that_all_need_are_an_all_gather_and_their_gradients_go_back_from_all_to_all() -> None:
    plans = _gathered(2)
    ringattn.verify(plans)
    assert _declared(plans[0]) == [*BOTH, "all_to_all", "all_to_all"]
    assert "as an all-gather; send 16 rows to rank 1" in plans[0].explain()
    assert plans[0].memory().buffers["staging"] == 16 * 3 * 14 * 2  # of 3 heads, once for all ranks
    # the keys of the third slice and the gradients of the first are two messages to each rank
    assert _declared(_gathered(3)[0]) == [*BOTH, None, "all_to_all", "all_to_all"]
    assert not any(plan.collective for plan in _gathered(2, ringattn.Causal()))


def _without_sends(plan: Plan) -> Plan:
    return dataclasses.replace(plan, sends=plan.sends[plan.sends[:, SEND_PHASE] == 1])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda plan: dataclasses.replace(plan, collective=None), "rank 0 declares .* is declared nothing"),
        (lambda plan: dataclasses.replace(plan, collective="all_to_all"), "rank 0 declares .* declared an all-to-all"),
        (_without_sends, "messages to rank"),
    ],
)
def test_a_rank_that_does_not_take_part_is_found(fault: Callable[[Plan], Plan], words: str) -> None:
    plans = _gathered(2)
    plans[1] = fault(plans[1])
    with pytest.raises(PlanError, match=words):
        ringattn.verify(plans)


@pytest.mark.parametrize(
    ("mask", "words"),
    [(ringattn.Causal(), "does not send all others the same"), (ringattn.Window(3), r"declares .* of ranks \[0, 1, 2")],
)
def test_what_is_not_what_all_declare_is_found(mask: ringattn.Mask, words: str) -> None:
    plans = _gathered(1, mask)
    ringattn.verify(plans)
    with pytest.raises(PlanError, match=words):
        ringattn.verify([dataclasses.replace(plan, collective="all_gather") for plan in plans])


# -- Ulysses -------------------------------------------------------------------------------------------------------


def _swaps(
    length: int, schedule: ringattn.Ulysses, ring: int, ulysses: int, heads: tuple[int, int]
) -> list[UlyssesPlan]:
    plans = ringattn.plan_all(ringattn.Causal(), length, "contiguous", schedule, ring, ulysses, heads=heads)
    ringattn.verify(plans)
    return [plan for plan in plans if isinstance(plan, UlyssesPlan)]


@pytest.mark.parametrize(
    ("length", "heads", "slices", "said"),
    [
        (29, (8, 8), 1, ["all_to_all"]),
        (29, (6, 6), 2, ["all_to_all", None]),  # the last ranks have one head, and nothing of the second slice
        (5, (5, 1), 1, ["all_to_all"]),
        (3, (8, 8), 1, [None]),  # a rank has no token
    ],
)
def test_a_swap_is_an_all_to_all_where_all_members_give_and_get(
    length: int, heads: tuple[int, int], slices: int, said: list[Collective | None]
) -> None:
    for plan in _swaps(length, ringattn.Ulysses("route", slices), 1, 4, heads):
        assert [plan.swap.collective(nth) for nth in range(plan.swap.slices)] == said
        assert ("as all-to-alls" in plan.explain()) == (None not in said)
        for exchange in (exchange for both in plan.swaps for exchange in both):
            if exchange.collective:
                assert all(len(side) == 3 for side in (exchange.sends, exchange.receives))
    for plan in _swaps(8 * length, ringattn.Ulysses("route", slices), 2, 2, heads):
        assert plan.swap.collective(0) == "all_to_all" and len(plan.swaps[0][0].sends) == 1, "of its group"


class _Silent(Swap):
    """A rank that does not know that it is an all-to-all."""

    def collective(self, nth: int) -> Collective | None:
        return None


class _Sparing(Swap):
    """A rank that leaves out what it has for one member."""

    def outward(self, nth: int) -> tuple[list[Message], list[Message]]:
        given, got = super().outward(nth)
        return given[1:], got


class _Deaf(Swap):
    """Neither is there what this one's members send it, nor what they get."""

    def outward(self, nth: int) -> tuple[list[Message], list[Message]]:
        given, got = super().outward(nth)
        return [m for m in given if m.peer not in (0, 1)], [m for m in got if m.peer not in (0, 1)]


@pytest.mark.parametrize(
    ("ranks", "swap", "words"),
    [
        ([1], _Silent, "rank 0 declares .* is declared nothing"),
        ([1], _Sparing, "messages to rank"),
        ([0, 1], _Deaf, r"rank 0 declares .* an all-to-all of ranks \[0, 1, 2\], and sends to \[2\]"),
    ],
)
def test_a_member_that_does_not_take_part_is_found(ranks: Sequence[int], swap: type[Swap], words: str) -> None:
    plans = _swaps(48, ringattn.Ulysses("route", 2), 2, 3, (6, 6))
    for rank in ranks:
        old = plans[rank].swap
        known = {field.name: getattr(old, field.name) for field in dataclasses.fields(Swap)}
        plans[rank] = dataclasses.replace(plans[rank], swap=swap(**known))
    with pytest.raises(PlanError, match=words):
        ringattn.verify(plans)


# -- transports ----------------------------------------------------------------------------------------------------


def test_an_exchange_without_all_messages_is_no_collective() -> None:
    def exchange(mesh: ringattn.Mesh, some: Sequence[int]) -> None:
        sends, receives = ([(peer, torch.zeros(2))] for peer in some)
        mesh.connected().exchange(sends, receives, label="a test", collective="all_to_all").wait()

    with pytest.raises(
        TransportError, match=r"a test of rank 0 of 3 is declared an all-to-all.* to \[1\] and from \[2\]"
    ):
        ringattn.simulate(functools.partial(exchange, some=(1, 2)), ring=3)


class _StandIn(TorchDistributed):
    """Gloo by the name of NCCL, whose collectives are counted."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group, agreement=False)
        self.name, self.made = "nccl", {"all_gather": 0, "all_to_all": 0}

    def refusal(self, device: torch.device) -> str | None:
        return None

    def _start_collective(self, collective: Collective, *arguments: Any) -> Callable[[], None]:
        self.made[collective] += 1
        with mock.patch.object(dist, "all_to_all", _all_to_all):
            return super()._start_collective(collective, *arguments)


def _all_to_all(into: Sequence[torch.Tensor], given: Sequence[torch.Tensor], *, group: Any, async_op: bool) -> Any:
    """NCCL's own, as Gloo has it: of one tensor. The own entries may be empty, and their sizes must meet."""
    assert async_op and all(x.is_contiguous() for x in (*into, *given))
    sizes = [[x.numel() for x in side] for side in (into, given)]
    got = into[0].new_empty(sum(sizes[0]))
    put = torch.cat([x.view(-1) for x in given])
    work = dist.all_to_all_single(got, put, sizes[0], sizes[1], group=group, async_op=True)
    assert work is not None

    def wait() -> None:
        work.wait()
        for x, part in zip(into, got.split(sizes[0]), strict=True):
            x.view(-1).copy_(part)

    return mock.Mock(wait=wait)


def _by_collectives(mesh: ringattn.Mesh, case: Case) -> tuple[Any, dict[str, int], list[int]]:
    assert isinstance(mesh.transport, TorchDistributed)
    stand_in = _StandIn(mesh.transport.group)
    virtual = ringattn.Mesh.virtual(mesh.sequence_size, rank=mesh.rank, transport=stand_in)
    moved, part = stand_in.counters, attend(virtual, case, extras=False)
    return part, stand_in.made, [moved.messages, moved.sent_bytes, moved.received_bytes]


@pytest.mark.parametrize(
    ("length", "schedule", "ranks", "ulysses", "gathers", "swaps"),
    [
        # two slices forward and backward, and the gradients of both; Gloo's own takes equal shares alone
        (48, ringattn.AllGather(slices=2), 3, 1, 4, 2),
        # the third rank has nothing of the second slice, which is messages
        (47, ringattn.Ulysses("route", slices=2), 3, 3, 0, 4),
        (47, ringattn.Ulysses("route", slices=2, keep=False), 3, 3, 0, 4),
        (47, ringattn.Ulysses("allgather"), 4, 2, 0, 0),  # groups of some ranks: messages
    ],
    ids=str,
)
def test_nccl_makes_its_own_collectives_and_gives_the_same_bits(
    gloo: Workers, length: int, schedule: Any, ranks: int, ulysses: int, gathers: int, swaps: int
) -> None:
    case = Case(
        length,
        ringattn.Full(),
        ranks=ranks,
        ulysses=ulysses,
        kv_heads=4,
        groups=2,
        schedule=schedule,
        layout="contiguous",
    )
    found = gloo.run(ranks, _by_collectives, case)
    whole, virtual = joined(case, [part for part, _, _ in found]), simulated(case)
    assert whole and all(torch.equal(x, virtual[name]) for name, x in whole.items())
    assert [made for _, made, _ in found] == [{"all_gather": gathers, "all_to_all": swaps}] * ranks
    shape: dict[str, Any] = {"heads": (8, 4), "head_dims": (8, 8), "dtype": "float32"}
    axes = ranks // ulysses, ulysses
    for plan, (_, _, moved) in zip(
        ringattn.plan_all(case.mask, length, "contiguous", schedule, *axes, mechanism=ringattn.Softmax(), **shape),
        found,
        strict=True,
    ):
        said = plan.traffic()
        assert moved == [
            said.messages + said.backward_messages,
            (said.sent_bytes or 0) + (said.backward_sent_bytes or 0),
            (said.received_bytes or 0) + (said.backward_received_bytes or 0),
        ]
