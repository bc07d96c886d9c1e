"""Softmax attention, blockwise and exact.

The state is normalised: the output over the keys seen so far and the log of the sum of their exponentials,
``out [B, Hq, M, Dv]`` and ``lse [B, Hq, M]``. Two blocks merge as (Online softmax, arXiv 1805.02867; in this form
FlashAttention-2, arXiv 2307.08691, section 3.1)

    out = out_a - sigmoid(lse_b - lse_a) (out_a - out_b)        lse = logaddexp(lse_a, lse_b)

which never exponentiates a positive number. A query that no key may reach keeps out 0 and lse -inf, and gives zero
gradients. With the final lse and output known, blocks of the backward pass are independent (FlashAttention-2,
section 3.2.2): P = exp(S - lse), dV = P^T dO, dS = P o (dO V^T - rowsum(dO o O) + dlse), dQ = scale dS K,
dK = scale dS^T Q.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ringattn.errors import InputError
from ringattn.mechanisms.base import Mechanism, Problem, State


@dataclasses.dataclass(frozen=True)
class Softmax(Mechanism):
    """``softmax(scale q k^T) v`` over the allowed keys.

    Attributes:
        scale: of the scores; None for 1 / sqrt(D).
    """

    scale: float | None = None
    extras = ("lse",)

    def __post_init__(self) -> None:
        if self.scale is not None and not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale)):
            raise InputError(f"Softmax's scale must be a finite number; got {self.scale!r}.")

    def scale_for(self, problem: Problem) -> float:
        """The factor of the scores."""
        return 1 / math.sqrt(problem.dim) if self.scale is None else self.scale

    def empty(self, problem: Problem, length: int) -> State:
        lse = problem.rows(problem.heads, length, 1).squeeze(-1)
        return problem.rows(problem.heads, length, problem.value_dim), lse.fill_(-math.inf)

    def tile(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None
    ) -> State:
        scores = self._scores(problem, q, k, allowed)
        lse = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - _finite(lse).unsqueeze(-1))
        return (weights @ v.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)

    def merge(self, into: State, part: State) -> None:
        (out, lse), (part_out, part_lse) = into, part
        # -inf - -inf, where neither side has a key, is nan: such a row keeps its zeros.
        weight = torch.sigmoid(torch.nan_to_num_(part_lse - lse, nan=-math.inf, posinf=math.inf, neginf=-math.inf))
        out.lerp_(part_out.to(out.dtype), weight.unsqueeze(-1))
        torch.logaddexp(lse, part_lse, out=lse)

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        out, lse = state
        return out.to(problem.dtype), (lse,)

    def tile_grad(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        saved: State,
        dout: torch.Tensor,
        dextras: tuple[torch.Tensor | None, ...],
        allowed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]:
        out, lse = saved
        scale, groups = self.scale_for(problem), (problem.kv_heads, -1)
        weights = torch.exp(self._scores(problem, q, k, allowed) - _finite(lse).unflatten(1, groups).unsqueeze(-1))
        delta = (dout * out).sum(dim=-1)
        if dextras[0] is not None:
            delta = delta - dextras[0]
        grouped = dout.unflatten(1, groups)
        dscores = grouped @ v.unsqueeze(2).transpose(-1, -2) - delta.unflatten(1, groups).unsqueeze(-1)
        dscores *= weights
        dq = (dscores @ k.unsqueeze(2)).flatten(1, 2) * scale
        dk = (dscores.transpose(-1, -2) @ q.unflatten(1, groups)).sum(dim=2) * scale
        dv = (weights.transpose(-1, -2) @ grouped).sum(dim=2)
        return dq, dk, dv, ()

    def _scores(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """``[B, Hkv, Hq / Hkv, M, N]``; -inf where a pair is not allowed."""
        grouped = q.unflatten(1, (problem.kv_heads, -1)) * self.scale_for(problem)
        scores = torch.matmul(grouped, k.unsqueeze(2).transpose(-1, -2))
        return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Lse with 0 for -inf: the scores it is taken from are all -inf, and exp(-inf - 0) is the 0 wanted."""
    return torch.where(lse == -math.inf, 0.0, lse)
