"""Summaries of keys and values: what a mechanism exchanges in place of them where keys can be summed up.

A rank sums up the keys that others may see and sends one summary for each set of them; keys and values stay where
they are, so that what travels does not depend on how long the sequence is. Whoever receives summaries folds, in the
order of the positions they sum up, those that a run of its queries may see, and attends to the outcome: a sum, for
most. Backward, the gradient of a summary goes to the rank whose keys it sums up, which takes it apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from ringattn.errors import InputError
from ringattn.kernels.base import Kernel
from ringattn.mechanisms.base import Mechanism, OutputGrad, Params, Problem, State, Summarising
from ringattn.mechanisms.blocks import rows_at
from ringattn.payloads.base import Attended, Heads, Pair, Parcel
from ringattn.plans import tiles as t
from ringattn.plans.tiles import Tiles

AT_ONCE = 1024  # rows worked on at once: a few copies of them in the accumulator's dtype are all the memory it takes


@dataclasses.dataclass(frozen=True)
class Summaries(Attended):
    """Sums over keys, for mechanisms that are `Summarising`."""

    name: ClassVar[str] = "summaries"
    unit: ClassVar[str] = "sums over keys"
    per_key: ClassVar[bool] = False
    accumulated: ClassVar[bool] = True

    def size(self, heads: Heads) -> int:
        if heads.summary is None:
            raise InputError("The bytes of a plan that exchanges summaries depend on the mechanism; give it to plan.")
        return heads.summary

    def refusal(self, mechanism: Mechanism) -> str | None:
        if isinstance(mechanism, Summarising):
            return None
        return f"{mechanism} needs the keys themselves"

    def pack(self, problem: Problem, own: Pair, parcels: Sequence[Parcel]) -> None:
        made: dict[tuple[int, int], torch.Tensor] = {}  # several ranks may get the same
        for parcel in parcels:
            for row, span in zip(parcel.rows, parcel.spans, strict=True):
                if span not in made:
                    made[span] = _summary(problem, own, *span)
                row.copy_(made[span])

    def attend(
        self, problem: Problem, kernel: Kernel, q: torch.Tensor, rows: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        mechanism = _summarising(problem)
        state = mechanism.empty(problem, q.shape[2]) if state is None else state
        for at, which in tiles.memo(_folds, problem.device):
            part = mechanism.attend(problem, q[:, :, at].to(problem.accumulator), mechanism.fold(problem, rows[which]))
            mechanism.merge(tuple(x[:, :, at] for x in state), part)
        return state

    def attend_grad(
        self,
        problem: Problem,
        kernel: Kernel,
        q: torch.Tensor,
        rows: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        dq: torch.Tensor,
        drows: torch.Tensor,
        dparams: Params,
    ) -> None:
        mechanism, accumulator = _summarising(problem), problem.accumulator
        for at, which in tiles.memo(_folds, problem.device):
            seen = rows[which]
            part, dfolded = mechanism.attend_grad(
                problem,
                q[:, :, at].to(accumulator),
                mechanism.fold(problem, seen),
                output_grad.select(rows_at(at), accumulator),
            )
            if part is not None:
                dq[:, :, at] += part
            if dfolded is not None:
                drows[which] += mechanism.fold_grad(problem, seen, dfolded)  # no row is in a fold twice

    def unpack_grad(self, problem: Problem, own: Pair, parcels: Sequence[Parcel], grads: Pair) -> None:
        mechanism, totals = _summarising(problem), dict[tuple[int, int], torch.Tensor]()
        for parcel in parcels:
            for row, span in zip(parcel.rows, parcel.spans, strict=True):
                part = row.to(problem.accumulator)
                totals[span] = totals[span] + part if span in totals else part
        for span, total in totals.items():
            parts = zip(_parts(problem, own, *span), _parts_grad(problem, own, *span, total), strict=True)
            for (at, k, v), dsummary in parts:
                for grad, part in zip(grads, mechanism.summarise_grad(problem, k, v, dsummary), strict=True):
                    if part is not None:
                        grad[:, :, at] += part


def _summarising(problem: Problem) -> Summarising:
    assert isinstance(problem.mechanism, Summarising)  # by `refusal`
    return problem.mechanism


def _summary(problem: Problem, own: Pair, start: int, stop: int) -> torch.Tensor:
    """The summary ``[B, Hkv, size]`` of a range of own keys."""
    mechanism = _summarising(problem)
    first, *others = (mechanism.summarise(problem, k, v) for _, k, v in _parts(problem, own, start, stop))
    for other in others:
        first = mechanism.fold(problem, torch.stack([first, other]))
    return first


def _parts_grad(problem: Problem, own: Pair, start: int, stop: int, dsummary: torch.Tensor) -> Iterator[torch.Tensor]:
    """The gradients of the summaries of `_parts`, which were folded."""
    if stop - start <= AT_ONCE:
        yield dsummary
        return
    mechanism = _summarising(problem)
    summaries = torch.stack([mechanism.summarise(problem, k, v) for _, k, v in _parts(problem, own, start, stop)])
    yield from mechanism.fold_grad(problem, summaries, dsummary).expand_as(summaries)


def _parts(problem: Problem, own: Pair, start: int, stop: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Own keys and values from ``start`` to ``stop``, some rows at a time, in the accumulator's dtype."""
    k, v = own
    for first in range(start, stop, AT_ONCE):
        at = slice(first, min(first + AT_ONCE, stop))
        yield at, k[:, :, at].to(problem.accumulator), v[:, :, at].to(problem.accumulator)


def _folds(tiles: Tiles, device: torch.device) -> list[tuple[slice, torch.Tensor]]:
    """Runs of queries, some rows at a time, and the rows of the summaries they see, in the order of positions."""
    rows: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for row in tiles.rows.tolist():
        last = row[t.K_POSITION] + (row[t.N] - 1) * row[t.K_STRIDE]
        rows.setdefault((row[t.Q], row[t.M], row[t.Q_STEP]), []).append((last, row[t.K]))
    folds = []
    for (first, count, step), which in rows.items():
        summaries = torch.tensor([row for _, row in sorted(which)]).to(device, non_blocking=True)
        for start in range(0, count, AT_ONCE):
            stop = min(start + AT_ONCE, count)
            folds.append((slice(first + start * step, first + (stop - 1) * step + 1, step), summaries))
    return folds
