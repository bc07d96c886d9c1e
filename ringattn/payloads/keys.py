"""Keys and values, as rows ``[rows, B, Hkv, D + Dv]``, and their gradients in the same form.

One message a peer carries both halves, the messages of a step lie behind one another in one buffer, and the kernel
reads that buffer as it arrived.
"""

from __future__ import annotations

import torch

from ringattn.mechanisms.base import Problem, State
from ringattn.payloads.base import Cargo, Gradients, Queries
from ringattn.plans.steps import Exchange, Item, Step
from ringattn.runtime.call import Call, Staging
from ringattn.transports.base import Message


class Keys(Cargo):
    """The keys and values of every phase: this rank's own, and those in the two receive buffers."""

    def __init__(self, call: Call, problem: Problem, k: torch.Tensor, v: torch.Tensor) -> None:
        self.call, self.problem, self._own = call, problem, (k, v)

    def of(self, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, Hkv, rows, D]`` and ``[B, Hkv, rows, Dv]``: views of where the phase's rows lie."""
        return self._own if phase == 0 else _halves(self._rows(phase), self.problem)

    def compute(self, step: Step, q: torch.Tensor, state: State | None) -> State:
        return self.call.kernel.forward(self.problem, q, *self.of(step.phase), step.tiles, state)

    def gradients(self) -> KeyGradients:
        return KeyGradients(self)

    def sends(self, exchange: Exchange) -> list[Message]:
        staging, packed = Staging(self.call, "key staging", self.problem.dtype), self.call.plan.packed
        return [
            (item.peer, self._packed(item, staging) if packed(item) else item.run_of(self._rows(item.phase)))
            for item in exchange.sends
            if not item.gradient
        ]

    def receives(self, exchange: Exchange) -> list[Message]:
        return [(item.peer, item.run_of(self._rows(item.phase))) for item in exchange.receives if not item.gradient]

    def _rows(self, phase: int) -> torch.Tensor:
        return self.call.phase_buffer("keys", phase, self.problem.dtype)

    def _packed(self, item: Item, staging: Staging) -> torch.Tensor:
        out = staging.take(item.rows)
        for source, target in zip(self.of(item.phase), _halves(out, self.problem), strict=True):
            _gather(source, item, target)
        return out


class KeyGradients(Gradients):
    """Accumulated gradients of the keys and values of every phase, and their way home."""

    def __init__(self, keys: Keys) -> None:
        super().__init__(keys.problem, keys.of(0)[0].shape[2])
        self._keys, self._call = keys, keys.call

    def compute(self, step: Step, queries: Queries) -> None:
        self._call.kernel.backward(
            self._keys.problem,
            queries.q,
            *self._keys.of(step.phase),
            queries.output_grad,
            step.tiles,
            (queries.dq, *self._of(step.phase)),
            queries.dparams,
        )

    def _of(self, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The accumulators of a phase, which begin as zeros when they are first asked for."""
        return self.own if phase == 0 else _halves(self._rows(phase).zero_(), self._keys.problem)

    def sends(self, exchange: Exchange) -> list[Message]:
        staging, packed = Staging(self._call, "gradient staging", self._call.grad_dtype), self._call.plan.packed
        return [
            (item.peer, self._packed(item, staging) if packed(item) else item.run_of(self._rows(item.phase)))
            for item in exchange.sends
            if item.gradient
        ]

    def receives(self, exchange: Exchange) -> list[Message]:
        return [(item.peer, rows) for item, rows in self._arrivals(exchange)]

    def add_arrived(self, exchange: Exchange) -> None:
        for item, rows in self._arrivals(exchange):
            for total, part in zip(self.own, _halves(rows, self._keys.problem), strict=True):
                at = 0
                for start, stop in item.spans.tolist():
                    total[:, :, start:stop].add_(part[:, :, at : at + stop - start])
                    at += stop - start

    def _arrivals(self, exchange: Exchange) -> list[tuple[Item, torch.Tensor]]:
        staging = Staging(self._call, "gradient arrivals", self._call.grad_dtype)
        return [(item, staging.take(item.rows)) for item in exchange.receives if item.gradient]

    def _packed(self, item: Item, staging: Staging) -> torch.Tensor:
        out = staging.take(item.rows)
        _gather(self._rows(item.phase).movedim(0, 2), item, out.movedim(0, 2))
        return out

    def _rows(self, phase: int) -> torch.Tensor:
        return self._call.phase_buffer("gradients", phase, self._keys.problem.accumulator)


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
