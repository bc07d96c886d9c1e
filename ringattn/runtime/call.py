"""A call: everything about an attention call that is known before its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ringattn.handles import number_of
from ringattn.kernels.base import Kernel
from ringattn.mechanisms.base import Problem
from ringattn.plans.steps import Plan
from ringattn.runtime import agreement
from ringattn.transports.base import Transport


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What is kept from call to call, as long as nothing but the tensors' content changes.

    Attributes:
        fields: what the ranks must agree on, for `agreement`.
        wanted: which of q, k, v and the params need gradients.
        spelling: the mechanism as compiled code holds it.
        handle: by which the ops find the call.
    """

    plan: Plan
    problem: Problem
    kernel: Kernel
    transport: Transport
    fields: Mapping[str, str]
    wanted: tuple[bool, ...]
    spelling: tuple[list[float], str]
    handle: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", number_of(self))

    def begun(self, name: str, params: Sequence[torch.Tensor], seed: int) -> Problem:
        """The problem of one pass, after comparing the call with every other rank's, before any payload."""
        agreement.check(self.transport, {**self.fields, "call": name, "seed": str(seed)})
        return self.with_params(params, seed)

    def with_params(self, params: Sequence[torch.Tensor], seed: int) -> Problem:
        """The problem with this call's learned tensors and seed."""
        named = dict(zip(self.problem.mechanism.params, params, strict=True))
        return dataclasses.replace(self.problem, params=named, seed=seed)

    @property
    def grad_dtype(self) -> torch.dtype:
        """In which gradients of keys and values, or of summaries, travel."""
        return self.problem.dtype if self.plan.gradient_wire == "input" else self.problem.accumulator

    def buffer(self, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, B, Hkv, size]`` over the transport's buffer of this name, which is kept from call to call.

        A row is a key and its value, ``D + Dv`` numbers a head, or one summary.
        """
        problem = self.problem
        shape = (rows, problem.batch, problem.kv_heads, problem.cargo_size(self.plan.cargo))
        return self.transport.buffers.take(name, shape, dtype, problem.device)

    def phase_buffer(self, name: str, phase: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows of a phase in one of the two buffers that take turns."""
        return self.buffer(f"{name} {self.plan.slots[phase]}", self.plan.held_rows[phase], dtype)


class Staging:
    """Hands out the rows of one buffer, from its beginning, to the messages of one exchange."""

    def __init__(self, call: Call, name: str, dtype: torch.dtype) -> None:
        self._rows = call.buffer(name, call.plan.buffer_rows[name], dtype)
        self._at = 0

    def take(self, rows: int) -> torch.Tensor:
        """The next rows."""
        self._at += rows
        return self._rows[self._at - rows : self._at]
