"""The front door: `attention` checks its arguments, finds or makes the plan, and runs it; `explain` only tells."""

from __future__ import annotations

import dataclasses
from typing import Literal, overload

import torch

from ringattn.errors import InputError, UnsupportedError
from ringattn.kernels.base import Kernel
from ringattn.kernels.choice import chosen
from ringattn.masks import Mask, checked
from ringattn.mechanisms.base import Mechanism, Problem
from ringattn.mechanisms.softmax import Softmax
from ringattn.plans.planning import plan
from ringattn.plans.steps import Plan
from ringattn.runtime import agreement, op
from ringattn.runtime.call import Call
from ringattn.schedules.base import Schedule
from ringattn.sharding import Sharding

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    schedule: Schedule | str = ...,
    kernel: Kernel | str = ...,
    return_lse: Literal[False] = ...,
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
    schedule: Schedule | str = ...,
    kernel: Kernel | str = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = None,
    mechanism: Mechanism = Softmax(),  # noqa: B008 (an immutable value)
    schedule: Schedule | str = "auto",
    kernel: Kernel | str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
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
        return_lse: whether to return the log-sum-exp too, ``[B, Hq, S_local]`` in float32 (float64 for float64),
            -inf for a query that no key may reach. It is differentiable. With learned sinks it includes them, and is
            the sink where no key is. Only softmax has one.

    Returns:
        ``[B, Hq, S_local, Dv]`` in q's dtype; 0 for a query that no key may reach.

    Raises:
        InputError: an argument is wrong; nothing was sent.
        UnsupportedError: the schedule or kernel asked for cannot do this; nothing was sent.
        AgreementError: the ranks called with different arguments; raised on all of them.
    """
    if not isinstance(sharding, Sharding):
        raise InputError(f"attention needs a ringattn.Sharding; got {sharding!r}.")
    kv = sharding if kv_sharding is None else kv_sharding
    transport = sharding.mesh.connected()
    call_number = transport.next_call()
    try:
        _check_kinds(q, k, v, mask, kv, mechanism, schedule, kernel)
        problem = _problem(q, k, v, mechanism, sharding, kv)
        number = _handle(problem, mask, sharding, kv, schedule, kernel, _wanted(q, k, v, mechanism))
        if return_lse and "lse" not in mechanism.extras:
            raise UnsupportedError(f"{mechanism} has no log-sum-exp to return; leave return_lse out.")
    except Exception:
        # The other ranks are about to compare digests and would wait for ours.
        agreement.refuse(transport, q.device if isinstance(q, torch.Tensor) else torch.device("cpu"))
        raise
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    params = list(mechanism.params.values())
    out, extras = op.attention(q, k, v, params, number, mechanism.new_seed(), call_number)
    return (out, extras[mechanism.extras.index("lse")].to(problem.accumulator)) if return_lse else out


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = None,
    mechanism: Mechanism = Softmax(),  # noqa: B008 (an immutable value)
    schedule: Schedule | str = "auto",
    kernel: Kernel | str = "auto",
) -> str:
    """What `attention` would do with the same arguments, in words: this rank's plan, its layout and kernel, and why.

    Sends nothing, and needs no transport.
    """
    kv = sharding if kv_sharding is None else kv_sharding
    _check_kinds(q, k, v, mask, kv, mechanism, schedule, kernel)
    problem = _problem(q, k, v, mechanism, sharding, kv)
    planned = _planned(problem, mask, sharding, kv, schedule)
    taken, reason = chosen(kernel, _asking(problem, planned))
    return f"{planned.explain()}\n  layout: {sharding.reason}\n  kernel {taken}: {reason}"


def _planned(problem: Problem, mask: Mask, sharding: Sharding, kv: Sharding, schedule: Schedule | str) -> Plan:
    return plan(
        mask,
        sharding,
        schedule,
        kv,
        heads=(problem.heads, problem.kv_heads),
        head_dims=(problem.dim, problem.value_dim),
        dtype=problem.dtype,
        batch=problem.batch,
        mechanism=problem.mechanism,
    )


def _handle(
    problem: Problem,
    mask: Mask,
    sharding: Sharding,
    kv: Sharding,
    schedule: Schedule | str,
    kernel: Kernel | str,
    wanted: str,
) -> int:
    """The handle of the call, which is prepared once and then kept by the sharding."""
    form = str(problem.mechanism), problem.batch, *_shapes(problem), problem.device
    key = mask, kv, schedule, kernel, form, wanted
    if key not in sharding.owned:
        refusal = sharding.mesh.connected().refusal(problem.device)
        if refusal is not None:
            raise UnsupportedError(refusal)
        sharding.owned[key] = _prepared(problem, mask, sharding, kv, schedule, kernel, wanted)
    _, number = sharding.owned[key]
    return int(number)


def _prepared(
    problem: Problem,
    mask: Mask,
    sharding: Sharding,
    kv: Sharding,
    schedule: Schedule | str,
    kernel: Kernel | str,
    wanted: str,
) -> tuple[Call, int]:
    """The call and its handle: planned, verified, and everything that can be known before the tensors."""
    heads, dims = (problem.heads, problem.kv_heads), (problem.dim, problem.value_dim)
    own = _planned(problem, mask, sharding, kv, schedule)
    own.verify()
    problem = _asking(problem, own)
    fields = {
        "shapes": f"{problem.batch} x {heads} heads of {dims}, {sharding.length} queries, {kv.length} keys",
        "dtype": str(problem.dtype).removeprefix("torch."),
        "mask": mask.signature(sharding.length, kv.length),
        "layout": sharding.signature if kv == sharding else f"{sharding.signature}, keys {kv.signature}",
        "schedule": str(schedule) if isinstance(schedule, str) else repr(schedule),
        "mechanism": str(problem.mechanism),
        "gradients": wanted,
    }
    call = Call(own, problem, chosen(kernel, problem)[0], sharding.mesh.connected(), fields)
    return call, op.handle(call)


def _asking(problem: Problem, plan: Plan) -> Problem:
    """The problem, with what partial tiles ask where there are any."""
    return dataclasses.replace(problem, allows=plan.mask.allows) if len(plan.partial) else problem


def _check_kinds(
    q: object, k: object, v: object, mask: object, kv: object, mechanism: object, schedule: object, kernel: object
) -> None:
    """Raises InputError where an argument is not even of the kind that is needed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise InputError(f"{name} must be a tensor; got {type(x).__name__}.")
    checked(mask)
    if not isinstance(kv, Sharding):
        raise InputError(f"kv_sharding must be a ringattn.Sharding; got {kv!r}.")
    if not isinstance(mechanism, Mechanism):
        raise InputError(f"mechanism must be a ringattn mechanism, such as ringattn.Softmax(); got {mechanism!r}.")
    if not isinstance(schedule, (str, Schedule)):
        raise InputError(f"schedule must be a Schedule or its name, such as 'auto'; got {schedule!r}.")
    if not isinstance(kernel, (str, Kernel)):
        raise InputError(f"kernel must be a Kernel or its name, such as 'auto'; got {kernel!r}.")


