"""The engine: interprets a plan, forward and backward. Nobody else, but the deterministic one, computes its tiles.

Every step does the same three things: start the exchange, compute the tiles over what is already here, wait for the
exchange. What travels is the plan's payload; in phase 0 the tiles are over this rank's own keys and values.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from ringattn.mechanisms.base import OutputGrad, Problem, State
from ringattn.payloads.base import Attended, Parcel
from ringattn.plans.shape import heads_of
from ringattn.runtime import preparing
from ringattn.runtime.call import TileCall
from ringattn.runtime.heads import Heads
from ringattn.runtime.messages import Moves


def forward(
    call: TileCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
) -> tuple[torch.Tensor, State]:
    """The output ``[B, Hq, Sq, Dv]``, and the extras and what is kept. ``number`` is the call's, for `agreement`."""
    compare = call.compare(f"fwd {number}", seed)
    problem = call.problem_of(params, seed)
    if call.before is not None:
        problem = dataclasses.replace(problem, known=_known(call.before, problem, q, k))
    finished = _finished(call, problem, call.passes.forward, q, k, v)
    compare()
    return finished


def _known(before: TileCall, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> State:
    """What passes over keys alone find of this rank's queries: as many as one of the ranks needs."""

    def one_pass(known: State) -> State:
        asked = dataclasses.replace(before.problem, params=problem.params, seed=problem.seed, known=known)
        return _finished(before, asked, before.key_passes, q, k, k[..., :0])[1]

    return preparing.found(before.transport, before.problem.mechanism, one_pass)


def _finished(
    call: TileCall, problem: Problem, passes: Moves, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, State]:
    """What one pass over keys and values gives."""
    kernel, payload, mechanism = call.kernel, call.plan.attended, problem.mechanism
    every, state = Heads.sliced(problem, heads_of(problem.kv_heads, call.plan.slices)), None
    pack = functools.partial(_pack, payload, every, k, v)
    for step, move in passes:
        under_way = move.start(call.transport, pack)
        if step.tiles and step.phase == 0:
            state = kernel.forward(problem, q, k, v, step.tiles, state)
        elif step.tiles:
            if state is None and len(every) > 1:
                state = mechanism.empty(problem, q.shape[2])
            some = every[call.plan.slice_of(step.phase)]
            seen = None if state is None else some.of_state(state)
            part = payload.attend(some.problem, kernel, some.of_queries(q), move.rows, step.tiles, seen)
            state = part if state is None else state
        under_way.wait()
    return mechanism.finish(problem, mechanism.empty(problem, q.shape[2]) if state is None else state)


def _pack(
    payload: Attended, every: Sequence[Heads], k: torch.Tensor, v: torch.Tensor, parcels: Sequence[Parcel]
) -> None:
    """Writes the rows of all parcels of one exchange, which are of one slice of heads."""
    some = every[parcels[0].slice]
    payload.pack(some.problem, some.of_keys(k, v), parcels)


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
    """The gradients of q, k and v, in the accumulator's dtype, and of the params.

    ``saved`` is all that `forward` gave, ``number`` the forward's.
    """
    compare = call.compare(f"bwd {number}", seed)
    problem = call.problem_of(params, seed)
    kernel, payload = call.kernel, call.plan.attended
    every = Heads.sliced(problem, heads_of(problem.kv_heads, call.plan.slices))
    pack = functools.partial(_pack, payload, every, k, v)
    dq, dk, dv = problem.no_gradients(q.shape[2], k.shape[2])
    dparams = problem.no_gradients_of_params()
    output_grad = OutputGrad(saved, dout, grad_extras)
    for step, move in call.passes.backward:
        under_way = move.start(call.transport, pack)
        if step.tiles and step.phase == 0:
            kernel.backward(problem, q, k, v, output_grad, step.tiles, (dq, dk, dv), dparams)
        elif step.tiles:
            drows = move.drows.zero_() if problem.wants("k", "v") else move.drows
            some = every[call.plan.slice_of(step.phase)]
            query, result = some.of_queries(q), some.of_output(output_grad)
            gradients = some.of_queries(dq), drows, some.of_params(dparams)
            payload.attend_grad(some.problem, kernel, query, move.rows, result, step.tiles, *gradients)
        under_way.wait()
        some = every[move.back]
        move.take_back(payload, some.problem, some.of_keys(k, v), some.of_keys(dk, dv))
    compare()
    problem.mechanism.finish_grad(problem, output_grad, dparams)
    return dq, dk, dv, [dparams[name].to(p.dtype) for name, p in problem.params.items()]
