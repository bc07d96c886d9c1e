"""Some heads of a call: key heads that lie behind one another, and the query heads that read them."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from ringattn.mechanisms.base import OutputGrad, Params, Problem, State
from ringattn.payloads.base import Pair


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """One slice of a problem's heads. What it takes of tensors are views.

    Attributes:
        problem: that of these heads.
        queries, keys: which they are; None for all.
    """

    problem: Problem
    queries: slice | None = None
    keys: slice | None = None

    @classmethod
    def sliced(cls, problem: Problem, sizes: tuple[int, ...]) -> tuple[Heads, ...]:
        """All heads of a problem, so many key heads at a time."""
        if len(sizes) == 1:
            return (cls(problem),)
        edges, group = [*itertools.accumulate(sizes, initial=0)], problem.heads // problem.kv_heads
        return tuple(
            cls._of(problem, slice(start * group, stop * group), slice(start, stop))
            for start, stop in itertools.pairwise(edges)
        )

    @classmethod
    def _of(cls, problem: Problem, queries: slice, keys: slice) -> Heads:
        some = cls(problem, queries, keys)
        of_these = dataclasses.replace(
            problem,
            heads=queries.stop - queries.start,
            kv_heads=keys.stop - keys.start,
            first_head=problem.first_head + queries.start,
            params=some.of_params(problem.params),
            known=some.of_state(problem.known),
        )
        return cls(of_these, queries, keys)

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[B, Hq, …]``."""
        return x if self.queries is None else x[:, self.queries]

    def of_keys(self, *pair: torch.Tensor) -> Pair:
        """Of keys and values, ``[B, Hkv, …]``."""
        k, v = pair if self.keys is None else (x[:, self.keys] for x in pair)
        return k, v

    def of_state(self, state: State) -> State:
        """Of what there is of each query."""
        return tuple(map(self.of_queries, state))

    def of_params(self, params: Params) -> Params:
        """Of learned tensors, or their gradients."""
        at = self.queries
        if at is None:
            return params
        mechanism, count = self.problem.mechanism, at.stop - at.start
        return {name: mechanism.of_heads(name, x, at.start, count) for name, x in params.items()}

    def of_output(self, output_grad: OutputGrad) -> OutputGrad:
        """Of the output side of a backward pass."""
        if self.queries is None:
            return output_grad
        extras = tuple(None if x is None else self.of_queries(x) for x in output_grad.grad_extras)
        return OutputGrad(self.of_state(output_grad.saved), self.of_queries(output_grad.dout), extras)