def _wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mechanism: Mechanism) -> str:
    """Which inputs need gradients, as in ``q k v`` or ``q k v sinks``."""
    if not torch.is_grad_enabled():
        return "none"
    named = {"q": q, "k": k, "v": v, **mechanism.params}
    return " ".join(name for name, x in named.items() if x.requires_grad) or "none"


def _shapes(problem: Problem) -> tuple[object, ...]:
    return problem.heads, problem.kv_heads, problem.dim, problem.value_dim, problem.dtype


def _problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mechanism: Mechanism, sharding: Sharding, kv: Sharding
) -> Problem:
    """The problem the tensors pose, or an error that shows the whole call."""
    call = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise InputError(f"attention takes [batch, heads, tokens, dim]; got {call}.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        said = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise InputError(f"q, k and v must have one dtype and device; got {said}.")
    if q.dtype not in _DTYPES:
        raise InputError(f"attention computes float64, float32, bfloat16 and float16; got {q.dtype}.")
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or k.shape[3] != dim:
        raise InputError(f"q, k, v must be [B, Hq, S, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv]; got {call}.")
    if not min(batch, heads, k.shape[1], dim, v.shape[3]):
        raise InputError(f"The batch, the heads and their dims must not be empty; got {call}.")
    if heads % k.shape[1]:
        raise InputError(f"Query heads must be a multiple of key heads; got {heads} and {k.shape[1]}.")
    for x, owner, what in ((q, sharding, "queries"), (k, kv, "keys")):
        if x.shape[2] != owner.count:
            raise InputError(
                f"Rank {owner.mesh.sequence_rank} holds {owner.count} of the {owner.length} {what}; got {call}. "
                f"Pass this rank's part, as sharding.split(x, dim=2) gives it."
            )
    problem = Problem(mechanism.without_tensors, batch, heads, k.shape[1], dim, v.shape[3], q.dtype, q.device)
    mechanism.check(problem, sharding.count, kv.length)
    return problem
