"""Schedules that send from several buffers in one phase: what they relay, and their own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import ringattn
from ringattn import conformance, layouts
from ringattn.bands import Array
from ringattn.errors import PlanError
from ringattn.payloads.summaries import Summaries
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.plan import Plan
from ringattn.plans.steps import SEND_PEER, SEND_PHASE, SEND_SOURCE
from ringattn.schedules.base import Schedule


@dataclasses.dataclass(frozen=True)
class Relay(Schedule):
    """Whole shards, wherever they come from: a member says who sends which in which phase."""

    def routes(self, size: int) -> list[tuple[int, int, int, int]]:
        """``(distance of the owner, phase, distance of the sender, the phase in which the sender got it)``."""
        raise NotImplementedError

    def refusal(self, demand: Demand) -> str | None:
        return None if demand.size <= 4 or isinstance(self, Skipping) else "doubling has buffers for four ranks"

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        phase = dict([(0, 0), *((owner, phase) for owner, phase, _, _ in self.routes(demand.size))])
        distance = (q_ranks - k_ranks) % demand.size
        return np.array([phase[d] for d in distance.tolist()], dtype=np.int64)

    def moves(self, demand: Demand, rank: int) -> Moves:
        size, tokens = demand.size, layouts.counts(demand.k_spans, demand.size)
        receives, sends = [], []
        for owner, phase, sender, source in self.routes(size):
            origin = (rank - owner) % size
            receives.append((phase, (rank - sender) % size, origin, 0, tokens[origin]))
            origin = (rank + sender - owner) % size
            sends.append((phase, (rank + sender) % size, source, origin, 0, tokens[origin]))
        received, sent = np.array(receives, np.int64).reshape(-1, 5), np.array(sends, np.int64).reshape(-1, 6)
        return Moves(received[received[:, 4] > 0], sent[sent[:, 5] > 0])

    def received_tokens(self, requested: Array, size: int) -> int:
        return 0

    def __str__(self) -> str:
        return type(self).__name__.lower()


class Doubling(Relay):
    """Up to four ranks: whoever has two shards sends both, in one message, to the rank two places on."""

    def routes(self, size: int) -> list[tuple[int, int, int, int]]:
        return [(1, 1, 1, 0), (2, 2, 2, 0), (3, 2, 2, 1)][: size - 1]


class Skipping(Relay):
    """The nearer half of the shards by relay, the other half from their owners: in one phase, to two ranks."""

    def routes(self, size: int) -> list[tuple[int, int, int, int]]:
        near = size // 2
        relayed = [(d, d, 1, d - 1) for d in range(1, near + 1)]
        return relayed + [(d, d - near, d, 0) for d in range(near + 1, size)]


def plans(schedule: Schedule, ranks: int = 4) -> list[Plan]:
    return ringattn.plan_all(ringattn.Full(), 24, "contiguous", schedule, ring=ranks)


def test_two_sources_in_one_phase() -> None:
    for schedule, peers in ((Doubling(), 1), (Skipping(), 2)):
        for plan in plans(schedule, 4 if peers == 1 else 6):
            two = plan.sends[plan.sends[:, SEND_PHASE] == 2]
            assert len({*two[:, SEND_SOURCE].tolist()}) == 2 and len({*two[:, SEND_PEER].tolist()}) == peers
            (step,) = [step for step in plan.steps if step.exchange.phase == 2]
            assert len(step.exchange.sends) == peers  # one message to a peer, whatever it is made of


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("schedule", [Doubling, Skipping])
def test_relays_are_exact(schedule: type[Relay], lookahead: int) -> None:
    report = conformance.check(schedule=schedule(lookahead=lookahead), count=70)
    assert report.passed, report
    assert len(report.computed) > 25


@pytest.mark.parametrize("schedule", [Doubling(), Skipping()])
def test_plans_fit_together_and_verify_says_the_same_of_one(schedule: Schedule) -> None:
    made = plans(schedule)
    ringattn.verify(made)
    for plan in made:
        plan.verify()


def test_a_relay_of_another_buffer_is_a_fault() -> None:
    made = plans(Doubling())
    sends = made[1].sends.copy()
    sends[sends[:, SEND_SOURCE] == 1, SEND_SOURCE] = 0
    made[1] = dataclasses.replace(made[1], sends=sends)
    with pytest.raises(PlanError, match="that are not the"):
        ringattn.verify(made)


def test_a_relay_of_what_has_not_arrived_is_a_fault_of_its_rank() -> None:
    plan = plans(Doubling())[1]
    sends = plan.sends.copy()
    sends[sends[:, SEND_SOURCE] == 1, SEND_SOURCE] = 2
    with pytest.raises(PlanError, match="uses the keys of phase 2 before they arrive"):
        dataclasses.replace(plan, sends=sends).verify()


def test_sums_over_keys_are_not_relayed() -> None:
    class Summed(Doubling):
        payload = Summaries()

    with pytest.raises(PlanError, match="summaries are sent by the rank whose keys they are of, never relayed"):
        plans(Summed())
