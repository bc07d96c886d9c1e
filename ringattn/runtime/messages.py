"""Messages: a plan's exchanges found in a rank's buffers, once for as long as the buffers stay where they are.

The rows of a payload, ``[rows, B, H, size]``, arrive in buffers that serve phase after phase, and their gradients, or
whatever else goes home of them, are made in others. What does not lie in one run, or travels in another dtype than it
is kept in, is copied together first, into a staging buffer in which the messages of one exchange lie one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ringattn.declared import Collective
from ringattn.mechanisms.base import Problem
from ringattn.payloads.base import Attended, Pair, Parcel
from ringattn.payloads.columns import Columns
from ringattn.plans.exchanges import Item, Step
from ringattn.plans.plan import Plan
from ringattn.plans.shape import heads_of
from ringattn.plans.steps import Program
from ringattn.transports.base import Buffers, Handle, Message, Transport

Copy = tuple[torch.Tensor, torch.Tensor]
"""From and to, equal shapes."""
Pack = Callable[[Sequence[Parcel]], None]
"""Writes the rows of all parcels that leave in one exchange, of what is this rank's own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """One step's exchange, and the rows its tiles are about.

    Attributes:
        phase: which exchange of its pass it is, shown in errors.
        collective: what it is declared to be, of all ranks.
        packs: own rows that the payload makes before the exchange starts.
        copies: rows that are copied together before it starts.
        sends, receives: its messages.
        returned: gradients of own rows that have come back when it is over.
        summed: gradients of others' rows that have come, and those that they are added to on their way.
        rows, drows: what the step's tiles attend to, and its gradient; empty in phase 0, whose rows are the rank's own.
    """

    phase: int
    collective: Collective | None
    packs: tuple[Parcel, ...]
    copies: tuple[Copy, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    returned: tuple[Parcel, ...]
    summed: tuple[Copy, ...]
    rows: torch.Tensor
    drows: torch.Tensor

    def start(self, transport: Transport, pack: Pack) -> Handle:
        """Starts the exchange, after putting together what does not travel from where it lies."""
        if self.packs:
            pack(self.packs)
        for source, target in self.copies:
            target.copy_(source)
        label = f"{transport.doing}, phase {self.phase}"
        return transport.exchange(self.sends, self.receives, label=label, collective=self.collective)

    @property
    def back(self) -> int:
        """The slice of heads whose gradients have come back, all of one exchange of one."""
        return self.returned[0].slice if self.returned else 0

    def take_back(self, payload: Attended, problem: Problem, own: Pair, grads: Pair) -> None:
        """Adds the gradients that came, when the exchange is over: to those of own keys, or to others' on their way."""
        for source, target in self.summed:
            target += source
        if self.returned:
            payload.unpack_grad(problem, own, self.returned, grads)


Moves = tuple[tuple[Step, Move], ...]
"""The steps of one pass, each with its exchange."""


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """The exchanges of a call, one for each step of the plan.

    Attributes:
        forward, backward: of both passes. Where no gradient of keys or values is wanted, none travels.
    """

    forward: Moves
    backward: Moves


def passes(plan: Plan, problem: Problem, buffers: Buffers) -> Passes:
    """All exchanges of a plan."""
    rooms = _Rooms(plan, Forms.of(plan, problem), buffers)
    forward, backward = plan.steps, plan.backward_steps
    if not problem.wants("k", "v"):
        backward = tuple(step for step in map(_without_gradients, backward) if step.exchange or step.tiles)
    return Passes(
        tuple((step, rooms.move(step)) for step in forward),
        tuple((step, rooms.move(step)) for step in backward),
    )


def there_and_back(plan: Plan, problem: Problem, buffers: Buffers) -> Passes:
    """The exchanges of a plan by which rows are brought, and only their gradients go back, nothing being recomputed."""
    rooms = _Rooms(plan, Forms.of(plan, problem), buffers)
    backward = (step for step in map(_gradients_alone, plan.backward_steps) if step.exchange or step.tiles)
    return Passes(
        tuple((step, rooms.move(step)) for step in plan.steps),
        tuple((step, rooms.move(step)) for step in backward),
    )


def gathering(plan: Plan, problem: Problem, buffers: Buffers) -> Moves:
    """The exchanges of a plan's forward pass alone, which brings rows."""
    rooms = _Rooms(plan, Forms.of(plan, problem), buffers, gradients=False)
    return tuple((step, rooms.move(step)) for step in plan.steps)


def round_trips(plan: Program, passes: Sequence[Forms], buffers: Buffers) -> list[Moves]:
    """The exchanges of each pass in which rows are brought and something of each goes back, if that has a size."""
    for forms in passes:
        _Rooms(plan, forms, buffers)  # which are grown before any of them is looked into, or small ones would be kept
    return [_round_trip(plan, forms, buffers) for forms in passes]


def _round_trip(plan: Program, forms: Forms, buffers: Buffers) -> Moves:
    rooms, steps = _Rooms(plan, forms, buffers), plan.backward_steps
    if not forms.held.size:
        steps = tuple(step for step in map(_without_gradients, steps) if step.exchange or step.tiles)
    return tuple((step, rooms.move(step)) for step in steps)


def _without_gradients(step: Step) -> Step:
    return _some(step, gradients=False)


def _gradients_alone(step: Step) -> Step:
    return _some(step, gradients=True)


def _some(step: Step, *, gradients: bool) -> Step:
    """The step with the messages of one kind."""
    sides = step.exchange.sends, step.exchange.receives
    sends, receives = (tuple(x for x in items if x.gradient == gradients) for items in sides)
    exchange = dataclasses.replace(step.exchange, sends=sends, receives=receives)
    return Step(exchange, step.phase, step.tiles)


