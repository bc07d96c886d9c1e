"""Messages: a plan's exchanges found in a rank's buffers, once for as long as the buffers stay where they are.

The rows of a payload, ``[rows, B, Hkv, size]``, arrive in two buffers that take turns, and their gradients are
accumulated in two more. What does not lie in one run, or travels in another dtype than it is kept in, is copied
together first, into a staging buffer in which the messages of one exchange lie behind one another.
"""

from __future__ import annotations

import dataclasses

import torch

from ringattn.mechanisms.base import Problem
from ringattn.payloads.base import Parcel
from ringattn.plans.steps import Item, Plan, Step
from ringattn.transports.base import Buffers, Message

Copy = tuple[torch.Tensor, torch.Tensor]
"""From and to, equal shapes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """One step's exchange, and the rows its tiles are about.

    Attributes:
        label: what the exchange is for, shown in errors.
        packs: own rows that the payload makes before the exchange starts.
        copies: rows that are copied together before it starts.
        sends, receives: its messages.
        returned: gradients of own rows that have come back when it is over.
        rows, drows: what the step's tiles attend to, and its gradient; empty in phase 0, whose rows are the rank's own.
    """

    label: str
    packs: tuple[Parcel, ...]
    copies: tuple[Copy, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    returned: tuple[Parcel, ...]
    rows: torch.Tensor
    drows: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """The exchanges of a call, one for each step of the plan.

    Attributes:
        forward, backward: of both passes.
        queries: of a backward pass in which no gradient of keys or values is wanted, so that none travels.
    """

    forward: tuple[tuple[Step, Move], ...]
    backward: tuple[tuple[Step, Move], ...]
    queries: tuple[tuple[Step, Move], ...]


def moves(plan: Plan, problem: Problem, buffers: Buffers) -> Moves:
    """All exchanges of a plan."""
    rooms = _Rooms(plan, problem, buffers)
    forward, backward = (
        tuple((step, rooms.move(step, name)) for step in steps)
        for name, steps in (("forward", plan.steps), ("backward", plan.backward_steps))
    )
    queries = tuple((step, rooms.move(step, "backward")) for step in plan.steps)
    return Moves(forward, backward, queries)


class _Rooms:
    """A plan's rows in a rank's buffers."""

    def __init__(self, plan: Plan, problem: Problem, buffers: Buffers) -> None:
        self._plan = plan
        travels = problem.accumulator if plan.payload.accumulated else problem.dtype
        returns = problem.dtype if plan.gradient_wire == "input" else problem.accumulator
        dtypes = {"keys": travels, "key": travels, "gradients": problem.accumulator, "gradient": returns}
        shape = (problem.batch, problem.kv_heads, plan.payload.size(problem))
        self._buffers = {
            name: buffers.take(name, (rows, *shape), dtypes[name.split()[0]], problem.device)
            for name, rows in plan.buffer_rows.items()
        }

    def move(self, step: Step, name: str) -> Move:
        exchange, plan = step.exchange, self._plan
        packs, copies, sends = [], [], []
        staged: dict[str, int] = {}
        for item in exchange.sends:
            rows = self._sent(item, staged)
            sends.append((item.peer, rows))
            if plan.packed(item):
                if item.phase == 0:
                    packs.append(Parcel(_spans(item), rows))
                else:
                    copies += self._copies(item, rows)
        receives, returned = [], []
        for item in exchange.receives:
            if item.gradient:
                rows = self._staged("gradient arrivals", item, staged)
                returned.append(Parcel(_spans(item), rows))
            else:
                rows = item.run_of(self._rows("keys", item.phase))
            receives.append((item.peer, rows))
        return Move(
            label=f"attention {name}, phase {exchange.phase}",
            packs=tuple(packs),
            copies=tuple(copies),
            sends=tuple(sends),
            receives=tuple(receives),
            returned=tuple(returned),
            rows=self._rows("keys", step.phase),
            drows=self._rows("gradients", step.phase),
        )

    def _sent(self, item: Item, staged: dict[str, int]) -> torch.Tensor:
        """The rows of a message, where they lie or where they are put together."""
        if self._plan.packed(item):
            return self._staged("gradient staging" if item.gradient else "key staging", item, staged)
        return item.run_of(self._rows("gradients" if item.gradient else "keys", item.phase))

    def _copies(self, item: Item, rows: torch.Tensor) -> list[Copy]:
        source, at, out = self._rows("gradients" if item.gradient else "keys", item.phase), 0, []
        for start, stop in _spans(item):
            out.append((source[start:stop], rows[at : at + stop - start]))
            at += stop - start
        return out

    def _rows(self, name: str, phase: int) -> torch.Tensor:
        """The rows of a phase in one of the two buffers that take turns; none for a rank's own."""
        slot = self._plan.slots.get(phase)
        return self._buffers[f"{name} {slot or 0}"][: 0 if slot is None else self._plan.held_rows[phase]]

    def _staged(self, name: str, item: Item, staged: dict[str, int]) -> torch.Tensor:
        """The next rows of a buffer that is filled from its beginning in every exchange."""
        at = staged.get(name, 0)
        staged[name] = at + item.rows
        return self._buffers[name][at : at + item.rows]


def _spans(item: Item) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in item.spans.tolist()]
