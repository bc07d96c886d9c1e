"""The deterministic engine: the same bits for any number of ranks, layout, schedule and transport.

A sum of floating point numbers depends on its order, and a matrix product on its shape. So nothing is computed but
whole tiles of one shape, cut from the sequence and not from what a rank holds (`plans.grid`), and nothing is summed but
tile after tile in the order of the sequence, where the sum belongs: the output and dq where the query lies, dk and dv
where the key lies. Rows that a rank does not have are zeros in its tiles: at one shape, a row of a product depends on
no other row, and a pair that is not allowed adds nothing.

Three passes. Forward and for dq, keys and values come to the queries, by the plan of the call. For dk and dv the
queries come to the keys, by the plan of the transposed mask. A pass computes when all that its plan brings is there,
so that a rank holds at once every row that it needs of the others.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ringattn.mechanisms.base import OutputGrad, Problem, State
from ringattn.mechanisms.blocks import Block
from ringattn.payloads.outputs import OutputSide
from ringattn.plans.grid import TILE, Tile
from ringattn.runtime.call import TileCall
from ringattn.runtime.gathering import Gathering


def forward(
    call: TileCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
) -> tuple[torch.Tensor, State]:
    """As `engine.forward`."""
    compare = call.compare(f"fwd {number}", seed)
    problem = call.problem_of(params, seed)
    mechanism, dtype, there = problem.mechanism, problem.accumulator, call.to_queries
    assert there is not None  # or it would be `engine`'s
    keys, values = there.blocks(call.transport, (k, v))
    out, extras = mechanism.finish(problem, mechanism.empty(problem, q.shape[2]))
    for nth, tiles in enumerate(there.grid.tiles):
        own, state = _whole(there, nth, q).to(dtype), mechanism.empty(problem, TILE)
        for tile, block in _blocks(there, nth, tiles, problem):
            key, value = keys[tile.other].to(dtype), values[tile.other].to(dtype)
            mechanism.merge(state, mechanism.tile(problem, block, own, key, value))
        done, done_extras = mechanism.finish(problem, state)
        for total, part in zip((out, *extras), (done, *done_extras), strict=True):
            _store(there, nth, part, total)
    compare()
    return out, extras


def backward(
    call: TileCall,
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
    """As `engine.backward`, but for the params, which get no gradients."""
    compare = call.compare(f"bwd {number}", seed)
    problem = call.problem_of(params, seed)
    output_grad = OutputGrad(saved, dout, grad_extras)
    dq, dk, dv = problem.no_gradients(q.shape[2], k.shape[2])
    if problem.wants("q"):
        _query_gradients(call, problem, q, k, v, output_grad, dq)
    if problem.wants("k", "v"):
        _key_gradients(call, problem, q, k, v, output_grad, (dk, dv))
    compare()
    return (
        dq.to(problem.dtype),
        dk.to(problem.dtype),
        dv.to(problem.dtype),
        [torch.zeros_like(p) for p in params],
    )


def _query_gradients(
    call: TileCall,
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output_grad: OutputGrad,
    dq: torch.Tensor,
) -> None:
    """Where the queries lie, over whole tiles of the keys."""
    problem = dataclasses.replace(problem, constants=problem.constants | {"k", "v"})
    there, dtype = call.to_queries, problem.accumulator
    assert there is not None
    keys, values = there.blocks(call.transport, (k, v))
    for nth, tiles in enumerate(there.grid.tiles):
        own = _whole(there, nth, q).to(dtype)
        output = output_grad.select(lambda x: _whole(there, nth, x), dtype)  # noqa: B023 (called at once)
        total = torch.zeros_like(own)
        for tile, block in _blocks(there, nth, tiles, problem):
            key, value = keys[tile.other].to(dtype), values[tile.other].to(dtype)
            part, _, _ = problem.mechanism.tile_grad(problem, block, own, key, value, output, {})
            if part is not None:
                total += part
        _store(there, nth, total, dq)


def _key_gradients(
    call: TileCall,
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output_grad: OutputGrad,
    gradients: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Where the keys lie, over whole tiles of the queries."""
    problem = dataclasses.replace(problem, constants=problem.constants | {"q"})
    there, side, dtype = call.to_keys, OutputSide.of(problem), problem.accumulator
    assert there is not None
    queries, outputs = there.blocks(call.transport, (q, side.packed(output_grad)))
    for nth, tiles in enumerate(there.grid.tiles):
        key, value = _whole(there, nth, k).to(dtype), _whole(there, nth, v).to(dtype)
        totals = torch.zeros_like(key), torch.zeros_like(value)
        for tile, block in _blocks(there, nth, tiles, problem):
            output = side.unpacked(outputs[tile.other]).select(lambda x: x, dtype)
            query = queries[tile.other].to(dtype)
            parts = problem.mechanism.tile_grad(problem, block, query, key, value, output, {})
            for total, part in zip(totals, problem.wanted(*parts)[1:], strict=True):
                if part is not None:
                    total += part
        for total, into in zip(totals, gradients, strict=True):
            _store(there, nth, total, into)


def _blocks(there: Gathering, nth: int, tiles: Sequence[Tile], problem: Problem) -> Iterator[tuple[Tile, Block]]:
    """The tiles of one of a rank's own blocks, of queries or of keys, and their pairs."""
    grid = there.grid
    for tile in tiles:
        allowed = tile.allowed(there.plan.mask, problem.device)
        own, other = grid.own.at(nth), grid.other.at(tile.other)
        if there.of_keys:
            yield tile, Block(slice(0, TILE), other, own, None if allowed is None else allowed.T)
        else:
            yield tile, Block(slice(0, TILE), own, other, allowed)


def _whole(there: Gathering, nth: int, x: torch.Tensor) -> torch.Tensor:
    """One of the own blocks of ``[B, heads, rows, …]``, with zeros for the rows that are not here."""
    rows, places = there.grid.rows(nth)
    whole = x.new_zeros(*x.shape[:2], TILE, *x.shape[3:])
    whole[:, :, places.to(x.device)] = x[:, :, rows]
    return whole


def _store(there: Gathering, nth: int, whole: torch.Tensor, into: torch.Tensor) -> None:
    """Keeps the rows of an own block that are here."""
    rows, places = there.grid.rows(nth)
    into[:, :, rows] = whole[:, :, places.to(whole.device)]
