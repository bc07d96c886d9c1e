"""The engine of calls in which heads are exchanged for sequence: all-to-alls around that of each part of the heads.

What a rank's parts are computed from, all tokens of its group and some heads, is kept for the backward pass with what
came out. Or it is exchanged again, with the results of the call, which go home whole then, and nothing is kept.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ringattn.mechanisms.base import State
from ringattn.plans.deal import Part, is_shared
from ringattn.runtime.all_to_all import KEYS, QUERIES, AllToAlls, Kind, Tensors, Travelling, heads_of
from ringattn.runtime.call import Call, UlyssesCall
from ringattn.runtime.engines import engine_along

Inputs = list[tuple[torch.Tensor, Kind]]


def forward(
    call: UlyssesCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
) -> tuple[torch.Tensor, State]:
    """The output ``[B, Hq, Sq, Dv]``, the extras, empty where nobody asked for one, and what is kept."""
    compare, swap, kinds = call.compare(f"fwd {number}", seed), call.swap, _kinds(call)
    inputs, aux = _inputs(q, k, v, params, kinds), call.aux
    home = call.asked if swap.keep else range(len(aux))
    targets = [q.new_empty(*q.shape[:3], v.shape[3])]
    targets += [torch.empty(aux[at][0], dtype=aux[at][1], device=q.device) for at in home]
    kept: Tensors = []

    def compute(nth: int, gathered: list[Tensors]) -> list[Tensors]:
        results = []
        for (part, inner), given in zip(call.parts[nth], gathered, strict=True):
            out, extras = engine_along(inner).forward(
                inner, *given[:3], _cut(call, params, kinds, part, given[3:]), seed, number
            )
            if swap.keep:
                kept.extend((*given, out, *extras))
            results.append([out, *(extras[at] for at in home)])
        return results

    def arrive(part: Part, results: Tensors) -> None:
        for target, x in zip(targets, results, strict=True):
            heads_of(target, QUERIES, part).copy_(x)

    travelling = [Travelling.of(target, QUERIES) for target in targets]
    AllToAlls(call.transport, swap, q.device).around(inputs, compute, travelling, arrive)
    compare()
    out, *arrived = targets
    if not swap.keep:
        return out, tuple(arrived)
    found = dict(zip(home, arrived, strict=True))
    return out, (*(found.get(at, q.new_empty(0)) for at in range(len(call.problem.mechanism.extras))), *kept)


def backward(
    call: UlyssesCall,
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
    """The gradients of q, k, v and the params. ``saved`` is all that `forward` gave, ``number`` the forward's."""
    compare, swap, kinds = call.compare(f"bwd {number}", seed), call.swap, _kinds(call)
    inputs = _inputs(q, k, v, params, kinds)
    mechanism = call.problem.mechanism
    first, known = len(inputs), len(inputs) + 1 + len(mechanism.extras) + len(mechanism.kept)
    kept = iter(saved[1 + len(mechanism.extras) :])
    arriving = _arriving(call, dout, grad_extras)
    again: Inputs = [] if swap.keep else [*inputs, *((x, QUERIES) for x in saved)]
    totals = _Totals(call, q, k, v, params, kinds)

    def compute(nth: int, gathered: list[Tensors]) -> list[Tensors]:
        results = []
        for (part, inner), given in zip(call.parts[nth], gathered, strict=True):
            before = [next(kept) for _ in range(known)] if swap.keep else given[:known]
            dlast, dextras = _grads(call, given[-len(arriving) :])
            asked, results_of_part = _cut(call, params, kinds, part, before[3:first]), tuple(before[first:])
            grads = engine_along(inner).backward(
                inner, *before[:3], asked, seed, number, results_of_part, dlast, dextras
            )
            results.append(totals.take(part, grads))
        return results

    all_to_alls = AllToAlls(call.transport, swap, q.device)
    all_to_alls.around([*again, *arriving], compute, totals.travelling, totals.arrive)
    compare()
    return totals.q, totals.k, totals.v, totals.params


def _kinds(call: Call) -> dict[str, Kind | None]:
    """Of every param: which dims count heads and tokens where it is sharded; None where each rank has all of it."""
    mechanism = call.problem.mechanism
    return {
        name: Kind(mechanism.heads_dim(name), mechanism.sharded[name]) if name in mechanism.sharded else None
        for name in mechanism.params
    }


