"""`reduce`: what the ranks that share a sequence have, added up or compared, differentiably."""

from __future__ import annotations

from typing import Any

import torch

from ringattn.checking import choice, instance
from ringattn.mechanisms.base import State
from ringattn.mesh import Mesh
from ringattn.runtime import agreement
from ringattn.runtime.folding import add, fold
from ringattn.runtime.transforms import Once, outside_graphs
from ringattn.transports.base import Transport

OPS = ("sum", "mean", "max", "min")


@outside_graphs
def reduce(x: torch.Tensor, mesh: Mesh, op: str = "sum") -> torch.Tensor:
    """The sum, mean, maximum or minimum over the ranks that share a sequence, elementwise. Every rank calls it.

    It travels along a tree of the ranks, up and down: 2 (P - 1) messages of all P ranks, and is folded in their order:
    the same bits on all of them, and on any transport.

    Args:
        x: of the same shape and dtype on every rank. Half precisions are added up in float32.
        mesh: the ranks.
        op: ``sum``, ``mean`` (over the ranks), ``max`` or ``min``.

    Returns:
        the result, on every rank. Backward, the gradients that arrive at it on all ranks are added up, as the losses of
        all ranks are: a loss that every rank computes alike must be divided by ``mesh.sequence_size``. Equal maxima or
        minima share their gradient, as in ``torch.amax``.

    Raises:
        InputError: an argument is wrong; nothing was sent.
        AgreementError: the ranks' shapes, dtypes or ops differ, or only some need a gradient.
    """
    transport = instance(mesh, Mesh, "mesh", "a ringattn.Mesh").connected()
    number = transport.next_call()
    with agreement.telling(transport, "ringattn.reduce", x):
        choice(op, "op", OPS)
    return _Reduce.apply(x, transport, op, number, torch.is_grad_enabled() and x.requires_grad)  # type: ignore[no-untyped-call, no-any-return]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, transport: Transport, op: str, number: int, wanted: bool) -> torch.Tensor:
        ctx.transport, ctx.op, ctx.number = transport, op, number
        gradients = "x" if wanted else "none"  # ranks that need none would not come to the backward pass
        compare = agreement.about(transport, f"red {number}", x, mechanism=op, gradients=gradients)
        value = _wide(x)
        if op in ("sum", "mean"):
            fold(transport, (value,), add, "reduce")
            compare()
            return (value / transport.size if op == "mean" else value).to(x.dtype)
        # how many ranks have the extreme travels with it
        sign = -1 if op == "min" else 1
        state = value * sign, torch.ones(x.shape, dtype=torch.int32, device=x.device)
        fold(transport, state, _extreme, "reduce")
        compare()
        out = (state[0] * sign).to(x.dtype)
        ctx.save_for_backward(x, out, state[1])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        transport: Transport = ctx.transport
        compare = agreement.about(transport, f"unr {ctx.number}", grad, mechanism=ctx.op)
        total = _wide(grad)
        fold(transport, (total,), add, "reduce, backward")
        compare()
        if ctx.op == "mean":
            total /= transport.size
        elif ctx.op != "sum":
            x, out, count = ctx.saved_tensors
            total = torch.where(x == out, total / count, 0)
        total = total.to(grad.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            (total,) = Once.apply("ringattn.reduce", 1, grad, total)  # type: ignore[no-untyped-call]
        return total, None, None, None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in which sums of it are accumulated."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype
    return x.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _extreme(into: State, part: State) -> None:
    """The larger value, and how many have it. Nothing is larger than what is no number."""
    (value, count), (other, others) = into, part
    wins, equal = (other > value) | other.isnan(), other == value
    count.copy_(torch.where(wins, others, count + others * equal))
    value.copy_(torch.where(wins, other, value))
