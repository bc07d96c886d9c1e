"""Hard attention: a query takes the values of the keys it scores highest, of one (Xu et al., arXiv 1502.03044, section
4) or of a few (top-k attention; Gupta et al., arXiv 2106.06899, section 2).

The state is the best so far, in order: ``(scores [B, Hq, M, top], positions [B, Hq, M, top], values [B, Hq, M, top,
Dv])``. The larger score wins, and of equal scores the key that comes first. Choosing is not differentiable. The weights
of those chosen are the softmax of their scores, W, and have a gradient as in softmax over these keys alone, dS =
W o (dO V^T - rowsum(dO o O)); of a single key it is 0, and the gradient of the output goes to its value alone. The
largest score is a result of its own, whose gradient goes to the query and the key that have it.

Which of two near scores is larger must not depend on how the sequence is cut, and a matrix product's last bits do:
they change with the shape of the block. So a product in float64 only finds the candidates, the keys within its
rounding error of the best, and their scores are then summed term by term, in the order of the dims. How many
candidates there are is known to the device alone: each block waits for it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from ringattn.checking import finite, integer
from ringattn.mechanisms.base import InputGrads, Mechanism, OutputGrad, Params, Problem, State
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.choices import AT_ONCE, NOWHERE, chosen, taken
from ringattn.mechanisms.lse import without_infinity


@dataclasses.dataclass(frozen=True, eq=False)
class Hard(Mechanism):
    """The value of the key with the largest ``scale q k^T``; of equal ones the first. Or of the `top` such keys.

    The extras are the ``position`` of the first (2^63 - 1 where no key may be reached) and its ``score`` (-inf there),
    which is differentiable: a maximum over the sequence.

    Attributes:
        scale: of the scores; None for 1 / sqrt(D). Of a single key's value only its sign matters.
        top: how many keys, weighted by the softmax of their scores. Where there are fewer, all; so many are kept of
            every query, with their values.
    """

    scale: float | None = None
    top: int = 1
    extras: ClassVar[tuple[str, ...]] = ("position", "score")
    kept: ClassVar[tuple[str, ...]] = ("positions", "lse")
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", finite(self.scale, "Hard's scale"))
        object.__setattr__(self, "top", integer(self.top, "Hard's top", least=1, needed="a number of keys"))

    def scale_for(self, problem: Problem) -> float:
        """The factor of the scores."""
        return 1 / math.sqrt(problem.dim) if self.scale is None else self.scale

    def empty(self, problem: Problem, length: int) -> State:
        scores = problem.rows(problem.heads, length, self.top).to(torch.float64)
        positions = torch.full_like(scores, NOWHERE, dtype=torch.int64)
        values = problem.rows(problem.heads, length, self.top * problem.value_dim).unflatten(-1, (self.top, -1))
        return scores.fill_(-math.inf), positions, values

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        q = q.unflatten(1, (problem.kv_heads, -1)).double() * self.scale_for(problem)
        exact = _exact(q, k.double(), block.allowed, min(self.top, k.shape[2]))
        if k.shape[2] < self.top:
            exact = torch.nn.functional.pad(exact, (0, self.top - k.shape[2]), value=-math.inf)
        scores, columns = _first(exact, self.top)
        positions, values = taken(block, v, scores, columns.clamp(max=k.shape[2] - 1))
        return scores.flatten(1, 2), positions.flatten(1, 2), values.flatten(1, 2)

    def merge(self, into: State, part: State) -> None:
        scores, positions, values = (torch.cat((a, b.to(a.dtype)), dim=3) for a, b in zip(into, part, strict=True))
        positions, order = positions.sort(dim=-1, stable=True)
        scores, columns = _first(scores.gather(-1, order), self.top)
        order = order.gather(-1, columns)
        kept = values.gather(3, order.unsqueeze(-1).expand(*order.shape, values.shape[-1]))
        for total, x in zip(into, (scores, positions.gather(-1, columns), kept), strict=True):
            total.copy_(x)

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        scores, positions, values = state
        best = scores[..., :1]
        weights = torch.where(scores == best, 1.0, torch.exp(scores - best)) * (positions != NOWHERE)
        total = weights.sum(dim=-1, keepdim=True)
        out = (values * (weights / total.clamp(min=1)).unsqueeze(-1)).sum(dim=-2)
        lse = best.squeeze(-1) + torch.log(total.squeeze(-1))
        return out.to(problem.dtype), (positions[..., 0].clone(), best.squeeze(-1).clone(), positions, lse)

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        pairs: torch.Tensor = chosen(block, saved[3]).unflatten(1, (problem.kv_heads, -1))
        if self.top == 1:
            return pairs.to(problem.accumulator)
        q = q.unflatten(1, (problem.kv_heads, -1)).double() * self.scale_for(problem)
        lse = without_infinity(saved[4]).unflatten(1, (problem.kv_heads, -1))
        scores = q @ k.double().unsqueeze(2).mT
        weights = torch.exp(scores - lse.unsqueeze(-1))
        return torch.where(pairs, weights, 0.0).to(problem.accumulator)

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
        dq, dk, dv, groups = None, None, None, (problem.kv_heads, -1)
        dscore, both = output_grad.grad_extras[1], problem.wants("q", "k")
        if not (problem.wants("v") or (both and (self.top > 1 or dscore is not None))):
            return None, None, None
        # a product with ones and zeros adds in a fixed order, where scattering would not on every device
        weights = self.weights(problem, block, q, k, output_grad.saved)
        dout = output_grad.dout.unflatten(1, groups)
        if problem.wants("v"):
            dv = (weights.mT @ dout).sum(dim=2)
        if both and (self.top > 1 or dscore is not None):
            dscores = torch.zeros_like(weights)
            if self.top > 1:
                delta = (output_grad.dout * output_grad.saved[0]).sum(dim=-1).unflatten(1, groups)
                dscores += weights * (dout @ v.unsqueeze(2).mT - delta.unsqueeze(-1))
            if dscore is not None:
                first = chosen(block, output_grad.saved[1].unsqueeze(-1)) * dscore.unsqueeze(-1)
                dscores += first.unflatten(1, groups).to(dscores.dtype)
            dscores *= self.scale_for(problem)
            dq = (dscores @ k.unsqueeze(2)).flatten(1, 2)
            dk = (dscores.mT @ q.unflatten(1, groups)).sum(dim=2)
        return dq, dk, dv


def _first(scores: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest scores of the last dim and where they are, of equal ones the first."""
    if top == 1:
        return scores.amax(dim=-1, keepdim=True), scores.argmax(dim=-1, keepdim=True)
    found, at = scores.sort(dim=-1, descending=True, stable=True)
    return found[..., :top], at[..., :top]


