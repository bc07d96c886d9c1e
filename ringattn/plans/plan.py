"""Plans: programs that can be verified, measured and explained."""

from __future__ import annotations

import dataclasses

from ringattn.plans import cost
from ringattn.plans.cost import Memory, Traffic
from ringattn.plans.steps import Program
from ringattn.plans.verification import verify_rank


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(Program):
    """One rank's part of one attention call, as `ringattn.plan` makes it."""

    def verify(self) -> None:
        """Checks this rank's part: see `verification.verify_rank`. Raises PlanError."""
        verify_rank(self.moved)

    @property
    def over_keys(self) -> Plan:
        """The same pass over keys alone, whose values have no dims."""
        shape = self.shape and dataclasses.replace(self.shape, value_dim=0)
        return dataclasses.replace(self, shape=shape)

    @property
    def over_keys_again(self) -> Plan:
        """The same of each such pass after the first."""
        return self.over_keys

    def traffic(self) -> Traffic:
        """What this rank moves: key positions, messages and, where the shape is known, bytes."""
        return cost.traffic(self)

    def memory(self) -> Memory:
        """Every buffer of forward and backward, in bytes. Needs the shape."""
        return cost.memory(self)

    def explain(self) -> str:
        """The plan in words, a line a step."""
        return cost.explain(self)
