"""The front door: `attention` checks its arguments, finds or makes the plan, and runs it; `explain` only tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, overload

import torch

from ringattn.kernels.base import Kernel
from ringattn.masks import Causal, Mask
from ringattn.mechanisms.base import Mechanism
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.softmax import Softmax
from ringattn.mechanisms.total import Total
from ringattn.runtime import op
from ringattn.runtime.request import Request, results_of, wanted_gradients
from ringattn.runtime.spelling import spelled
from ringattn.runtime.transforms import outside_graphs, refuse_export
from ringattn.schedules.base import Scheme
from ringattn.sharding import Sharding

_UP_TO = Causal()  # which compiled code cannot make


@overload
def attention(  # type: ignore[overload-overlap]  # of an empty tuple, which is one of names too
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = ...,
    mechanism: Mechanism = ...,
    schedule: Scheme | str = ...,
    kernel: Kernel | str = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = ...,
    extras: tuple[()] = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = ...,
    mechanism: Mechanism = ...,
    schedule: Scheme | str = ...,
    kernel: Kernel | str = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
    extras: tuple[()] = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = ...,
    mechanism: Mechanism = ...,
    schedule: Scheme | str = ...,
    kernel: Kernel | str = ...,
    deterministic: bool = ...,
    return_lse: bool = ...,
    extras: Sequence[str],
) -> tuple[torch.Tensor, ...]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = None,
    mechanism: Mechanism = Softmax(),  # noqa: B008 (an immutable value)
    schedule: Scheme | str = "auto",
    kernel: Kernel | str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    extras: Sequence[str] = (),
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Exact attention over a sequence that is sharded over ranks. Every rank calls it with its own part.

    Args:
        q: ``[B, Hq, S_local, D]``, this rank's queries, in the order of ``sharding.positions``.
        k, v: ``[B, Hkv, Skv_local, D]`` and ``[B, Hkv, Skv_local, Dv]``, in the order of ``kv_sharding.positions``. Hq
            is a multiple of Hkv; query head h reads key head ``h // (Hq / Hkv)``, as in
            ``scaled_dot_product_attention(enable_gqa=True)``.
        mask: the allowed pairs, in global positions.
        sharding: who holds the queries.
        kv_sharding: who holds the keys and values; None for the same.
        mechanism: what attends; Softmax by default.
        schedule: a schedule, its name, or ``auto``, which `ringattn.plan(...).explain()` explains.
        kernel: a kernel, its name, or ``auto``.
        deterministic: the same bits, of the output and of the gradients, for any number of ranks, layout, schedule and
            transport: of finite numbers, on processors and builds of PyTorch that are alike. It computes whole tiles by
            the reference kernel, holds at once all the keys that a rank's queries need and, backward, the queries
            that its keys need, and sends those too; `explain` says how much. A schedule that sums up keys (scan),
            another kernel, an additive bias, and learned parameters that need gradients are refused.
        return_lse: whether to return the log-sum-exp too, ``[B, Hq, S_local]`` in float32 (float64 for float64),
            -inf for a query that no key may reach. It is differentiable. With learned sinks it includes them, and is
            the sink where no key is. Only softmax has one.
        extras: names of further results of the mechanism (its ``extras``), each ``[B, Hq, S_local]``, numbers in
            float32 (float64 for float64) and differentiable.

    Returns:
        ``[B, Hq, S_local, Dv]`` in q's dtype; 0 for a query that no key may reach. With ``return_lse`` or ``extras`` a
        tuple of it, the log-sum-exp if asked for, and the extras in the order of their names.

    Raises:
        InputError: an argument is wrong; nothing was sent.
        UnsupportedError: the schedule or kernel asked for cannot do this; nothing was sent.
        AgreementError: the ranks called with different arguments; raised on all of them.
    """
    request = Request(mask, sharding, kv_sharding, mechanism, schedule, kernel, deterministic, return_lse, extras)
    given = q
    request, q, k, v = summed_first(request, q, k, v)
    dtype = given.dtype  # a tensor's, as has been checked by now
    compiling = torch.compiler.is_compiling()
    run = _between_graphs if isinstance(request.mechanism, Ordered) else _compiled if compiling else _eager
    out, aux = run(request, q, k, v)
    if out.dtype != dtype:
        out = out.to(dtype)
    if not request.results:
        return out
    return out, *results_of(mechanism, request.results, aux, dtype)


def running_sum(x: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """The sums ``[B, H, S_local, D]`` of x up to and at each position: attention that asks nothing of its keys."""
    nothing = x.new_zeros(()).expand(*x.shape[:3], 1)
    return attention(nothing, nothing, x, _UP_TO, sharding=sharding, mechanism=Total())


def summed_first(
    request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[Request, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is asked for when the cumulative sums that the mechanism needs, which most do not, are worked in."""
    try:
        request.check_kinds(q, k, v)
        x = request.mechanism.to_sum(q, k, v)
        if x is None:
            return request, q, k, v
        request.check_one_sharding()
    except Exception as error:
        request.refuse(error)
        raise
    mechanism, q, k, v = request.mechanism.with_sums(q, k, v, running_sum(x, request.sharding))
    return dataclasses.replace(request, mechanism=mechanism), q, k, v


def _eager(
    request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The output, and the mechanism's extras and what it keeps."""
    call, ticket, params = op.prepared(request, q, k, v)
    if any(call.wanted):
        out, *aux = op.Attention.apply(call, ticket, q, k, v, *params)  # type: ignore[no-untyped-call]
        return out, aux
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return torch.ops.ringattn.attention.default(q, k, v, params, ticket, *call.spelling, call.wanted)  # type: ignore[no-any-return]


@outside_graphs
def _between_graphs(
    request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The same where what is kept is as large as the plan says, which no graph knows."""
    return _eager(request, q, k, v)


def _compiled(
    request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The same as two ops of a graph. What the arguments hold is looked at when they run, but for the mechanism."""
    refuse_export("ringattn.attention")
    mechanism, params = request.mechanism, list(request.mechanism.params.values())
    numbers: list[float] = []
    text, schedule, kernel = (spelled(x, numbers) for x in (mechanism, request.schedule, request.kernel))
    wanted = wanted_gradients(q, k, v, *params)
    tokens, deterministic = [request.mask.token, request.sharding.token, request.kv.token], request.deterministic
    drawn = mechanism.new_seed()
    seed = drawn if isinstance(drawn, torch.Tensor) else torch.full((), drawn, dtype=torch.int64, device="cpu")
    ticket = torch.ops.ringattn.prepare(
        q, k, v, params, tokens, seed, numbers, text, schedule, kernel, deterministic, wanted
    )
    return torch.ops.ringattn.attention(q, k, v, params, ticket, numbers, text, wanted)  # type: ignore[no-any-return]


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = None,
    mechanism: Mechanism = Softmax(),  # noqa: B008 (an immutable value)
    schedule: Scheme | str = "auto",
    kernel: Kernel | str = "auto",
    deterministic: bool = False,
) -> str:
    """What `attention` would do with the same arguments, in words: this rank's plan, its layout and kernel, and why.

    Sends nothing, and needs no transport.
    """
    request = Request(mask, sharding, kv_sharding, mechanism, schedule, kernel, deterministic)
    request.check_kinds(q, k, v)
    x = request.mechanism.to_sum(q, k, v)
    if x is not None:  # of which nothing but the shape matters
        mechanism, q, k, v = request.mechanism.with_sums(q, k, v, x)
        request = dataclasses.replace(request, mechanism=mechanism)
    return request.explain(q, k, v)
