"""The engine: interprets a plan, forward and backward. The only caller of kernels and transports.

Every step does the same three things: start the exchange, compute the tiles over the buffer that is already here,
wait for the exchange. Keys and values travel as rows ``[rows, B, Hkv, D + Dv]``, so that one message a peer carries
both, the messages of a step lie behind one another in one buffer, and the kernel reads that buffer as it arrived.
Gradients of keys and values have the same form, in the accumulator's dtype.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ringattn import agreement
from ringattn.kernels.base import Kernel
from ringattn.mechanisms.base import Problem, State
from ringattn.plans import Exchange, Item, Plan
from ringattn.transports.base import Handle, Message, Transport


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Everything about an attention call that is known before its tensors.

    Attributes:
        fields: what the ranks must agree on, for `agreement`.
    """

    plan: Plan
    problem: Problem
    kernel: Kernel
    transport: Transport
    fields: Mapping[str, str]

    def with_params(self, params: State, seed: int) -> Problem:
        """The problem with this call's learned tensors and seed."""
        return dataclasses.replace(self.problem, params=params, seed=seed)

    def agree(self, name: str) -> None:
        """Compares this call with every other rank's, before any payload."""
        agreement.check(self.transport, {**self.fields, "call": name}, self.problem.device)


def forward(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: State, seed: int, number: int
) -> tuple[torch.Tensor, State]:
    """The output ``[B, Hq, Sq, Dv]`` and the mechanism's extras. ``number`` is the call's, for `agreement`."""
    call.agree(f"fwd {number}")
    problem = call.with_params(params, seed)
    state = problem.mechanism.empty(problem, q.shape[2])
    keys = _Keys(call, k, v)
    for step in call.plan.steps:
        under_way = _start(call, step.exchange, "forward", keys)
        if step.tiles:
            call.kernel.forward(problem, q, *keys.of(step.phase), step.tiles, state)
        under_way.wait()
    return problem.mechanism.finish(problem, state)


def backward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: State,
    seed: int,
    number: int,
    saved: State,
    dout: torch.Tensor,
    dextras: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]:
    """The gradients of q, k, v and the params. ``saved`` is the output and the extras, ``number`` the forward's."""
    call.agree(f"bwd {number}")
    problem = call.with_params(params, seed)
    keys = _Keys(call, k, v)
    dq = problem.rows(problem.heads, q.shape[2], problem.dim)
    gradients = _Gradients(call, k.shape[2])
    dparams = tuple(torch.zeros_like(p, dtype=problem.accumulator) for p in params)
    for step in call.plan.backward_steps:
        under_way = _start(call, step.exchange, "backward", keys, gradients)
        if step.tiles:
            into = (dq, *gradients.of(step.phase))
            call.kernel.backward(problem, q, *keys.of(step.phase), saved, dout, dextras, step.tiles, into, dparams)
        under_way.wait()
        gradients.add_arrived(step.exchange)
    dk, dv = gradients.of(0)
    totals = tuple(total.to(p.dtype) for total, p in zip(dparams, params, strict=True))
    return dq.to(problem.dtype), dk.to(problem.dtype), dv.to(problem.dtype), totals


def _start(call: Call, exchange: Exchange, name: str, *buffers: _Keys | _Gradients) -> Handle:
    """Starts an exchange of what these buffers have for it. Keys come first, on every rank alike."""
    return call.transport.exchange(
        [message for part in buffers for message in part.sends(exchange)],
        [message for part in buffers for message in part.receives(exchange)],
        label=f"attention {name}, phase {exchange.phase}",
    )


class _Keys:
    """The keys and values of every phase: this rank's own, and those in the two receive buffers."""

    def __init__(self, call: Call, k: torch.Tensor, v: torch.Tensor) -> None:
        self._call, self._own = call, (k, v)

    def of(self, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, Hkv, rows, D]`` and ``[B, Hkv, rows, Dv]``: views of where the phase's rows lie."""
        return self._own if phase == 0 else _halves(self._rows(phase), self._call.problem)

    def sends(self, exchange: Exchange) -> list[Message]:
        """The keys and values that leave in this exchange."""
        staging = _Staging(self._call, "key staging", self._call.problem.dtype)
        packed = self._call.plan.packed
        return [
            (item.peer, self._packed(item, staging) if packed(item) else self._run(item))
            for item in exchange.sends
            if item.what == "kv"
        ]

    def receives(self, exchange: Exchange) -> list[Message]:
        """Where those that arrive in it go."""
        return [(item.peer, self._run(item)) for item in exchange.receives if item.what == "kv"]

    def _rows(self, phase: int) -> torch.Tensor:
        name = f"keys {self._call.plan.slots[phase]}"
        return _buffer(self._call, name, self._call.plan.held_rows[phase], self._call.problem.dtype)

    def _run(self, item: Item) -> torch.Tensor:
        """The rows of an item that lie behind one another."""
        return self._rows(item.phase)[int(item.spans[0, 0]) : int(item.spans[-1, 1])]

    def _packed(self, item: Item, staging: _Staging) -> torch.Tensor:
        out = staging.take(item.rows)
        for source, target in zip(self.of(item.phase), _halves(out, self._call.problem), strict=True):
            _gather(source, item, target)
        return out


