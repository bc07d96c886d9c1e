"""The chunked kernel: mechanisms whose keys can be summed up, in time that grows with n log n and not with n squared.

Bands are lowered to full rectangles and small squares on the diagonal. A rectangle of m queries and n keys is one
summary of its keys, which its queries attend to: n + m times a summary's size, not n times m. The squares are tiles.
"""

from __future__ import annotations

import dataclasses

import torch

from ringattn.kernels.base import Kernel
from ringattn.kernels.lowering import CAUSAL, FULL, TileGroup, lowered
from ringattn.mechanisms.base import Block, InputGrads, OutputGrad, Params, Problem, State, Summarising
from ringattn.plans.tiles import Tiles

LIMITS = 128, 4096
"""Rows of a square on a diagonal, about where as many pairs cost what two summaries of D = 64 do, and of one launch, so
that what it holds in the accumulator's dtype stays small."""


@dataclasses.dataclass(frozen=True)
class Chunked(Kernel):
    """Summaries for what is full, tiles for what is not."""

    def supports(self, problem: Problem) -> bool:
        return isinstance(problem.mechanism, Summarising)

    def refusal(self, problem: Problem) -> str | None:
        if not self.supports(problem):
            return f"chunked computes mechanisms whose keys can be summed up; got {problem.mechanism}"
        if problem.allows is not None:
            return "chunked knows bands of pairs; the mask holds a predicate"
        return None

    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        mechanism, dtype = _summarising(problem), problem.accumulator
        state = mechanism.empty(problem, q.shape[2]) if state is None else state
        for launch in tiles.memo(lowered, *LIMITS, problem.batch):
            queries, keys = launch.queries, launch.keys
            inputs = queries(q).to(dtype), keys(k).to(dtype), keys(v).to(dtype)
            if launch.group.kind == FULL:
                part = mechanism.attend(problem, inputs[0], mechanism.summarise(problem, *inputs[1:]))
            else:
                part = mechanism.tile(problem, _square(launch.group, q.device), *inputs)
            mechanism.merge(tuple(queries(x) for x in state), part)
        return state

    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dparams: Params,
    ) -> None:
        mechanism, dtype = _summarising(problem), problem.accumulator
        if not problem.wants("q", "k", "v", *problem.params):
            return
        for launch in tiles.memo(lowered, *LIMITS, problem.batch):
            queries, keys = launch.queries, launch.keys
            inputs = queries(q).to(dtype), keys(k).to(dtype), keys(v).to(dtype)
            output = output_grad.select(queries, dtype)
            if launch.group.kind == FULL:
                summary = mechanism.summarise(problem, *inputs[1:])
                dq, dsummary = mechanism.attend_grad(problem, inputs[0], summary, output)
                parts: InputGrads = dq, None, None
                if dsummary is not None:
                    parts = dq, *mechanism.summarise_grad(problem, *inputs[1:], dsummary)
            else:
                block = _square(launch.group, q.device)
                parts = mechanism.tile_grad(problem, block, *inputs, output, dparams)
            for total, rows, part in zip(gradients, (queries, keys, keys), problem.wanted(*parts), strict=True):
                if part is not None:
                    rows(total).add_(part)


def _summarising(problem: Problem) -> Summarising:
    assert isinstance(problem.mechanism, Summarising)
    return problem.mechanism


def _square(group: TileGroup, device: torch.device) -> Block:
    """The pairs of a square on the diagonal. What can be summed up knows no positions, so rows stand for them."""
    rows, keys = slice(0, group.m, 1), slice(0, group.n, 1)
    allowed = torch.ones(group.m, group.n, dtype=torch.bool, device=device)
    return Block(rows, rows, keys, allowed.tril_() if group.kind == CAUSAL else allowed.triu_())
