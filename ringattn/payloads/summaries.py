"""Summaries of keys and values, ``[rows, B, Hkv, size]``: what a linear mechanism exchanges in place of them.

A rank sums up the keys that others may see and sends one summary for each set of them; keys and values stay where
they are, so that what travels does not depend on how long the sequence is. Whoever receives summaries adds up, in the
order of the ranks, those that a run of its queries may see, and attends to the sum. Backward, the gradient of a
summary goes to the rank whose keys it sums up, which takes it apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ringattn.mechanisms.base import Problem, State, Summarising, rows_at
from ringattn.payloads.base import Cargo, Gradients, Queries
from ringattn.plans import tiles as t
from ringattn.plans.steps import Exchange, Step
from ringattn.plans.tiles import Tiles
from ringattn.runtime.call import Call, Staging
from ringattn.transports.base import Message

AT_ONCE = 1024  # rows worked on at once: a few copies of them in the accumulator's dtype are all the memory it takes
Run = tuple[int, int]


class Summaries(Cargo):
    """The summaries of every phase; in phase 0 this rank's own keys and values themselves."""

    def __init__(self, call: Call, problem: Problem, k: torch.Tensor, v: torch.Tensor) -> None:
        assert isinstance(problem.mechanism, Summarising)
        self.call, self.problem, self.mechanism, self.k, self.v = call, problem, problem.mechanism, k, v

    def compute(self, step: Step, q: torch.Tensor, state: State | None) -> State:
        if step.phase == 0:
            return self.call.kernel.forward(self.problem, q, self.k, self.v, step.tiles, state)
        state = self.mechanism.empty(self.problem, q.shape[2]) if state is None else state
        for at, rows in step.tiles.memo(_folds):
            part = self.mechanism.attend(self.problem, self.wide(q[:, :, at]), self.folded(step.phase, rows))
            self.mechanism.merge(tuple(x[:, :, at] for x in state), part)
        return state

    def gradients(self) -> SummaryGradients:
        return SummaryGradients(self)

    def sends(self, exchange: Exchange) -> list[Message]:
        staging = Staging(self.call, "key staging", self.problem.accumulator)
        made: dict[Run, torch.Tensor] = {}
        messages = []
        for item in exchange.sends:
            if not item.gradient:
                out = staging.take(item.rows)
                for row, (start, stop) in zip(out, item.spans.tolist(), strict=True):
                    if (start, stop) not in made:
                        made[start, stop] = self._summary(start, stop)
                    row.copy_(made[start, stop])
                messages.append((item.peer, out))
        return messages

    def receives(self, exchange: Exchange) -> list[Message]:
        return [(item.peer, item.run_of(self._rows(item.phase))) for item in exchange.receives if not item.gradient]

    def folded(self, phase: int, rows: torch.Tensor) -> torch.Tensor:
        """The sum of these rows of a phase, ``[B, Hkv, size]``."""
        return self._rows(phase).index_select(0, rows.to(self.problem.device)).sum(dim=0)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """In the accumulator's dtype."""
        return x.to(self.problem.accumulator)

    def parts(self, start: int, stop: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """This rank's keys and values from ``start`` to ``stop``, some rows at a time."""
        for first in range(start, stop, AT_ONCE):
            at = slice(first, min(first + AT_ONCE, stop))
            yield at, self.wide(self.k[:, :, at]), self.wide(self.v[:, :, at])

    def _summary(self, start: int, stop: int) -> torch.Tensor:
        first, *others = (self.mechanism.summarise(self.problem, k, v) for _, k, v in self.parts(start, stop))
        for other in others:
            first += other
        return first

    def _rows(self, phase: int) -> torch.Tensor:
        return self.call.phase_buffer("keys", phase, self.problem.accumulator)


class SummaryGradients(Gradients):
    """Gradients of the summaries of every phase, and of this rank's keys and values."""

    def __init__(self, cargo: Summaries) -> None:
        super().__init__(cargo.problem, cargo.k.shape[2])
        self._cargo, self._call = cargo, cargo.call

    def compute(self, step: Step, queries: Queries) -> None:
        cargo, wide = self._cargo, self._cargo.wide
        if step.phase == 0:
            into = (queries.dq, *self.own)
            self._call.kernel.backward(
                cargo.problem, queries.q, cargo.k, cargo.v, queries.output_grad, step.tiles, into, queries.dparams
            )
            return
        gradients = self._rows(step.phase).zero_()
        for at, rows in step.tiles.memo(_folds):
            dq, folded = cargo.mechanism.attend_grad(
                cargo.problem,
                wide(queries.q[:, :, at]),
                cargo.folded(step.phase, rows),
                queries.output_grad.of(rows_at(at), cargo.problem.accumulator),
            )
            queries.dq[:, :, at] += dq
            # a sum hands its gradient on to every part; no part is in a fold twice
            gradients[rows.to(gradients.device)] += folded

    def sends(self, exchange: Exchange) -> list[Message]:
        staging = Staging(self._call, "gradient staging", self._call.grad_dtype)
        messages = []
        for item in exchange.sends:
            if item.gradient:
                rows = item.run_of(self._rows(item.phase))
                messages.append(
                    (item.peer, staging.take(item.rows).copy_(rows) if self._call.plan.packed(item) else rows)
                )
        return messages

    def receives(self, exchange: Exchange) -> list[Message]:
        return [(peer, rows) for peer, _, rows in self._arrivals(exchange)]

    def add_arrived(self, exchange: Exchange) -> None:
        totals: dict[Run, torch.Tensor] = {}
        for _, runs, rows in self._arrivals(exchange):
            for run, row in zip(runs, rows, strict=True):
                part = self._cargo.wide(row)
                totals[run] = totals[run] + part if run in totals else part
        dk, dv = self.own
        for (start, stop), total in totals.items():
            for at, k, v in self._cargo.parts(start, stop):
                for own, part in zip(
                    (dk, dv), self._cargo.mechanism.summarise_grad(self._cargo.problem, k, v, total), strict=True
                ):
                    own[:, :, at] += part

    def _arrivals(self, exchange: Exchange) -> list[tuple[int, list[Run], torch.Tensor]]:
        staging = Staging(self._call, "gradient arrivals", self._call.grad_dtype)
        return [
            (item.peer, [(start, stop) for start, stop in item.spans.tolist()], staging.take(item.rows))
            for item in exchange.receives
            if item.gradient
        ]

    def _rows(self, phase: int) -> torch.Tensor:
        return self._call.phase_buffer("gradients", phase, self._cargo.problem.accumulator)


def _folds(tiles: Tiles) -> list[tuple[slice, torch.Tensor]]:
    """Runs of queries, some rows at a time, and the rows of the summaries they attend to, ascending."""
    rows: dict[tuple[int, int, int], list[int]] = {}
    for row in tiles.rows.tolist():
        rows.setdefault((row[t.Q], row[t.M], row[t.Q_STEP]), []).append(row[t.K])
    folds = []
    for (first, count, step), of in rows.items():
        summaries = torch.tensor(sorted(of))
        for start in range(0, count, AT_ONCE):
            stop = min(start + AT_ONCE, count)
            folds.append((slice(first + start * step, first + (stop - 1) * step + 1, step), summaries))
    return folds
