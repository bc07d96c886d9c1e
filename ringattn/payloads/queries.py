"""Queries that travel to the keys, and what comes home of them: a state forward, the gradient of the query backward.

What a mechanism needs of a query travels beside it: its rows of tensors that are sharded, such as a bias, what passes
over keys have found of it, and backward the output side. Everything is bytes, a row ``[B, Hq, size]``.

Shapes: q ``[B, Hq, Sq, D]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from ringattn.mechanisms.base import Params, Problem, State
from ringattn.payloads.base import Parcel, Payload, Wire
from ringattn.payloads.columns import Columns
from ringattn.payloads.outputs import OutputSide


@dataclasses.dataclass(frozen=True)
class Trip:
    """A pass of queries: what goes to the keys, and what comes home."""

    there: Columns
    back: Columns


@dataclasses.dataclass(frozen=True)
class Trips:
    """The passes of one call.

    Attributes:
        forward, backward: of the main pass.
        before: of the passes over keys alone, the first and those after it, where the mechanism has some.
    """

    forward: Trip
    backward: Trip
    before: tuple[Trip, Trip] | None

    @classmethod
    def of(cls, problem: Problem, *, narrow: bool) -> Trips:
        """Those of a problem's mechanism.

        Args:
            narrow: whether gradients travel in the inputs' dtype and not in the accumulator's.
        """
        mechanism, meta = problem.mechanism, torch.device("meta")
        params = problem.params_like(meta)
        problem = dataclasses.replace(problem, params=params, device=meta, known=())
        q = torch.empty(problem.batch, problem.heads, 0, problem.dim, dtype=problem.dtype, device=meta)
        named = {name: x[:, :, :0] for name, x in sharded(problem, params).items()}
        rows, known = [*named.values()], problem.unprepared(0).known
        returns = problem.dtype if narrow else problem.accumulator
        gradients = [x.to(returns) for name, x in {"q": q, **named}.items() if problem.wants(name)]
        output = OutputSide.of(problem)
        before = None
        if mechanism.preparation is not None:
            first = problem.over_keys(mechanism.preparation)
            later = dataclasses.replace(first, known=known)
            before = (_trip((q, *rows), _state(first)), _trip((q, *rows, *known), _state(later)))
        backward = Columns((*Columns.of((q, *rows), lead=3).fields, *output.columns.fields))
        return cls(
            _trip((q, *rows, *known), _state(dataclasses.replace(problem, known=known))),
            Trip(backward, Columns.of(gradients, lead=3)),
            before,
        )

    def wire(self, rows: int, *, before: int | None = None) -> Wire:
        """The bytes of a query, of so many heads of all of the batch.

        Args:
            before: which of the passes over keys alone; None for the main pass.
        """
        forward = self.forward if before is None or self.before is None else self.before[before]
        sizes = (x.size for x in (forward.there, forward.back, self.backward.there, self.backward.back))
        there, back, backward_there, backward_back = (rows * size for size in sizes)
        return Wire(there, back, backward_there, backward_back, held=max(back, backward_back))


def _trip(there: Sequence[torch.Tensor], back: Sequence[torch.Tensor]) -> Trip:
    return Trip(Columns.of(there, lead=3), Columns.of(back, lead=3))


def _state(problem: Problem) -> State:
    return problem.mechanism.empty(problem, 0)


@dataclasses.dataclass(frozen=True)
class Queries(Payload):
    """Queries, for any mechanism that is computed in tiles."""

    name: ClassVar[str] = "queries"
    unit: ClassVar[str] = "queries"
    per_key: ClassVar[bool] = True


def sharded(problem: Problem, params: Params) -> dict[str, torch.Tensor]:
    """Those params of which each query has rows of its own, ``[B, Hq, Sq, …]``.

    The heads are the dim before the one that is cut. What has no batch is the same for each of it.
    """
    found = {}
    for name, dim in problem.mechanism.sharded.items():
        if name in params:
            x = params[name]
            found[name] = x if dim == 2 else x.expand(problem.batch, *x.shape)
    return found


def whole(problem: Problem, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The params again of what `sharded` gives."""
    return {name: x if problem.mechanism.sharded[name] == 2 else x[0] for name, x in rows.items()}


def pack(columns: Columns, own: Sequence[torch.Tensor], parcels: Sequence[Parcel]) -> None:
    """Writes the rows of all parcels that leave in one exchange, from tensors ``[B, Hq, Sq, …]``."""
    for parcel in parcels:
        targets, at = columns.views(parcel.rows.permute(1, 2, 0, 3)), 0
        for start, stop in parcel.spans:
            for source, target in zip(own, targets, strict=True):
                target[:, :, at : at + stop - start].copy_(source[:, :, start:stop])
            at += stop - start
