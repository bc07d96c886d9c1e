"""The engine of plans by which queries travel to the keys, and partial states come home (`plans.passing`).

Every step starts the exchange, computes the tiles of the queries that are here with this rank's own keys, and waits for
the exchange. What the tiles of others' queries give goes home in a later exchange: states, which their owner merges, or
gradients, which it adds up, in the order in which the plan brings them.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch

from ringattn.kernels.base import Kernel
from ringattn.kernels.reference import Reference
from ringattn.mechanisms.base import OutputGrad, Problem, State
from ringattn.payloads.base import Parcel
from ringattn.payloads.columns import Columns
from ringattn.payloads.outputs import OutputSide
from ringattn.payloads.queries import pack, sharded, whole
from ringattn.plans.tiles import Tiles
from ringattn.runtime import preparing
from ringattn.runtime.call import PassCall, Tour


def forward(
    call: PassCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
) -> tuple[torch.Tensor, State]:
    """As `engine.forward`."""
    compare = call.compare(f"fwd {number}", seed)
    problem, tours = call.problem_of(params, seed), call.tours
    if tours.before is not None:
        problem = dataclasses.replace(problem, known=_known(call, tours.before, problem, q, k))
    finished = _finished(call, tours.forward, problem, call.kernel, q, k, v)
    compare()
    return finished


def _known(call: PassCall, tours: tuple[Tour, Tour], problem: Problem, q: torch.Tensor, k: torch.Tensor) -> State:
    """What passes over keys alone find of this rank's queries: as many as one of the ranks needs."""
    mechanism = problem.mechanism.preparation
    assert mechanism is not None

    def one_pass(known: State) -> State:
        asked = problem.over_keys(mechanism, known)
        return _finished(call, tours[bool(known)], asked, Reference(), q, k, k[..., :0])[1]

    return preparing.found(call.transport, mechanism, one_pass)


def _finished(
    call: PassCall, tour: Tour, problem: Problem, kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, State]:
    """What one pass gives."""
    mechanism, there, back = problem.mechanism, tour.trip.there, tour.trip.back
    own = q, *sharded(problem, problem.params).values(), *problem.known
    state: State | None = None
    for step, move in tour.moves:
        under_way = move.start(call.transport, functools.partial(pack, there, own))
        tiles = step.tiles.transposed
        if step.tiles and step.phase == 0:
            state = kernel.forward(problem, q, k, v, tiles, state)
        elif step.tiles:
            arrived, query, _ = _at(problem, _opened(there, move.rows))
            _lay(back, move.drows, kernel.forward(arrived, query, k, v, tiles, None))
        under_way.wait()
        for at, part in _returned(back, move.returned):
            state = mechanism.empty(problem, q.shape[2]) if state is None else state
            mechanism.merge(tuple(x[:, :, at] for x in state), part)
    return mechanism.finish(problem, mechanism.empty(problem, q.shape[2]) if state is None else state)


def backward(
    call: PassCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
    saved: State,
    dout: torch.Tensor,
    grad_extras: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """As `engine.backward`."""
    compare = call.compare(f"bwd {number}", seed)
    problem, tour = call.problem_of(params, seed), call.tours.backward
    dq, dk, dv = problem.no_gradients(q.shape[2], k.shape[2])
    dparams = problem.no_gradients_of_params()
    output_grad, side = OutputGrad(saved, dout, grad_extras), OutputSide.of(problem)
    there, back = tour.trip.there, tour.trip.back
    own = q, *sharded(problem, problem.params).values(), *side.tensors(output_grad)
    totals = _wanted(problem, dq, dparams)
    for step, move in tour.moves:
        under_way = move.start(call.transport, functools.partial(pack, there, own))
        tiles = step.tiles.transposed
        if step.tiles and step.phase == 0:
            call.kernel.backward(problem, q, k, v, output_grad, tiles, (dq, dk, dv), dparams)
        elif step.tiles:
            came = _at(problem, _opened(there, move.rows))
            _lay(back, move.drows, _gradients(call, problem, came, side, k, v, tiles, dk, dv, dparams))
        under_way.wait()
        for at, part in _returned(back, move.returned):
            for total, x in zip(totals, part, strict=True):
                total[:, :, at] += x[: len(total)]
    compare()
    problem.mechanism.finish_grad(problem, output_grad, dparams)
    return dq, dk, dv, [dparams[name].to(p.dtype) for name, p in problem.params.items()]


def _gradients(
    call: PassCall,
    problem: Problem,
    came: tuple[Problem, torch.Tensor, State],
    side: OutputSide,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Tiles,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dparams: dict[str, torch.Tensor],
) -> State:
    """What goes home of queries that came. What is this rank's is added to ``dk``, ``dv`` and ``dparams``."""
    arrived, query, others = came
    dq = problem.rows(problem.heads, query.shape[2], problem.dim)
    drows = {name: torch.zeros_like(arrived.params[name], dtype=problem.accumulator) for name in _names(problem)}
    output_grad = side.output_grad(others, call.asked)
    call.kernel.backward(arrived, query, k, v, output_grad, tiles, (dq, dk, dv), {**dparams, **drows})
    return _wanted(problem, dq, drows)


def _names(problem: Problem) -> list[str]:
    """Of the params of which each query has rows of its own."""
    return [name for name in problem.mechanism.sharded if name in problem.params]


def _opened(columns: Columns, rows: torch.Tensor) -> State:
    """Tensors ``[B, Hq, rows, …]`` that lie in rows ``[rows, B, Hq, size]`` of bytes."""
    return columns.views(rows.permute(1, 2, 0, 3))


def _at(problem: Problem, arrived: State) -> tuple[Problem, torch.Tensor, State]:
    """The problem of queries that arrived, the queries, and what came with them besides."""
    query, *others = arrived
    names = _names(problem)
    rows = whole(problem, dict(zip(names, others, strict=False)))
    rest = tuple(others[len(names) :])
    known = rest if problem.known else ()
    return dataclasses.replace(problem, params={**problem.params, **rows}, known=known), query, rest


def _wanted(problem: Problem, dq: torch.Tensor, dparams: dict[str, torch.Tensor]) -> State:
    """The gradients that go home, or to which they are added, as `payloads.queries.Trips` says.

    Those of params that are the same for each of a batch travel beside the first of it.
    """
    dims = problem.mechanism.sharded
    found = {"q": dq, **{name: dparams[name] if dims[name] == 2 else dparams[name][None] for name in _names(problem)}}
    return tuple(x for name, x in found.items() if problem.wants(name))


def _lay(columns: Columns, rows: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Writes tensors ``[B, Hq, rows, …]`` into rows of bytes."""
    for into, x in zip(_opened(columns, rows), tensors, strict=True):
        into[: len(x)] = x
        into[len(x) :] = 0


def _returned(columns: Columns, parcels: Sequence[Parcel]) -> Iterator[tuple[slice, State]]:
    """Own queries, and what has come home of them."""
    for parcel in parcels:
        tensors, at = _opened(columns, parcel.rows), 0
        for start, stop in parcel.spans:
            count = stop - start
            yield slice(start, stop), tuple(x[:, :, at : at + count] for x in tensors)
            at += count
