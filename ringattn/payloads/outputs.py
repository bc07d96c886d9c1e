"""The output side of a backward pass, as it travels beside the queries to the keys.

Of each query the gradient of its output, the output, and the mechanism's extras and their gradients, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from ringattn.mechanisms.base import OutputGrad, Problem, State
from ringattn.payloads.columns import Columns


@dataclasses.dataclass(frozen=True, eq=False)
class OutputSide:
    """How it is laid out.

    Attributes:
        columns: of the gradient of the output, of the output, of each extra and what is kept, and of the gradient of
            each extra that has one.
        extras, kept: how many of them there are.
        dtype: the inputs', of whose numbers a row is a multiple.
    """

    columns: Columns
    extras: int
    kept: int
    dtype: torch.dtype

    @classmethod
    def of(cls, problem: Problem) -> OutputSide:
        """That of a problem's mechanism."""
        mechanism = problem.mechanism
        params = problem.params_like(problem.device)  # which decide on dtypes
        problem = dataclasses.replace(problem, params=params).unprepared(0)
        out, others = mechanism.finish(problem, mechanism.empty(problem, 0))
        extras = others[: len(mechanism.extras)]
        travel = out, out, *others, *(x for x in extras if x.is_floating_point())
        columns = Columns.of(travel, lead=3, multiple=problem.dtype.itemsize)
        return cls(columns, len(extras), len(others) - len(extras), problem.dtype)

    @property
    def size(self) -> int:
        """Numbers of the inputs' dtype of one head that travel beside a query."""
        return self.columns.size // self.dtype.itemsize

    def tensors(self, output_grad: OutputGrad) -> State:
        """What travels, ``[B, Hq, Sq, …]`` each; the gradient of an extra that nobody used is zeros."""
        out, *others = output_grad.saved
        grads = [
            x.new_zeros(x.shape) if grad is None else grad
            for x, grad in zip(others[: self.extras], output_grad.grad_extras, strict=True)
            if x.is_floating_point()
        ]
        return output_grad.dout, out, *others, *grads

    def output_grad(self, tensors: State, asked: Collection[int] | None = None) -> OutputGrad:
        """The same again.

        Args:
            asked: of which extras the gradients may be others than zeros, by their number; None if of all. Those of
                others are dropped, as kernels compute for them whatever they are.
        """
        dout, out, *numbers = tensors
        known = self.extras + self.kept
        others, grads = numbers[:known], iter(numbers[known:])
        every = [next(grads) if x.is_floating_point() else None for x in others[: self.extras]]
        grad_extras = tuple(x if asked is None or at in asked else None for at, x in enumerate(every))
        return OutputGrad((out, *others), dout, grad_extras)

    def packed(self, output_grad: OutputGrad) -> torch.Tensor:
        """``[B, Hq, Sq, size]`` numbers of the inputs' dtype."""
        tensors = self.tensors(output_grad)
        return self.columns.packed(tensors, tensors[0].shape[:3]).view(self.dtype)

    def unpacked(self, rows: torch.Tensor) -> OutputGrad:
        """The same of ``[B, Hq, rows, size]``."""
        return self.output_grad(self.columns.views(rows.contiguous().view(torch.uint8)))