@dataclasses.dataclass(frozen=True)
class Form:
    """How one row lies in a buffer: ``[B, H, size]``."""

    batch: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True)
class Forms:
    """How rows lie in the buffers in which they arrive, those in which what goes back is made, and as it travels."""

    arriving: Form
    held: Form
    returning: Form

    @classmethod
    def of(cls, plan: Plan, problem: Problem) -> Forms:
        """Those of a plan by which something travels that is attended to, and its gradients return."""
        payload = plan.attended
        travels = problem.accumulator if payload.accumulated else problem.dtype
        returns = problem.dtype if plan.gradient_wire == "input" else problem.accumulator
        size = payload.size(problem)

        def form(dtype: torch.dtype) -> Form:
            return Form(problem.batch, problem.kv_heads, size, dtype, problem.device)

        return cls(form(travels), form(problem.accumulator), form(returns))

    @classmethod
    def of_columns(cls, there: Columns, back: Columns, problem: Problem) -> Forms:
        """Those of queries."""
        sizes = (there.size, back.size, back.size)
        return cls(*(Form(problem.batch, problem.heads, size, torch.uint8, problem.device) for size in sizes))


class _Rooms:
    """A plan's rows in a rank's buffers."""

    def __init__(self, plan: Program, forms: Forms, buffers: Buffers, gradients: bool = True) -> None:
        self._plan = plan
        self._heads = heads_of(forms.arriving.heads, plan.slices)
        rows = plan.buffer_rows if gradients else dataclasses.replace(plan.buffer_rows, grad_staging=0, grad_arrivals=0)

        def take(name: str, count: int, form: Form) -> torch.Tensor:
            shape = count, form.batch, self._heads[0], form.size
            return buffers.take(name, shape, form.dtype, form.device)

        self._received = [take(f"rows {nth}", count, forms.arriving) for nth, count in enumerate(rows.received)]
        self._gradients = [
            take(f"gradients {nth}", count, forms.held) for nth, count in enumerate(rows.gradients if gradients else ())
        ]
        self._nothing = take("nothing", 0, forms.arriving)
        self._staging = take("staging", rows.staging, forms.arriving)
        self._grad_staging = take("gradient staging", rows.grad_staging, forms.returning)
        self._grad_arrivals = take("gradient arrivals", rows.grad_arrivals, forms.returning)

    def move(self, step: Step) -> Move:
        exchange, plan = step.exchange, self._plan
        packs, copies, sends = [], [], []
        staging, grad_staging = _Staging(self._staging), _Staging(self._grad_staging)
        made: dict[object, torch.Tensor] = {}  # several ranks may get the same
        for item in exchange.sends:
            rows = made.get(item.content)
            if rows is None and plan.packed(item):
                rows = (grad_staging if item.gradient else staging).next(item.rows, self._heads[item.slice])
                own, others = self._apart(item, rows)
                packs += own
                copies += others
            elif rows is None:
                rows = self._run(item)
            made[item.content] = rows
            sends.append((item.peer, rows))
        receives, returned, summed, arrivals = [], [], [], _Staging(self._grad_arrivals)
        for item in exchange.receives:
            if item.gradient:
                rows = arrivals.next(item.rows, self._heads[item.slice])
                parcels, others = self._apart(item, rows)
                returned += parcels
                summed += [(part, into) for into, part in others]
            else:
                rows = self._run(item)
            receives.append((item.peer, rows))
        return Move(
            phase=exchange.phase,
            collective=exchange.collective,
            packs=tuple(packs),
            copies=tuple(copies),
            sends=tuple(sends),
            receives=tuple(receives),
            returned=tuple(returned),
            summed=tuple(summed),
            rows=self._rows(False, step.phase),
            drows=self._rows(True, step.phase),
        )

    def _run(self, item: Item) -> torch.Tensor:
        """The rows of a message that lie behind one another in one buffer."""
        (phase,) = item.phases
        return item.run_of(self._rows(item.gradient, phase))

    def _apart(self, item: Item, rows: torch.Tensor) -> tuple[list[Parcel], list[Copy]]:
        """Where the rows of a message belong: those of this rank's own keys, and, from and to, those of the buffers."""
        parcels: list[Parcel] = []
        copies: list[Copy] = []
        for (phase, spans, _), part in zip(
            item.sources, rows.split([count for _, _, count in item.sources]), strict=True
        ):
            if phase == 0:
                parcels.append(Parcel(spans, part, item.slice))
                continue
            source = self._rows(item.gradient, phase)
            parts = part.split([stop - start for start, stop in spans])
            copies += [(source[start:stop], into) for (start, stop), into in zip(spans, parts, strict=True)]
        return parcels, copies

    def _rows(self, gradients: bool, phase: int) -> torch.Tensor:
        """The rows of a phase, or their gradients, in the buffer that it has; none for a rank's own."""
        slots, rooms = (self._plan.grad_slots, self._gradients) if gradients else (self._plan.slots, self._received)
        slot = slots.get(phase)
        if slot is None or not rooms:
            return self._nothing
        return _first(rooms[slot], self._plan.phase_rows[phase], self._heads[self._plan.slice_of(phase)])


def _first(rows: torch.Tensor, count: int, heads: int) -> torch.Tensor:
    """The first of a buffer's rows, which have so many heads; it may have been made for more."""
    if rows.shape[2] == heads:
        return rows[:count]
    _, batch, _, size = rows.shape
    return rows.view(-1)[: count * batch * heads * size].view(count, batch, heads, size)


class _Staging:
    """Hands out a buffer's rows, from its beginning, to the messages of one exchange, all of one slice of heads."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._at = 0

    def next(self, count: int, heads: int) -> torch.Tensor:
        """The next rows."""
        self._at += count
        return _first(self._rows, self._at, heads)[self._at - count :]