def _exact(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor | None, top: int) -> torch.Tensor:
    """The scores ``[B, Hkv, G, M, N]`` of every row's candidates, to the bit the same in any block; else -inf.

    Args:
        q, k: ``[B, Hkv, G, M, D]`` and ``[B, Hkv, N, D]`` in float64.
    """
    scores = q @ k.unsqueeze(2).transpose(-1, -2)
    if allowed is not None:
        scores.masked_fill_(~allowed, -math.inf)
    # |error of a dot product| <= D eps |q| |k|, of both scores compared; twice that to be sure
    lengths = q.norm(dim=-1) * k.norm(dim=-1).amax(dim=-1)[:, :, None, None]
    margin = 4 * q.shape[-1] * torch.finfo(torch.float64).eps * lengths
    least = scores.amax(dim=-1) if top == 1 else scores.topk(top, dim=-1).values[..., -1]
    # written so that a NaN is a candidate, and where margins are NaN every key is
    near = ~(scores < (least - margin).unsqueeze(-1)) & (scores != -math.inf)
    out = torch.full_like(scores, -math.inf)
    for b, g, h, i, j in (x.unbind(1) for x in near.nonzero().split(AT_ONCE)):
        products = q[b, g, h, i] * k[b, g, j]
        total = products[:, 0]
        for d in range(1, products.shape[1]):
            total = total + products[:, d]
        out[b, g, h, i, j] = total
    return out
