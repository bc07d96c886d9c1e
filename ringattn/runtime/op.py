"""The torch op around the engine: ``ringattn::attention`` and its backward.

The op takes its plan as an integer, a handle to a `Call`, so that another plan does not mean another graph, and the
call's own number, by which ranks notice that they run backward in another order. The calls are owned by their
`Sharding`; the table below only finds them, and is the one piece of module state in the package.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from ringattn.errors import InputError
from ringattn.runtime import engine
from ringattn.runtime.call import Call

_CALLS: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def handle(call: Call) -> int:
    """A number by which the op finds the call for as long as somebody owns it."""
    number = next(_NUMBERS)
    _CALLS[number] = call
    return number


def _call(plan: int) -> Call:
    call = _CALLS.get(plan)
    if call is None:
        raise InputError(
            "The sharding that owned this attention's plan is gone. Keep it until the backward pass is done."
        )
    return call


@torch.library.custom_op("ringattn::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: list[torch.Tensor], plan: int, seed: int, number: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output and the mechanism's extras."""
    with torch.autocast(q.device.type, enabled=False):  # what is computed in float32 is so on purpose
        out, extras = engine.forward(_call(plan), q, k, v, params, seed, number)
    return out, list(extras)


@attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: list[torch.Tensor], plan: int, seed: int, number: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    problem = _call(plan).with_params(params, seed)
    out, extras = problem.mechanism.finish(problem, problem.mechanism.empty(problem, q.shape[2]))
    return out, list(extras)


@torch.library.custom_op("ringattn::attention_backward", mutates_args=())
def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: list[torch.Tensor],
    saved: list[torch.Tensor],
    dout: torch.Tensor,
    grad_extras: list[torch.Tensor],
    present: list[bool],
    plan: int,
    seed: int,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The gradients. ``present`` tells which extras have one; ``grad_extras`` holds those."""
    given = iter(grad_extras)
    all_extras = tuple(next(given) if there else None for there in present)
    with torch.autocast(q.device.type, enabled=False):
        return engine.backward(_call(plan), q, k, v, params, seed, number, tuple(saved), dout, all_extras)


@attention_backward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: list[torch.Tensor],
    saved: list[torch.Tensor],
    dout: torch.Tensor,
    grad_extras: list[torch.Tensor],
    present: list[bool],
    plan: int,
    seed: int,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    problem = _call(plan).problem
    dq, dk, dv = (problem.rows(x.shape[1], x.shape[2], x.shape[3]).to(x.dtype) for x in (q, k, v))
    return dq, dk, dv, [torch.zeros_like(p) for p in params]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    q, k, v, params, plan, seed, number = inputs
    out, extras = output
    ctx.save_for_backward(q, k, v, out, *params, *extras)
    ctx.params, ctx.plan, ctx.seed, ctx.number = len(params), plan, seed, number
    ctx.call = _CALLS.get(plan)  # keeps the call alive as long as the graph, whatever becomes of its sharding
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, grad_extras: list[torch.Tensor | None] | None) -> tuple[Any, ...]:
    q, k, v, out, *rest = ctx.saved_tensors
    params, extras = rest[: ctx.params], rest[ctx.params :]
    given = [None] * len(extras) if grad_extras is None else grad_extras
    dq, dk, dv, dparams = attention_backward(
        q,
        k,
        v,
        params,
        [out, *extras],
        torch.zeros_like(out) if dout is None else dout,
        [d for d in given if d is not None],
        [d is not None for d in given],
        ctx.plan,
        ctx.seed,
        ctx.number,
    )
    return dq, dk, dv, dparams, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)