def _inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    kinds: Mapping[str, Kind | None],
) -> Inputs:
    """What goes outward for the forward pass."""
    sharded = [(x, kind) for x, kind in zip(params, kinds.values(), strict=True) if kind is not None]
    return [(q, QUERIES), (k, KEYS), (v, KEYS), *sharded]


def _cut(
    call: Call,
    params: Sequence[torch.Tensor],
    kinds: Mapping[str, Kind | None],
    part: Part,
    gathered: Sequence[torch.Tensor],
) -> Tensors:
    """The params of a part's heads: those that were gathered, and of others the part."""
    found, mechanism = iter(gathered), call.problem.mechanism
    return [
        mechanism.of_heads(name, x, part.first, part.heads) if kind is None else next(found)
        for x, (name, kind) in zip(params, kinds.items(), strict=True)
    ]


def _arriving(call: UlyssesCall, dout: torch.Tensor, grad_extras: Sequence[torch.Tensor | None]) -> Inputs:
    """The gradients of the results that the caller got: of those that nobody used here zeros, as others may have."""
    found = [dout]
    for at in _differentiable(call):
        shape, dtype = call.aux[at]
        grad = grad_extras[at]
        found.append(torch.zeros(shape, dtype=dtype, device=dout.device) if grad is None else grad.to(dtype))
    return [(x, QUERIES) for x in found]


def _differentiable(call: UlyssesCall) -> list[int]:
    return [at for at in call.asked if call.aux[at][1].is_floating_point]


def _grads(call: UlyssesCall, arrived: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The gradient of the output of a part, and of each extra, None for one that no rank has used."""
    found = dict(zip(_differentiable(call), arrived[1:], strict=True))
    extras = range(len(call.problem.mechanism.extras))
    return arrived[0], tuple(found[at] if at in found and bool(found[at].any()) else None for at in extras)


class _Totals:
    """The gradients of a call's inputs, to which the parts add theirs."""

    def __init__(
        self,
        call: UlyssesCall,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        params: Sequence[torch.Tensor],
        kinds: Mapping[str, Kind | None],
    ) -> None:
        problem, swap = call.problem, call.swap
        summed = problem.accumulator if swap.adds_up else problem.dtype
        self._mechanism = problem.mechanism
        self.q = torch.zeros_like(q)
        self.k, self.v = (torch.zeros_like(x, dtype=summed) for x in (k, v))
        self.params = [torch.zeros_like(x) for x in params]
        self._wire = problem.accumulator if swap.gradient_wire == "float32" else problem.dtype
        self._group = problem.heads // problem.kv_heads
        self._alone = [name for name, kind in kinds.items() if kind is None]
        self._by_name = dict(zip(("q", "k", "v", *kinds), (self.q, self.k, self.v, *self.params), strict=True))
        self._home: dict[str, Kind] = {
            name: kind
            for name, kind in {"q": QUERIES, "k": KEYS, "v": KEYS, **kinds}.items()
            if kind is not None and problem.wants(name)
        }

    @property
    def travelling(self) -> list[Travelling]:
        """What goes home."""
        return [self._travelling(self._by_name[name], kind) for name, kind in self._home.items()]

    def _travelling(self, total: torch.Tensor, kind: Kind) -> Travelling:
        if not kind.of_keys:
            return Travelling.of(total, kind)
        narrow = self.q.dtype
        return Travelling(tuple(total.shape), kind, lambda part: self._wire if is_shared(part, self._group) else narrow)

    def take(
        self, part: Part, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]
    ) -> Tensors:
        """Those of a part which go home; those of params that each rank has are added up here."""
        found = dict(zip(self._by_name, (*grads[:3], *grads[3]), strict=True))
        for name in self._alone:
            self._mechanism.of_heads(name, self._by_name[name], part.first, part.heads).add_(found[name])
        return [found[name] for name in self._home]

    def arrive(self, part: Part, results: Tensors) -> None:
        """Adds what came home."""
        for (name, kind), x in zip(self._home.items(), results, strict=True):
            total = heads_of(self._by_name[name], kind, part)
            if kind.of_keys and is_shared(part, self._group):
                total.add_(x)
            else:
                total.copy_(x)
