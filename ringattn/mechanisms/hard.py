"""Hard attention: a query takes the value of the one key it scores highest (Xu et al., arXiv 1502.03044, section 4).

The state is the winner so far, ``(score [B, Hq, M], position [B, Hq, M], value [B, Hq, M, Dv])``; the larger score
wins, and of equal scores the key that comes first. Choosing is not differentiable: queries and keys get no gradient,
and the gradient of the output goes to the winner's value.

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

from ringattn.mechanisms.base import Block, InputGrads, Mechanism, OutputGrad, Params, Problem, State, finite

_NOWHERE = torch.iinfo(torch.int64).max  # behind every key
_AT_ONCE = 1 << 16  # candidates scored at once


@dataclasses.dataclass(frozen=True, eq=False)
class Hard(Mechanism):
    """The value of the key with the largest ``scale q k^T``; of equal ones the first.

    Attributes:
        scale: of the scores; None for 1 / sqrt(D). Only its sign matters.
    """

    scale: float | None = None
    extras: ClassVar[tuple[str, ...]] = ("position",)
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", finite(self.scale, "Hard's scale"))

    def empty(self, problem: Problem, length: int) -> State:
        score = problem.rows(problem.heads, length, 1).squeeze(-1).to(torch.float64)
        position = torch.full_like(score, _NOWHERE, dtype=torch.int64)
        return score.fill_(-math.inf), position, problem.rows(problem.heads, length, problem.value_dim)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        scale = 1 / math.sqrt(problem.dim) if self.scale is None else self.scale
        q = q.unflatten(1, (problem.kv_heads, -1)).double() * scale
        scores = _exact(q, k.double(), block.allowed)
        best, column = scores.amax(dim=-1), scores.argmax(dim=-1)  # argmax takes the first of equals
        reached = best != -math.inf
        position = torch.where(reached, block.k_positions(q.device)[column], _NOWHERE)
        index = column.flatten(2).unsqueeze(-1).expand(-1, -1, -1, problem.value_dim)
        value = v.gather(2, index).unflatten(2, column.shape[2:]) * reached.unsqueeze(-1)
        value = value.masked_fill(best.isnan().unsqueeze(-1), math.nan)  # as softmax would have it
        return best.flatten(1, 2), position.flatten(1, 2), value.flatten(1, 2)

    def merge(self, into: State, part: State) -> None:
        (score, position, value), (part_score, part_position, part_value) = into, part
        wins = (part_score > score) | ((part_score == score) & (part_position < position)) | part_score.isnan()
        score.copy_(torch.where(wins, part_score, score))
        position.copy_(torch.where(wins, part_position, position))
        value.copy_(torch.where(wins.unsqueeze(-1), part_value.to(value.dtype), value))

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        _, position, value = state
        return value.to(problem.dtype), (position,)

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        won = saved[1].unsqueeze(-1) == block.k_positions(q.device)
        won = won if block.allowed is None else won & block.allowed
        weights: torch.Tensor = won.to(problem.accumulator).unflatten(1, (problem.kv_heads, -1))
        return weights

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
        won = output_grad.saved[1].unsqueeze(-1) == block.k_positions(q.device)
        if block.allowed is not None:
            won = won & block.allowed  # the winner's pair may lie in the rectangle of another tile, outside its band
        # a product with ones and zeros adds in a fixed order, where scattering would not on every device
        won, dout = (x.to(q.dtype).unflatten(1, (problem.kv_heads, -1)) for x in (won, output_grad.dout))
        dv = (won.transpose(-1, -2) @ dout).sum(dim=2)
        return None, None, dv


def _exact(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
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
    # written so that a NaN is a candidate, and where margins are NaN every key is
    near = ~(scores < (scores.amax(dim=-1) - margin).unsqueeze(-1)) & (scores != -math.inf)
    out = torch.full_like(scores, -math.inf)
    for b, g, h, i, j in (x.unbind(1) for x in near.nonzero().split(_AT_ONCE)):
        products = q[b, g, h, i] * k[b, g, j]
        total = products[:, 0]
        for d in range(1, products.shape[1]):
            total = total + products[:, d]
        out[b, g, h, i, j] = total
    return out
