"""Plans by which queries travel to the keys, and what the keys make of them comes home.

Such a plan is that of the transposed mask seen from the other side. In it the keys are the side that stays, and asks
for queries as queries ask for keys elsewhere; and what a rank has made of the queries it received, states forward and
gradients backward, goes home to their owners as the gradients of keys do. So both passes are one: rows there, results
back, which the owner merges in the order of the phases.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, TypeVar

from ringattn import bands
from ringattn.masks import Mask, Transposed
from ringattn.plans.exchanges import Step
from ringattn.plans.plan import Plan
from ringattn.plans.steps import BufferRows
from ringattn.plans.tiles import transposed

P = TypeVar("P", bound=Plan)


@dataclasses.dataclass(frozen=True, eq=False)
class PassPlan(Plan):
    """One rank's part. Its buffers are of queries, of which its tiles' queries are rows; phase 0 is of its own."""

    queries_travel: ClassVar[bool] = True

    @classmethod
    def of(cls, plan: Plan, mask: Mask) -> PassPlan:
        """That of a plan of the transposed mask.

        Args:
            mask: as it was asked for.
        """
        return _turned(plan, cls, mask)

    @functools.cached_property
    def moved(self) -> Plan:
        """The plan of the transposed mask."""
        turned = _turned(self, Plan, Transposed(self.mask))
        # its gradients are this one's results, whose dtypes are no business of a plan of keys
        return dataclasses.replace(turned, gradient_wire="float32", shape=None)

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """Both passes: queries there, results back."""
        steps = self.moved.backward_steps
        return tuple(dataclasses.replace(step, tiles=step.tiles.transposed) for step in steps)

    @property
    def backward_steps(self) -> tuple[Step, ...]:
        """The same."""
        return self.steps

    @property
    def phase_rows(self) -> dict[int, int]:
        """Rows in the buffer of every phase, this rank's own queries in phase 0."""
        return {**self.moved.phase_rows, 0: self.tokens}

    @property
    def buffer_rows(self) -> BufferRows:
        """The size of each exchange buffer."""
        return self.moved.buffer_rows

    @property
    def over_keys(self) -> PassPlan:
        """The first of the passes over keys alone, whose values have no dims."""
        return self._before(0)

    @property
    def over_keys_again(self) -> PassPlan:
        """Each of those after it, in which what is known of the queries travels too."""
        return self._before(1)

    def _before(self, nth: int) -> PassPlan:
        shape = self.shape
        if shape is not None and shape.before is not None:
            shape = dataclasses.replace(shape, value_dim=0, queries=shape.before[nth])
        return dataclasses.replace(self, shape=shape)


def _turned(plan: Plan, kind: type[P], mask: Mask) -> P:
    """The plan with queries for keys."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)}
    turned = {
        "mask": mask,
        "regions": bands.transpose(plan.regions),
        "partial": bands.transpose(plan.partial),
        "q_spans": plan.k_spans,
        "k_spans": plan.q_spans,
        "tile_rows": transposed(plan.tile_rows),
    }
    return kind(**{**fields, **turned})
