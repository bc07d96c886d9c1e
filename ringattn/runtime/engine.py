"""The engine: interprets a plan, forward and backward. The only caller of kernels and transports.

Every step does the same three things: start the exchange, compute the tiles over what is already here, wait for the
exchange. What travels is the plan's cargo.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringattn.mechanisms.base import OutputGrad, Problem, State
from ringattn.payloads.base import Cargo, Queries, Traveller
from ringattn.payloads.keys import Keys
from ringattn.payloads.summaries import Summaries
from ringattn.plans.steps import Exchange
from ringattn.runtime.call import Call
from ringattn.transports.base import Handle


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
) -> tuple[torch.Tensor, State]:
    """The output ``[B, Hq, Sq, Dv]`` and the mechanism's extras. ``number`` is the call's, for `agreement`."""
    problem = call.begun(f"fwd {number}", params, seed)
    state: State | None = None
    cargo = _cargo(call, problem, k, v)
    for step in call.plan.steps:
        under_way = _start(call, step.exchange, "forward", cargo)
        if step.tiles:
            state = cargo.compute(step, q, state)
        under_way.wait()
    return problem.mechanism.finish(problem, problem.mechanism.empty(problem, q.shape[2]) if state is None else state)


def backward(
    call: Call,
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
    """The gradients of q, k, v and the params. ``saved`` is the output and the extras, ``number`` the forward's."""
    problem = call.begun(f"bwd {number}", params, seed)
    cargo = _cargo(call, problem, k, v)
    gradients = cargo.gradients()
    dq = problem.rows(problem.heads, q.shape[2], problem.dim)
    dparams = {name: torch.zeros_like(p, dtype=problem.accumulator) for name, p in problem.params.items()}
    output_grad = OutputGrad(saved, dout, grad_extras)
    queries = Queries(q, output_grad, dq, dparams)
    for step in call.plan.backward_steps:
        under_way = _start(call, step.exchange, "backward", cargo, gradients)
        if step.tiles:
            gradients.compute(step, queries)
        under_way.wait()
        gradients.add_arrived(step.exchange)
    problem.mechanism.finish_grad(problem, output_grad, dparams)
    dk, dv = gradients.own
    totals = [dparams[name].to(p.dtype) for name, p in problem.params.items()]
    return dq.to(problem.dtype), dk.to(problem.dtype), dv.to(problem.dtype), totals


def _cargo(call: Call, problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Cargo:
    return Summaries(call, problem, k, v) if call.plan.cargo == "summaries" else Keys(call, problem, k, v)


def _start(call: Call, exchange: Exchange, name: str, *travellers: Traveller) -> Handle:
    """Starts an exchange of what these have for it. Cargo comes before gradients, on every rank alike."""
    return call.transport.exchange(
        [message for part in travellers for message in part.sends(exchange)],
        [message for part in travellers for message in part.receives(exchange)],
        label=f"attention {name}, phase {exchange.phase}",
    )
