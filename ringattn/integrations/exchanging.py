"""Heads for sequence around an attention of the caller's own, which sees all tokens, and some of the heads.

Shapes: q ``[B, S, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]``, S and Sk this rank's tokens, contiguous runs
of the sequence in the order of the ranks, of any lengths. What goes to another rank is one message each way: its heads
of q, k and v, as `plans.deal` deals them, and this rank's tokens of what it has computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.errors import InputError
from ringattn.plans.deal import Part, deal
from ringattn.runtime.agreement import gathered
from ringattn.transports.base import Transport

Shape = tuple[int, ...]
Local = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The output ``[B, S, H, Dv]`` of all tokens and any heads."""


class Holding(NamedTuple):
    """What a rank has been called with: the shapes of q, k and v, and their dtype."""

    q: Shape
    k: Shape
    v: Shape
    dtype: str


def exchanged_attention(local: Local, q: Tensor, k: Tensor, v: Tensor, transport: Transport) -> Tensor:
    """The output ``[B, S, Hq, Dv]`` of this rank's tokens. All ranks call it, backward too.

    Args:
        local: called once or, where key heads do not divide, for each run of heads that share key heads alike.

    Raises:
        InputError: the ranks' shapes differ in more than their tokens; on all of them.
        UnsupportedError: there are more ranks than query heads.
    """
    holding = Holding(tuple(q.shape), tuple(k.shape), tuple(v.shape), str(q.dtype))
    held = gathered(transport, holding, "the exchange of heads for sequence")
    _check(held)
    dealt = [slices[0] for slices in deal(q.shape[2], k.shape[2], transport.size)]
    mine = dealt[transport.rank]
    messages = [_flat(*(_heads(x, parts, of_keys) for x, of_keys in ((q, 0), (k, 1), (v, 1)))) for parts in dealt]
    shapes = [[_shape(shape, mine, of_keys) for shape, of_keys in ((h.q, 0), (h.k, 1), (h.v, 1))] for h in held]
    arrived = [_split(x, each) for x, each in zip(_exchange(transport, messages, shapes), shapes, strict=True)]
    whole_q, whole_k, whole_v = (torch.cat(x, 1) for x in zip(*arrived, strict=True))
    first, kv_first = mine[0].first, mine[0].kv_first
    outs = []
    for part in mine:
        own = whole_q.narrow(2, part.first - first, part.heads)
        read = (x.narrow(2, part.kv_first - kv_first, part.kv_heads) for x in (whole_k, whole_v))
        outs.append(local(own, *read))
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    _check_output(out, whole_q)
    home = [_flat(x) for x in out.split([h.q[1] for h in held], 1)]
    back = [[(*q.shape[:2], _count(parts, 0), out.shape[3])] for parts in dealt]
    returned = _exchange(transport, home, back)
    return torch.cat([_split(x, each)[0] for x, each in zip(returned, back, strict=True)], 2)


def _check(held: Sequence[Holding]) -> None:
    alike = {(h.q[0], h.q[2:], h.k[0], h.k[2:], h.v[0], h.v[2:], h.k[1] == h.v[1], h.dtype) for h in held}
    if len(alike) > 1 or held[0].k[1] != held[0].v[1]:
        said = "; ".join(f"rank {rank}: {' '.join(map(str, h))}" for rank, h in enumerate(held))
        raise InputError(f"The ranks' queries, keys and values differ in more than their tokens; got {said}.")
    heads, kv_heads = held[0].q[2], held[0].k[2]
    if kv_heads == 0 or heads % kv_heads or held[0].v[2] != kv_heads:
        raise InputError(f"Query heads must be a multiple of key heads; got {heads}, {kv_heads} and {held[0].v[2]}.")


def _check_output(out: Tensor, q: Tensor) -> None:
    if out.dim() != 4 or out.shape[:3] != q.shape[:3]:
        raise InputError(f"The local attention gives the shape of its queries, {list(q.shape)}; got {list(out.shape)}.")


def _count(parts: Sequence[Part], of_keys: int) -> int:
    return sum(part.kv_heads if of_keys else part.heads for part in parts)


def _heads(x: Tensor, parts: Sequence[Part], of_keys: int) -> Tensor:
    """Those that a rank computes."""
    start = parts[0].kv_first if of_keys else parts[0].first
    return x.narrow(2, start, _count(parts, of_keys))


def _shape(shape: Shape, parts: Sequence[Part], of_keys: int) -> Shape:
    return (*shape[:2], _count(parts, of_keys), shape[3])


def _flat(*tensors: Tensor) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _split(x: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(x.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def _exchange(transport: Transport, messages: list[Tensor], shapes: list[list[Shape]]) -> list[Tensor]:
    """What each rank has for this one, of these shapes, this rank's own included."""
    counts = [sum(math.prod(shape) for shape in each) for each in shapes]
    me, own = transport.rank, messages.pop(transport.rank)
    counts.pop(me)
    received = list(_AllToAll.apply(transport, counts, *messages)) if messages else []  # type: ignore[no-untyped-call]
    received.insert(me, own)
    return received


class _AllToAll(torch.autograd.Function):
    """A message to every other rank, and one from each; backward their gradients, the other way."""

    @staticmethod
    def forward(ctx: Any, transport: Transport, counts: list[int], *messages: Tensor) -> tuple[Tensor, ...]:
        ctx.transport, ctx.counts = transport, [x.numel() for x in messages]
        return _swapped(transport, messages, counts, "heads for sequence")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *_swapped(ctx.transport, gradients, ctx.counts, "heads for sequence, backward")


def _swapped(transport: Transport, given: Sequence[Tensor], counts: list[int], label: str) -> tuple[Tensor, ...]:
    got = tuple(given[0].new_empty(count) for count in counts)
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    sends = [(peer, x.contiguous()) for peer, x in zip(others, given, strict=True)]
    transport.exchange(sends, list(zip(others, got, strict=True)), label=label).wait()
    return got
