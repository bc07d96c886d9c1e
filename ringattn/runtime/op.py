"""The torch ops around the engine, by which attention is differentiated, compiled and checkpointed.

    ringattn::prepare              checks, plans and numbers a call when it runs           -> ticket
    ringattn::attention            the forward pass of the ticket's call                   -> out, aux
    ringattn::attention_backward   the gradients that were wanted

A *ticket* is an int64 tensor ``[3]`` on the CPU: the handle of the `Call`, the call's number among those of its ranks,
and its seed. Its memory owns the call, so that a plan lives as long as a graph or an autograd node holds the ticket,
whatever becomes of its sharding. Everything that may change from step to step without another graph (masks, shardings,
plans, numbers, seeds) is found when the ops run; what a graph must know to trace them, the mechanism's fields and which
gradients are wanted, is text.

Eager calls prepare themselves and go through `Attention`, an ordinary autograd function around the same ops: a third of
the cost of autograd that is registered with an op.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ringattn.handles import found
from ringattn.runtime import ulysses
from ringattn.runtime.call import Call, UlyssesCall
from ringattn.runtime.engines import engine_along
from ringattn.runtime.request import Request, problem_of, wanted_gradients
from ringattn.runtime.running import running
from ringattn.runtime.spelling import unspelled
from ringattn.runtime.transforms import Once, refuse_transforms
from ringattn.transports.base import Transport

Tensors = list[torch.Tensor]
Flags = Sequence[bool]
"""Of q, k, v and the params in turn: whether a gradient is wanted."""

_LIBRARY = torch.library.Library("ringattn", "DEF")
_LIBRARY.define(
    "prepare(Tensor q, Tensor k, Tensor v, Tensor[] params, Tensor[] tokens, Tensor seed, float[] numbers, "
    "str mechanism, str schedule, str kernel, bool deterministic, bool[] wanted) -> Tensor"
)
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] params, Tensor ticket, float[] numbers, str mechanism, "
    "bool[] wanted) -> (Tensor, Tensor[])"
)
_LIBRARY.define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor[] params, Tensor[] saved, Tensor? dout, "
    "Tensor?[] grad_aux, Tensor ticket, bool[] wanted) -> Tensor[]"
)


class _Owner(np.ndarray):
    """A ticket's memory. A tensor made of it keeps it, and with it the call, alive."""

    call: Call


def ticket_of(call: Call, seed: int) -> torch.Tensor:
    """The ticket of one run of a call, which is numbered among those of its ranks."""
    owner = np.array((call.handle, call.transport.next_call(), seed), dtype=np.int64).view(_Owner)
    owner.call = call
    return torch.from_numpy(owner)


def prepared(request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Call, torch.Tensor, Tensors]:
    """The call of a request of the right kinds, the ticket of one run, and the params. Others hear of a refusal."""
    try:
        refuse_transforms("ringattn.attention", q, k, v)
        params = list(request.mechanism.params.values())
        call = request.call((q, k, v, *params), wanted_gradients(q, k, v, *params))
        return call, ticket_of(call, int(request.mechanism.new_seed())), params
    except Exception as error:
        request.refuse(error)
        raise


# -- the ops ---------------------------------------------------------------------------------------------------------


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Tensors,
    tokens: Tensors,
    seed: torch.Tensor,
    numbers: Sequence[float],
    mechanism: str,
    schedule: str,
    kernel: str,
    deterministic: bool,
    wanted: Flags,
) -> torch.Tensor:
    names = ("mask", "sharding", "kv_sharding")
    mask, sharding, kv = (found(int(token), name) for token, name in zip(tokens, names, strict=True))
    asked = unspelled(mechanism, numbers, params)
    kv = None if kv is sharding else kv
    named = unspelled(schedule, numbers), unspelled(kernel, numbers)
    request = Request(mask, sharding, kv, asked, *named, deterministic, traced=True)
    try:
        return ticket_of(request.call((q, k, v, *params), tuple(wanted)), int(seed))
    except Exception as error:
        request.refuse(error)
        raise


def _prepare_fake(*_: Any) -> torch.Tensor:
    return torch.empty(3, dtype=torch.int64, device="cpu")


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Tensors,
    ticket: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, Tensors]:
    handle, number, seed = ticket.tolist()
    call = found(handle, "plan")
    with running(call.transport, f"attention forward {number}", q.device.type):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as kernels take them
        _observe(call.transport, q=q, k=k, v=v)
        out, aux = _engine(call).forward(call, q, k, v, params, seed, number)
        _observe(call.transport, output=out)
    return out, list(aux)


