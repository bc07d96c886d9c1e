"""Alpha-entmax: weights that sum to 1 and are exactly 0 for keys that score low.

Between softmax (alpha 1) and sparsemax (alpha 2; Martins and Astudillo, arXiv 1602.02068), with p = 1 / (alpha - 1)
(Peters, Niculae and Martins, arXiv 1905.05702, equation 10; alpha learned per head, Correia, Niculae and Martins,
arXiv 1909.00015, proposition 1):

    z_j = (alpha - 1) s_j        w_j = [(z_j - t)+]^p        sum_j w_j = 1

The threshold t of every query is found first, in passes over keys alone (`mechanisms.thresholds`). With it blocks are
independent, and the state is a sum: of w v, and for the backward pass of u v and u, where u_j = w_j^(2 - alpha) on the
support. With m = sum u v / sum u and D = dO . m,

    dS = u o (dO V^T - D)        dV = W^T dO

    dalpha = sum_ij (w_ij - (alpha - 1) w_ij ln w_ij) / (alpha - 1)^2 (dO V^T - D)_ij
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch

from ringattn.checking import finite, shown
from ringattn.errors import InputError
from ringattn.mechanisms.base import InputGrads, Mechanism, OutputGrad, Params, Problem, State
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.scores import LEARNED, WORDS, Scored
from ringattn.mechanisms.thresholds import (
    Cut,
    Power,
    blank,
    first_guess,
    gather,
    gathered,
    join,
    next_guess,
    nothing,
    sketch,
)

LEAST, MOST = 1.05, 2.0
"""Of alpha. Nearer to 1, weights are such high powers that their digits are lost; above 2, slopes are infinite."""
PRECISE = {torch.float32: 1e-9, torch.float64: 2.0**-43}
"""How far from 1 the sum of a query's weights may be, by the accumulator's dtype."""

_PIECE = 1 << 17
"""Scores that a pass over keys takes at once: a megabyte, which stays in a core's own cache."""


