"""The plain sum of the values of the allowed keys: what `ringattn.cumsum` is made of. Queries and keys have no say.

A summary is the sum of some values, Dv numbers a head; the state of a query is the sum so far.
"""

from __future__ import annotations

import dataclasses

import torch

from ringattn.mechanisms.base import InputGrads, OutputGrad, Params, Problem, State, Summarising
from ringattn.mechanisms.blocks import Block


@dataclasses.dataclass(frozen=True, eq=False)
class Total(Summarising):
    """``sum_j v_j`` over the keys j that a query may see."""

    def empty(self, problem: Problem, length: int) -> State:
        return (problem.rows(problem.heads, length, problem.value_dim),)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        if block.allowed is None:
            return self.attend(problem, q, self.summarise(problem, k, v))
        return (_of_query_heads(problem, block.allowed.to(v.dtype) @ v),)

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        return state[0].to(problem.dtype), ()

    def tile_grad(
        self,
        problem: Problem,
        block: Block,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        dparams: Params,
    ) -> InputGrads:
        if not problem.wants("v"):
            return None, None, None
        dsum = _of_key_heads(problem, output_grad.dout)
        if block.allowed is None:
            return None, None, dsum.sum(dim=2, keepdim=True).expand_as(v)
        return None, None, block.allowed.to(v.dtype).T @ dsum

    def summary_size(self, dim: int, value_dim: int) -> int:
        return value_dim

    def summarise(self, problem: Problem, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v.sum(dim=2)

    def attend(self, problem: Problem, q: torch.Tensor, summary: torch.Tensor) -> State:
        return (_of_query_heads(problem, summary.unsqueeze(2).expand(-1, -1, q.shape[2], -1)),)

    def attend_grad(
        self, problem: Problem, q: torch.Tensor, summary: torch.Tensor, output_grad: OutputGrad
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return None, _of_key_heads(problem, output_grad.dout).sum(dim=2) if problem.wants("v") else None

    def summarise_grad(
        self, problem: Problem, k: torch.Tensor, v: torch.Tensor, dsummary: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return None, dsummary.unsqueeze(2).expand_as(v) if problem.wants("v") else None


def _of_query_heads(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, M, Dv]`` as ``[B, Hq, M, Dv]``."""
    return x.repeat_interleave(problem.heads // problem.kv_heads, dim=1)


def _of_key_heads(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """The sums ``[B, Hkv, M, Dv]`` of what comes from the query heads, ``[B, Hq, M, Dv]``."""
    total: torch.Tensor = x.unflatten(1, (problem.kv_heads, -1)).sum(dim=2)
    return total
