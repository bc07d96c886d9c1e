"""The chunked kernel: mechanisms whose keys can be summed up, in time that grows with n log n and not with n squared.

Bands are lowered to full rectangles and small squares on the diagonal. A rectangle of m queries and n keys is one
summary of its keys, which its queries attend to: n + m times a summary's size, not n times m. The squares are tiles.
"""

from __future__ import annotations

import dataclasses

import torch

from ringattn.kernels.base import Kernel
from ringattn.kernels.lowering import CAUSAL, FULL, Launch, TileGroup, lowered
from ringattn.mechanisms.base import InputGrads, OutputGrad, Params, Problem, State, Summarising
from ringattn.mechanisms.blocks import Block
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
        if not problem.wants("q", "k", "v", *problem.params):
            return
        for launch in tiles.memo(lowered, *LIMITS, problem.batch):
            _add_grad(problem, launch, (q, k, v), output_grad, gradients, dparams)


def _add_grad(
    problem: Problem,
    launch: Launch,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output_grad: OutputGrad,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dparams: Params,
) -> None:
    """Adds what one launch contributes, of which nothing is held when the next one begins."""
    mechanism, dtype, places = _summarising(problem), problem.accumulator, (launch.queries, launch.keys, launch.keys)
    q, k, v = (rows(x).to(dtype) for rows, x in zip(places, inputs, strict=True))
    output = output_grad.select(launch.queries, dtype)
    if launch.group.kind == FULL:
        dq, dsummary = mechanism.attend_grad(problem, q, mechanism.summarise(problem, k, v), output)
        parts: InputGrads = dq, None, None
        if dsummary is not None:
            parts = dq, *mechanism.summarise_grad(problem, k, v, dsummary)
    else:
        parts = mechanism.tile_grad(problem, _square(launch.group, q.device), q, k, v, output, dparams)
    for total, rows, part in zip(gradients, places, problem.wanted(*parts), strict=True):
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