def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Tensors,
    _ticket: torch.Tensor,
    numbers: Sequence[float],
    mechanism: str,
    _wanted: Flags,
) -> tuple[torch.Tensor, Tensors]:
    asked = unspelled(mechanism, numbers, params)
    problem = problem_of(asked, q, k, v, params=asked.params).unprepared(q.shape[2])
    out, aux = asked.finish(problem, asked.empty(problem, q.shape[2]))
    return out, list(aux)


def _attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Tensors,
    saved: Tensors,
    dout: torch.Tensor | None,
    grad_aux: Sequence[torch.Tensor | None],
    ticket: torch.Tensor,
    wanted: Flags,
) -> Tensors:
    handle, number, seed = ticket.tolist()
    dout = torch.zeros_like(saved[0]) if dout is None else dout
    call = found(handle, "plan")
    mechanism = call.problem.mechanism
    with running(call.transport, f"attention backward {number}", q.device.type):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        _observe(call.transport, output_gradient=dout)
        dq, dk, dv, dparams = _engine(call).backward(
            call, q, k, v, params, seed, number, tuple(saved), dout, tuple(grad_aux[: len(mechanism.extras)])
        )
        dq, dk, dv = (x.to(q.dtype) for x in (dq, dk, dv))
        _observe(call.transport, q_gradient=dq, k_gradient=dk, v_gradient=dv)
    return list(itertools.compress((dq, dk, dv, *dparams), wanted))


def _attention_backward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: Tensors, *others: Any
) -> Tensors:
    # as PyTorch's flash kernels return them, stored as [B, S, H, D]
    like = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v)]
    wanted: Flags = others[-1]
    return list(itertools.compress((*like, *map(torch.empty_like, params)), wanted))


def _engine(call: Call) -> ModuleType:
    return ulysses if isinstance(call, UlyssesCall) else engine_along(call)


for name, implementation, fake in (
    ("prepare", _prepare, _prepare_fake),
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
):
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ringattn::{name}", fake, lib=_LIBRARY)


# -- autograd --------------------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """The same ops in eager mode. Takes ``call, ticket, q, k, v, *params``, gives ``out, *aux``."""

    @staticmethod
    def forward(ctx: Any, call: Call, ticket: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *params = inputs
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out, aux = torch.ops.ringattn.attention.default(q, k, v, params, ticket, *call.spelling, call.wanted)
        # The caller may write into what it gets. What is kept is copied by the first who writes to either.
        ctx.save_for_backward(q, k, v, *params, *map(torch._lazy_clone, (out, *aux)))
        ctx.call, ctx.ticket, ctx.params = call, ticket, len(params)
        ctx.set_materialize_grads(False)
        extras = len(call.problem.mechanism.extras)
        ctx.mark_non_differentiable(*(x for x in aux[:extras] if not x.is_floating_point()), *aux[extras:])
        return out, *aux

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *grad_aux: torch.Tensor | None) -> tuple[Any, ...]:
        grads = _gradients(ctx.saved_tensors, ctx.params, dout, grad_aux, ctx.ticket, ctx.call.wanted)
        return None, None, *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, Tensors]) -> None:
    q, k, v, params, ticket, numbers, _, wanted = inputs
    out, aux = output
    ctx.save_for_backward(ticket, q, k, v, *params, *map(torch._lazy_clone, (out, *aux)))  # as in `Attention`
    ctx.params, ctx.wanted = len(params), wanted
    ctx.no_numbers = None if numbers else []  # torch takes an empty list for one of tensors
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, grad_aux: list[torch.Tensor | None] | None) -> tuple[Any, ...]:
    ticket, *saved = ctx.saved_tensors
    dq, dk, dv, *dparams = _gradients(saved, ctx.params, dout, grad_aux or (), ticket, ctx.wanted)
    return dq, dk, dv, dparams, None, ctx.no_numbers, None, None


torch.library.register_autograd("ringattn::attention", _backward, setup_context=_setup_context, lib=_LIBRARY)


def _gradients(
    saved: Sequence[torch.Tensor],
    params: int,
    dout: torch.Tensor | None,
    grad_aux: Sequence[torch.Tensor | None],
    ticket: torch.Tensor,
    wanted: Flags,
) -> list[torch.Tensor | None]:
    """The gradients of q, k, v and the params, None where none is wanted."""
    q, k, v, *rest = saved
    named, results = rest[:params], rest[params:]
    given = list(grad_aux) or [None] * (len(results) - 1)
    grads = torch.ops.ringattn.attention_backward.default(q, k, v, named, results, dout, given, ticket, wanted)
    if torch.is_grad_enabled():  # create_graph=True
        grads = Once.apply("ringattn.attention", len(saved), *saved, *grads)  # type: ignore[no-untyped-call]
    found_ones = iter(grads)
    return [next(found_ones) if there else None for there in wanted]


def _observe(transport: Transport, **tensors: torch.Tensor) -> None:
    if transport.observer is not None:
        transport.observer(transport.doing, tensors)