@dataclasses.dataclass(frozen=True, eq=False)
class Entmax(Scored):
    """``entmax(S) v`` over the allowed keys: weights that are exactly 0 for low scores; sparsemax is alpha 2.

    Attributes:
        alpha: from 1.05 to 2, or ``[Hq]`` of such numbers, learned: 1.5 is 1.5-entmax, 2 is sparsemax.
        scale, softcap: as in `Softmax`.
        alibi, relative, bias, additive: as in `Softmax`.
    """

    alpha: float | torch.Tensor = 1.5
    scale: float | None = dataclasses.field(default=None, kw_only=True)
    softcap: float | None = dataclasses.field(default=None, kw_only=True)
    alibi: torch.Tensor | None = dataclasses.field(default=None, kw_only=True)
    relative: torch.Tensor | None = dataclasses.field(default=None, kw_only=True)
    bias: torch.Tensor | None = dataclasses.field(default=None, kw_only=True)
    additive: torch.Tensor | None = dataclasses.field(default=None, kw_only=True)

    tensors: ClassVar[tuple[str, ...]] = ("alpha", *LEARNED)
    numbers: ClassVar[tuple[str, ...]] = ("alpha",)
    sharded: ClassVar[Mapping[str, int]] = {"bias": 1}
    kept: ClassVar[tuple[str, ...]] = ("threshold", "mean")
    words: ClassVar[Mapping[str, str]] = WORDS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.alpha, torch.Tensor):
            object.__setattr__(self, "alpha", finite(self.alpha, "Entmax's alpha"))
            if not LEAST <= self.alpha <= MOST:
                raise InputError(_out_of_range(self.alpha))

    def check(self, problem: Problem, queries: int, keys: int) -> None:
        super().check(problem, queries, keys)
        if isinstance(self.alpha, torch.Tensor) and tuple(self.alpha.shape) != (problem.heads,):
            raise InputError(
                f"alpha must be a number or have shape [{problem.heads}], one for each query head; got "
                f"{list(self.alpha.shape)}."
            )

    @property
    def preparation(self) -> Mechanism:
        return Threshold(self)

    def less_1(self, problem: Problem) -> Power:
        """Alpha less 1."""
        if isinstance(self.alpha, torch.Tensor):
            return problem.params["alpha"].double().unsqueeze(-1) - 1
        return self.alpha - 1

    def scaled(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """``z``, float64 ``[B, Hq, M, N]``."""
        return self._scaled(problem, self.scores(problem, block, q, k)[0])

    def _scaled(self, problem: Problem, scores: torch.Tensor) -> torch.Tensor:
        by = self.less_1(problem)
        z: torch.Tensor = scores.flatten(1, 2).double() * (by.unsqueeze(-1) if isinstance(by, torch.Tensor) else by)
        return z

    def empty(self, problem: Problem, length: int) -> State:
        out, slopes = (problem.rows(problem.heads, length, problem.value_dim) for _ in range(2))
        return out, slopes, problem.rows(problem.heads, length, 1).squeeze(-1)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        threshold = Cut(*problem.known).guess[:, :, block.queries]
        scores, _ = self.scores(problem, block, q, k)
        both = self._both(problem, scores, threshold)
        weights, slopes = (x.unflatten(1, (problem.kv_heads, -1)).to(v.dtype) for x in both)
        sums = ((x @ v.unsqueeze(2)).flatten(1, 2) for x in (weights, slopes))
        return *sums, slopes.sum(dim=-1).flatten(1, 2)

    def merge(self, into: State, part: State) -> None:
        for total, x in zip(into, part, strict=True):
            total += x

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        out, slopes, total = state
        # the slopes of a row that any key may reach sum to 1 or more
        mean = slopes / total.clamp(min=1).unsqueeze(-1)
        return out.to(problem.dtype), (Cut(*problem.known).guess, mean)

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
        tables, groups = self.wanted_tables(problem, dparams), (problem.kv_heads, -1)
        learned = "alpha" in problem.params and problem.wants("alpha")
        if not (tables or learned or problem.wants("q", "k", "v")):
            return None, None, None
        scores, slope = self.scores(problem, block, q, k)
        both = self._both(problem, scores, output_grad.saved[1])
        weights, slopes = (x.unflatten(1, groups).to(v.dtype) for x in both)
        dout, dq, dk = output_grad.dout.unflatten(1, groups), None, None
        dv = (weights.transpose(-1, -2) @ dout).sum(dim=2) if problem.wants("v") else None
        if tables or learned or problem.wants("q", "k"):
            dscores = dout @ v.unsqueeze(2).transpose(-1, -2)
            dscores -= _delta(output_grad).unflatten(1, groups).unsqueeze(-1)
            if learned:
                dparams["alpha"].add_(self._alpha_grad(problem, weights, dscores))
            dscores *= slopes
            dq, dk = self.score_grads(problem, block, q, k, slope, dscores, tables)
        return dq, dk, dv

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        scores, _ = self.scores(problem, block, q, k)
        found: torch.Tensor = self._both(problem, scores, saved[1])[0].unflatten(1, (problem.kv_heads, -1))
        return found.to(problem.accumulator)

    def _both(
        self, problem: Problem, scores: torch.Tensor, threshold: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights and their slopes, float64 ``[B, Hq, M, N]``."""
        above = self._scaled(problem, scores).sub_(threshold.unsqueeze(-1)).clamp_(min=0)
        p = 1 / self.less_1(problem)
        if isinstance(p, float) and p > 1:
            slopes = above ** (p - 1)
        else:  # 0 to the power of 0 is 1, and where nothing is above the threshold there is no slope
            slopes = torch.where(above > 0, above ** ((p.unsqueeze(-1) if isinstance(p, torch.Tensor) else p) - 1), 0.0)
        return slopes * above, slopes

    @staticmethod
    def _alpha_grad(problem: Problem, weights: torch.Tensor, dweights: torch.Tensor) -> torch.Tensor:
        """Of a block, ``[Hq]``, from weights and ``dO V^T - D``, ``[B, Hkv, Hq / Hkv, M, N]``."""
        by = (problem.params["alpha"].to(weights.dtype) - 1).unflatten(0, (problem.kv_heads, -1))[..., None, None]
        each = (weights + by * torch.special.entr(weights)) / by**2 * dweights
        total: torch.Tensor = each.sum(dim=(0, 3, 4)).flatten()
        return total


@dataclasses.dataclass(frozen=True, eq=False)
class Threshold(Mechanism):
    """The passes over keys that find the thresholds of entmax. What is known is a `Cut`."""

    of: Entmax
    sharded: ClassVar[Mapping[str, int]] = Entmax.sharded
    kept: ClassVar[tuple[str, ...]] = ("guess", "radius", "low", "high")

    def settled(self, known: State) -> bool:
        return not bool((Cut(*known).radius > 0).any())

    def empty(self, problem: Problem, length: int) -> State:
        shape = problem.batch, problem.heads, length
        return (nothing if problem.known else blank)(shape, problem.device)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        alpha = problem.params.get("alpha")
        if not problem.known and alpha is not None and not bool(((alpha >= LEAST) & (alpha <= MOST)).all()):
            raise InputError(_out_of_range(alpha.tolist()))
        z, p = self.of.scaled(problem, block, q, k), 1 / self.of.less_1(problem)
        rows = max(1, _PIECE // (z.shape[0] * z.shape[1] * z.shape[3]))
        pieces = z.split(rows, dim=2)
        if problem.known:
            known = zip(*(x[:, :, block.queries].split(rows, dim=2) for x in problem.known), strict=True)
            parts = [gathered(piece, Cut(*cut), p) for piece, cut in zip(pieces, known, strict=True)]
        else:
            parts = [sketch(piece) for piece in pieces]
        return tuple(torch.cat(x, dim=2) for x in zip(*parts, strict=True))

    def merge(self, into: State, part: State) -> None:
        (gather if len(into) == 2 else join)(into, part)

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        p = 1 / self.of.less_1(problem)
        if problem.known:
            cut = next_guess(state, Cut(*problem.known), p, PRECISE[problem.accumulator])
        else:
            cut = first_guess(state, p)
        return problem.rows(problem.heads, cut.guess.shape[2], 0).to(problem.dtype), cut.state

    def tile_grad(self, *_: object) -> InputGrads:
        """None: a threshold is no function that is differentiated, its gradient is in that of the weights."""
        return None, None, None


def _out_of_range(alpha: object) -> str:
    return f"Entmax's alpha must be from {LEAST} to {MOST} (1.5 is 1.5-entmax, 2 sparsemax); got {shown(alpha)}."


def _delta(output_grad: OutputGrad) -> torch.Tensor:
    """``dO . m``, ``[B, Hq, M]``."""
    return (output_grad.dout * output_grad.saved[2]).sum(dim=-1)
