"""Linear attention (Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236, equations 7 to 12).

With a feature map, phi(x) = elu(x) + 1 or another, in place of the exponential, the sums over keys factor:

    O_i = phi(q_i)^T S / phi(q_i)^T z        S = sum_j phi(k_j) v_j^T        z = sum_j phi(k_j)

so that ``(S, z)``, F (Dv + 1) numbers a head of F features, is all that keys and values have to say to a query that
may see all of them. That is their summary; summaries add up. The state of a query is its numerator and denominator.

Backward, from dO: dn = dO / d and dd = -(dO . O) / d arrive at numerator and denominator (d is the denominator), and
with the weights A_ij = phi(q_i) . phi(k_j), dA_ij = dn_i . v_j + dd_i, dv_j = sum_i A_ij dn_i, and dA reaches phi(q)
and phi(k) as scores do.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ringattn.checking import choice
from ringattn.mechanisms.base import InputGrads, OutputGrad, Params, Problem, State, Summarising
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.features import MAPS, FeatureMap


@dataclasses.dataclass(frozen=True, eq=False)
class Linear(Summarising):
    """``phi(q) phi(k)^T v``, normalised over the allowed keys.

    Attributes:
        features: phi. ``elu``: elu(x) + 1; ``taylor``: (1, x / |x|), by which a pair weighs one plus the cosine of its
            angle (arXiv 2007.14902); ``given``: q and k are features already, such that no pair weighs less than 0.
    """

    features: str = "elu"
    kept: ClassVar[tuple[str, ...]] = ("denominator",)
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choice(self.features, "features", tuple(MAPS))

    @property
    def _map(self) -> FeatureMap:
        return MAPS[self.features]

    def empty(self, problem: Problem, length: int) -> State:
        denominator = problem.rows(problem.heads, length, 1).squeeze(-1)
        return problem.rows(problem.heads, length, problem.value_dim), denominator

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        weights = self._weights(problem, block, q, k)
        return (weights @ v.unsqueeze(2)).flatten(1, 2), weights.sum(dim=-1).flatten(1, 2)

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        numerator, denominator = state
        return numerator.div_(_safe(denominator).unsqueeze(-1)).to(problem.dtype), (denominator,)

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
        groups = (problem.kv_heads, -1)
        dq = dk = dv = None
        dn, dd = (x.unflatten(1, groups) for x in _at_the_sums(output_grad))
        if problem.wants("v"):
            dv = (self._weights(problem, block, q, k).transpose(-1, -2) @ dn).sum(dim=2)
        if problem.wants("q", "k"):
            dweights = dn @ v.unsqueeze(2).transpose(-1, -2)
            dweights += dd.unsqueeze(-1)  # in place: of all that a launch makes, the pairs take most
            if block.allowed is not None:
                dweights *= block.allowed
            if problem.wants("q"):
                dq = self._map.back(q, (dweights @ self._map.of(k).unsqueeze(2)).flatten(1, 2))
            if problem.wants("k"):
                features = self._map.of(q).unflatten(1, groups)
                dk = self._map.back(k, (dweights.transpose(-1, -2) @ features).sum(dim=2))
        return dq, dk, dv

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        denominator = _safe(saved[1]).unflatten(1, (problem.kv_heads, -1)).unsqueeze(-1)
        shares: torch.Tensor = self._weights(problem, block, q, k) / denominator
        return shares

    def summary_size(self, dim: int, value_dim: int) -> int:
        return self._map.size(dim) * (value_dim + 1)

    def summarise(self, problem: Problem, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        matrix: torch.Tensor = self._map.of(k).transpose(-1, -2) @ _with_ones(v)
        return matrix.flatten(2)

    def attend(self, problem: Problem, q: torch.Tensor, summary: torch.Tensor) -> State:
        sums = self._map.of(q).unflatten(1, (problem.kv_heads, -1)) @ self._matrix(problem, summary)
        numerator, denominator = sums.flatten(1, 2).split([problem.value_dim, 1], dim=-1)
        return numerator, denominator.squeeze(-1)

    def attend_grad(
        self, problem: Problem, q: torch.Tensor, summary: torch.Tensor, output_grad: OutputGrad
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        groups = (problem.kv_heads, -1)
        dq = dsummary = None
        dn, dd = _at_the_sums(output_grad)
        dsums = torch.cat([dn, dd.unsqueeze(-1)], dim=-1).unflatten(1, groups)
        if problem.wants("q"):
            dq = self._map.back(q, (dsums @ self._matrix(problem, summary).transpose(-1, -2)).flatten(1, 2))
        if problem.wants("k", "v"):
            dsummary = (self._map.of(q).unflatten(1, groups).transpose(-1, -2) @ dsums).sum(dim=2).flatten(2)
        return dq, dsummary

    def summarise_grad(
        self, problem: Problem, k: torch.Tensor, v: torch.Tensor, dsummary: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        matrix = self._matrix(problem, dsummary).squeeze(2)
        dk = self._map.back(k, _with_ones(v) @ matrix.transpose(-1, -2)) if problem.wants("k") else None
        return dk, self._map.of(k) @ matrix[..., :-1] if problem.wants("v") else None

    def _matrix(self, problem: Problem, summary: torch.Tensor) -> torch.Tensor:
        """S and z side by side, ``[B, Hkv, 1, F, Dv + 1]``."""
        return summary.reshape(*summary.shape[:2], 1, self._map.size(problem.dim), problem.value_dim + 1)

    def _weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """``[B, Hkv, Hq / Hkv, M, N]``; 0 where a pair is not allowed."""
        grouped = self._map.of(q).unflatten(1, (problem.kv_heads, -1))
        weights: torch.Tensor = grouped @ self._map.of(k).unsqueeze(2).transpose(-1, -2)
        return weights if block.allowed is None else weights.mul_(block.allowed)


def _with_ones(v: torch.Tensor) -> torch.Tensor:
    """Values with a column of ones behind them, by which a sum over keys also sums their weights."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def _safe(denominator: torch.Tensor) -> torch.Tensor:
    """1 for a query that no key may reach, whose numerator is 0."""
    return torch.where(denominator == 0, 1, denominator)


def _at_the_sums(output_grad: OutputGrad) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of numerator ``[B, Hq, M, Dv]`` and denominator ``[B, Hq, M]``."""
    out, denominator = output_grad.saved
    dn = output_grad.dout / _safe(denominator).unsqueeze(-1)
    return dn, -(dn * out).sum(dim=-1)