class _Gradients:
    """Accumulated gradients of the keys and values of every phase, and their way home."""

    def __init__(self, call: Call, length: int) -> None:
        self._call, problem = call, call.problem
        self._own = tuple(problem.rows(problem.kv_heads, length, dim) for dim in (problem.dim, problem.value_dim))
        self._wire = problem.dtype if call.plan.gradient_wire == "input" else problem.accumulator

    def of(self, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The accumulators of a phase, which begin as zeros when they are first asked for."""
        if phase == 0:
            return self._own[0], self._own[1]
        return _halves(self._rows(phase).zero_(), self._call.problem)

    def sends(self, exchange: Exchange) -> list[Message]:
        """The gradients that go home in this exchange."""
        staging = _Staging(self._call, "home staging", self._wire)
        packed = self._call.plan.packed
        return [
            (item.peer, self._packed(item, staging) if packed(item) else self._run(item))
            for item in exchange.sends
            if item.what == "dkv"
        ]

    def receives(self, exchange: Exchange) -> list[Message]:
        """Where those that come home in it arrive."""
        return [(item.peer, rows) for item, rows in self._arrivals(exchange)]

    def add_arrived(self, exchange: Exchange) -> None:
        """Adds what came home to this rank's own gradients, in the order of the exchange's items."""
        for item, rows in self._arrivals(exchange):
            for total, part in zip(self._own, _halves(rows, self._call.problem), strict=True):
                at = 0
                for start, stop in item.spans.tolist():
                    total[:, :, start:stop].add_(part[:, :, at : at + stop - start])
                    at += stop - start

    def _arrivals(self, exchange: Exchange) -> list[tuple[Item, torch.Tensor]]:
        staging = _Staging(self._call, "home arrivals", self._wire)
        return [(item, staging.take(item.rows)) for item in exchange.receives if item.what == "dkv"]

    def _run(self, item: Item) -> torch.Tensor:
        return self._rows(item.phase)[int(item.spans[0, 0]) : int(item.spans[-1, 1])]

    def _packed(self, item: Item, staging: _Staging) -> torch.Tensor:
        out = staging.take(item.rows)
        _gather(self._rows(item.phase).movedim(0, 2), item, out.movedim(0, 2))
        return out

    def _rows(self, phase: int) -> torch.Tensor:
        name = f"gradients {self._call.plan.slots[phase]}"
        return _buffer(self._call, name, self._call.plan.held_rows[phase], self._call.problem.accumulator)


class _Staging:
    """Hands out the rows of one buffer, from its beginning, to the messages of one exchange."""

    def __init__(self, call: Call, name: str, dtype: torch.dtype) -> None:
        self._rows = _buffer(call, name, call.plan.buffer_rows[name], dtype)
        self._at = 0

    def take(self, rows: int) -> torch.Tensor:
        self._at += rows
        return self._rows[self._at - rows : self._at]


def _buffer(call: Call, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, B, Hkv, D + Dv]`` over the transport's buffer of this name, which is kept from call to call."""
    problem = call.problem
    shape = (rows, problem.batch, problem.kv_heads, problem.dim + problem.value_dim)
    return call.transport.buffers.take(name, shape, dtype, problem.device)


def _halves(rows: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The key half and the value half of rows, ``[B, Hkv, rows, D]`` and ``[B, Hkv, rows, Dv]``."""
    k, v = rows.permute(1, 2, 0, 3).split([problem.dim, problem.value_dim], dim=-1)
    return k, v


def _gather(source: torch.Tensor, item: Item, target: torch.Tensor) -> None:
    """Copies the item's rows, dim 2 of ``source``, one behind the other into dim 2 of ``target``."""
    at = 0
    for start, stop in item.spans.tolist():
        target[:, :, at : at + stop - start].copy_(source[:, :, start:stop])
        at += stop - start
